"""Step time of a private step over the plain step, on a DiT, paired and interleaved in one process.

    python benchmarks/step_time.py                       # width 384, depth 4, 256 tokens, batch 8
    python benchmarks/step_time.py --width 256 --depth 6 --size 14 --batch 64

Both steps use fused AdamW. The private step is `clipped_sum` and the optimizer, and with `+ noise` Gaussian noise too.
Quote the ratios: lone times say more of the machine than of the code.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import dither
from dither.diffusion import DiT
from dither.noise import GaussianNoise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 384, "depth": 4, "heads": 6, "size": 32, "batch": 8, "pairs": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = DiT(
        input_size=arguments.size,
        patch_size=2,
        hidden_size=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.heads,
        learn_sigma=False,
        position="learned",
    )
    with torch.no_grad():  # away from the zero initialisation, where half of the backward pass multiplies zeros
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    x = torch.randn(arguments.batch, 4, arguments.size, arguments.size)
    t, y = torch.randint(1000, (arguments.batch,)), torch.randint(1000, (arguments.batch,))
    noise = torch.randn_like(x)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p) for n, p in parameters.items()}
    gaussian = GaussianNoise()

    def losses() -> torch.Tensor:
        return F.mse_loss(model(x, t, y), noise, reduction="none").flatten(1).mean(1)

    def plain() -> None:
        optimizer.zero_grad()
        losses().mean().backward()
        optimizer.step()

    def private(strategy: str, noisy: bool = False) -> Callable[[], None]:
        def step() -> None:
            for total in sums.values():
                total.zero_()
            dither.clipped_sum(model, losses, strategy=strategy, into=sums)
            if noisy:
                gaussian.add_(sums, 1.0)
            for name, parameter in parameters.items():
                parameter.grad = sums[name]
            optimizer.step()

        return step

    steps = {
        "plain": plain,
        "auto": private("auto"),
        "auto + noise": private("auto", noisy=True),
        "hold": private("hold"),
        "ghost": private("ghost"),
        "tile": private("tile"),
        "two_pass": private("two_pass"),
    }
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.pairs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(arguments)}")
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["plain"], strict=True)]
        print(f"{name:13} {statistics.median(taken):7.3f} s   {statistics.median(ratios):5.2f} x plain")


if __name__ == "__main__":
    main()
