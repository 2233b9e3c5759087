"""How tensors cross between the processes of one model: torch.distributed, NCCL on GPUs and Gloo on CPUs."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lattice_serve.engine.errors import ConfigError, EngineDied
from lattice_serve.engine.tensor_parallel.share import Share

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
_SECONDS = 300
"""What a collective may take: a process may be compiling a kernel that another has in its cache."""
_JOIN_SECONDS = 60
"""What joining may, where all have loaded their shares."""


def devices(device: str, size: int) -> list[str]:
    """Where each of `size` shares lies: `cuda` from the first GPU on, `cuda:2` from the third, all on one `cpu`.

    Raises `ConfigError` where there are not as many GPUs, or shares cannot be there. Other devices are not looked at.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and index.isdigit() == bool(index):
        first, there = int(index or 0), torch.cuda.device_count()
        if first + size > there > 0:
            raise ConfigError(
                f"device is {device!r} and tensor_parallel_size {size}: that takes {first + size} GPUs, and there are "
                f"{there}: lower replicas or tensor_parallel_size",
                param="device",
            )
        return [f"cuda:{first + rank}" for rank in range(size)]
    if size > 1 and kind != "cpu":
        raise ConfigError(f"device is {device!r}: with tensor_parallel_size give cuda or cpu", param="device")
    return [device] * size


def check_free() -> None:
    """Raises `ConfigError` where this process cannot be in a group: it can be in one."""
    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed: leave tensor_parallel_size out")
    if dist.is_initialized():
        raise ConfigError(
            "this process is in a group of torch.distributed already: load a model with tensor_parallel_size in a "
            "process of its own",
            param="tensor_parallel_size",
        )


class Group:
    """The processes of one model. Its collectives wait for all of them; each must come to them in the same order.

    On a GPU they are put on its current stream, and may be captured in a CUDA graph. That has not been tried: no two
    GPUs were there. They raise `EngineDied` where a process is gone, as far as the backend finds out: Gloo at once,
    NCCL by a watchdog that ends the process after a while.
    """

    def __init__(self, share: Share, device: str, folder: Path) -> None:
        """Wait for all to come, by a file in `folder`. Of torch's groups this is the default one.

        Raises `EngineDied` when one does not come.
        """
        # All are on this machine: nothing is to listen where others can reach it.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        on_gpu = device.startswith("cuda")
        store = dist.FileStore(str(folder / "group"), share.size)  # type: ignore[attr-defined]  # which it documents
        try:  # a backend would wait for one that has died as long as for a collective
            store.set(f"{share.rank} is here", "")
            store.wait([f"{rank} is here" for rank in range(share.size)], timedelta(seconds=_JOIN_SECONDS))
        except RuntimeError as error:
            raise _died() from error
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=share.rank,
            world_size=share.size,
            timeout=timedelta(seconds=_SECONDS),
            device_id=torch.device(device) if on_gpu else None,
        )
        self.share = share

    def gather(self, part: Tensor) -> Tensor:
        """[1, ...] of each share -> [shares, ...], in the order of their ranks."""
        parts = part.new_empty(self.share.size, *part.shape[1:])
        try:
            _all_gather(parts, part)
        except RuntimeError as error:
            raise _died() from error
        return parts

    def scatter(self, part: Tensor, parts: Tensor | None) -> None:
        """Into `part` [...], which is contiguous, this share of what the leader alone gives, `parts` [shares, ...]."""
        try:
            dist.scatter(part, None if parts is None else list(parts), src=0)
        except RuntimeError as error:
            raise _died() from error

    def close(self) -> None:
        with suppress(RuntimeError):  # others may have gone before
            dist.destroy_process_group()


def _died() -> EngineDied:
    return EngineDied("a process of this model has ended, and with it the engine: start it again")
