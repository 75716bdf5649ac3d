"""Adam whose second moments leave out the noise that was added to the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from dither.errors import ConfigurationError


class AdamBC(torch.optim.Optimizer):
    """DP-AdamBC: Adam with the noise's variance subtracted from its second moments.

    The average of squared private gradients is the squared gradients' plus the noise's variance, which is larger, so
    plain Adam divides every coordinate by about the same number and adapts to nothing. The variance is known: it is
    taken off again before the root. With `noise_std` 0 this is Adam.

    Source: Tang et al. 2024, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)",
    algorithm 1. Guarantee: post-processing of private gradients; the deviation is a public constant.

    Args:
        params: as any torch optimizer's.
        lr: learning rate.
        betas: decay of the averages of gradients and of their squares.
        floor: least second moment, as a share of the noise's variance; where the signal is lost in noise this is what
            divides. Small: such coordinates take long steps. The paper's gamma', there an absolute number.
        eps: added to the root, as Adam's.
        noise_std: standard deviation of the noise in each coordinate of `grad`. `PrivateTraining` sets it.

    Raises:
        ConfigurationError: an argument is outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 0.1,
        eps: float = 1e-8,
        noise_std: float = 0.0,
    ) -> None:
        if not (lr > 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigurationError(f"lr {lr} or betas {betas} cannot be", fix="lr above 0, betas from 0 to below 1")
        if not (floor > 0 and eps >= 0 and 0 <= noise_std < math.inf):
            raise ConfigurationError(
                f"floor {floor}, eps {eps} or noise_std {noise_std} cannot be", fix="floor above 0, the others from 0"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "eps": eps, "noise_std": noise_std})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure`, if given, computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(group, parameters)
        return loss

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            state["step"] += 1
        (first, second), variance = group["betas"], group["noise_std"] ** 2
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        averages, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(averages, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_div(squares, [1 - second ** state["step"] for state in states])
        torch._foreach_sub_(roots, variance)
        torch._foreach_clamp_min_(roots, group["floor"] * variance)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, [1 - first ** state["step"] for state in states])
        torch._foreach_addcdiv_(parameters, averages, roots, value=-group["lr"])
