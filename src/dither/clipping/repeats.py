"""Proof that a second backward pass repeats the first: what is summed must be what the norms were taken of.

A hook that draws random numbers, a backward with a state, or a checkpoint that recomputes with other random numbers
sends something else the second time, which no norm has bounded. So the first pass keeps a fingerprint of what each use
received, and the second compares. A fingerprint is the product with fixed pseudo-random factors along every axis but
the examples': one number for each entry of that axis, for one reading of the tensor. Whatever changes by more than
rounding changes it, also where entries trade places or sign, but for coincidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dither.capture.examples import Layout
from dither.capture.uses import OpCall, ParamUse, tensors_in
from dither.errors import CoverageError


@dataclass(frozen=True)
class Fingerprint:
    """One tensor's.

    Attributes:
        products: with the fixed factors, one for each entry of the example axis, float32 or float64.
        sizes: norms of the same entries; None where the products are compared bit for bit.
    """

    products: Tensor
    sizes: Tensor | None

    @staticmethod
    def of(tensor: Tensor, layout: Layout, bitwise: bool) -> Fingerprint:
        """Of a gradient, or of an input, which need not have the examples' axis."""
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        axis = layout.axis if tensor.dim() > layout.axis and tensor.shape[layout.axis] == layout.size else None
        wide = torch.float64 if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
        products = tensor.to(wide)
        sizes = None
        if not bitwise:
            others = [a for a in range(tensor.dim()) if a != axis]
            sizes = torch.linalg.vector_norm(products, dim=others) if others else products.abs()
        while products.dim() > (0 if axis is None else axis + 1):
            products = products @ _factors(products.shape[-1], wide, products.device)
        if products.dim() > 1:
            products = products.flatten(0, -2).mT @ _factors(products[..., 0].numel(), wide, products.device)
        return Fingerprint(products, sizes)

    def repeats(self, first: Fingerprint, factors: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether this is the first's fingerprint, times factors for each entry of the axis."""
        if self.products.shape != first.products.shape:
            return False
        if first.sizes is None:
            return torch.equal(self.products, first.products)
        expected, sizes = first.products, first.sizes
        if factors is not None:
            expected, sizes = expected * factors.to(expected), sizes * factors.to(sizes)
        return bool(((self.products - expected).abs() <= tolerance(dtype) * sizes).all())


def tolerance(dtype: torch.dtype) -> float:
    """How far a repeated gradient may be off, against its norm, where sums run in another order each time.

    Half of float32's digits, or four units in the last place of a narrower type. Rounding that a few hundred layers
    carry on stays far below; what stays below moves an example's part of the sum by no more than that share of it.
    """
    share = float(torch.finfo(torch.float32).eps ** 0.5)
    return max(share, 4.0 * torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else share


class Repeats:
    """What each use received in the first pass, and the comparison in the second."""

    def __init__(self) -> None:
        self._first: dict[OpCall, list[Fingerprint]] = {}
        self._met: set[OpCall] = set()

    def note(self, use: ParamUse, gradient: Tensor, scaled: bool = False) -> None:
        """In the first pass: keep the fingerprints of what the use received.

        Args:
            use: of the tape, its examples decided.
            gradient: its output's.
            scaled: whether the second pass will send scaled losses, so that nothing repeats bit for bit.
        """
        if use.call not in self._first:
            # On a CPU every sum runs in the same order again; CUDA's atomic additions need not.
            bitwise = gradient.device.type == "cpu" and not scaled
            self._first[use.call] = [Fingerprint.of(t, use.examples, bitwise) for t in _received(use, gradient)]

    def check(self, use: ParamUse, gradient: Tensor, factors: Tensor | None = None) -> None:
        """In the second pass: raise CoverageError unless the use receives the same again.

        Args:
            use: as it was noted.
            gradient: its output's.
            factors: (B,), what the losses were scaled by since; None if they were not.
        """
        if use.call in self._met:
            return
        first = self._first.get(use.call)
        if first is None:
            if bool(gradient.any()):
                raise _differs(use.name, use.call, "received nothing in the first")
            return
        self._met.add(use.call)
        tensors = _received(use, gradient)
        for position, (tensor, before) in enumerate(zip(tensors, first, strict=True)):
            scale = None if factors is None or position else factors[use.examples.owners(factors.device)]
            again = Fingerprint.of(tensor, use.examples, before.sizes is None)
            if not again.repeats(before, scale, tensor.dtype):
                what = "an input that is recomputed" if position else "its output gradient"
                raise _differs(use.name, use.call, f"got {what} as another than in the first")

    def check_all_met(self) -> None:
        """Raise CoverageError if a use that received something in the first pass received nothing in the second."""
        for call in self._first:
            if call not in self._met:
                raise _differs("", call, "received nothing, and did so in the first")


def _received(use: ParamUse, gradient: Tensor) -> list[Tensor]:
    """The output gradient, and the inputs that hooks hold: a checkpoint recomputes them in each pass."""
    if use.call.hidden is None:
        return [gradient]
    kept = {id(tensor) for tensor in tensors_in(*use.call.hidden[:2])}
    return [gradient, *(t for t in tensors_in(use.call.args, use.call.kwargs) if id(t) not in kept)]


def _differs(parameter: str, call: OpCall, how: str) -> CoverageError:
    named = f" (parameter {parameter})" if parameter else ""
    return CoverageError(
        f"In the second backward pass {call.name}{named} {how}: the sum would not be of the gradients that were "
        "clipped. Nothing was added.",
        fix="choose strategy='auto', 'hold', 'ghost' or 'tile', which send the losses back once; or make the backward "
        "pass repeat itself: no random numbers or state in hooks and backward methods, preserve_rng_state=True in "
        "checkpoints",
    )


@lru_cache(maxsize=256)
def _factors(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed pseudo-random numbers of either sign, 1/2 to 1 in size, so that none hides an entry."""
    generator = torch.Generator().manual_seed(size)
    numbers = torch.rand(size, generator=generator, dtype=torch.float64)
    return torch.where(numbers < 0.5, numbers - 1.0, numbers).to(dtype=dtype, device=device)
