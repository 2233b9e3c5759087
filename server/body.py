"""Request bodies: counted before objects are made of them, and read so that others go on meanwhile.

What makes a body slow to read is the number of its JSON values, not its size: a long text is read in no time. Token
ids, of which there may be millions, are read by themselves, a slice at a time; of all other values there is a most.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np

from lattice_serve.engine.errors import InvalidParameter
from lattice_serve.server.schemas.base import RequestModel

MAX_VALUES = 50_000
"""JSON values in a body, beside token ids."""
LARGE = 1 << 16
"""Bytes of a body, or characters of a text, beyond which others may have to wait for it."""
_SLICE = 1 << 16
"""Bytes of token ids that are read at a time: a millisecond."""
_ID_LIST = b"0123456789-, \t\r\n[]"

R = TypeVar("R", bound=RequestModel)


class Turns:
    """Large work one after another, and half of the time none: whatever comes, most of a processor is for others."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._next = 0.0
        """When the loop's clock says so the next one may begin."""

    @asynccontextmanager
    async def take(self, size: int) -> AsyncGenerator[None, None]:
        """A turn for work on so many bytes or characters; little work needs none."""
        if size <= LARGE:
            yield
            return
        loop = asyncio.get_running_loop()
        async with self._lock:
            await asyncio.sleep(max(0.0, self._next - loop.time()))
            began = loop.time()
            try:
                yield
            finally:
                ended = loop.time()
                self._next = ended + (ended - began)


async def parse(kind: type[R], body: bytes, turns: Turns) -> R:
    """A request's body as a `kind`. Raises `InvalidParameter` that names the first wrong field."""
    if len(body) <= LARGE:
        return kind.parse(body)
    async with turns.take(len(body)):
        return await _parse_large(kind, body)


async def _parse_large(kind: type[R], body: bytes) -> R:
    _check_count(await _count(body, b":"))
    ids: dict[str, Any] = {}
    fields = _split(body)
    if fields is not None:
        for name in kind.id_fields:
            text = bytes(fields.get(name, b""))
            if text[:1] == b"[" and not text.translate(None, _ID_LIST):
                ids[name] = await _ids(kind, name, text)
                # Whether lists of lists are taken is left to who reads the rest.
                fields[name] = msgspec.Raw(b"[0]" if isinstance(ids[name], array) else b"[[0]]")
        body = msgspec.json.encode(fields)
    await asyncio.sleep(0)
    _check_count(await _count(body, b",[{"))
    return kind.parse(body).model_copy(update=ids)


def _check_count(count: int) -> None:
    if count > MAX_VALUES:
        raise InvalidParameter(f"the body has over {MAX_VALUES} JSON values beside token ids: send less in one request")


async def _count(body: bytes, marks: bytes) -> int:
    """How many of these characters there are outside of strings; or as many as there are at all, if those are few."""
    most = sum(body.count(marks[i : i + 1]) for i in range(len(marks)))
    if most <= MAX_VALUES:
        return most
    if b"\\" in body:  # pairs from the left, so that what is left before a quote escapes it
        body = body.replace(b"\\\\", b"")
        await asyncio.sleep(0)
        body = body.replace(b'\\"', b"")
    data = np.frombuffer(body, np.uint8)
    count, quotes = 0, 0
    for start in range(0, len(data), 1 << 20):
        await asyncio.sleep(0)
        piece = data[start : start + (1 << 20)]
        inside = np.cumsum(piece == ord('"'), dtype=np.int32) + quotes
        quotes = int(inside[-1])
        outside = inside & 1 == 0
        count += sum(int(np.count_nonzero(outside & (piece == mark))) for mark in marks)
    return count


def _split(body: bytes) -> dict[str, msgspec.Raw] | None:
    """The fields of a JSON object, unread; None where it is none: who reads it says why."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError):
        return None


async def _ids(kind: type[RequestModel], name: str, text: bytes) -> array[int] | list[array[int]]:
    """Token ids, or lists of them. Raises `InvalidParameter` where it is neither."""
    if b"[" not in text[1:]:
        return await _id_list(kind, name, text)
    _check_count(text.count(b"["))
    try:
        lists = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _wrong(kind, name) from error
    found = []
    for place, each in enumerate(lists):
        found.append(await _id_list(kind, name, bytes(each)))
        if place % 1000 == 0:
            await asyncio.sleep(0)
    return found


async def _id_list(kind: type[RequestModel], name: str, text: bytes) -> array[int]:
    if text[:1] != b"[" or b"[" in text[1:]:
        raise _wrong(kind, name)
    ids = array("i")
    for part in _parts(text):
        try:
            ids.extend(msgspec.json.decode(b"[%b]" % part, type=list[int]))
        except OverflowError as error:
            raise InvalidParameter(
                f"{name} holds a token id of more than 32 bits: give ids of the model's vocabulary", param=name
            ) from error
        except msgspec.MsgspecError as error:
            raise _wrong(kind, name) from error
        if len(part) >= _SLICE:
            await asyncio.sleep(0)
    return ids


def _parts(text: bytes) -> Iterator[bytes]:
    """What is in the brackets of a list, cut at commas."""
    start, end = 1, len(text.rstrip()) - 1
    while start < end:
        cut = text.find(b",", start + _SLICE, end)
        cut = end if cut < 0 else cut
        yield text[start:cut]
        start = cut + 1


def _wrong(kind: type[RequestModel], name: str) -> InvalidParameter:
    return InvalidParameter(f"{name}: {kind.remedies[name]}", param=name)
