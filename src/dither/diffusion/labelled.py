"""Anybody's denoiser, forward(x, t, y), under the signature that the loss and the samplers call."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from dither.diffusion.sampling import evaluating
from dither.errors import ConfigurationError, DitherError


def with_hidden(y: Tensor, drop_label: Tensor, num_classes: int, refuse: bool) -> Tensor:
    """Labels (B,), `num_classes` where `drop_label` (B,) is true.

    Raises:
        ConfigurationError: `refuse`, for a model that never saw a label hidden, and one is.
    """
    if refuse and bool(drop_label.any()):
        raise ConfigurationError(
            "the model was trained without label dropout and has no 'no label'", fix="use guidance 1"
        )
    return torch.where(drop_label, num_classes, y)


class LabelledModel(nn.Module):
    """A model of the user's with forward(x, t, y), which takes label `num_classes` as "no label".

    A forward that has an argument `drop_label`, as `DiT`'s, gets it and does that itself.

    Args:
        net: predicts (B, C, H, W) from x (B, C, H, W), t (B,) and y (B,).
        input_size: image side.
        in_channels: image channels C.
        num_classes: labels run from 0 to `num_classes - 1`.
        hides_labels: whether "no label" occurs: with label dropout.
        fractions: whether timesteps between whole numbers occur: the sampler "euler" has such.

    Raises:
        ConfigurationError: on a public batch of zeros, the model fails or returns another shape.
    """

    def __init__(
        self,
        net: nn.Module,
        input_size: int,
        in_channels: int,
        num_classes: int,
        hides_labels: bool,
        fractions: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.hides_labels = hides_labels
        self._drops_itself = "drop_label" in inspect.signature(net.forward).parameters
        self._try(torch.zeros(2, dtype=torch.int64))
        if fractions:
            self._try(torch.full((2,), 0.5))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """Predict (B, C, H, W); the label is hidden where `drop_label` (B,) is true."""
        if self._drops_itself:
            out: Tensor = self.net(x, t, y, drop_label=drop_label)
            return out
        if drop_label is not None:
            y = with_hidden(y, drop_label, self.num_classes, refuse=not self.hides_labels and not self.training)
        out = self.net(x, t, y)
        return out

    @torch.no_grad()
    def _try(self, t: Tensor) -> None:
        name = type(self.net).__name__
        x = torch.zeros(2, self.in_channels, self.input_size, self.input_size)
        y = torch.full((2,), self.num_classes - 1)
        hidden = torch.tensor([False, self.hides_labels])
        label = f", where label {self.num_classes} means 'no label'" if self.hides_labels else ""
        fix = f"forward(x, t, y) predicts {tuple(x.shape)} from x {tuple(x.shape)}, t (2,), y (2,){label}"
        if t.is_floating_point():
            fix = "take timesteps between whole numbers, which the sampler euler has, or sample by dpm-solver++"
        try:
            with torch.random.fork_rng(devices=[]), evaluating(self):
                out = self(x, t, y, drop_label=hidden)
        except DitherError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ConfigurationError(
                f"{name} fails at timesteps {t.tolist()}: {type(error).__name__}: {error}", fix=fix
            ) from error
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ConfigurationError(f"{name} returns {got}", fix=fix)
