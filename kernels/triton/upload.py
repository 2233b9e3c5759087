"""From host memory to a device, without waiting for what the device is at."""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """`values`, on the host, where they can be copied to `device` without waiting; torch keeps them until they are."""
    return values if device.type == "cpu" else values.pin_memory()


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values`, of any shape and dtype, on `device`."""
    return pinned(values, device).to(device, non_blocking=True)
