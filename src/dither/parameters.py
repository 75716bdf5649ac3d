"""Which parameters a private run trains, and whether its optimizer fits them."""

from __future__ import annotations

import torch
from torch import nn

from dither.errors import ConfigurationError


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The model's trainable parameters, when the optimizer's fit them.

    Raises:
        ConfigurationError: there are none, or the optimizer holds none of them, or others, or is LBFGS.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigurationError(
            "The model has no trainable parameters.", fix="set requires_grad on those that should be trained"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError("LBFGS evaluates the loss several times a step.", fix="use Adam, AdamW or SGD")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in parameters.values()}:
        raise ConfigurationError(
            "The optimizer holds none of the model's trainable parameters.",
            fix="build it after the model is moved or replaced: optimizer = AdamW(model.parameters())",
        )
    foreign = held - {id(p) for p in model.parameters()}
    if foreign:
        raise ConfigurationError(
            f"The optimizer holds {len(foreign)} parameters that are not the model's; their gradients would be "
            "neither clipped nor noised.",
            fix="put everything that is trained into one module and pass that as the model",
        )
    return parameters
