"""Convolutions in 1, 2 and 3 dimensions, and their transposes: a linear map of patches.

Input (N, C, *space) is unfolded to patches (N, groups, L, C/groups * K), L positions of K taps; each group is then
the linear rule with T = L rows. Without patches, examples are groups of one convolution, whose ordinary weight gradient
holds each example's (Rochette et al. 2019, arXiv:1912.06015). A transposed convolution is the input gradient of a
convolution with the same weight, so the two maps change places: the output gradient is unfolded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dither.kernels as kernels
from dither.capture.examples import ExampleAxis
from dither.capture.uses import ParamUse
from dither.errors import ExampleAxisError
from dither.rules.affine import ChannelBias
from dither.rules.linear import outer_ghost_norm, outer_gradient, outer_tile_norm
from dither.rules.rule import Cost, Rule, at_least_float32, cancels, register_rule, squared_rows

_NATIVE = (torch.float32, torch.float64)

# How per-example gradients are formed, measured on one and two cores over 35 convolutions, each against the other ways.
_WORTH_A_CALL = 1024
"""Values in an example's patches for each of the weight's first channels beyond which torch's own weight gradient,
called once for each example, is faster than writing the patches."""
_WORTH_GROUPS = 512
"""Entries of the weight for each position below which examples are best made groups of one convolution, if taps
overlap: oneDNN then takes as long as for the ordinary weight gradient, where patches take several times that."""
_AT_ONCE = 1 << 18
"""Entries of per-example gradients, or sixteenths of those of maps, for one call: what it writes is to stay in the
cache until it is read, and oneDNN copies the maps."""


def _patches(wide: Tensor, taps: torch.Size, stride: list[int], dilation: list[int]) -> Tensor:
    """What each position sees of a padded map (N, C, *space): (N, L, C * K), by channel, then tap."""
    overlap = any(s < t for s, t in zip(stride, taps, strict=True))
    if len(taps) <= 2 and overlap and wide.dtype in _NATIVE and wide.device.type == "cpu":
        # torch's own unfolding, measured two to three times faster where patches overlap, is of images.
        ahead: tuple[int, ...] = (1,) * (2 - len(taps))
        image = wide.unsqueeze(2) if ahead else wide
        return F.unfold(image, (*ahead, *taps), (*ahead, *dilation), 0, (*ahead, *stride)).mT
    for axis, (size, step, spread) in enumerate(zip(taps, stride, dilation, strict=True), 2):
        wide = wide.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    # (N, C, *positions, *taps) to (N, *positions, C, *taps)
    space = range(2, 2 + len(taps))
    wide = wide.permute(0, *space, 1, *(axis + len(taps) for axis in space))
    return wide.flatten(1, len(taps)).flatten(2)


def _has_fast_groups(x: Tensor) -> bool:
    """Whether a convolution with a group for each example is oneDNN's, whose groups cost nothing of their own."""
    oneDNN = torch.backends.mkldnn
    return x.dtype == torch.float32 and x.device.type == "cpu" and oneDNN.is_available() and bool(oneDNN.enabled)


class ConvWeight(Rule):
    """Weight (O, C/groups, *taps) of a convolution over `dims` spatial dimensions."""

    holds_cheaply = False

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Batched inputs; an unbatched one goes to the fallback."""
        return bool(operands["input"].dim() == self.dims + 2)

    def _options(self, use: ParamUse) -> tuple[list[int], list[tuple[int, int]], list[int], int]:
        stride = self._tuple(use.operand("stride"), 1)
        dilation = self._tuple(use.operand("dilation"), 1)
        padding = use.operand("padding")
        taps = use.parameter.shape[2:]
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
            pads = [(t // 2, t - t // 2) for t in total]
        else:
            pads = [(p, p) for p in self._tuple(0 if padding == "valid" else padding, 0)]
        return stride, pads, dilation, use.operand("groups") or 1

    def _tuple(self, value: Any, default: int) -> list[int]:
        if value is None:
            value = default
        return [value] * self.dims if isinstance(value, int) else list(value) * (self.dims // len(value))

    def _unpadded(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The map that the taps run over, (N, C, *space), and the map of their positions, (N, O, *positions)."""
        return use.operand("input"), grad_output

    def _maps(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The same, the first conjugated and padded."""
        return self._pad(use, use.operand("input").conj()), grad_output

    def _pad(self, use: ParamUse, wide: Tensor) -> Tensor:
        flat = [amount for pair in reversed(self._options(use)[1]) for amount in pair]
        return F.pad(wide, flat) if any(flat) else wide

    def _rows(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B * groups, T, C/groups * K) and positions' values (B * groups, T, O/groups)."""
        if use.examples.axis != 0:
            raise ExampleAxisError(
                f"The examples lie along axis {use.examples.axis} of the output of {use.call.name} ({use.name}).",
                fix="put the examples on axis 0 of a convolution's input",
            )
        stride, _, dilation, groups = self._options(use)
        wide, narrow = self._maps(use, grad_output)
        patches = _patches(wide, use.parameter.shape[2:], stride, dilation).unflatten(2, (groups, -1))
        values = narrow.flatten(2).mT.unflatten(2, (groups, -1))
        common = torch.promote_types(patches.dtype, values.dtype)
        split = use.examples.split
        return self._per_example(split(patches), groups).to(common), self._per_example(split(values), groups).to(common)

    @staticmethod
    def _per_example(rows: Tensor, groups: int) -> Tensor:
        """(B, outer, inner, L, groups, features) to (B * groups, outer * inner * L, features)."""
        batch, features = rows.shape[0], rows.shape[-1]
        rows = rows.reshape(batch, -1, groups, features)
        return rows.transpose(1, 2).reshape(batch * groups, -1, features)

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (B, O, C/groups, *taps)."""
        at_once = self._examples_at_once(use, grad_output)
        if at_once is None:
            x, g = self._rows(use, grad_output)
            rows = None if out is None or out.dtype != g.dtype else out.view(len(g), g.shape[2], x.shape[2])
            return outer_gradient(x, g, rows).reshape(use.batch, *use.parameter.shape)
        if out is None or out.dtype != grad_output.dtype:
            out = grad_output.new_empty(use.batch, *use.parameter.shape)
        formed = self._weight_gradients(use, grad_output, at_once)
        for rows, gradients in zip(out.split(at_once), formed, strict=True):
            rows.copy_(gradients)
        return out

    def _examples_at_once(self, use: ParamUse, grad_output: Tensor) -> int | None:
        """How many examples' gradients a call of torch's own weight gradient is to form: it writes no patches.

        None where patches are better, or have to be taken.
        """
        layout, x, (channels, *window) = use.examples, use.operand("input"), use.parameter.shape
        positions = math.prod(self._positions(use)[2:]) * layout.inner * layout.outer
        regular = isinstance(layout, ExampleAxis) and layout.axis == 0 and layout.outer == 1
        if not layout.batch or not regular or x.dtype != grad_output.dtype or x.dtype not in _NATIVE:
            return None
        stride, _, _, _ = self._options(use)
        overlap = any(step < tap for step, tap in zip(stride, window[1:], strict=True))
        if overlap and _has_fast_groups(x) and use.parameter.numel() <= _WORTH_GROUPS * positions:
            maps = int(x.numel() + grad_output.numel()) // layout.batch
            return min(layout.batch, max(1, _AT_ONCE // max(use.parameter.numel(), maps // 16)))
        return 1 if positions * math.prod(window) > _WORTH_A_CALL * channels else None

    def _weight_gradients(self, use: ParamUse, grad_output: Tensor, at_once: int) -> Iterator[Tensor]:
        """Per-example gradients (b, *shape), of so many examples at a time: each is a group of one convolution."""
        inner, both = use.examples.inner, self._maps(use, grad_output)
        for wide, narrow in zip(*(maps.split(at_once * inner) for maps in both), strict=True):
            count = len(wide) // inner
            # (b * inner, C, *space) to (inner, b * C, *space)
            wide, narrow = (m.unflatten(0, (count, inner)).transpose(0, 1).flatten(1, 2) for m in (wide, narrow))
            yield self._weight_gradient(use, wide, narrow, count).unflatten(0, (count, -1))

    def _weight_gradient(self, use: ParamUse, wide: Tensor, narrow: Tensor, times: int = 1) -> Tensor:
        """The ordinary weight gradient, summed over all maps; of so many times the channels and groups."""
        stride, _, dilation, groups = self._options(use)
        channels, *window = use.parameter.shape
        common = torch.promote_types(wide.dtype, narrow.dtype)
        wide, narrow = wide.to(common), narrow.to(common)
        if times > 1:  # its shape is asked for, not its values
            weight = narrow.new_empty(()).expand(times * channels, *window)
        else:
            weight = use.operand("weight").to(common)
        zeros = [0] * self.dims
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            narrow,
            wide,
            weight,
            None,
            stride,
            zeros,
            dilation,
            False,
            zeros,
            times * groups,
            [False, True, False],
        )
        return gradients[1]

    def _norm(self, use: ParamUse, grad_output: Tensor, ghost: bool) -> Tensor | None:
        norm = outer_ghost_norm if ghost else outer_tile_norm
        squared = norm(*self._rows(use, grad_output))
        return None if squared is None else squared.view(use.batch, -1).sum(1)

    def squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Ghost norm over patches."""
        return self._norm(use, grad_output, ghost=True)

    def tile_squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Norm in tiles of output channels, or of some examples at a time; on a GPU without writing patches."""
        squares = self._in_kernel(use, grad_output) if kernels.serve(grad_output) else None
        if squares is None:
            at_once = self._examples_at_once(use, grad_output)
            if at_once is None:
                return self._norm(use, grad_output, ghost=False)
            squares = torch.cat([squared_rows(rows) for rows in self._weight_gradients(use, grad_output, at_once)])
        # Every entry of a map is in as many patches as there are taps, at most.
        x, g = (squared_rows(use.examples.split(t)).double() for t in self._unpadded(use, grad_output))
        return None if cancels(squares, x * g * use.parameter.shape[2:].numel(), squares.dtype) else squares

    def _in_kernel(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        wide, narrow = self._unpadded(use, grad_output)
        if self.dims > 2 or use.examples.axis != 0 or not kernels.serve(wide, narrow):
            return None
        stride, pads, dilation, groups = self._options(use)
        common = torch.promote_types(wide.dtype, narrow.dtype)
        # (B, outer, inner, ...) to (B, maps of one example, ...)
        x, g = (use.examples.split(t.to(common)).flatten(1, 2) for t in (wide, narrow))
        before = [first for first, _ in pads]
        return kernels.convolution_tile_norm(x, g, use.parameter.shape[2:], stride, before, dilation, groups)

    def add_weighted_sum(self, use: ParamUse, grad_output: Tensor, weights: Tensor, into: Tensor) -> None:
        """The ordinary weight gradient of the weighted output gradient."""
        if grad_output.is_complex():
            super().add_weighted_sum(use, grad_output, weights, into)
            return
        scale = weights.to(at_least_float32(grad_output.dtype))[use.examples.owners(grad_output.device)]
        wide, narrow = self._maps(use, grad_output * scale.view(-1, *[1] * (self.dims + 1)))
        into.add_(self._weight_gradient(use, wide, narrow))

    def cost(self, use: ParamUse) -> Cost:
        """The linear rule's, with T = positions and d = taps."""
        count, _, *space = self._positions(use)
        positions = math.prod(space) * (count // use.batch)
        p, d = use.parameter.shape[0], use.parameter[0].numel()
        batch, groups = use.batch, use.operand("groups") or 1
        ghost = 2.0 * batch * positions * positions * (p + d * groups) if positions > 1 else 0.0
        held = float(batch * use.parameter.numel() * use.parameter.element_size())
        formed = 2.0 * batch * positions * p * d
        return Cost(formed, ghost, held, formed, 2.0 * batch * positions * p * use.parameter.element_size())

    def _positions(self, use: ParamUse) -> torch.Size:
        """Shape of the map of the taps' positions."""
        return use.call.output_shape


class TransposedConvWeight(ConvWeight):
    """Weight (C, O/groups, *taps) of a transposed convolution over `dims` spatial dimensions."""

    def _unpadded(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The taps run over the output gradient; their positions are the input's."""
        return grad_output, use.operand("input")

    def _maps(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The same, the first padded, the second conjugated."""
        stride, _, dilation, _ = self._options(use)
        x: Tensor = use.operand("input").conj()
        wide = self._pad(use, grad_output)
        for axis, (size, step, spread) in enumerate(zip(use.parameter.shape[2:], stride, dilation, strict=True), 2):
            # What output padding added beyond the last position's taps has no part in the weight.
            wide = wide.narrow(axis, 0, (x.shape[axis] - 1) * step + spread * (size - 1) + 1)
        return wide, x

    def _positions(self, use: ParamUse) -> torch.Size:
        shape: torch.Size = use.operand("input").shape
        return shape


_NAMES = ("input", "weight", "bias", "stride", "padding")
for _dims, _plain, _transposed in (
    (1, F.conv1d, F.conv_transpose1d),
    (2, F.conv2d, F.conv_transpose2d),
    (3, F.conv3d, F.conv_transpose3d),
):
    _bias = ChannelBias(_dims)
    register_rule(_plain, (*_NAMES, "dilation", "groups"), {"weight": ConvWeight(_dims), "bias": _bias})
    register_rule(
        _transposed,
        (*_NAMES, "output_padding", "groups", "dilation"),
        {"weight": TransposedConvWeight(_dims), "bias": _bias},
    )
