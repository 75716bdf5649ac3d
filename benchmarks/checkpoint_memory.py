"""Peak memory of a clipped sum with and without activation checkpoints, over the plain forward and backward's.

    python benchmarks/checkpoint_memory.py          # 12 transformer blocks of width 256, 256 tokens, batch 4

A process for each case (Linux): the peak of resident memory during a step, less what was resident once model, inputs
and, on both sides, the gradients or sums were there. Of the first step, which proves the gradients, and of the third,
which does not. Held per-example gradients are memory that no checkpoint saves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dither

CASES = ("plain", "two_pass", "ghost", "hold")
STEPS = 3
"""dither proves its gradients in the first and the second."""


class Block(nn.Module):
    """A transformer block, its attention by torch's fused function."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class Stack(nn.Module):
    """Blocks, each in a checkpoint if asked for."""

    def __init__(self, depth: int, width: int, checkpointed: bool) -> None:
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList(Block(width) for _ in range(depth)), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def status(field: str) -> int:
    """Bytes in a field of /proc/self/status: VmRSS is resident now, VmHWM its peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 2**10


def one(arguments: argparse.Namespace) -> None:
    """Run a case in this process and print its peak."""
    torch.manual_seed(0)
    small, y = Stack(1, 32, arguments.checkpointed), torch.randn(2, 8, 32)  # loads the code that a step runs
    small(y).sum().backward()
    dither.clipped_sum(small, lambda: small(y).sum((1, 2)))
    model = Stack(arguments.depth, arguments.width, arguments.checkpointed)
    x = torch.randn(arguments.batch, arguments.tokens, arguments.width)
    sums = {name: torch.zeros_like(p).detach() for name, p in model.named_parameters()}

    def losses() -> Tensor:
        return model(x).square().flatten(1).mean(1)

    step: Callable[[], object]
    if arguments.case == "plain":
        for name, parameter in model.named_parameters():
            parameter.grad = sums[name]
        step = lambda: losses().mean().backward()  # noqa: E731
    else:
        step = lambda: dither.clipped_sum(model, losses, strategy=arguments.case, into=sums)  # noqa: E731
    before, peaks, start = status("VmRSS"), [], time.perf_counter()
    for _ in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        step()
        peaks.append((status("VmHWM") - before) / 2**20)
    print(json.dumps({"first": peaks[0], "later": peaks[-1], "seconds": time.perf_counter() - start}))


def run(case: str, checkpointed: bool, sizes: list[str]) -> dict[str, float]:
    """A case in a process of its own, where freed tensors go back to the system at once and are not counted."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, __file__, "--case", case, *(["--checkpointed"] if checkpointed else []), *sizes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"depth": 12, "width": 256, "tokens": 256, "batch": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--case", choices=CASES, help="run one case in this process, print its peak")
    parser.add_argument("--checkpointed", action="store_true", help="with --case: a checkpoint around each block")
    arguments = parser.parse_args()
    if arguments.case:
        one(arguments)
        return
    sizes = {name: getattr(arguments, name) for name in ("depth", "width", "tokens", "batch")}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    found = {(case, c): run(case, c, options) for case in CASES for c in (False, True)}
    plain = found["plain", False]["later"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sizes}; plain takes {plain:.0f} MiB")
    columns = ("later step", "checkpoints", "first step", "checkpoints", "slowest")
    print(f"{'peak / plain':14}" + "".join(f"{column:>14}" for column in columns))
    for case in CASES:
        ratios = [found[case, c][which] / plain for which in ("later", "first") for c in (False, True)]
        slowest = max(found[case, c]["seconds"] for c in (False, True))
        print(f"{case:14}" + "".join(f"{ratio:14.2f}" for ratio in ratios) + f"{slowest:12.1f} s")


if __name__ == "__main__":
    main()
