"""Which device does the work."""

from __future__ import annotations

import torch

from brainfm_cli.errors import SettingsError


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` takes a GPU where there is one.

    Raises
    ------
    SettingsError
        The device is unknown, or not at hand.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    at_hand = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = name.partition(":")[0]
    if not at_hand.get(kind, False):
        what = "is not available on this machine" if kind in at_hand else "is unknown"
        raise SettingsError(f"device '{name}' {what}", fix="use --device cpu or --device auto")
    return torch.device(name)
