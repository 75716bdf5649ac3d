"""The same Opacus script on stock Opacus and under `python -m dither.opacus`, in turns: ratios of step time and memory.

    python benchmarks/drop_in.py                      # modes hooks and ghost; width 384, depth 4, 256 tokens, batch 8
    python benchmarks/drop_in.py --rounds 3 -- --width 256 --depth 6 --size 14 --batch 64

What follows `--` goes to benchmarks/opacus_script.py. A round runs, for each mode, stock and dither in turn,
each in a process of its own, and once the plain step without privacy. Ratios are of medians of a round's steps; the
median over rounds is printed, with the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).with_name("opacus_script.py"))


def run(mode: str, under_dither: bool, options: list[str]) -> tuple[float, float, float]:
    """Median step in seconds, peak memory in MiB and the first step, of a process."""
    command = [sys.executable, *(["-m", "dither.opacus"] if under_dither else []), SCRIPT, "--mode", mode, *options]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    if mode != "plain" and found["module"].startswith("dither.") != under_dither:
        raise SystemExit(f"{command} ran {found['module']}")
    return statistics.median(found["seconds"]), found["peak_mib"], found["first"]


def shown(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):5.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["hooks", "ghost"])
    parser.add_argument("options", nargs="*", help="of benchmarks/opacus_script.py, after --")
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for number in range(arguments.rounds):
        plain = run("plain", False, arguments.options)
        rows.setdefault("plain", []).append(plain)
        for mode in arguments.modes:
            for under_dither in (False, True):
                key = f"{mode} {'dither' if under_dither else 'stock'}"
                rows.setdefault(key, []).append(run(mode, under_dither, arguments.options))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    print(f"{'':24}{'step':24}{'peak memory':24}first step")
    for mode in arguments.modes:
        stock, ours = f"{mode} stock", f"{mode} dither"
        for over, under in ((stock, ours), (stock, "plain"), (ours, "plain")):
            columns = [[a[i] / b[i] for a, b in zip(rows[over], rows[under], strict=True)] for i in range(3)]
            print(f"{over + ' / ' + under.replace(mode + ' ', ''):24}" + "".join(f"{shown(c):24}" for c in columns))


if __name__ == "__main__":
    main()
