"""An example whose rows cancel: norm and sum must round alike, or what is clipped exceeds the bound."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dither

C = 0.1


def _opposed(shape: tuple[int, ...], apart: float) -> torch.Tensor:
    """A map, and nearly the same again: against opposite gradients their parts of a weight gradient cancel."""
    x = torch.randn(1, *shape)
    return torch.cat([x, x + apart * torch.randn_like(x)], 1)


class Table(nn.Module):
    """Looked up twice for every id."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


class Heads(nn.Module):
    """A raw matrix for each of three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bthd,hdp->bthp", x, self.weight)


def _linear(apart: float):
    return nn.Linear(64, 64, bias=False), _opposed((64, 64), apart), 1


def _heads(apart: float):
    return Heads(), _opposed((64, 3, 16), apart), 1


def _conv(apart: float):
    x = _opposed((12, 32, 8), apart).view(1, 2, 12, 32, 8).transpose(1, 2).reshape(1, 12, 64, 8)
    return nn.Conv2d(12, 8, (1, 3), bias=False), x, 2


CASES = {"linear": _linear, "heads": _heads, "conv": _conv}


@pytest.mark.parametrize("apart", [1e-5, 1e-6, 1e-7, 0.0])
@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "tile", "two_pass"])
@pytest.mark.parametrize("case", CASES)
def test_the_bound_holds_where_an_example_s_rows_cancel(case, strategy, apart):
    model, x, axis = CASES[case](apart)
    one, _ = model(x).detach().chunk(2, axis)
    c = torch.randn_like(one) * 1e3
    signs = torch.cat([c, -c], axis)
    found = dither.clipped_sum(model, lambda: (model(x) * signs).flatten(1).sum(1), max_grad_norm=C, strategy=strategy)
    size = sum(g.double().square().sum() for g in found.gradients.values()).sqrt()
    assert float(size) <= C * (1 + 1e-4)


@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "tile", "two_pass"])
def test_the_bound_holds_where_looked_up_rows_cancel(strategy):
    model, ids = Table(), torch.randint(9, (1, 50)).repeat(1, 40)
    c = torch.randn(1, 1000, 64) * 1e3
    signs = torch.cat([c, -c], 1)
    found = dither.clipped_sum(
        model, lambda: (model(ids) * signs).flatten(1).sum(1), max_grad_norm=C, strategy=strategy
    )
    size = found.gradients["table.weight"].double().norm()
    assert float(size) <= C * (1 + 1e-4)


def test_other_examples_are_summed_as_ever():
    model, x, _ = _linear(1e-7)
    c = torch.randn(1, 64, 64) * 1e3
    x, signs = torch.cat([x, torch.randn_like(x)]), torch.cat([torch.cat([c, -c], 1), torch.randn(1, 128, 64)])
    sums = {
        strategy: dither.clipped_sum(
            model, lambda: (model(x) * signs).flatten(1).sum(1), max_grad_norm=1e3, strategy=strategy
        )
        for strategy in ("hold", "ghost", "tile", "two_pass")
    }
    for found in sums.values():
        torch.testing.assert_close(found.gradients["weight"], sums["hold"].gradients["weight"], rtol=1e-4, atol=1e-3)
