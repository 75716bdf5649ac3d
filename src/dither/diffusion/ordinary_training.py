"""Training without clipping and noise, on what is public or released already; it can be left and taken up again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dither.diffusion.loss import DiffusionLoss
from dither.errors import ConfigurationError


class LabelledImages(Protocol):
    """Images that may be used without noise."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W) and labels (b,) int64 at indices (b,)."""
        ...


class OrdinaryTraining:
    """Adam, with a learning rate that falls to zero over the steps.

    Guarantee: none of its own. What goes in must be public or released already: then this is post-processing.

    Args:
        model: changed in place.
        parameters: those of the model that are trained; they require gradients only while a step is taken, if they did
            not before.
        data: each step's images are drawn from it with replacement.
        loss: as in the private training after it.
        steps: optimizer steps.
        learning_rate: of the first step.
        batch_size: images of a step.

    Raises:
        ConfigurationError: steps, learning_rate or batch_size are not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        data: LabelledImages,
        loss: DiffusionLoss,
        *,
        steps: int = 300,
        learning_rate: float = 1e-3,
        batch_size: int = 64,
    ) -> None:
        for name, value in (("steps", steps), ("learning_rate", learning_rate), ("batch_size", batch_size)):
            if not value > 0:
                raise ConfigurationError(f"{name} {value} is not above 0", fix="300 steps of 64 images at 1e-3")
        self._model, self._data, self._loss = model, data, loss
        self._learning_rate, self._batch_size = learning_rate, batch_size
        self._parameters = list(parameters)
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate)
        self.steps = steps
        self.index = 0
        """Steps taken."""

    def step(self) -> float:
        """Take one step; returns the batch's mean loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * (1 - self.index / self.steps)
        before = [parameter.requires_grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        images, labels = self._data.batch(torch.randint(len(self._data), (self._batch_size,)))
        device = self._parameters[0].device
        loss = self._loss(self._model, (images.to(device), labels.to(device))).mean()
        loss.backward()
        self._optimizer.step()
        for parameter, trained in zip(self._parameters, before, strict=True):
            parameter.grad = None
            parameter.requires_grad_(trained)
        self.index += 1
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: weights, Adam's averages, the step."""
        return {"index": self.index, "model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.index = int(state["index"])
