"""The rules for operations without one: vector-Jacobian products of that one operation, one per example.

The product is linear in the output gradient (or, for a custom autograd function, taken exactly as one example's
backward pass would), so with the output gradient of the other examples masked to zero each is exactly that example's
gradient, wherever the inputs carry the examples.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dither.capture.examples import Layout
from dither.capture.operations import is_in_place
from dither.capture.uses import ParamUse, map_tensors, tensors_in
from dither.errors import UnsupportedOpError
from dither.rules.rule import Rule


class Fallback(Rule):
    """Runs the operation again, its inputs detached, from the random state it first ran in.

    The products are taken at once (vmap) where the operation's derivative allows it, otherwise one after the other;
    both cost one backward of the operation per example.
    """

    replays = True

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (B, *parameter.shape)."""
        masked = masked_gradients(use, grad_output)
        gradients = _products(use, *self._replay(use), masked)
        wrong = ~torch.isfinite(gradients).unsqueeze(-1).flatten(1).all(1)
        if use.batch == 1 or not bool(wrong.any()):
            return gradients
        # Zero times another example's NaN is NaN: each is taken without the others that may be to blame.
        suspects = self._not_finite(use, grad_output)
        gradients = torch.where(
            suspects.view(-1, *[1] * (gradients.dim() - 1)),
            gradients,
            _products(use, *self._replay(use, suspects), masked),
        )
        for example in suspects.nonzero().flatten():
            others = suspects.clone()
            others[example] = False
            row = masked[example : example + 1]
            gradients[example] = _products(use, *self._replay(use, others), row)[0]
        return gradients

    def _not_finite(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Which examples have an input or an output gradient that is not finite, (B,) bool."""
        layout = use.examples
        found = _spoiled(use, grad_output)
        for position, tensor in enumerate(tensors_in(use.call.args, use.call.kwargs)):
            if position not in use.call.fixed and _varies(tensor, layout):
                found |= _spoiled(use, tensor)
        return found

    def _replay(self, use: ParamUse, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the operation again on a new leaf in the parameter's place, some examples' inputs put to zero."""
        call, layout = use.call, use.examples
        tensors = tensors_in(call.args, call.kwargs)
        operand = tensors[int(use.slot)]
        leaf = operand.detach().clone().requires_grad_()
        fixed = {id(tensors[position]) for position in call.fixed}

        overwritten = call.args[0] if is_in_place(call.name) else None  # kept as it was, for another pass

        def given(tensor: Tensor) -> Tensor:
            if tensor is operand:
                return leaf
            if without is None or id(tensor) in fixed or not _varies(tensor, layout):
                return tensor.clone() if tensor is overwritten else tensor
            rows = without[layout.owners(tensor.device)].view(-1, *[1] * (tensor.dim() - layout.axis - 1))
            return torch.where(rows, torch.zeros_like(tensor), tensor)

        replay: Any = map_tensors(given, (call.args, call.kwargs))
        region = torch.autocast(*call.autocast) if call.autocast is not None else nullcontext()
        drawn = call.drawn_from.again() if call.drawn_from is not None else nullcontext()
        with drawn, torch.enable_grad(), region:
            outputs = tensors_in(call.function(*replay[0], **replay[1]))
            return [t for t in outputs if t.is_floating_point() or t.is_complex()][call.output], leaf


def _varies(tensor: Tensor, layout: Layout) -> bool:
    """Whether a tensor has entries for each example where the output has them."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return numbers and tensor.dim() > layout.axis and tensor.shape[layout.axis] == layout.size


def _spoiled(use: ParamUse, entries: Tensor) -> Tensor:
    """Which examples have an entry that is not finite, (B,) bool."""
    finite = torch.isfinite(entries.detach())
    if entries.dim() == 0 or bool(finite.all()):
        return torch.zeros(use.batch, dtype=torch.bool, device=entries.device)
    wrong: Tensor = use.examples.split((~finite).float()).flatten(1).any(1)
    return wrong


def _products(use: ParamUse, output: Tensor, leaf: Tensor, gradients: Tensor) -> Tensor:
    """The vector-Jacobian product of each output gradient, at once or one after the other."""
    try:
        return torch.autograd.grad(output, leaf, gradients, is_grads_batched=True, retain_graph=True)[0]
    except RuntimeError:  # something in the derivative has no batching rule
        pass
    try:
        return torch.stack([torch.autograd.grad(output, leaf, row, retain_graph=True)[0] for row in gradients])
    except RuntimeError as error:
        raise UnsupportedOpError(
            f"{use.call.name} uses parameter {use.name}, has no rule and no derivative that can be taken for one "
            f"example alone: {error}",
            fix="write the step with other torch operations, or register a rule (CONTRIBUTING.md)",
        ) from error


class CustomNode(Fallback):
    """A custom autograd function: its own backward, called once an example, as one example's backward pass would."""

    replays = False

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (B, *tensor.shape) of the tensor that was given to the function."""
        (node,) = use.call.args
        rows = [_asked(node, use, row) for row in masked_gradients(use, grad_output)]
        return torch.stack(rows)


def _asked(node: Any, use: ParamUse, grad_output: Tensor) -> Tensor:
    """What the node gives to the edge of the use for this gradient of one of its outputs."""
    gradients = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in node._input_metadata]
    gradients[use.call.output] = grad_output
    try:
        found = node.apply(*gradients) if hasattr(node, "apply") else node(*gradients)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedOpError(
            f"{use.call.name} is given parameter {use.name}, and its backward cannot be called for one example alone: "
            f"{error}",
            fix="write the function with torch operations, or give its parameter gradient a way through them",
        ) from error
    found = list(found) if isinstance(found, (tuple, list)) else [found]
    if hasattr(node, "needs_input_grad"):  # one entry for each argument of its forward, tensors or not
        found = [g for g, needed in zip(found, node.needs_input_grad, strict=False) if needed]
        edges = [i for i, (parent, _) in enumerate(node.next_functions) if parent is not None]
        found = [found[edges.index(int(use.slot))]]
    else:
        found = [found[int(use.slot)]]
    return torch.zeros_like(use.parameter, requires_grad=False) if found[0] is None else found[0].detach()


def masked_gradients(use: ParamUse, grad_output: Tensor) -> Tensor:
    """The output gradient once for each example, the others' entries zero: (B, *grad_output.shape)."""
    layout = use.examples
    owners = layout.owners(grad_output.device).view(-1, *[1] * (grad_output.dim() - layout.axis - 1))
    if grad_output.dim() == 0:
        owners = owners.view(())
    examples = torch.arange(layout.batch, device=grad_output.device).view(-1, *[1] * grad_output.dim())
    return torch.where(owners == examples, grad_output, 0)
