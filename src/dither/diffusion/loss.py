"""The diffusion loss, one number per example, for private training.

Shapes: B examples, K noise draws per example; of rows R = B K, K consecutive ones belong to one example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.diffusion.process import Process
from dither.diffusion.variational import variational_bound
from dither.errors import ConfigurationError, LabelError

# model(x_t, t, y, drop_label=...) -> prediction; every DiT is one
Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class Draws:
    """All randomness of one loss: fix it and the loss is a function of model and batch."""

    timesteps: Tensor  # (B, K) int64
    noise: Tensor  # (B, K, C, H, W) standard normal
    drop_label: Tensor  # (B,) bool: one coin per image, shared by its K draws


class DiffusionLoss:
    """Per-example denoising loss with noise multiplicity.

    K pairs of timestep and noise are drawn for each image and their losses averaged into that image's one
    loss *before* clipping: the gradient is less noisy at no privacy cost, for each image still gives one
    clipped gradient. Hand K to the engine as `rows_per_example`.

    Source: Dockhorn et al. 2022, "Differentially Private Diffusion Models", sec. 3.2.

    Args:
        process: forward process, prediction target and weighting.
        multiplicity: noise draws K per image.
        label_dropout: probability of hiding an image's label; one coin per image.
        num_classes: labels run from 0 to `num_classes - 1`; None leaves the check to the model.
        stratified: spread an image's K timesteps over K equal parts of the range.
        generator: source of randomness; None is torch's global one.

    Raises:
        ConfigurationError: K below 1, a probability outside [0, 1], or timesteps that cannot be drawn.
    """

    def __init__(
        self,
        process: Process,
        multiplicity: int = 1,
        label_dropout: float = 0.1,
        num_classes: int | None = None,
        *,
        stratified: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if multiplicity < 1:
            raise ConfigurationError(f"multiplicity {multiplicity} is below 1", fix="draw at least one noise per image")
        if not 0 <= label_dropout <= 1:
            raise ConfigurationError(
                f"label_dropout {label_dropout} is outside [0, 1]", fix="give a probability, usually 0.1"
            )
        _ = process.timestep_probabilities  # refuses now what could not be drawn later
        self.process = process
        self.multiplicity = multiplicity
        self.label_dropout = label_dropout
        self.num_classes = num_classes
        self.stratified = stratified
        self.generator = generator

    @property
    def rows_per_example(self) -> int:
        """Rows that one example takes in the model's batch: K."""
        return self.multiplicity

    def __call__(self, model: Denoiser, batch: Sequence[Tensor]) -> Tensor:
        """Return one loss per image, (B,).

        Args:
            model: called as `model(x_t, t, y, drop_label=...)` on B K rows.
            batch: images (B, C, H, W) in [-1, 1] and labels (B,) int64.

        Raises:
            LabelError: a label outside 0..num_classes-1.
        """
        images, labels = batch[0], batch[1]
        return self.at(model, images, labels, self.draw(images))

    def draw(self, images: Tensor) -> Draws:
        """Draw timesteps, noise and the label coin for images (B, C, H, W)."""
        count, device = images.shape[0], images.device
        return Draws(
            timesteps=self.process.draw_timesteps(
                count, self.multiplicity, stratified=self.stratified, device=device, generator=self.generator
            ),
            noise=torch.randn(
                (count, self.multiplicity, *images.shape[1:]),
                dtype=images.dtype, device=device, generator=self.generator,
            ),
            drop_label=torch.rand(count, device=device, generator=self.generator) < self.label_dropout,
        )  # fmt: skip

    def at(self, model: Denoiser, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Return the losses (B,) for given draws; `__call__` with the randomness passed in."""
        self._check(labels)
        rows = draws.timesteps.shape[1]
        t, noise = draws.timesteps.flatten(), draws.noise.flatten(0, 1)
        x_0 = images.repeat_interleave(rows, 0)
        x_t = self.process.add_noise(x_0, noise, t)
        output = model(
            x_t, t, labels.repeat_interleave(rows, 0), drop_label=draws.drop_label.repeat_interleave(rows, 0)
        )
        losses = self._row_losses(output, x_0, x_t, noise, t)
        return losses.view(images.shape[0], rows).mean(1)

    def _row_losses(self, output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        predicted, fraction = output.chunk(2, dim=1) if self.process.learn_sigma else (output, None)
        error = (predicted - self.process.target(x_0, noise, t)).square().flatten(1).mean(1)
        losses = error * self.process.weight(t)
        if fraction is not None:
            losses = losses + variational_bound(self.process, x_0, x_t, t, predicted, fraction)
        return losses

    def _check(self, labels: Tensor) -> None:
        if self.num_classes is None or torch.compiler.is_compiling() or not labels.numel():
            return
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= self.num_classes:
            raise LabelError(
                f"label {low if low < 0 else high} is outside 0..{self.num_classes - 1}",
                fix=f"map the labels to 0..{self.num_classes - 1}, or raise num_classes",
            )
