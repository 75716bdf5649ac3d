"""Models of a user, named by class path in the tests of --model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A small class-conditional network; class `classes` means no label."""

    def __init__(self, width: int = 8, classes: int = 11, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.label = nn.Embedding(classes, width)
        self.time = nn.Linear(1, width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.norm(self.first(x)) + (self.label(y) + self.time(t[:, None] / 1000))[:, :, None, None]
        return self.last(torch.tanh(h))


class Tabled(Net):
    """Looks timesteps up."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Embedding(1001, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, self.times(t).squeeze(1), y)


class Mixing(Net):
    """Lets examples see each other."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x - x.mean(0), t, y)


class Classifier(Net):
    """Returns something else than images."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y).mean((1, 2, 3))
