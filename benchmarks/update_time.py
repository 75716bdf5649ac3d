"""Time of the private update of a logical batch over the plain optimizer's step, paired and interleaved in one process.

    python benchmarks/update_time.py                     # a DiT of width 768, depth 4
    python benchmarks/update_time.py --width 384 --threads 1

The private update adds noise, divides by the expected batch size and steps. The sums are there already: what they cost
is `dither bench`'s. Quote the ratios: lone times say more of the machine than of the code.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from dither.diffusion import DiT
from dither.noise import GaussianNoise

OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "foreach AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "width": 768,
        "depth": 4,
        "heads": 12,
        "pairs": 9,
        "threads": torch.get_num_threads(),
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = DiT(
        input_size=32,
        patch_size=2,
        hidden_size=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.heads,
        learn_sigma=False,
        position="learned",
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    count, noise = sum(map(torch.Tensor.numel, parameters)), GaussianNoise()
    print(f"torch {torch.__version__}, {count:,} parameters in {len(parameters)} tensors, {vars(arguments)}")
    print(f"{'':14} {'plain':>8} {'noise':>8} {'update':>8}   ns a parameter; ratios of the plain step: noise, update")
    for name, build in OPTIMIZERS.items():
        optimizer = build(parameters)

        def add_noise() -> None:
            noise.add_(gradients, 1.0, divisor=256.0)

        def update(optimizer: torch.optim.Optimizer = optimizer) -> None:
            add_noise()
            optimizer.step()

        times = measure((optimizer.step, add_noise, update), arguments.pairs)
        lone = "".join(f" {statistics.median(taken) / count * 1e9:8.2f}" for taken in times)
        ratios = "".join(
            f" {statistics.median(a / b for a, b in zip(taken, times[0], strict=True)):6.2f}" for taken in times[1:]
        )
        print(f"{name:14}{lone}  {ratios}", flush=True)


def measure(functions: tuple[Callable[[], object], ...], rounds: int) -> list[list[float]]:
    """Times of each function, called in turns after one call that is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_:
                taken.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
