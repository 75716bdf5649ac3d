"""Accuracy against training time: `dither train` is interrupted, copied, resumed, and the copies are scored.

A run has its steps and its noise from the beginning, so an early copy has spent less than the whole budget. Minutes are
the command's, from its start: reading, the release, the first steps' proofs, every resume. What follows `--` goes to
`dither train`. Scores that are there are not computed again.

    python benchmarks/fashion-mnist/over_time.py over-time --minutes 5 15 -- \\
        --data.path /usr/share/datasets/fashion-mnist --epsilon 10 --threads 1
    python benchmarks/fashion-mnist/over_time.py over-time opacus-hooks opacus-ghost --draw times.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DITHER = (sys.executable, "-m", "dither")
INTERRUPTED = 130
DATA = "/usr/share/datasets/fashion-mnist"


def train(folder: Path, options: list[str], minutes: list[float]) -> None:
    """Train to the end, with a copy of the run after so many minutes; points.json says which."""
    folder.mkdir(parents=True)
    run, points, trained = folder / "run", [], 0.0
    for mark in [*sorted(minutes), None]:
        if mark is not None and 60 * mark <= trained:
            continue
        words = ["--resume", str(run)] if run.exists() else ["--output", str(run), *options]
        began = time.perf_counter()
        process = subprocess.Popen([*DITHER, "train", *words], stdout=subprocess.DEVNULL)
        try:
            process.wait(None if mark is None else 60 * mark - trained)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        trained += time.perf_counter() - began
        if process.returncode not in (0, INTERRUPTED):
            raise SystemExit(f"dither train ended with {process.returncode}")
        if (run / "ema.safetensors").exists():
            copy = folder / f"after-{trained / 60:.0f}"
            shutil.copytree(run, copy, ignore=shutil.ignore_patterns("state"))  # a second future would cost again
            points.append({"file": copy.name, "minutes": trained / 60})
            (folder / "points.json").write_text(json.dumps(points, indent=2) + "\n")
            print(f"{trained / 60:.1f} minutes: {copy}", flush=True)
        if process.returncode == 0:
            return


def scored(folder: Path, count: int) -> list[dict[str, Any]]:
    """The points of a folder, with what `dither evaluate` says of each: a run's copy, or samples."""
    points = json.loads((folder / "points.json").read_text())
    for point in points:
        source = folder / point["file"]
        output = folder / f"evaluation-{source.stem}"
        if not (output / "evaluation.json").exists():
            shutil.rmtree(output, ignore_errors=True)
            drawn = ["--count", str(count)] if source.is_dir() else []
            words = [str(source), "--data.path", DATA, "--output", str(output), "--classifiers", "CNN", *drawn]
            subprocess.run([*DITHER, "evaluate", *words], check=True, stdout=sys.stderr)
        found = json.loads((output / "evaluation.json").read_text())
        point["images"] = found["images"]["generated"]["value"]
        point["accuracy"] = found["accuracy_on_held_out_images"]["CNN"]["all"]["value"]
        point["frechet"] = found["distance_to_held_out_images"]["frechet_distance"]["value"]
    return list(points)


def draw(series: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """The curves, a name each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, points in series.items():
        axes.plot([p["minutes"] for p in points], [p["accuracy"] for p in points], marker="o", label=name)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("accuracy of the CNN on real images")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="of runs; a new one is trained, with the options after --"
    )
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="when to copy, besides the end")
    parser.add_argument("--count", type=int, default=500, help="images of each class that are drawn for a score")
    parser.add_argument("--draw", type=Path, default=None, help="a picture of all scores")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    arguments, options = parser.parse_args(words[:cut]), words[cut + 1 :]
    for folder in arguments.folders:
        if not folder.exists():
            train(folder, options, arguments.minutes)
    series = {folder.name: scored(folder, arguments.count) for folder in arguments.folders}
    for name, points in series.items():
        for point in points:
            print(
                f"{name:16}{point['minutes']:6.1f} minutes  accuracy {point['accuracy']:.3f}  "
                f"Frechet distance {point['frechet']:.1f}  of {point['images']} images"
            )
    if arguments.draw is not None:
        draw(series, arguments.draw)


if __name__ == "__main__":
    main()
