"""The prefix cache in a file: what an engine has read outlives it, and can be moved to another one.

A state is good for the engine that would have come to the same bits: of the same weights, by the same code and the same
arithmetic. `identity` names all that; a file of another one is left alone. It is written beside its place and moved
there when it is whole, and read only if its checksum is right.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

import msgspec
import numpy as np
import torch

from lattice_serve.engine.errors import CacheFileError
from lattice_serve.engine.prefix_cache import PrefixCache
from lattice_serve.engine.radix_tree import Ids
from lattice_serve.engine.tier import Snapshot
from lattice_serve.kernels.numba.cache import sources_digest

_MAGIC = b"lattice-serve states 1\n"
_READ = 1 << 20
_CHECKSUM_BYTES = 4
_LINE = 64
"""Bytes: numbers begin at a multiple of so many."""


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot. Its row, and its logits if it has any, follow the head in the order of entries."""

    salt: int
    """Number of its salt."""
    after: int
    """Number of the entry that its tokens go on from, which comes before it; -1: from nothing."""
    ids: bytes
    """int32: the tokens that follow those of that one."""
    used: int
    """Place among all, the least recently used first."""
    has_logits: bool


class _Head(msgspec.Struct, frozen=True):
    identity: str
    row_size: int
    vocab_size: int
    salts: list[str]
    entries: list[_Entry]


def identity(model: Path, *settings: object) -> str:
    """Of all that the bits of a state depend on: the model's files, the kernels, what compiles them, and `settings`."""
    compilers = [version(name) for name in ("llvmlite", "torch")]  # and torch's own Triton
    digest = hashlib.sha256(repr((sys.byteorder, compilers, sources_digest(), settings)).encode())
    for path in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while data := file.read(_READ):
                digest.update(data)
    return digest.hexdigest()


def save(path: Path, cache: PrefixCache, identity: str) -> int:
    """Put all that is cached into `path`, for its owner's eyes alone; the number of states.

    Raises `CacheFileError`; what was in `path` is there still, then.
    """
    by_use = cache.snapshots()
    used = {id(snapshot): place for place, snapshot in enumerate(by_use)}
    # What a snapshot goes on from has fewer tokens, and so comes before it.
    snapshots = sorted(by_use, key=lambda snapshot: snapshot.length)
    numbers = {id(snapshot): number for number, snapshot in enumerate(snapshots)}
    salts: dict[str, int] = {}
    entries = []
    for snapshot in snapshots:
        before, ids = _before(snapshot)
        entries.append(
            _Entry(
                salts.setdefault(snapshot.salt, len(salts)),
                -1 if before is None else numbers[id(before)],
                ids.tobytes(),
                used[id(snapshot)],
                snapshot.logits is not None,
            )
        )
    vocab_size = max((len(each.logits) for each in snapshots if each.logits is not None), default=0)
    row_size = len(snapshots[0].row) if snapshots else 0
    head = msgspec.msgpack.encode(_Head(identity, row_size, vocab_size, list(salts), entries))
    try:
        # Made with mode 0600: texts can be read off it.
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            try:
                _write(file, (_MAGIC, len(head).to_bytes(8, "little"), head, bytes(_gap(head)), *_tensors(snapshots)))
                Path(file.name).replace(path)
            except BaseException:
                with suppress(OSError):
                    Path(file.name).unlink()
                raise
    except OSError as error:
        raise CacheFileError(f"{path} cannot be written: {error.strerror or error}") from error
    return len(snapshots)


def load(path: Path, cache: PrefixCache, identity: str) -> int:
    """Put the states of `path`, those used last first, into an empty cache, as far as its budget goes; their number.

    Raises `CacheFileError`, and has put nothing then, for a file that is damaged or has another identity.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c")
    except (OSError, ValueError) as error:  # of the last kind where it is empty
        raise CacheFileError(f"{path} cannot be read: {error}") from error
    head, at = _head(path, data)
    if head.identity != identity:
        raise CacheFileError(f"{path} has the states of another model, version or kind of processor")
    places = list(accumulate(_sizes(head), initial=at))
    if not _is_sound(head) or places[-1] != len(data) - _CHECKSUM_BYTES:
        raise CacheFileError(f"{path} has states that do not fit together")
    loaded: dict[int, Snapshot] = {}
    for number in sorted(_chosen(head, cache.budget)):
        entry = head.entries[number]
        ids, before = _since(head, number, lambda place: place in loaded and loaded[place] in cache)
        numbers = torch.from_numpy(data[places[number] : places[number + 1]].view(np.float32))
        row, logits = numbers[: head.row_size], numbers[head.row_size :] if entry.has_logits else None
        snapshot = cache.put(head.salts[entry.salt], array("i", ids), row, logits, after=loaded.get(before))
        if snapshot is not None:
            loaded[number] = snapshot
    kept = [number for number, snapshot in loaded.items() if snapshot in cache]
    for number in sorted(kept, key=lambda number: head.entries[number].used):
        cache.renew(loaded[number])
    return len(kept)


def _before(snapshot: Snapshot) -> tuple[Snapshot | None, Ids]:
    """The longest snapshot that this one goes on from, and the tokens between them."""
    node, edges = snapshot.node, [snapshot.node.edge]
    while node.parent is not None and node.parent.value is None:
        node = node.parent
        edges.append(node.edge)
    return (None if node.parent is None else node.parent.value), np.concatenate(edges[::-1])


def _tensors(snapshots: list[Snapshot]) -> Iterator[Any]:
    for snapshot in snapshots:
        for tensor in (snapshot.row, snapshot.logits):
            if tensor is not None:
                yield tensor.cpu().numpy().data.cast("B")


def _write(file: IO[bytes], parts: tuple[Any, ...]) -> None:
    """One after another, and their checksum."""
    checksum = 0
    for part in parts:
        file.write(part)
        checksum = zlib.crc32(part, checksum)
    file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))


def _head(path: Path, data: Any) -> tuple[_Head, int]:
    """What the file says it has, and where that begins."""
    begin = len(_MAGIC) + 8
    checksum = int.from_bytes(data[-_CHECKSUM_BYTES:].tobytes(), "little")
    if data[: len(_MAGIC)].tobytes() != _MAGIC or zlib.crc32(data[:-_CHECKSUM_BYTES]) != checksum:
        raise CacheFileError(f"{path} is no file of states, or is damaged")
    end = begin + int.from_bytes(data[len(_MAGIC) : begin].tobytes(), "little")
    try:
        return msgspec.msgpack.decode(data[begin:end].tobytes(), type=_Head), end + _gap(data[begin:end])
    except msgspec.MsgspecError as error:
        raise CacheFileError(f"{path} is of another version: {error}") from error


def _gap(head: Any) -> int:
    """Bytes behind the head."""
    return -(len(_MAGIC) + 8 + len(head)) % _LINE


def _is_sound(head: _Head) -> bool:
    """Whether what entries say of each other can be."""
    return all(
        -1 <= entry.after < number and 0 <= entry.salt < len(head.salts) and entry.ids and len(entry.ids) % 4 == 0
        for number, entry in enumerate(head.entries)
    )


def _sizes(head: _Head) -> list[int]:
    """Bytes of the row and logits of each entry."""
    return [4 * (head.row_size + head.vocab_size * entry.has_logits) for entry in head.entries]


def _chosen(head: _Head, budget: int) -> set[int]:
    """Numbers of the entries used last that fit together."""
    chosen: set[int] = set()
    sizes, used = _sizes(head), 0
    for number in sorted(range(len(head.entries)), key=lambda number: -head.entries[number].used):
        ids, _ = _since(head, number, chosen.__contains__)
        used += sizes[number] + len(ids)  # at the most: another that comes may share some of them
        if used > budget:
            break
        chosen.add(number)
    return chosen


def _since(head: _Head, number: int, known: Callable[[int], bool]) -> tuple[bytes, int]:
    """The tokens of an entry since the last one before it that is `known`, and the number of that; -1: none is."""
    ids, before = [head.entries[number].ids], head.entries[number].after
    while before >= 0 and not known(before):
        ids.append(head.entries[before].ids)
        before = head.entries[before].after
    return b"".join(reversed(ids)), before
