"""What `dither train` chooses for a data set, where it was not told: printed with reasons, and kept in config.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dither.cli.options import Options
from dither.cli.reading import with_settings

if TYPE_CHECKING:
    from dither.cli.run_folder import Images


def choose_for_data(options: Options, images: Images, examples: int, console: Console) -> Options:
    """The options with settings for a data set of this size and shape, where the user gave none.

    The embedded digits have the recipe's own.

    Args:
        options: as they were given.
        images: what is public of the data.
        examples: number of images.
        console: where the choices and their reasons are shown.
    """
    from dither.diffusion.defaults import choose

    if options.data.path is None:
        return options
    privacy = options.privacy
    given = {name: _value(options, name) for name in options.given}
    if options.model != "dit":
        given["model"] = options.model  # of a class, only the parts are among the names
    chosen = choose(
        examples,
        images.num_classes,
        images.input_size,
        images.in_channels,
        latents=images.latents is not None,
        epsilon=privacy.epsilon,
        batch=privacy.expected_batch_size if "privacy.expected_batch_size" in given else None,
        given=given,
        public=options.pretrain.path is not None or options.finetune_from is not None,
    )
    if not chosen:
        return options
    size = f"{images.input_size} x {images.input_size} x {images.in_channels}"
    table = Table(title=f"Chosen for {examples:,} images of {size}; each can be given", title_justify="left", box=None)
    table.add_column("option", no_wrap=True)
    table.add_column("why")
    changes: dict[str, dict[str, Any]] = {}
    for one in chosen:
        changes.setdefault(one.group, {})[one.name] = one.value
        table.add_row(f"--{one.option} {_shown(one.value)}", one.reason)
    console.print(table)
    return with_settings(options, changes)


def _value(options: Options, name: str) -> Any:
    """The value of an option by its full name."""
    if name == "finetune.from":
        return options.finetune_from
    found: Any = options
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _shown(value: object) -> str:
    """A value as a word of the command line."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
