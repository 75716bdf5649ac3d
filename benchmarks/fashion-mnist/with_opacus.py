"""A U-Net trained on Fashion-MNIST by stock Opacus for some minutes, and what it then draws.

The network, loss, optimizer and batch size that `dither train` chooses, and as many steps as the minutes hold: some
on random images are timed first, in physical batches of several sizes, of which the fastest is taken. Opacus has no
release for a model to begin with, so that the whole budget is the steps'. Minutes are of the steps alone.

    python benchmarks/fashion-mnist/with_opacus.py opacus-hooks --mode hooks --minutes 30
    python benchmarks/fashion-mnist/over_time.py opacus-hooks       # scores what was drawn
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import dither
from dither.data import read_images
from dither.diffusion.export import save_arrays
from dither.diffusion.recipe import Recipe, build_ema, build_optimizer, build_process
from dither.diffusion.sampling import sample
from dither.diffusion.unet import DiffusersUNet, UNet

CLASSES, SIDE = 10, 28
NETWORK = UNet(block_out_channels=(16, 32), attention=False, patch_size=2)
TIMED = 3


class SquaredErrors:
    """Mean squared error of each row, which Opacus's ghost mode asks for, or of all."""

    reduction = "mean"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        rows = (output - target).square().flatten(1).mean(1)
        return rows if self.reduction == "none" else rows.mean()


class Training:
    """Training under Opacus."""

    def __init__(
        self, data: TensorDataset, mode: str, noise_multiplier: float, recipe: Recipe, physical_batch: int
    ) -> None:
        self.process, self.physical_batch = build_process(recipe), physical_batch
        self.network = DiffusersUNet(NETWORK, SIDE, 1, CLASSES, hides_labels=False)
        self.average = build_ema(recipe, self.network)
        optimizer, self.scheduler = build_optimizer(recipe, self.network)
        self.engine = PrivacyEngine(accountant="prv")
        criterion: Any = SquaredErrors()
        made = self.engine.make_private(
            module=self.network,
            optimizer=optimizer,
            data_loader=loader_of(data, recipe),
            criterion=criterion,
            noise_multiplier=noise_multiplier,
            max_grad_norm=recipe.max_grad_norm,
            grad_sample_mode=mode,
        )
        self.model, self.optimizer = made[:2]
        self.criterion, self.loader = (criterion, made[2]) if mode == "hooks" else made[2:]

    def steps(self) -> Iterator[int]:
        """Take noisy steps, without end; yields how many were taken."""
        taken = 0
        while True:
            with BatchMemoryManager(
                data_loader=self.loader, max_physical_batch_size=self.physical_batch, optimizer=self.optimizer
            ) as batches:
                for images, labels in batches:
                    self._one(images, labels)
                    if self.optimizer._is_last_step_skipped:  # a part of a batch that is not whole yet
                        continue
                    self.scheduler.step()
                    self.average.update_parameters(self.network)
                    taken += 1
                    yield taken

    def _one(self, x_0: Tensor, y: Tensor) -> None:
        t = self.process.draw_timesteps(len(x_0), 1).flatten()
        noise = torch.randn_like(x_0)
        self.optimizer.zero_grad()
        output = self.model(self.process.add_noise(x_0, noise, t), t, y)
        self.criterion(output, self.process.target(x_0, noise, t)).backward()
        self.optimizer.step()

    def draw(self, count: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """So many images of each class from the averaged weights, and their labels."""
        labels = torch.arange(CLASSES).repeat_interleave(count)
        model = self.average.module
        drawn = sample(model, labels, process=self.process, sampler=recipe.sampler, steps=recipe.sampler_steps)
        return drawn, labels


def loader_of(data: TensorDataset, recipe: Recipe) -> DataLoader[Any]:
    """Opacus samples at 1 / its length."""
    return DataLoader(data, batch_size=int(recipe.expected_batch_size))


def recipe_of(steps: int, batch: int) -> Recipe:
    """What `dither train` chooses, but for sigma_data, which is small there for the mixture's sake: here Karras's."""
    return Recipe(
        steps=steps,
        multiplicity=1,  # every row is an example to Opacus
        expected_batch_size=batch,
        learning_rate=8e-3,
        ema_decay=0.97,
        sigma_data=0.5,
        timestep_distribution="log_normal",
        label_dropout=0.0,
    )


def seconds_of_a_step(mode: str, batch: int, physical_batch: int) -> float:
    """The median of some steps on random images, as many as there are real ones."""
    data = TensorDataset(torch.randn(60_000, 1, SIDE, SIDE), torch.randint(CLASSES, (60_000,)))
    training = Training(data, mode, 1.0, recipe_of(TIMED + 1, batch), physical_batch)
    times, began = [], time.perf_counter()
    for taken in training.steps():
        times.append(time.perf_counter() - began)
        if taken > TIMED:
            break
        began = time.perf_counter()
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--mode", choices=("hooks", "ghost"), default="hooks")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--drawn_after", type=float, nargs="*", default=[], help="minutes, besides the last")
    parser.add_argument("--count", type=int, default=500, help="images of each class that are drawn")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--batch", type=int, default=512, help="expected; dither takes 1,024 at epsilon 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of a generator that is not a secure one, and of hooks on inputs without gradient
    dither.keep_memory()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True)
    images, labels = read_images(arguments.data).batch()
    data, mode, batch = TensorDataset(images, labels), arguments.mode, arguments.batch
    seconds = {size: seconds_of_a_step(mode, batch, size) for size in (64, 128, 256, 512)}
    fastest = min(seconds, key=lambda size: seconds[size])
    steps = max(1, int(60 * arguments.minutes / seconds[fastest]))
    recipe = recipe_of(steps, batch)
    rate = 1 / len(loader_of(data, recipe))
    noise = get_noise_multiplier(
        target_epsilon=arguments.epsilon, target_delta=arguments.delta, sample_rate=rate, steps=steps, accountant="prv"
    )
    training = Training(data, mode, noise, recipe, fastest)
    print(f"{steps} steps at noise multiplier {noise:.3f}, seconds by physical batch {seconds}", flush=True)
    points: list[dict[str, Any]] = []
    marks, trained, began = sorted(arguments.drawn_after), 0.0, time.perf_counter()
    for taken in training.steps():
        trained += time.perf_counter() - began
        if taken == steps or (marks and trained >= 60 * marks[0]):
            marks = [mark for mark in marks if 60 * mark > trained]
            name = f"after-{trained / 60:.0f}.npz"
            with (arguments.output / name).open("wb") as file:
                save_arrays(*training.draw(arguments.count, recipe), file)
            epsilon = training.engine.get_epsilon(arguments.delta)
            points.append({"file": name, "minutes": trained / 60, "steps": taken, "epsilon": epsilon})
            (arguments.output / "points.json").write_text(json.dumps(points, indent=2) + "\n")
            print(points[-1], flush=True)
        if taken == steps:
            return
        began = time.perf_counter()


if __name__ == "__main__":
    main()
