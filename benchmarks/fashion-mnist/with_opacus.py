"""The U-Net of `dither train` on Fashion-MNIST, trained by stock Opacus for some minutes; what it then draws.

The same network, loss, optimizer, batch size and budget, and as many steps as the minutes hold: three steps on random
images are timed first. Opacus has no release for a model to begin with, so that the whole budget is the steps'.

    python benchmarks/fashion-mnist/with_opacus.py --mode hooks --minutes 30 --output opacus-hooks
    dither evaluate opacus-hooks/last.npz --data.path /usr/share/datasets/fashion-mnist \\
        --output opacus-hooks/evaluation --classifiers CNN
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

from dither.data import read_images
from dither.diffusion.export import save_arrays
from dither.diffusion.recipe import Recipe, build_ema, build_optimizer, build_process
from dither.diffusion.sampling import sample
from dither.diffusion.unet import DiffusersUNet, UNet

CLASSES, SIDE, PHYSICAL_BATCH = 10, 28, 128
NETWORK = UNet(block_out_channels=(16, 32), attention=False, patch_size=2)
TIMED = 3


class SquaredErrors:
    """Mean squared error of each row, which Opacus's ghost mode asks for, or of all."""

    reduction = "mean"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        rows = (output - target).square().flatten(1).mean(1)
        return rows if self.reduction == "none" else rows.mean()


class Training:
    """A run of so many steps under Opacus."""

    def __init__(self, data: TensorDataset, mode: str, noise_multiplier: float, recipe: Recipe) -> None:
        self.process = build_process(recipe)
        network = DiffusersUNet(NETWORK, SIDE, 1, CLASSES, hides_labels=False)
        optimizer, self.scheduler = build_optimizer(recipe, network)
        criterion: Any = SquaredErrors()
        made = PrivacyEngine(accountant="prv").make_private(
            module=network,
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=recipe.expected_batch_size),
            criterion=criterion,
            noise_multiplier=noise_multiplier,
            max_grad_norm=recipe.max_grad_norm,
            grad_sample_mode=mode,
        )
        self.model, self.optimizer = made[:2]
        self.criterion, self.loader = (criterion, made[2]) if mode == "hooks" else made[2:]
        self.average = build_ema(recipe, network)
        self.network = network

    def steps(self) -> Iterator[int]:
        """Take noisy steps, without end; yields how many were taken."""
        taken = 0
        while True:
            with BatchMemoryManager(
                data_loader=self.loader, max_physical_batch_size=PHYSICAL_BATCH, optimizer=self.optimizer
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
        drawn = sample(
            self.average.module, labels, process=self.process, sampler=recipe.sampler, steps=recipe.sampler_steps
        )
        return drawn, labels


def recipe_of(steps: int) -> Recipe:
    """What `dither train` chooses for these images at epsilon 10."""
    return Recipe(
        steps=steps,
        multiplicity=1,
        expected_batch_size=512,
        learning_rate=8e-3,
        ema_decay=0.97,
        sigma_data=0.25,
        timestep_distribution="log_normal",
        label_dropout=0.0,
    )


def seconds_of_a_step(mode: str) -> float:
    """The median of some steps on random images, in as many as there are of the real ones."""
    images = torch.randn(60_000, 1, SIDE, SIDE)
    training = Training(TensorDataset(images, torch.randint(CLASSES, (60_000,))), mode, 1.0, recipe_of(TIMED + 1))
    times, began = [], time.perf_counter()
    for taken in training.steps():
        times.append(time.perf_counter() - began)
        if taken > TIMED:
            return statistics.median(times[1:])
        began = time.perf_counter()
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("hooks", "ghost"), default="hooks")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--drawn_after", type=float, nargs="*", default=[], help="minutes, besides the last")
    parser.add_argument("--count", type=int, default=1000, help="images of each class that are drawn")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of a generator that is not a secure one, and of hooks on inputs without gradient
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True)
    images, labels = read_images(arguments.data).batch()
    steps = int(60 * arguments.minutes / seconds_of_a_step(arguments.mode))
    recipe = recipe_of(steps)
    rate = recipe.expected_batch_size / len(images)
    noise = get_noise_multiplier(
        target_epsilon=arguments.epsilon, target_delta=arguments.delta, sample_rate=rate, steps=steps, accountant="prv"
    )
    training = Training(TensorDataset(images, labels), arguments.mode, noise, recipe)
    said: dict[str, Any] = {"mode": arguments.mode, "steps": steps, "noise_multiplier": noise, "drawn": []}
    print(f"{steps} steps at noise multiplier {noise:.3f}", flush=True)
    marks, trained, began = sorted(arguments.drawn_after), 0.0, time.perf_counter()
    for taken in training.steps():
        trained += time.perf_counter() - began
        if taken == steps or (marks and trained >= 60 * marks[0]):
            name = "last" if taken == steps else f"{marks.pop(0):g}"
            with (arguments.output / f"{name}.npz").open("wb") as file:
                save_arrays(*training.draw(arguments.count, recipe), file)
            said["drawn"].append({"file": f"{name}.npz", "minutes": trained / 60, "steps": taken})
            (arguments.output / "run.json").write_text(json.dumps(said, indent=2) + "\n")
            print(f"{taken} steps in {trained / 60:.1f} minutes: {name}.npz", flush=True)
        if taken == steps:
            return
        began = time.perf_counter()


if __name__ == "__main__":
    main()
