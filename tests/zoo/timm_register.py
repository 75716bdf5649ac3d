"""How an image classifier of timm is registered, and small sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.models as tm
from timm.layers.norm_act import GroupNormAct
from torch import nn

from zoo import REPLACED, classification, entry, group_norm, images, without_batch_norm

DROP = {"drop_rate": 0.2, "drop_path_rate": 0.3}
"""Dropout before the classifier, and of whole branches."""
INNER = {"attn_drop_rate": 0.1, "proj_drop_rate": 0.1}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}
TWO_STAGES = {"depths": (1, 2), "embed_dim": 8, "num_heads": (2, 2), "window_size": 2}


def register(
    name: str,
    make: Callable[..., nn.Module],
    size: int = 16,
    *,
    quick: bool = False,
    replace: bool = False,
    **config: Any,
) -> None:
    """Register a classifier of five classes.

    Args:
        name: the row's name.
        make: the class, or a function of its arguments.
        size: of the images.
        quick: whether the tests run it.
        replace: whether batch norm is replaced after the model is built, for classes that let nobody choose.
        config: arguments of `make`.
    """
    replaced = replace or config.get("norm_layer") in (group_norm, GROUP_ACT)

    @entry("timm", name, f"images {size}x{size}", quick=quick, note=REPLACED if replaced else "")
    def build():
        model, x = make(num_classes=5, **config), images(size)
        if replace:
            model = without_batch_norm(model)
        return model, classification(lambda: _first(model(x)))


def _first(output: Any) -> Any:
    """The classifier's logits; some models return those of a second head beside them."""
    return output[0] if isinstance(output, tuple) else output


def named(name: str) -> Callable[..., nn.Module]:
    """A named timm architecture, to be made small by overriding its config."""
    return partial(tm.create_model, name)


GROUP_ACT = partial(GroupNormAct, num_groups=1)
