"""A process with one share of a model: `python -m lattice_serve.engine.tensor_parallel.worker FD`.

FD is a socket to the leader, whose `commands` it carries out one after another. It is the life line, too: when the
leader closes it, or dies, this process ends.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

from lattice_serve.engine import child_process
from lattice_serve.engine.backend import Backend, make_backend
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import LatticeError
from lattice_serve.engine.models.registry import load_config
from lattice_serve.engine.state_pool import StatePool
from lattice_serve.engine.tensor_parallel.commands import (
    READY,
    CheckScrubbed,
    Command,
    Initialise,
    Read,
    Reserve,
    Run,
    Scrub,
    Start,
    Write,
    receive,
)
from lattice_serve.engine.tensor_parallel.group import Group, devices
from lattice_serve.engine.tensor_parallel.share import Share
from lattice_serve.engine.weights import load_model, pick_dtype
from lattice_serve.kernels.mixers.segments import Segments

Inbox = queue.SimpleQueue[Command]

_LAST_SECONDS = 1.0
"""After which this process ends in any case."""


def _read(link: socket.socket, inbox: Inbox) -> None:
    """Commands into `inbox`; at their end this process ends, whatever it is at or waits for."""
    folder = None
    with suppress(OSError):  # a leader that ends with `READY` unread resets the connection
        while (command := receive(link)) is not None:
            if isinstance(command, Start):
                folder = command.folder
            inbox.put(command)
    # Who is about to join the others may look for the folder for minutes, and let no other thread go on meanwhile.
    signal.setitimer(signal.ITIMER_REAL, _LAST_SECONDS)
    if folder is not None:  # the leader may not have come to it
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def serve(link: socket.socket, inbox: Inbox) -> None:
    """Load a share and carry out commands, without end."""
    start = inbox.get()
    assert isinstance(start, Start)
    config = EngineConfig.model_validate_json(start.config)
    share = Share(start.rank, config.tensor_parallel_size)
    torch.set_num_threads(1)
    device = devices(config.device, share.size)[share.rank]
    dtype = pick_dtype(config.dtype, load_config(config.model))
    model = load_model(config.model, device=device, dtype=dtype, share=share)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    link.sendall(READY)
    group = Group(share, device, Path(start.folder))
    reserve = inbox.get()
    assert isinstance(reserve, Reserve)
    pool = StatePool(model.initial_row(), reserve.rows, device)
    backend = make_backend(
        model,
        pool.memory,
        max_tokens=config.max_step_tokens,
        threads=1,
        beside=True,
        quantization=config.quantization,
        gather=group.gather,
    )
    with torch.inference_mode():
        while True:
            carry_out(inbox.get(), pool, backend, group)


def carry_out(command: Command, pool: StatePool, backend: Backend, group: Group) -> None:
    match command:
        case Run(ids, segments, decodes):
            backend(ids, Segments.of(segments, decodes), ())
        case Initialise(row):
            pool.initialise(row)
        case Scrub(row):
            pool.scrub(row)
        case Read(row):
            group.gather(pool.memory[None, row])
        case Write(row):
            group.scatter(pool.memory[row], None)
        case CheckScrubbed(rows):
            pool.check_scrubbed(rows)
        case _:
            raise AssertionError(f"{command} comes once, at the start")


def main() -> int:
    """Returns the exit status where the share could not be loaded; otherwise it ends with the leader."""
    child_process.wake_at_parents_end()
    inbox: Inbox = queue.SimpleQueue()
    link = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_read, args=(link, inbox), daemon=True).start()
    try:
        serve(link, inbox)
    except LatticeError as error:
        print(f"error: {error.message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
