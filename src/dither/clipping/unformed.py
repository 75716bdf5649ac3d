"""Collectors that form no gradients: they keep inputs and output gradients, and take norms and sums from these.

What they kept is formed for rare examples alone: whose rows cancel, or whose squares overflow. Legend: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dither.capture.uses import ParamUse
from dither.clipping import one_by_one
from dither.clipping.collectors import Added, add_kept, check_gradient, wide_squares
from dither.clipping.one_by_one import Room
from dither.rules.crossing import crossed_norm
from dither.rules.rule import at_least_float32, squared_rows


def _wide(grad_output: Tensor) -> Tensor:
    """In float32 or wider, as the norm was computed: gradients of half precision would be rounded after it."""
    return grad_output.to(at_least_float32(grad_output.dtype))


class Unformed:
    """Keeps inputs and output gradients of a parameter's uses; forms what a few rare examples need.

    Args:
        strategy: its name.
        room: what may be formed for these; beyond it each example's gradient is taken alone.
    """

    def __init__(self, strategy: str, room: Room) -> None:
        self.strategy = strategy
        self._room = room
        self._kept: list[tuple[ParamUse, Tensor, int]] = []
        self._formed: Tensor | None = None
        self._alone = False

    def _keep(self, use: ParamUse, grad_output: Tensor) -> None:
        self._kept.append((use, grad_output, grad_output._version))

    def _received(self) -> list[tuple[ParamUse, Tensor]]:
        for _, grad_output, version in self._kept:
            check_gradient(grad_output, version)
        return [(use, grad_output) for use, grad_output, _ in self._kept]

    def _norm_of_cancelling_rows(self) -> Tensor:
        """Norms of the gradients themselves, of which the sum is taken then too."""
        received = self._received()
        if self._room.hold(received):
            self._formed = self.formed()
            assert self._formed is not None
            return squared_rows(self._formed)
        self._alone = True
        return one_by_one.squared_norms(received, range(received[0][0].batch), self._room)

    def formed(self) -> Tensor | None:
        """Formed now, for the rare examples that need it."""
        if self._formed is not None:
            return self._formed
        every = Added()
        for use, grad_output in self._received():
            every.receive(use, _wide(grad_output))
        return every.formed()

    def wide_squared_norm(self, examples: Sequence[int]) -> Tensor | None:
        """Of gradients that are formed for it, all at once where there is room."""
        if self._formed is None and self._kept and not self._room.fits(received := self._received()):
            return one_by_one.squared_norms(received, examples, self._room)
        return wide_squares(self.formed(), examples)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, dropped: Tensor | None = None) -> None:
        """One weighted product a use, over all rows; or of what was formed."""
        if self._formed is not None:
            add_kept(self._formed, weights, into, dropped)
            return
        received = self._received()
        if not received:
            return
        for use, _ in received:
            use.call.check_unchanged()
        if self._alone:
            for example in range(len(weights)) if dropped is None else (~dropped).nonzero().flatten().tolist():
                gradient = one_by_one.gradient_of(received, example)
                into.add_(gradient.mul_(weights[example].to(gradient.dtype)))
        elif dropped is not None and self._room.fits(received):
            add_kept(self.formed(), weights, into, dropped)
        else:
            for use, grad_output in received:
                if dropped is not None:
                    use, grad_output = one_by_one.without(use, grad_output, dropped)
                use.rule.add_weighted_sum(use, grad_output, weights, into)


class NotFormed(Unformed):
    """Keeps input and output gradient of a parameter that is used once; strategy ghost or tile."""

    def __init__(self, strategy: str, room: Room) -> None:
        super().__init__(strategy, room)
        self._squared: Tensor | None = None

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Compute the norm at once, while the tensors are in cache; where rows cancel, form the gradients."""
        self._kept.clear()
        self._keep(use, grad_output)
        norm = use.rule.squared_norm if self.strategy == "ghost" else use.rule.tile_squared_norm
        self._squared = norm(use, grad_output)
        if self._squared is None:
            self._squared = self._norm_of_cancelling_rows()
            if self._formed is not None:
                self._kept.clear()

    @property
    def keeps_inputs(self) -> bool:
        """Until it is told to forget, or if the gradients were formed."""
        return bool(self._kept)

    @property
    def needs_pass(self) -> bool:
        """Whether the sum takes another backward pass (for two passes)."""
        return self._formed is None and not self._alone

    def forget(self) -> None:
        """Drop the tensors, keep the norm (for two passes), unless each example's gradient is taken from them again."""
        if not self._alone:
            self._kept.clear()

    def squared_norm(self) -> Tensor | None:
        """As computed on arrival."""
        return self._squared


class Crossed(Unformed):
    """Keeps inputs and output gradient of all uses of a parameter; multiplies each use's rows with every other's."""

    keeps_inputs = True

    def __init__(self, room: Room) -> None:
        super().__init__("cross", room)

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Keep them: the norm needs all."""
        self._keep(use, grad_output)

    def squared_norm(self) -> Tensor | None:
        """From the products of all rows; where these cancel, of the gradients, which the sum then takes as well."""
        received = self._received()
        if not received:
            return None
        squared: Tensor | None
        if len(received) == 1:
            use, grad_output = received[0]
            squared = use.rule.squared_norm(use, grad_output)
        else:
            squared = crossed_norm([use.rule.row_factors(use, g) for use, g in received])
        return self._norm_of_cancelling_rows() if squared is None else squared
