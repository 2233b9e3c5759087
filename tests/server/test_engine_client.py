"""The server's end of the socket to an engine, without a server."""

from __future__ import annotations

import asyncio
from array import array
from pathlib import Path

import pytest
import uvloop

from lattice_serve.engine.errors import EngineDied
from lattice_serve.engine.messages import Ready, Submit, TokenOutput, encode
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.server.engine_client import EngineClient, Generation
from lattice_serve.server.metrics import Metrics

READY = encode(Ready("m", 1, 8, 1000, 300, "cpu", "float32", 0.0))


async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An engine that is ready, and no more."""
    writer.write(READY)
    await reader.read()
    writer.close()


def test_what_comes_between_an_engines_death_and_its_news_ends_like_what_came_before(tmp_path: Path) -> None:
    async def submit_to(client: EngineClient) -> None:
        ready = asyncio.Event()
        client.on_ready = lambda _: ready.set()
        await ready.wait()
        assert client._writer is not None
        client._writer.transport.abort()  # as when something cannot be sent
        generation = Generation(None)
        for index in range(2):
            client.submit(generation, index, Submit("", array("i", [1]), SamplingParams()))
            await asyncio.sleep(0)  # the transport is closed now; `run` goes on next
        with pytest.raises(EngineDied):
            await anext(generation)
        assert client.live == 0

    async def scenario() -> None:
        server = await asyncio.start_unix_server(listen, tmp_path / "socket")
        client = EngineClient(Metrics("m"), 60)
        link = asyncio.create_task(client.run(tmp_path / "socket"))
        try:
            await submit_to(client)
        finally:
            await link
            server.close()

    # uvloop's transports, unlike asyncio's own, raise an error when they are closed.
    uvloop.run(scenario())


async def test_a_client_that_takes_long_is_not_told_that_the_answer_did() -> None:
    client, generation = EngineClient(Metrics("m"), 60), Generation(0.01)
    client.submit(generation, 0, Submit("", array("i", [1]), SamplingParams()))
    (request_id,) = generation.open
    client._deliver(TokenOutput(request_id, 5, "x", "length"))
    await asyncio.sleep(0.05)
    assert [output.text async for _, output in generation] == ["x"]
