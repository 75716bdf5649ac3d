"""What --model may be, and where a class of the user's is looked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from torch import nn

ModelChoice = Literal["dit", "diffusers_unet"] | nn.Module
"""A name, or a class path with its arguments, which is not instantiated while options are read."""


def find_users_modules() -> None:
    """Have class paths found beside the place where the command runs, as `python -m` does."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
