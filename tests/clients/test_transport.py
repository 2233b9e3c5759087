from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from lattice_serve.clients.transport import LeanTransport

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
LENGTH = HEAD + b"content-length: 2\r\n"

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[tuple[str, list[int]]]:
    """An address at which each connection is answered so, request after request; and how many came by each."""
    counts: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(counts)
        counts.append(0)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b"0"
                )
                await reader.readexactly(int(length.rpartition(b":")[2]))
                counts[number] += 1
                await answer(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1")
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", counts


def writes(*parts: bytes, end: bool = False) -> Answer:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        if end:
            writer.close()

    return answer


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with (
        server(writes(LENGTH, b"\r\nh", b"i")) as (url, counts),
        httpx.AsyncClient(transport=LeanTransport()) as http,
    ):
        for _ in range(3):
            assert (await http.post(url, content=b"x" * 100_000)).text == "hi"
        assert counts == [3]
        assert [answer.text for answer in await asyncio.gather(*(http.get(url) for _ in range(4)))] == ["hi"] * 4
        assert sum(counts) == 7
        assert len(counts) == 4


@pytest.mark.parametrize(
    "answer",
    [
        writes(LENGTH, b"connection: close\r\n\r\nhi", end=True),
        writes(HEAD + b"connection: close\r\n\r\nh", b"i", end=True),
        writes(HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nh\r\n", b"1\r\ni\r\n0\r\n\r\n"),
    ],
    ids=["closed", "until the end", "chunked"],
)
async def test_bodies_of_every_kind(answer: Answer) -> None:
    async with server(answer) as (url, _), httpx.AsyncClient(transport=LeanTransport()) as http:
        for _ in range(2):
            assert (await http.get(url)).text == "hi"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (writes(end=True), httpx.ReadError),
        (writes(b"\0\0 no HTTP\r\n\r\n"), httpx.ReadError),
        (writes(LENGTH + b"\r\nh", end=True), httpx.RemoteProtocolError),
        (writes(), httpx.ReadTimeout),
    ],
    ids=["nothing", "no HTTP", "half", "silence"],
)
async def test_what_goes_wrong_is_told_as_httpx_tells_it(answer: Answer, error: type[Exception]) -> None:
    async with server(answer) as (url, _), httpx.AsyncClient(transport=LeanTransport(), timeout=0.5) as http:
        with pytest.raises(error):
            await http.get(url)


async def test_a_connection_that_was_given_up_is_replaced() -> None:
    """It was promised to be kept. What has not been answered at all is sent again, once."""
    used: set[asyncio.StreamWriter] = set()

    async def once(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer in used:
            writer.close()
        else:
            used.add(writer)
            writer.write(LENGTH + b"\r\nhi")

    async with server(once) as (url, counts), httpx.AsyncClient(transport=LeanTransport()) as http:
        for _ in range(3):
            assert (await http.post(url, content=b"x")).text == "hi"
        assert counts == [2, 2, 1]


async def test_half_an_answer_on_a_kept_connection_is_not_asked_for_again() -> None:
    answers = [LENGTH + b"\r\nhi", b"HTTP/1.1 200"]

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers.pop(0))
        if not answers:
            writer.close()

    async with server(answer) as (url, counts), httpx.AsyncClient(transport=LeanTransport()) as http:
        assert (await http.get(url)).text == "hi"
        with pytest.raises(httpx.ReadError):
            await http.get(url)
        assert counts == [2]


async def test_nobody_listens() -> None:
    async with server(writes()) as (url, _):
        pass
    async with httpx.AsyncClient(transport=LeanTransport()) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(url)
