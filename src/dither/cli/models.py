"""The model that a command's options or a run folder name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from dither.cli.run_folder import Images, RunFolder
from dither.errors import ConfigurationError, DitherError

if TYPE_CHECKING:
    from dither.cli.options import Options

ModelChoice = Literal["dit", "diffusers_unet"] | nn.Module
"""What --model may be: a name, or a class path with its arguments, which is not instantiated while options are read."""


def find_users_modules() -> None:
    """Have class paths found beside the place where the command runs, as `python -m` does."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def build(options: Options, images: Images) -> nn.Module:
    """Build the model of the options, freshly initialised.

    Raises:
        ConfigurationError: sizes that do not go together, or a model of the user's that does not do what it should.
    """
    from dither.diffusion.recipe import build_model

    sizes = images.input_size, images.in_channels, images.num_classes
    if options.model == "dit":
        return build_model(options.recipe, *sizes)
    if options.model == "diffusers_unet":
        from dither.diffusion.unet import DiffusersUNet

        return DiffusersUNet(options.unet, *sizes)
    from dither.diffusion.labelled import LabelledModel

    return LabelledModel(_users_model(options.model), *sizes, hides_labels=options.recipe.label_dropout > 0)


def run_model(folder: RunFolder, options: Options | None = None) -> nn.Module:
    """Build the model of a run, without its weights.

    Args:
        folder: the run.
        options: of its config.yaml; read from there if None.

    Raises:
        RunFolderError: config.yaml is missing or damaged.
        ConfigurationError: a class of the user's is not what it was.
    """
    from dither.cli.reading import read_run_options

    return build(options or read_run_options(folder.config), folder.images)


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
