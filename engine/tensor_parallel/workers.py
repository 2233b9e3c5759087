"""The leader's way to the other processes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lattice_serve.engine import child_process
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import ConfigError, EngineDied
from lattice_serve.engine.own_folder import OwnFolder
from lattice_serve.engine.tensor_parallel.commands import READY, Command, Start, send
from lattice_serve.engine.tensor_parallel.group import Group, check_free
from lattice_serve.engine.tensor_parallel.share import Share

_QUIET = "ignore:compiled kernels are not kept"  # the leader says so
COMMAND = (sys.executable, "-W", _QUIET, "-m", "lattice_serve.engine.tensor_parallel.worker")
_STOP_SECONDS = 3.0


class Workers:
    """Processes with shares 1 to `tensor_parallel_size` - 1. They end with this object, or with this process, however
    that ends."""

    def __init__(self, config: EngineConfig) -> None:
        """Start them: they load while this process does. Raises `ConfigError` where this one has a group already."""
        check_free()
        self._size = config.tensor_parallel_size
        try:
            own = OwnFolder()
        except OSError as error:
            raise ConfigError(
                f"no folder for the processes of this model: {error.strerror}: set TMPDIR to one that can be written to"
            ) from error
        self._folder = own.path
        self._links: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._groups: list[Group] = []
        self._closing = threading.Event()
        self.close = weakref.finalize(self, _end, self._closing, self._links, self._processes, self._groups, own)
        """Ends them. Again: does nothing."""
        for rank in range(1, self._size):
            ours, theirs = socket.socketpair()
            self._links.append(ours)
            with theirs:
                self._processes.append(
                    subprocess.Popen(
                        [*COMMAND, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        env=child_process.environment(),
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,  # out of reach of the terminal's Ctrl-C
                    )
                )
            _send(ours, Start(config.model_dump_json(), rank, str(self._folder)))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def meet(self, device: str) -> Group:
        """The group of all, when each has loaded its share. Raises `ConfigError` when one has not."""
        for rank, link in enumerate(self._links, 1):
            word = b""
            with suppress(OSError):  # one that has ended with its first command unread resets the connection
                word = link.recv(1)
            if word != READY:
                raise ConfigError(f"process {rank} of {self._size} did not start: its messages say why")
        self._groups.append(Group(Share(0, self._size), device, self._folder))
        return self._groups[0]

    def send(self, command: Command) -> None:
        """Raises `EngineDied` when one has gone."""
        for link in self._links:
            _send(link, command)

    def watch(self, on_end: Callable[[], object]) -> None:
        """Call `on_end`, from another thread, when one of them ends that was not told to."""
        for rank, process in enumerate(self._processes, 1):
            arguments = (rank, process, self._closing, self._folder, on_end)
            threading.Thread(target=_watch, args=arguments, daemon=True).start()


def _send(link: socket.socket, command: Command) -> None:
    try:
        send(link, command)
    except OSError as error:
        raise EngineDied("a process of this model has ended, and with it the engine: start it again") from error


def _watch(
    rank: int,
    process: subprocess.Popen[bytes],
    closing: threading.Event,
    folder: Path,
    on_end: Callable[[], object],
) -> None:
    status = process.wait()
    if not closing.is_set():
        print(f"engine: process {rank} of this model has ended, exit status {status}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        on_end()


def _end(
    closing: threading.Event,
    links: list[socket.socket],
    processes: list[subprocess.Popen[bytes]],
    groups: list[Group],
    folder: OwnFolder,
) -> None:
    closing.set()
    for link in links:
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)
        link.close()
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for group in groups:
        group.close()
    folder.close()
