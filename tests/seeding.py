"""Seeds for the devices that are there."""

from __future__ import annotations

import torch


def seed_only_what_is_there() -> None:
    """`torch.manual_seed` leaves out the kinds of accelerator that this machine has none of.

    For each of them torch would keep a call for later, with the formatted stack of whoever seeded: under pytest about a
    millisecond a seed, and some data sets seed for every example. No number that is drawn changes.
    """
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None
