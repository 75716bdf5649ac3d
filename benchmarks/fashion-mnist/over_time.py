"""Accuracy against training time: `dither train` is interrupted, copied, scored and resumed.

A run has its steps and its noise from the beginning, so an early copy has spent less than the whole budget. Minutes are
the command's, from its start: reading, the release, the first steps' proofs, every resume. What follows `--` goes to
`dither train`.

    python benchmarks/fashion-mnist/over_time.py --output over-time --minutes 3 6 12 24 -- \\
        --data.path /usr/share/datasets/fashion-mnist --epsilon 10 --threads 1
    python benchmarks/fashion-mnist/over_time.py --output over-time --beside opacus-hooks opacus-ghost --draw times.png
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


def train(run: Path, options: list[str], minutes: list[float]) -> list[dict[str, Any]]:
    """Train to the end, with a copy of the run after so many minutes; the copies' folders and minutes."""
    copies, trained = [], 0.0
    for mark in [*sorted(minutes), None]:
        words = ["--resume", str(run)] if run.exists() else ["--output", str(run), *options]
        began = time.perf_counter()
        process = subprocess.Popen([*DITHER, "train", *words], stdout=subprocess.DEVNULL)
        try:
            process.wait(None if mark is None else max(0.0, 60 * mark - trained))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        trained += time.perf_counter() - began
        if process.returncode not in (0, INTERRUPTED):
            raise SystemExit(f"dither train ended with {process.returncode}")
        copy = run.with_name(f"{run.name}-{len(copies)}")
        shutil.copytree(run, copy)
        copies.append({"run": copy.name, "minutes": trained / 60})
        print(f"{trained / 60:.1f} minutes: {copy}", flush=True)
        if process.returncode == 0:
            break
    return copies


def score(source: Path, output: Path, options: list[str]) -> dict[str, float]:
    """What `dither evaluate` says of a run or of samples."""
    subprocess.run([*DITHER, "evaluate", str(source), "--classifiers", "CNN", *options], check=True, stdout=sys.stderr)
    found = json.loads((output / "evaluation.json").read_text())
    return {
        "accuracy": found["accuracy_on_held_out_images"]["CNN"]["all"]["value"],
        "frechet": found["distance_to_held_out_images"]["frechet_distance"]["value"],
    }


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
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs and scores.json")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="when to stop and score, besides the end")
    parser.add_argument("--count", type=int, default=1000, help="images of each class that are drawn for a score")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="folders of with_opacus.py")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--draw", type=Path, default=None, help="a picture of all scores")
    parser.add_argument("options", nargs="*", help="of dither train, after --")
    arguments = parser.parse_args()
    scores = arguments.output / "scores.json"
    if arguments.options:
        arguments.output.mkdir(parents=True)
        copies = train(arguments.output / "run", arguments.options, arguments.minutes)
        for point in copies:
            run = arguments.output / point["run"]
            point |= score(run, run, ["--count", str(arguments.count)])
        scores.write_text(json.dumps(copies, indent=2) + "\n")
    for folder in arguments.beside:
        if not (folder / "scores.json").exists():
            points = json.loads((folder / "run.json").read_text())["drawn"]
            for point in points:
                output = folder / f"evaluation-{Path(point['file']).stem}"
                point |= score(folder / point["file"], output, ["--data.path", arguments.data, "--output", str(output)])
            (folder / "scores.json").write_text(json.dumps(points, indent=2) + "\n")
    folders = [folder for folder in (arguments.output, *arguments.beside) if (folder / "scores.json").exists()]
    series = {folder.name: json.loads((folder / "scores.json").read_text()) for folder in folders}
    for name, points in series.items():
        for minutes, accuracy, frechet in ((p["minutes"], p["accuracy"], p["frechet"]) for p in points):
            print(f"{name:16}{minutes:7.1f} minutes  accuracy {accuracy:.3f}  Frechet distance {frechet:.1f}")
    if arguments.draw is not None:
        draw(series, arguments.draw)


if __name__ == "__main__":
    main()
