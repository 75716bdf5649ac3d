"""The model that a command's options or a run folder name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from dither.cli.public import ARCHITECTURE, PUBLIC, add_facts, checkpoint_facts, read_facts, trained_parameters_facts
from dither.cli.reading import read_run_options
from dither.cli.results import load
from dither.cli.run_folder import Images, RunFolder
from dither.diffusion.checkpoints import architecture, load_dit
from dither.diffusion.dit import DiT
from dither.diffusion.finetuning import adapt, choose_parameters, merge
from dither.diffusion.over_mixture import OverMixture
from dither.diffusion.recipe import build_model, build_process
from dither.errors import ConfigurationError, DitherError

if TYPE_CHECKING:
    from dither.cli.options import Options


def start_model(options: Options, folder: RunFolder) -> nn.Module:
    """Build the model that a new run begins with; what is public of it is written into the folder.

    Raises:
        ConfigurationError: sizes that do not go together, or a model of the user's that does not do what it should;
            --finetune.from is a run of another --recipe.prediction.
        CheckpointError: --finetune.from cannot be read.
    """
    source, mode = options.finetune_from, options.finetune.mode
    model = _build(options, folder.images) if source is None else _from_checkpoint(source, options, folder)
    choose_parameters(model, options.finetune)
    model = _over_mixture(model, options)
    if source is not None or mode != "full" or options.pretrain.path is not None:
        add_facts(folder, PUBLIC, {"fine_tuning": trained_parameters_facts(model, mode)})
    return model


def run_model(folder: RunFolder, options: Options | None = None) -> nn.Module:
    """Build the model of a run, without its weights.

    Args:
        folder: the run.
        options: of its config.yaml; read from there if None.

    Raises:
        RunFolderError: config.yaml or model.json is missing or damaged.
        ConfigurationError: a class of the user's is not what it was.
    """
    options = options or read_run_options(folder.config)
    settings = read_facts(folder, ARCHITECTURE)
    model = DiT(**settings) if settings else _build(options, folder.images)
    choose_parameters(model, options.finetune)
    return _over_mixture(model, options)


def run_dit(folder: RunFolder, weights: str) -> DiT:
    """The DiT of a finished run with its "ema" or "model" weights; low-rank updates are added to their matrices.

    Raises:
        RunFolderError: the run is not complete, or damaged.
        ConfigurationError: the run's model is no DiT.
    """
    model = run_model(folder)
    if isinstance(model, OverMixture):
        raise ConfigurationError(
            f"the model of {folder.path} corrects a mixture, which no DiT holds", fix="--warm_up.kind gaussians"
        )
    if not isinstance(model, DiT):
        raise ConfigurationError(
            f"the model of {folder.path} is a {type(model).__name__}, not a DiT", fix="--model dit"
        )
    load(model, folder.load_weights(weights))
    merge(model)
    return model


def _from_checkpoint(source: Path, options: Options, folder: RunFolder) -> DiT:
    """The DiT of a checkpoint, fitted to the run's images."""
    if options.model != "dit":
        raise ConfigurationError("--finetune.from loads a DiT, and --model is another", fix="leave --model out")
    public = _of_run(source, options) if (source / "run.json").is_file() else load_dit(source)
    images = folder.images
    model = adapt(
        public, images.input_size, images.in_channels, images.num_classes, hides_labels=options.recipe.label_dropout > 0
    )
    add_facts(folder, ARCHITECTURE, architecture(model))
    add_facts(folder, PUBLIC, {"checkpoint": checkpoint_facts(source)})
    return model


def _of_run(source: Path, options: Options) -> DiT:
    """The DiT of another run, which predicts what this one trains it to."""
    folder = RunFolder.open(source)
    theirs, ours = read_run_options(folder.config).recipe.prediction, options.recipe.prediction
    if theirs != ours:
        raise ConfigurationError(
            f"the model of {source} predicts {theirs}, and --recipe.prediction is {ours}",
            fix=f"--recipe.prediction {theirs}",
        )
    return run_dit(folder, "ema")


def _build(options: Options, images: Images) -> nn.Module:
    sizes = images.input_size, images.in_channels, images.num_classes
    if options.model == "dit":
        return build_model(options.recipe, *sizes)
    if options.model == "diffusers_unet":
        from dither.diffusion.unet import DiffusersUNet

        return DiffusersUNet(options.unet, *sizes, hides_labels=options.recipe.label_dropout > 0)
    from dither.diffusion.labelled import LabelledModel

    recipe = options.recipe
    return LabelledModel(
        _users_model(options.model),
        *sizes,
        hides_labels=recipe.label_dropout > 0,
        fractions=recipe.sampler == "euler",
    )


def _over_mixture(model: nn.Module, options: Options) -> nn.Module:
    """The model over a mixture that is still empty, where the options ask for one."""
    chosen = options.warm_up
    if chosen.kind != "mixtures":
        return model
    return OverMixture(model, build_process(options.recipe), chosen.components, chosen.rank)


def _users_model(choice: Namespace) -> nn.Module:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    try:
        made: Any = parser.instantiate(Namespace(model=choice)).model
    except DitherError:
        raise
    except Exception as error:  # the user's constructor may raise anything
        raise ConfigurationError(
            f"{choice.class_path} cannot be built: {type(error).__name__}: {error}", fix="see its init_args in --model"
        ) from error
    assert isinstance(made, nn.Module)
    return made
