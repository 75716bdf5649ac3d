"""Options that no per-example gradient can follow are refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
from dither.errors import UnsupportedOpError


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_options_of_a_table_that_couple_examples(table, options):
    model, ids = table(6, 3, **options), torch.randint(6, (4, 5))
    with pytest.raises(UnsupportedOpError, match=next(iter(options))):
        dither.clipped_sum(model, lambda: model(ids).flatten(1).sum(1))


def test_a_last_bag_that_ends_before_the_last_id():
    model, ids, offsets = nn.EmbeddingBag(6, 3, mode="sum"), torch.randint(6, (10,)), torch.tensor([0, 3, 5, 9])

    def bags() -> torch.Tensor:
        return F.embedding_bag(ids, model.weight, offsets, mode="sum", include_last_offset=True)

    with pytest.raises(UnsupportedOpError, match="before the last of 10 ids"):
        dither.clipped_sum(model, lambda: bags().square().sum(1))
