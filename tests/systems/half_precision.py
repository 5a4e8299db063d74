"""The arithmetic of GPUs, on the CPU: bfloat16 autocast around a step of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def assert_trains_in_half_precision(system: Any, batch: Any, *, exactly: Sequence[str] = (), rel: float = 0.1) -> None:
    """Terms near those of 32 bits (``exactly`` equal where named), finite gradients."""
    torch.manual_seed(0)
    whole = system.losses(batch, epoch=0.0)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = system.losses(batch, epoch=0.0)
        loss = sum(system.loss_weights[name] * value for name, value in half.items() if name in system.loss_weights)
    for name in system.loss_weights.keys() & whole.keys():
        assert half[name].item() == pytest.approx(whole[name].item(), rel=rel, abs=0.02), name
    for name in exactly:
        assert half[name].item() == whole[name].item(), name
    system.module.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in system.module.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
