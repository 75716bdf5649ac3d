"""torch's random states, to draw the same numbers once more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class DrawnFrom:
    """The states that torch draws from as they are now: the CPU's and those of some devices.

    Args:
        devices: whose state is kept besides the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        found = {(d.type, d.index): d for d in devices if d.type not in ("cpu", "meta")}
        self._devices = list(found.values())
        self._cpu, self._states = torch.get_rng_state(), [_of(device, "get_rng_state") for device in self._devices]

    @property
    def moved(self) -> bool:
        """Whether numbers were drawn since."""
        pairs = zip(self._devices, self._states, strict=True)
        return not torch.equal(self._cpu, torch.get_rng_state()) or any(
            not torch.equal(state, _of(device, "get_rng_state")) for device, state in pairs
        )

    def restore(self) -> None:
        """Draw the same numbers from here on."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._states, strict=True):
            _of(device, "set_rng_state", state)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers inside; outside nothing is known of it."""
        now = DrawnFrom(self._devices)
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _of(device: torch.device, function: str, *state: Tensor) -> Tensor:
    where = () if device.type == "mps" else (device,)  # there is one, and its functions take none
    found: Tensor = getattr(torch.get_device_module(device), function)(*state, *where)
    return found
