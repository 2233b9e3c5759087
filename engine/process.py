"""The engine as a process of its own: `python -m lattice_serve.engine.process --socket PATH --config JSON`.

It binds a Unix socket at PATH, takes one connection, says `Ready` and speaks the messages of `engine.messages`. The
connection is its life line: when the server closes it, or the server's end of stdin goes, the process ends. With
`--cache-file` it begins with the states that one before it has cached, and leaves its own there, at its end and, with
`--cache-save-seconds`, from time to time.
"""

from __future__ import annotations

import argparse
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from lattice_serve.engine import cache_file, child_process, standard_error
from lattice_serve.engine.cache_file import CacheFile, StateShape
from lattice_serve.engine.cache_saver import CacheSaver
from lattice_serve.engine.config import SAVE_SECONDS, EngineConfig
from lattice_serve.engine.engine import Engine
from lattice_serve.engine.errors import LatticeError
from lattice_serve.engine.messages import (
    TO_ENGINE,
    Abort,
    Credit,
    FromEngine,
    Ping,
    RequestFailed,
    StepOutputs,
    Submit,
    ToEngine,
    encode,
)
from lattice_serve.engine.replacement import clear_unfinished

M = TypeVar("M")
P = TypeVar("P")

_PATIENCE_SECONDS = 20.0
_PAUSE_SECONDS = 0.05


class Connection:
    """Messages over a socket, read and written by threads of its own: the engine's never waits for the server."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        for target in (self._read, self._write):
            threading.Thread(target=target, daemon=True).start()

    def send(self, message: FromEngine) -> None:
        self._outbox.put(message)

    def receive(self, *, wait: bool, seconds: float | None = None) -> list[ToEngine]:
        """What has come since the last call; with `wait`, at least one message, unless none comes for so many seconds.
        Raises EOFError at the end."""
        messages: list[ToEngine] = []
        with suppress(queue.Empty):
            while True:
                message = self._inbox.get(block=wait and not messages, timeout=seconds)
                if message is None:
                    raise EOFError
                messages.append(message)
        return messages

    def _read(self) -> None:
        try:
            with self._link.makefile("rb") as stream:
                message: ToEngine | None = None
                while header := stream.read(4):
                    # Nothing of it has been read yet while there is no memory for it; and what waits needs no more.
                    frame = _patiently(bytearray, int.from_bytes(header, "big"))
                    if stream.readinto(frame) < len(frame):
                        raise EOFError("a message is cut short")
                    before, message = message, _patiently(TO_ENGINE.decode, frame)
                    if isinstance(message, Submit) and message.same_prompt and isinstance(before, Submit):
                        message = msgspec.structs.replace(message, prompt_ids=before.prompt_ids, same_prompt=False)
                    self._inbox.put(message)
        except (EOFError, MemoryError, OSError, msgspec.MsgspecError, LatticeError) as error:
            print(f"engine: connection lost: {error}", file=sys.stderr)
        finally:
            self._inbox.put(None)

    def _write(self) -> None:
        try:
            with suppress(OSError):  # The server has gone: the reader sees it too.
                while True:
                    self._link.sendall(_patiently(encode, self._outbox.get()))
        except MemoryError:
            self._link.shutdown(socket.SHUT_RDWR)  # it is of no use any more


def _patiently(make: Callable[[P], M], of: P) -> M:
    """What `make` makes, as soon as there is memory for it. Raises `MemoryError` where that takes too long."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return make(of)
        except MemoryError:
            if time.monotonic() > until:
                raise
        time.sleep(_PAUSE_SECONDS)


def serve(engine: Engine, connection: Connection, saver: CacheSaver | None = None) -> None:
    """Take requests and run steps until the connection ends. saver: of the engine's cache."""
    connection.send(engine.info)
    with suppress(EOFError):
        while True:
            untidy = engine.tidy()
            if saver is not None:
                saver.tick()
            idle = not (engine.has_work or untidy)
            messages = connection.receive(wait=idle, seconds=None if saver is None else saver.wait_seconds)
            failures = []
            for message in messages:
                if isinstance(message, Ping):
                    continue
                if isinstance(message, Abort):
                    engine.abort(message.request_id)
                    continue
                if isinstance(message, Credit):
                    engine.credit(message.request_id, message.size)
                    continue
                try:
                    engine.submit(message)
                except LatticeError as error:
                    failures.append(RequestFailed.of(message.request_id, error))
            if engine.has_work:
                engine.launch()
                step = engine.emit()  # on a GPU, of the step before
                connection.send(msgspec.structs.replace(step, failures=failures + step.failures))
                engine.collect()
                if engine.idle:
                    engine.check_idle()
            elif messages:
                connection.send(StepOutputs(outputs=[], failures=failures, stats=engine.stats()))


def _end_with_parent(to_save: threading.Event) -> None:
    """Exit when stdin ends: its other end is the server's, and goes with it however it dies. Where there are states
    `to_save`, that is given its time."""
    while os.read(0, 1024):
        pass
    if to_save.is_set():
        time.sleep(SAVE_SECONDS)
    os._exit(0)


def _saver(engine: Engine, path: Path, key: Path | None, seconds: float) -> CacheSaver:
    """What keeps the states that `engine` caches in `path`; the cache begins with those that are there."""
    settings = engine.runner.backend.arithmetic, engine.info.dtype, engine.config.tensor_parallel_size
    shape = StateShape(engine.info.bytes_per_row // 4, engine.info.vocab_size)
    saver = CacheSaver(
        CacheFile(path, cache_file.identity(engine.config.model, *settings), shape, key), engine.cache, seconds
    )
    if unfinished := clear_unfinished(path):
        print(f"engine: {unfinished:,} bytes that a killed engine had not finished are removed", file=sys.stderr)
    if path.exists():
        saver.load()
    return saver


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 when the server has gone, 1 when the engine could not start or go on."""
    parser = argparse.ArgumentParser(prog="python -m lattice_serve.engine.process", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="path of the Unix socket to bind")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--cache-file", type=Path, help="where cached states outlive the process")
    parser.add_argument("--cache-key-file", type=Path, help="its key; by default beside it")
    parser.add_argument("--cache-save-seconds", type=float, default=0.0, help="0: states are saved at the end alone")
    options = parser.parse_args(arguments)
    standard_error.outlive_it()
    child_process.wake_at_parents_end()
    # Who stops a whole process group means the server, which has yet to drain: its end is this process's, see below.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    to_save = threading.Event()
    threading.Thread(target=_end_with_parent, args=(to_save,), daemon=True).start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(options.socket))
        except OSError as error:  # no room in its folder, or too long a path
            reason = error.strerror or error
            print(f"error: no socket at {options.socket}: {reason}: set TMPDIR to another folder", file=sys.stderr)
            return 1
        listener.listen(1)
        try:
            engine = Engine(EngineConfig.model_validate_json(options.config), progress=True, beside=True)
            if engine.workers is not None:
                engine.workers.watch(lambda: os._exit(1))  # whatever it is at: what it waits for may never come
            saver = None
            if options.cache_file is not None:
                saver = _saver(engine, options.cache_file, options.cache_key_file, options.cache_save_seconds)
            # What is there now stays: looking through all of it would make a step wait for some 80 ms.
            gc.collect()
            gc.freeze()
            link, _ = listener.accept()
            if saver is not None:
                to_save.set()
            with link:
                serve(engine, Connection(link), saver)
            if saver is not None:
                saver.close()
        except LatticeError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return 1
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
