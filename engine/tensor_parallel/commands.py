"""What the leader tells its workers: messages of msgpack over a socket each, a length of four bytes before them."""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first: load share `rank`, say `READY`, and join the others by files in `folder`."""

    config: str
    """`EngineConfig` as JSON."""
    rank: int
    folder: str


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """The second: make a pool of so many rows, and what runs the model on it."""

    rows: int


class Run(msgspec.Struct, frozen=True, tag=True):
    """One step, as `Backend` takes it. Logits and hidden states are the leader's alone."""

    ids: list[int]
    segments: list[tuple[int, int, int]]
    """(row, position, length) of each."""
    decodes: int


class Initialise(msgspec.Struct, frozen=True, tag=True):
    row: int


class Scrub(msgspec.Struct, frozen=True, tag=True):
    row: int


class Read(msgspec.Struct, frozen=True, tag=True):
    """Take part in gathering a row."""

    row: int


class Write(msgspec.Struct, frozen=True, tag=True):
    """Take part in scattering a row."""

    row: int


class CheckScrubbed(msgspec.Struct, frozen=True, tag=True):
    """Assert that these rows hold nothing."""

    rows: list[int]


Command: TypeAlias = Start | Reserve | Run | Initialise | Scrub | Read | Write | CheckScrubbed

READY = b"R"
"""A worker's one word: its share is loaded."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def send(link: socket.socket, command: Command) -> None:
    """Raises OSError when nobody is there any more."""
    data = _ENCODER.encode(command)
    link.sendall(len(data).to_bytes(4, "big") + data)


def receive(link: socket.socket) -> Command | None:
    """The next command; None when the leader has gone."""
    header = _exactly(link, 4)
    data = _exactly(link, int.from_bytes(header, "big")) if header else b""
    return _DECODER.decode(data) if data else None


def _exactly(link: socket.socket, size: int) -> bytes:
    """So many bytes; none of them when the other end has closed before."""
    parts = bytearray()
    while len(parts) < size:
        part = link.recv(size - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)
