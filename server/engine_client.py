"""The server's end of the socket to the engine process (see `engine.messages` for what is said)."""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import structlog

from lattice_serve.engine import errors
from lattice_serve.engine.errors import EngineDied, LatticeError
from lattice_serve.engine.messages import (
    FROM_ENGINE,
    Abort,
    Credit,
    FromEngine,
    Ping,
    Ready,
    RequestFailed,
    Submit,
    ToEngine,
    TokenOutput,
    encode,
    output_size,
)
from lattice_serve.server.errors import TimedOut
from lattice_serve.server.metrics import Metrics, SequenceMeter
from lattice_serve.server.watchdog import Watchdog

log = structlog.get_logger(__name__)

WINDOW = 1 << 18
"""Size of a sequence's outputs, about their bytes, that may wait for its client: then the engine pauses it."""
_CREDIT = WINDOW // 4
"""Of outputs that were taken, the engine is told by the lump."""
_CONNECT_SECONDS = 0.05


class EngineClient:
    """Requests to the engine and its answers, matched by id. Lives on one event loop.

    `run` holds the connection; between two connections there is no engine, and nothing may be submitted.
    """

    def __init__(self, metrics: Metrics, watchdog_seconds: float) -> None:
        """watchdog_seconds: after which an engine that neither answers nor computes counts as hanging."""
        self.ever_ready = False
        self.worked = False
        """Whether an engine has generated anything since this was last set to False."""
        self.on_ready: Callable[[Ready], None] = lambda ready: None
        self._metrics = metrics
        self._watchdog = Watchdog(watchdog_seconds)
        self._watch: asyncio.Task[str] | None = None
        """Of the engine that is connected, from the moment when it was ready."""
        self._ready: Ready | None = None
        self._live: dict[str, _Live] = {}
        self.tenants: Counter[str] = Counter()
        """Of them, those of each tenant."""
        self._writer: asyncio.StreamWriter | None = None
        self._sent_prompt: array[int] | None = None
        """That of the message sent last, if it had one."""

    @property
    def ready(self) -> Ready | None:
        """What the engine said of itself; None while there is none that answers."""
        return self._ready if self._watchdog.responsive else None

    @property
    def live(self) -> int:
        """Sequences submitted and not ended."""
        return len(self._live)

    def submit(self, generation: Generation, index: int, request: Submit) -> None:
        """Have the engine, which is ready, work on sequence `index` of `generation`, under an id of its own."""
        request_id = uuid.uuid4().hex
        generation.open[request_id] = self
        meter = self._metrics.sequence(len(request.prompt_ids))
        self._live[request_id] = _Live(index, generation, meter, request.tenant)
        self.tenants[request.tenant] += 1
        same = request.prompt_ids is self._sent_prompt
        ids = array("i") if same else request.prompt_ids
        changes = {"request_id": request_id, "window": WINDOW, "prompt_ids": ids, "same_prompt": same}
        self._send(msgspec.structs.replace(request, **changes))
        self._sent_prompt = request.prompt_ids

    def taken(self, output: TokenOutput) -> None:
        """Have the engine make more of a sequence, if it has not ended: this output is on its way to its client."""
        live = self._live.get(output.request_id)
        if live is not None:
            live.taken += output_size(output.logprob, output.prompt_logprobs)
            if live.taken >= _CREDIT:
                self._send(Credit(output.request_id, live.taken))
                live.taken = 0

    def abort(self, request_id: str) -> None:
        self._take(request_id).meter.stopped("abort")
        self._send(Abort(request_id))

    def fail_all(self, make_error: Callable[[], LatticeError]) -> None:
        """End every live sequence with an error of its own and have the engine forget it."""
        for request_id in list(self._live):
            self._fail(request_id, make_error())
            self._send(Abort(request_id))

    async def run(self, socket: Path) -> None:
        """Connect to `socket` as soon as an engine listens there, and carry messages until it is gone.

        Raises TimeoutError, which says why, when it hangs: it will not end by itself.
        """
        reader, self._writer = await _connect(socket)
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                self._receive(FROM_ENGINE.decode(await reader.readexactly(size)))
        except (OSError, asyncio.IncompleteReadError) as error:
            if self._watch is not None and self._watch.done():
                raise TimeoutError(self._watch.result()) from error
            log.warning("engine connection closed")
        except msgspec.DecodeError as error:
            log.error("engine sent a message that cannot be read", error=str(error))
        finally:
            if self._watch is not None:
                self._watch.cancel()
            self._ready = self._watch = self._sent_prompt = None
            writer, self._writer = self._writer, None
            self._metrics.engine_started(rows=0)
            self.fail_all(lambda: EngineDied("the engine stopped while it worked on this request: send it again"))
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    def _receive(self, message: FromEngine) -> None:
        self._watchdog.heard()
        if isinstance(message, Ready):
            self._metrics.engine_started(message.rows, again=self.ever_ready)
            self._ready = message
            self.ever_ready = True
            self._watch = asyncio.create_task(self._watchdog.watch(message.pid, lambda: self._send(Ping())))
            assert self._writer is not None
            transport = self._writer.transport
            self._watch.add_done_callback(lambda _: transport.abort())
            self.on_ready(message)
            return
        self._metrics.step(message.stats)
        self.worked = self.worked or bool(message.outputs)
        for output in message.outputs:
            self._deliver(output)
        for failure in message.failures:
            self._fail(failure.request_id, _as_error(failure))

    def _deliver(self, output: TokenOutput) -> None:
        live = self._live.get(output.request_id)
        if live is None:
            return  # Aborted while the token was on its way.
        live.meter.output(output)
        if output.finish_reason is not None:
            self._take(output.request_id)
        live.generation.put((live.index, output))

    def _fail(self, request_id: str, error: LatticeError) -> None:
        if request_id in self._live:
            live = self._take(request_id)
            live.meter.stopped("error")
            live.generation.put(error)

    def _take(self, request_id: str) -> _Live:
        live = self._live.pop(request_id)
        del live.generation.open[request_id]
        self.tenants[live.tenant] -= 1
        if not self.tenants[live.tenant]:
            del self.tenants[live.tenant]
        return live

    def _send(self, message: ToEngine) -> None:
        # A connection that is lost is closed a moment before `run` hears of it, and ends what was submitted.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))
        self._sent_prompt = None


@dataclass(slots=True, eq=False)
class _Live:
    index: int
    generation: Generation
    meter: SequenceMeter
    tenant: str
    taken: int = 0
    """Size of the outputs that were taken, and that the engine has not been told of."""


class Generation:
    """The sequences of one request, on one engine or several.

    Iterating gives (index of the sequence, output) until all have ended, and raises the error of the first one that
    fails. Leaving the `with` block aborts whatever has not ended.
    """

    def __init__(self, timeout: float | None) -> None:
        """timeout: seconds after which what has not ended fails with `TimedOut`."""
        self.open: dict[str, EngineClient] = {}
        """Ids of the sequences that have not ended, and who works on them."""
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            error = TimedOut(f"the answer took longer than its timeout of {timeout:g} s", param="timeout")
            self._timer = asyncio.get_running_loop().call_later(timeout, self._time_out, error)
        self._queue: asyncio.Queue[tuple[int, TokenOutput] | LatticeError] = asyncio.Queue()

    def put(self, item: tuple[int, TokenOutput] | LatticeError) -> None:
        self._queue.put_nowait(item)

    def _time_out(self, error: TimedOut) -> None:
        if self.open:  # else all has come in time, and it is the client that takes long
            self.put(error)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, TokenOutput]:
        if not self.open and self._queue.empty():
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, LatticeError):
            raise item
        client = self.open.get(item[1].request_id)
        if client is not None:
            client.taken(item[1])
        return item

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for request_id, client in list(self.open.items()):
            client.abort(request_id)


async def _connect(socket: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return await asyncio.open_unix_connection(socket)
        await asyncio.sleep(_CONNECT_SECONDS)


def _as_error(failure: RequestFailed) -> LatticeError:
    kind = getattr(errors, failure.error, None)
    if not (isinstance(kind, type) and issubclass(kind, LatticeError)):
        kind = LatticeError
    return kind(failure.message, param=failure.param)
