"""What `dither train` chooses for a data set, where it was not told: printed with reasons, and kept in config.yaml."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from dither.cli.options import Options

if TYPE_CHECKING:
    from dither.cli.run_folder import Images


def choose_for_data(options: Options, images: Images, examples: int, console: Console) -> Options:
    """The options with settings for a data set of this size and shape, where the user gave none.

    The embedded digits have the recipe's own; so have models that are not built by the recipe.

    Args:
        options: as they were given.
        images: what is public of the data.
        examples: number of images.
        console: where the choices and their reasons are shown.
    """
    from dither.diffusion.defaults import choose

    if options.data.path is None or options.model != "dit" or options.finetune_from is not None:
        return options
    every = choose(examples, images.num_classes, images.input_size, images.in_channels, images.latents is not None)
    chosen = [one for one in every if f"{one.group}.{one.name}" not in options.given]
    if not chosen:
        return options
    size = f"{images.input_size} x {images.input_size} x {images.in_channels}"
    table = Table(title=f"Chosen for {examples:,} images of {size}; each can be given", title_justify="left", box=None)
    table.add_column("option", no_wrap=True)
    table.add_column("why")
    changes: dict[str, dict[str, Any]] = {"privacy": {}, "recipe": {}, "warm_up": {}}
    for one in chosen:
        changes[one.group][one.name] = one.value
        table.add_row(f"--{one.group}.{one.name} {one.value}", one.reason)
    console.print(table)
    recorded = yaml.safe_load(options.text)
    for group, values in changes.items():
        recorded[group] |= values
    shared = {name: value for name, value in changes["privacy"].items() if hasattr(options.recipe, name)}
    return replace(
        options,
        privacy=replace(options.privacy, **changes["privacy"]),
        recipe=replace(options.recipe, **changes["recipe"], **shared),
        warm_up=replace(options.warm_up, **changes["warm_up"]),
        text=yaml.safe_dump(recorded, sort_keys=False),
    )
