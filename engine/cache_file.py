"""The prefix cache in a file: what an engine has read outlives it, and can be moved to another one.

A state is good for the engine that would have come to the same bits: of the same weights, by the same code and the same
arithmetic. `identity` names all that; a file of another one is left alone. So is one that an owner of its key
(`engine.cache_key`) has not written, and one whose states are not like the model's.

    magic | row and logits of each state, float32 | index | bytes of the index, 8 | code of the index, 32

The index has a code for the numbers of each state. Nothing is used before its code has been checked, and it is used as
it was read then: the file may change meanwhile.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sys
from array import array
from collections.abc import Callable
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np
import torch

from lattice_serve.engine.cache_contents import Contents
from lattice_serve.engine.cache_key import CacheKey
from lattice_serve.engine.errors import CacheFileError
from lattice_serve.engine.prefix_cache import PrefixCache
from lattice_serve.engine.replacement import replacing
from lattice_serve.engine.tier import Snapshot
from lattice_serve.kernels.numba.cache import sources_digest

MAGIC = b"lattice-serve states 2\n"
INDEX, STATE = b"index", b"state"
"""Kinds of data that have codes."""
_READ = 1 << 20
_SIZE_BYTES = 8


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A state. Its row, and its logits if it has any, lie in the file in the order of entries."""

    salt: int
    """Number of its salt."""
    after: int
    """Number of the entry that its tokens go on from, which comes before it; -1: from nothing."""
    ids: bytes
    """int32: the tokens that follow those of that one."""
    used: int
    """Place among all, the least recently used first."""
    has_logits: bool
    code: bytes
    """Of its row and logits. Empty: they are not in the file, for the state was given up while it was written."""


class Index(msgspec.Struct, frozen=True):
    identity: str
    row_size: int
    vocab_size: int
    salts: list[str]
    entries: list[Entry]


class StateShape(NamedTuple):
    """What the states of a model are like."""

    row_size: int
    """Floats of a row."""
    vocab_size: int
    """Floats of logits."""

    def nbytes(self, entry: Entry) -> int:
        """Bytes of an entry's state in the file."""
        return 4 * (self.row_size + self.vocab_size * entry.has_logits) if entry.code else 0


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


class CacheFile:
    """Where the cached states of one engine outlive it."""

    def __init__(self, path: Path, identity: str, shape: StateShape, key_path: Path | None = None) -> None:
        """key_path: where its key is, which is made with the first file; beside it unless given."""
        self.path, self._identity, self._shape = path, identity, shape
        self._key_path = key_path or path.with_name(f"{path.name}.key")

    def save(self, contents: Contents, *, after_each: Callable[[], None] = lambda: None) -> int:
        """Replace the file by one of `contents`, for its owner's eyes alone; the number of states.

        after_each: called when a state has been written. Raises `CacheFileError`, and what `after_each` raises;
        the file is as it was, then.
        """
        key = CacheKey.read_or_make(self._key_path)
        entries, states = [], 0
        try:
            with replacing(self.path) as file:
                file.write(MAGIC)
                for kept in contents.states:
                    data, code = kept.numbers(), b""
                    if data is not None:
                        file.write(data)
                        code, states = key.code(STATE, data), states + 1
                    entries.append(Entry(kept.salt, kept.after, kept.ids.tobytes(), kept.used, kept.has_logits, code))
                    after_each()
                index = msgspec.msgpack.encode(Index(self._identity, *self._shape, contents.salts, entries))
                file.write(index)
                file.write(len(index).to_bytes(_SIZE_BYTES, "little"))
                file.write(key.code(INDEX, index))
        except (OSError, MemoryError) as error:
            raise CacheFileError(f"{self.path} cannot be written: {_reason(error)}") from error
        return states

    def load(self, cache: PrefixCache) -> int:
        """Put its states, those used last first, into an empty cache, as far as its budget goes; their number.

        Raises `CacheFileError`, and has put nothing then, for a file that is not this engine's, whole and sound.
        """
        key = CacheKey.read(self._key_path)
        try:
            with self.path.open("rb") as file:
                return self._load(file, key, cache)
        except (OSError, MemoryError) as error:
            cache.clear()
            raise CacheFileError(f"{self.path} cannot be read: {_reason(error)}") from error
        except CacheFileError:
            cache.clear()
            raise

    def _load(self, file: IO[bytes], key: CacheKey, cache: PrefixCache) -> int:
        index, end = self._index(file, key)
        places = list(accumulate(map(self._shape.nbytes, index.entries), initial=len(MAGIC)))
        if places[-1] != end:
            raise self._damaged()
        loaded: dict[int, Snapshot] = {}
        for number in sorted(_chosen(index, self._shape, cache.budget)):
            entry = index.entries[number]
            file.seek(places[number])
            # Of this state alone, and to be written to: the cache copies it, and torch takes no other memory.
            data = bytearray(file.read(self._shape.nbytes(entry)))
            if not hmac.compare_digest(key.code(STATE, data), entry.code):
                raise self._damaged()
            numbers = torch.frombuffer(data, dtype=torch.float32)
            if not all(end.isfinite() for end in numbers.aminmax()):  # NaN is the least and the greatest of all
                raise CacheFileError(f"{self.path} has a state that is not finite")
            ids, before = _since(index, number, lambda place: place in loaded and loaded[place] in cache)
            row, logits = numbers[: index.row_size], numbers[index.row_size :] if entry.has_logits else None
            snapshot = cache.put(index.salts[entry.salt], array("i", ids), row, logits, after=loaded.get(before))
            if snapshot is not None:
                loaded[number] = snapshot
        kept = [number for number, snapshot in loaded.items() if snapshot in cache]
        for number in sorted(kept, key=lambda number: index.entries[number].used):
            cache.renew(loaded[number])
        return len(kept)

    def _index(self, file: IO[bytes], key: CacheKey) -> tuple[Index, int]:
        """What the file says it has, and where that begins."""
        if file.read(len(MAGIC)) != MAGIC:
            raise CacheFileError(f"{self.path} is no file of states, or one of another version")
        tail = _SIZE_BYTES + key.code_bytes
        file_size = file.seek(0, os.SEEK_END)
        file.seek(max(0, file_size - tail))
        size, code = file.read(_SIZE_BYTES), file.read()
        begin = file_size - tail - int.from_bytes(size, "little")
        if begin < len(MAGIC):
            raise self._damaged()
        file.seek(begin)
        data = file.read(file_size - tail - begin)
        if not hmac.compare_digest(key.code(INDEX, data), code):
            raise self._damaged()
        try:
            index = msgspec.msgpack.decode(data, type=Index)
        except ValueError as error:  # of msgspec, and of text that is not UTF-8
            raise CacheFileError(f"{self.path} is of another version: {error}") from error
        if index.identity != self._identity:
            raise CacheFileError(f"{self.path} has the states of another model, version or kind of processor")
        if (index.row_size, index.vocab_size) != self._shape or not _is_sound(index, key.code_bytes):
            raise CacheFileError(f"{self.path} has states that do not fit together, or not this model")
        return index, begin

    def _damaged(self) -> CacheFileError:
        return CacheFileError(f"{self.path} is damaged, or was written with another key than {self._key_path}")


def _is_sound(index: Index, code_bytes: int) -> bool:
    """Whether what entries say of themselves and of each other can be."""
    return all(
        -1 <= entry.after < number
        and 0 <= entry.salt < len(index.salts)
        and (entry.after < 0 or index.entries[entry.after].salt == entry.salt)
        and len(entry.code) in (0, code_bytes)
        and _are_ids(entry.ids, index.vocab_size)
        for number, entry in enumerate(index.entries)
    )


def _are_ids(data: bytes, vocab_size: int) -> bool:
    if not data or len(data) % 4:
        return False
    ids = np.frombuffer(data, np.int32)
    return int(ids.min()) >= 0 and int(ids.max()) < vocab_size


def _chosen(index: Index, shape: StateShape, budget: int) -> set[int]:
    """Numbers of the entries used last that fit together."""
    chosen: set[int] = set()
    used = 0
    numbers = [number for number, entry in enumerate(index.entries) if entry.code]
    for number in sorted(numbers, key=lambda number: -index.entries[number].used):
        ids, _ = _since(index, number, chosen.__contains__)
        used += shape.nbytes(index.entries[number]) + len(ids)  # at the most: another that comes may share some of them
        if used > budget:
            break
        chosen.add(number)
    return chosen


def _since(index: Index, number: int, known: Callable[[int], bool]) -> tuple[bytes, int]:
    """The tokens of an entry since the last one before it that is `known`, and the number of that; -1: none is."""
    ids, before = [index.entries[number].ids], index.entries[number].after
    while before >= 0 and not known(before):
        ids.append(index.entries[before].ids)
        before = index.entries[before].after
    return b"".join(reversed(ids)), before


def _reason(error: OSError | MemoryError) -> str:
    if isinstance(error, BlockingIOError):
        return "another process is writing it"
    return (isinstance(error, OSError) and error.strerror) or "out of memory"
