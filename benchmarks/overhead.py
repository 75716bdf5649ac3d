"""What recording costs when the model is small, where every operation's bookkeeping shows.

    python benchmarks/overhead.py                # an MLP of 64-64-10 and the tiny DiT, batch 64
    python benchmarks/overhead.py --profile      # and where clipped_sum's time goes on the MLP

For each model, in turns in one process: the plain forward and backward of the mean loss; `clipped_sum`, strategy auto;
and stock Opacus, GradSampleModule's forward and backward with DPOptimizer's clip and sum. No noise, no update.
The steady step leaves the first 64 steps out, after which dither proves its gradients at the 128th, 256th, 512th...
only. The first step, which proves them too, is a column of its own. Quote the ratios: lone times say more of the
machine than of the code.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

import dither
from dither.diffusion import DiT
from dither.diffusion.recipe import Recipe, build_model

WARM_UP = 64


@dataclass
class Subject:
    """A model and its losses.

    Attributes:
        name: as printed.
        build: makes the model; the same weights each time.
        inputs: of its forward.
        losses: from the output, one per example.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    losses: Callable[[Tensor], Tensor]


def mlp(batch: int) -> Subject:
    """Two layers, width 64, ten classes."""
    x, y = torch.randn(batch, 64), torch.randint(10, (batch,))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    return Subject("MLP 64-64-10", build, (x,), lambda output: F.cross_entropy(output, y, reduction="none"))


def tiny_dit(batch: int) -> Subject:
    """The demo's DiT on 8 x 8 images.

    Its inputs go in by position, all of them tensors, and its position table is fixed: with a trainable one, which
    belongs to the top module, stock Opacus raises a TypeError in backward. Labels are not dropped, so that every
    library sees the same batch.
    """
    x = torch.randn(batch, 1, 8, 8)
    t, y, noise = torch.randint(1000, (batch,)), torch.randint(10, (batch,)), torch.randn(batch, 1, 8, 8)
    recipe = Recipe(label_dropout=0.0)

    def build() -> DiT:
        torch.manual_seed(0)
        model = build_model(recipe, input_size=8, in_channels=1, num_classes=10)
        with torch.no_grad():  # away from the zero initialisation, where half of the backward pass multiplies zeros
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        return model

    blocks = build().blocks
    return Subject(
        f"tiny DiT, width {blocks[0].attn.proj.out_features}, depth {len(blocks)}, fixed position table (stock Opacus "
        "needs that)",
        build,
        (x, t, y),
        lambda output: F.mse_loss(output, noise, reduction="none").flatten(1).mean(1),
    )


def plain_step(subject: Subject) -> Callable[[], None]:
    """Forward and backward of the mean."""
    model = subject.build()

    def step() -> None:
        model.zero_grad()
        subject.losses(model(*subject.inputs)).mean().backward()

    return step


def dither_step(subject: Subject) -> Callable[[], dither.ClippedSum]:
    """The clipped sum."""
    model = subject.build()
    return lambda: dither.clipped_sum(model, lambda: subject.losses(model(*subject.inputs)))


def opacus_step(subject: Subject) -> Callable[[], dict[str, Tensor]]:
    """The clipped sum of stock Opacus, in `summed_grad`; the dictionary is for the comparison."""
    model = GradSampleModule(subject.build())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=0.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad()
        subject.losses(model(*subject.inputs)).mean().backward()
        optimizer.clip_and_accumulate()
        named = model.named_parameters()
        return {name.removeprefix("_module."): p.summed_grad for name, p in named if p.requires_grad}

    return step


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative distance of the two sums: both do the same work."""
    wrong = sum(float((ours[name] - total).square().sum()) for name, total in theirs.items())
    return float((wrong / sum(float(total.square().sum()) for total in theirs.values())) ** 0.5)


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(subject: Subject, rounds: int) -> None:
    """Print the subject's lines."""
    steps = {"plain": plain_step(subject), "dither": dither_step(subject), "Opacus": opacus_step(subject)}
    timed(plain_step(subject))  # torch's own first calls belong to nobody
    first = {name: timed(step) for name, step in steps.items()}
    for step in steps.values():
        for _ in range(WARM_UP - 1):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step))
    apart = compare(steps["dither"]().gradients, steps["Opacus"]())
    print(f"\n{subject.name}, batch {len(subject.inputs[0])}; the sums differ by {apart:.0e}, relative")
    print(f"{'':17}{'steady, median':>16}{'first step':>14}")
    for name in steps:
        print(f"{name:17}{statistics.median(times[name]) * 1e3:13.3f} ms{first[name] * 1e3:11.2f} ms")
    for over, under in (("dither", "plain"), ("Opacus", "plain"), ("dither", "Opacus")):
        steady = statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
        print(f"{over + ' / ' + under:17}{steady:13.2f} x {first[over] / first[under]:11.2f} x")


def profile(subject: Subject, steps: int = 60) -> None:
    """Print the 15 functions that take most of the steady step's time: by themselves, and with what they call."""
    step = dither_step(subject)
    for _ in range(WARM_UP):
        step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        step()
    profiler.disable()
    print(f"\n{steps} steps of clipped_sum, {subject.name}, no proof among them; the profiler slows them down")
    for order in ("tottime", "cumulative"):
        pstats.Stats(profiler).strip_dirs().sort_stats(order).print_stats(15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--profile", action="store_true", help="of clipped_sum on the MLP, instead of the times")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    if arguments.profile:
        profile(mlp(arguments.batch))
        return
    for subject in (mlp(arguments.batch), tiny_dit(arguments.batch)):
        measure(subject, arguments.rounds)


if __name__ == "__main__":
    main()
