"""From words and files to the options of `dither train`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from dither.cli.model_choice import find_users_modules
from dither.cli.options import SHORT, Options, Privacy, train_parser
from dither.cli.parsing import parse
from dither.cli.run_folder import RunFolder
from dither.diffusion.recipe import Recipe
from dither.diffusion.schedulers import check_sampler
from dither.errors import ConfigurationError, DitherError, RunFolderError

RESUMABLE = ("resume", "save_every", "performance.", "telemetry.")
"""What may be given together with --resume: nothing that the ledger knows."""


def read_options(words: Sequence[str]) -> Options:
    """Parse the words after `dither train`.

    Raises:
        ConfigurationError: an unknown option, a value of the wrong type, or options that exclude each other.
        RunFolderError: --resume names a run whose config.yaml is missing or damaged.
    """
    words = [expand(word) for word in words]
    find_users_modules()
    parser = train_parser()
    given = parse(parser, words, defaults=False)
    if given.get("resume") is None:
        return _options(parser, parse(parser, words), given)
    return _resumed_options(parser, words, given)


def read_run_options(config: Path) -> Options:
    """The options in a run's config.yaml.

    Raises:
        RunFolderError: missing or damaged.
    """
    find_users_modules()
    parser = train_parser()
    parsed = _parse_run_config(parser, config, [])
    return _options(parser, parsed, Namespace())


def with_settings(options: Options, changes: Mapping[str, Mapping[str, Any]]) -> Options:
    """The options with other settings, in the text for config.yaml too.

    Args:
        options: as they were read.
        changes: by group ("recipe", "privacy", "unet", "warm_up"), values by name; of no group (""), the model.

    Raises:
        ConfigurationError: settings that do not go together.
    """
    content = yaml.safe_load(options.text)
    for group, values in changes.items():
        if not group:
            content |= values
            options = replace(options, **values)
            continue
        content[group] |= values
        options = replace(options, **{group: replace(getattr(options, group), **values)})
    text = yaml.safe_dump(content, sort_keys=False)
    changed = replace(options, recipe=_planned(options.recipe, options.privacy), text=text)
    _check(changed)
    return changed


def _planned(recipe: Recipe, privacy: Privacy) -> Recipe:
    """The recipe with the steps, batch and bound of the privacy options, which are the ones that count."""
    shared = ("steps", "expected_batch_size", "max_grad_norm")
    return replace(recipe, **{name: getattr(privacy, name) for name in shared})


def expand(word: str) -> str:
    """Spell a short option out: --epsilon=3 becomes --privacy.epsilon=3."""
    name, equals, value = word.partition("=")
    return SHORT.get(name, name) + equals + value


def _resumed_options(parser: ArgumentParser, words: Sequence[str], given: Namespace) -> Options:
    refused = [key for key in given.keys(branches=False) if not key.startswith(RESUMABLE)]
    if refused:
        raise ConfigurationError(
            f"--{refused[0]} cannot change when a run is resumed",
            fix="leave it out; only --performance.*, --telemetry.* and --save_every may differ",
        )
    folder = RunFolder.open(given.resume)
    return _options(parser, _parse_run_config(parser, folder.config, words), given)


def _parse_run_config(parser: ArgumentParser, config: Path, words: Sequence[str]) -> Namespace:
    if not config.is_file():
        raise RunFolderError(f"{config} is missing", fix="give a complete run folder of `dither train`")
    try:
        parse(parser, ["--config", str(config)])
    except (DitherError, ValueError, TypeError) as error:
        why = error.what.removeprefix(f"{config}: ") if isinstance(error, DitherError) else error
        raise RunFolderError(f"{config} is damaged: {why}", fix="restore it from a copy, or train again") from None
    return parse(parser, ["--config", str(config), *words])


def _options(parser: ArgumentParser, parsed: Namespace, given: Namespace) -> Options:
    parsed.pop("config", None)
    for read in (parsed.data, parsed.pretrain):
        if read.path is not None and Path(read.path).exists():
            read.path = str(Path(read.path).resolve())  # a resume may run elsewhere
    if parsed.privacy.noise_multiplier is not None:
        if given.get("privacy.epsilon") is not None:
            raise ConfigurationError(
                "both epsilon and noise_multiplier are given", fix="give one; the other follows from it"
            )
        parsed.privacy.epsilon = None
    kept = parsed.clone()
    kept.output = kept.resume = None
    model, source = parsed.pop("model"), parsed.pop("finetune.from")  # built later, after the seed
    made = parser.instantiate(parsed)
    options = Options(
        data=made.data,
        privacy=made.privacy,
        performance=made.performance,
        recipe=_planned(made.recipe, made.privacy),
        warm_up=made.warm_up,
        telemetry=made.telemetry,
        model=model,
        unet=made.unet,
        finetune_from=source,
        finetune=made.finetune,
        pretrain=made.pretrain,
        output=made.output,
        resume=made.resume,
        seed=made.seed,
        save_every=made.save_every,
        text=parser.dump(kept, skip_unset=False),
        given=frozenset(given.keys(branches=False)),
    )
    _check(options)
    return options


def _check(options: Options) -> None:
    """Refuse now what would otherwise fail when the model is built, or only after the training."""
    recipe = options.recipe
    _check_mixtures(options)
    if recipe.guidance != 1 and recipe.label_dropout == 0:
        raise ConfigurationError(
            f"--recipe.guidance {recipe.guidance} needs a model that also learns without labels",
            fix="--recipe.label_dropout 0.1, or guidance 1",
        )
    if options.telemetry.samples < 0:
        raise ConfigurationError(f"--telemetry.samples {options.telemetry.samples} is below 0", fix="0 draws none")
    check_sampler(recipe.sampler, recipe.prediction)
    if not 1 <= recipe.sampler_steps <= recipe.timesteps:
        raise ConfigurationError(
            f"--recipe.sampler_steps {recipe.sampler_steps} is outside 1..{recipe.timesteps}", fix="choose 20 to 250"
        )
    positive = {
        "recipe": ("hidden_size", "depth", "num_heads", "patch_size", "multiplicity", "learning_rate", "timesteps"),
        "privacy": ("steps", "expected_batch_size"),
        "performance": ("threads", "memory_budget"),
        "warm_up": ("clip_norm", "components", "rank", "steps", "learning_rate"),
        "pretrain": ("steps", "learning_rate", "batch_size"),
    }
    given = {
        f"{group}.{name}": getattr(getattr(options, group), name) for group in positive for name in positive[group]
    }
    for option, value in {**given, "save_every": options.save_every}.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigurationError(f"--{option} {value} is not above 0", fix="give a positive number")


def _check_mixtures(options: Options) -> None:
    if options.warm_up.kind != "mixtures":
        return
    if options.finetune_from is not None or options.pretrain.path is not None:
        raise ConfigurationError(
            "--warm_up.kind mixtures is corrected by a network that begins at zero, and a public one does not",
            fix="leave out --finetune.from and --pretrain.path, or the warm-up",
        )
    if options.finetune.mode != "full":
        raise ConfigurationError(
            f"--finetune.mode {options.finetune.mode} leaves the last layer, which begins at zero, as it is",
            fix="--finetune.mode full, or another --warm_up.kind",
        )
