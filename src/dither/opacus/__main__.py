"""`python -m dither.opacus script.py args`: run a script that uses Opacus, unchanged, with `dither.opacus`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from dither.allocator import keep_memory

_USAGE = """usage: python -m dither.opacus script.py [arguments of the script]
       python -m dither.opacus -m package.module [arguments]

Run a program that uses Opacus, unchanged: whatever it imports from `opacus` comes from dither.opacus. Models may take
several inputs, keywords and anything else; gradients are exact, or an error says why not and what to do.

examples:
  python -m dither.opacus train.py --epochs 3
  python -m dither.opacus -m my_project.train
"""


def main(arguments: list[str]) -> int | str | None:
    """Install, then run the script as `__main__` with the rest of the arguments.

    Args:
        arguments: what follows `python -m dither.opacus`.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    as_module = arguments[0] == "-m"
    if as_module:
        arguments = arguments[1:]
    if not arguments or (not as_module and not Path(arguments[0]).exists()):
        found = f"there is no file {arguments[0]!r}" if arguments else "-m needs a module's name"
        print(f"python -m dither.opacus: {found}.\n  Fix: give the path of the script to run.", file=sys.stderr)
        return 2
    try:
        from dither.opacus import install
    except ImportError as error:
        return f"python -m dither.opacus: {error}.\n  Fix: pip install 'dither[opacus]'"
    keep_memory()
    target, sys.argv = arguments[0], list(arguments)
    with install():
        if as_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            script = Path(target).resolve()
            sys.path[0] = str(script.parent)  # where `-m` put the current folder
            runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
