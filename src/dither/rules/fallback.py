"""The rule for operations without one: the vector-Jacobian product of that one operation.

The operation is run again, its inputs detached, from the random state it first ran in; then one product per
example is taken at once (vmap), with the output gradient of the other examples masked to zero. The product is
linear in the output gradient, so each is exactly that example's gradient, wherever the inputs carry the examples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dither.capture.uses import ParamUse, map_tensors, tensors_in
from dither.errors import UnsupportedOpError
from dither.rules.rule import Cost, Rule


class Fallback(Rule):
    """Vmapped vector-Jacobian product of the one operation; costs one backward of it per example."""

    replays = True

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (B, *parameter.shape)."""
        call = use.call
        if len(call.output_shapes) != 1:
            raise UnsupportedOpError(
                f"{call.name} uses parameter {use.name} and returns {len(call.output_shapes)} tensors.",
                fix="use operations with one output, or register a rule (CONTRIBUTING.md)",
            )
        operand = list(tensors_in((call.args, call.kwargs)))[int(use.slot)]
        leaf = operand.detach().clone().requires_grad_()
        replay: Any = map_tensors(lambda t: leaf if t is operand else t, (call.args, call.kwargs))
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            if call.rng_state is not None:
                torch.set_rng_state(call.rng_state)
            (output,) = [t for t in tensors_in(call.function(*replay[0], **replay[1])) if t.is_floating_point()]
        layout = use.examples
        owners = layout.owners(grad_output.device).view(-1, *[1] * (grad_output.dim() - layout.axis - 1))
        if grad_output.dim() == 0:
            owners = owners.view(())
        examples = torch.arange(layout.batch, device=grad_output.device).view(-1, *[1] * grad_output.dim())
        masked = torch.where(owners == examples, grad_output, 0)
        try:
            (gradients,) = torch.autograd.grad(output, leaf, masked, is_grads_batched=True)
        except RuntimeError as error:
            raise UnsupportedOpError(
                f"{call.name} uses parameter {use.name}, has no rule and no per-example derivative: {error}",
                fix="write the step with other torch operations, or register a rule (CONTRIBUTING.md)",
            ) from error
        return gradients

    def cost(self, use: ParamUse) -> Cost:
        """Always formed."""
        return Cost(0.0, 0.0, float(use.batch * use.parameter.numel() * use.parameter.element_size()))
