"""A stand-in for the engine process: the same messages over the same socket, without a model.

Answers are letters drawn from a hash of prompt, seed and place. What a prompt says, or the last message of a plain
chat, steers it:

- `!slow`        50 ms a token
- `!stall`       never a token
- `!hang`        never anything any more, of any request
- `!compute`     nothing for 3 s, in which it computes, then an answer
- `!eos`         end-of-text after 3 tokens
- `!stop`        the first stop string after 2 tokens
- `!utf8`        the two bytes of one character first
- `!rank`        tokens the likelier, the higher the seed
- `!say TEXT`    TEXT, token by token, then end-of-text
- `!fail X`      the error X of `engine.errors` instead of a token; `!fail-late X` after 2 tokens
- `!exit`        the process ends; `!exit-late` after 2 tokens
- `!garbage`     a frame that is no message
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from lattice_serve.engine import child_process
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.detokenizer import Detokenizer
from lattice_serve.engine.messages import (
    TO_ENGINE,
    Credit,
    EngineStats,
    Ping,
    Ready,
    RequestFailed,
    StepOutputs,
    Submit,
    TokenLogprob,
    TokenOutput,
    encode,
    output_size,
)
from lattice_serve.engine.tokenizer import Tokenizer

PIECE = 64
"""Tokens of a prompt whose log-probabilities go into one message."""


class FakeEngine:
    def __init__(self, config: EngineConfig, record: Path, longest: int) -> None:
        self.config = config
        self.longest = longest
        self.tokenizer = Tokenizer.load(config.model)
        vocabulary = range(self.tokenizer.vocab_size)
        self.words = [token_id for token_id in vocabulary if self.tokenizer.token_bytes(token_id).isalpha()]
        self.pieces = {self.tokenizer.token_bytes(token_id): token_id for token_id in vocabulary}
        self.rows = asyncio.Semaphore(config.max_rows or 8)
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.windows: dict[str, int] = {}
        """Size of outputs that each request may yet send."""
        self.credited = asyncio.Condition()
        self.prompt_ids: Any = None
        self.counts: dict[str, Any] = {
            "rows_used": 0,
            "prompt_tokens_total": 0,
            "generation_tokens_total": 0,
            "steps_total": 0,
        }
        self.record_path = record

    def record(self, event: str, **fields: Any) -> None:
        with self.record_path.open("a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        rows = self.config.max_rows or 8
        self.send(Ready("fake", os.getpid(), rows, 1000, self.tokenizer.vocab_size, "cpu", "float32", 0.0))
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            message = TO_ENGINE.decode(await reader.readexactly(size))
            if isinstance(message, Credit):
                async with self.credited:
                    self.windows[message.request_id] += message.size
                    self.credited.notify_all()
            elif isinstance(message, Submit):
                if message.same_prompt:
                    message = msgspec.structs.replace(message, prompt_ids=self.prompt_ids)
                self.prompt_ids, params = message.prompt_ids, message.params
                self.windows[message.request_id] = message.window or 1 << 62
                self.record(
                    "submit",
                    pid=os.getpid(),
                    id=message.request_id,
                    ids=message.prompt_ids.tolist(),
                    seed=params.seed,
                    stop=params.stop,
                    grammar=msgspec.to_builtins(params.grammar),
                    tenant=message.tenant,
                    weight=message.weight,
                    salt=message.cache_salt,
                )
                self.tasks[message.request_id] = asyncio.create_task(self.answer(message))
            elif isinstance(message, Ping):
                self.step()
            else:
                self.record("abort", id=message.request_id)
                if message.request_id in self.tasks:  # It may have ended meanwhile.
                    self.tasks.pop(message.request_id).cancel()

    def send(self, message: Ready | StepOutputs) -> None:
        self.writer.write(encode(message))

    def step(self, *outputs: TokenOutput, failures: list[RequestFailed] | None = None) -> None:
        used = self.counts["rows_used"]
        stats = EngineStats(
            running=used, waiting=len(self.tasks) - used, rows=self.config.max_rows or 8, step_tokens=1, **self.counts
        )
        self.send(StepOutputs(list(outputs), failures or [], stats))

    async def answer(self, request: Submit) -> None:
        try:
            async with self.rows:
                self.counts["rows_used"] += 1
                try:
                    await self.generate(request)
                finally:
                    self.counts["rows_used"] -= 1
        finally:
            self.tasks.pop(request.request_id, None)
            self.step()

    async def generate(self, request: Submit) -> None:
        params = request.params
        text = self.tokenizer.decode(request.prompt_ids)
        self.counts["prompt_tokens_total"] += len(request.prompt_ids)
        order, _, error = text.rpartition("User: ")[2].removesuffix("\nAssistant:").partition(" ")
        said = self.tokenizer.encode(error) if order == "!say" else []
        detokenizer = Detokenizer(self.tokenizer.token_bytes)
        if order == "!stall":
            await asyncio.sleep(3600)
        if order == "!hang":
            time.sleep(3600)  # noqa: ASYNC251
        end = time.monotonic() + 3 * (order == "!compute")
        while time.monotonic() < end:
            pass
        if order == "!fail":
            self.step(failures=[RequestFailed(request.request_id, error, f"told to: {error}", "prompt")])
            return
        await self.score(request)
        if params.max_tokens == 0:
            await self.emit(self.output(request, 0, None, "", "length"))
        longest = min(params.max_tokens, self.longest)
        for place in range(longest):
            if order == "!slow":
                await asyncio.sleep(0.05)
            if order == "!fail-late" and place == 2:
                self.step(failures=[RequestFailed(request.request_id, error, f"told to: {error}", "prompt")])
                return
            if order in ("!exit", "!exit-late") and place == 2 * (order == "!exit-late"):
                await self.writer.drain()
                os._exit(3)
            if order == "!garbage":
                self.writer.write(b"\x00\x00\x00\x01\xc1")
            last = place == longest - 1
            token_id, delta, reason, stop = self.word(request, place), None, "length" if last else None, None
            if order == "!utf8" and place < 2:
                token_id, delta = self.pieces["é".encode()[place : place + 1]], "é" * place
            if place < len(said):
                token_id = said[place]
                delta, _ = detokenizer.push(token_id)
            if (order == "!eos" and place == 3) or (order == "!say" and place == len(said)):
                token_id, delta, reason = self.tokenizer.eos_token_id or 0, "", "stop"
            if order == "!stop" and place == 2:
                delta, reason, stop = "", "stop", params.stop[0]
            delta = self.tokenizer.token_text(token_id) if delta is None else delta
            self.counts["generation_tokens_total"] += 1
            self.counts["steps_total"] += 1
            await self.emit(self.output(request, place, token_id, delta, reason, stop))
            if reason == "stop":
                return
            await asyncio.sleep(0)

    async def emit(self, output: TokenOutput) -> None:
        """Send it, and wait while too much of what was sent has not been taken."""
        self.step(output)
        self.windows[output.request_id] -= output_size(output.logprob, output.prompt_logprobs)
        if output.finish_reason is None:
            async with self.credited:
                await self.credited.wait_for(lambda: self.windows[output.request_id] > 0)

    async def score(self, request: Submit) -> None:
        """All but the last piece of the prompt's log-probabilities."""
        count = request.params.prompt_logprobs
        for start in range(0, len(request.prompt_ids) - PIECE if count is not None else 0, PIECE):
            scores = self.scores(request, start, start + PIECE)
            await self.emit(TokenOutput(request.request_id, None, "", prompt_logprobs=scores))

    def scores(self, request: Submit, start: int, end: int) -> list[TokenLogprob | None]:
        count = request.params.prompt_logprobs or 0
        places = range(start, min(end, len(request.prompt_ids)))
        return [self.logprob(request.prompt_ids[place], count) if place else None for place in places]

    def word(self, request: Submit, place: int) -> int:
        digest = hashlib.sha256(repr((request.prompt_ids.tolist(), request.params.seed, place)).encode()).digest()
        return self.words[int.from_bytes(digest[:4], "big") % len(self.words)]

    def output(
        self,
        request: Submit,
        place: int,
        token_id: int | None,
        text: str,
        reason: Any = None,
        stop: str | None = None,
    ) -> TokenOutput:
        params = request.params
        prompt_logprobs = None
        if params.prompt_logprobs is not None and place == 0:
            size = len(request.prompt_ids)
            prompt_logprobs = self.scores(request, (size - 1) // PIECE * PIECE, size)
        return TokenOutput(
            request.request_id,
            token_id,
            text,
            reason,
            stop,
            self.chosen(request, token_id) if token_id is not None and params.logprobs is not None else None,
            prompt_logprobs,
            embedding=None if request.pooling is None else [3.0 * len(request.prompt_ids), 4.0, -0.0],
            queue_seconds=0.25 if place == 0 else None,
            prefill_seconds=0.5 if place == 0 else None,
        )

    def chosen(self, request: Submit, token_id: int) -> TokenLogprob:
        params = request.params
        if self.tokenizer.decode(request.prompt_ids) == "!rank":
            return TokenLogprob(token_id, (params.seed or 0) - 100.0)
        return self.logprob(token_id, params.logprobs or 0)

    def logprob(self, token_id: int, count: int) -> TokenLogprob:
        """The token is the most likely one, the others are impossible."""
        others = [other for other in self.words[:count] if other != token_id]
        top = [(token_id, -0.5), *((other, float("-inf")) for other in others)]
        return TokenLogprob(token_id, -0.5, tuple(top[:count]))


async def main() -> None:
    child_process.wake_at_parents_end()
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--fail-connected", action="store_true")
    parser.add_argument("--longest", type=int, default=1 << 31, help="tokens of an answer")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--config", required=True)
    options = parser.parse_args()
    if options.fail:
        sys.exit("the fake engine was told not to start")
    engine = FakeEngine(EngineConfig.model_validate_json(options.config), options.record, options.longest)
    folder = Path(options.socket).parent
    engine.record("start", pid=os.getpid(), folder=str(folder), mode=oct(folder.stat().st_mode & 0o777))
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if options.fail_connected:
            writer.close()
            print("the fake engine was told not to start", file=sys.stderr)
            # As the engine, it ends with its stdin, too.
            server_gone = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
            os._exit(0 if (await asyncio.wait({server_gone}, timeout=0.2))[0] else 1)
        try:
            await engine.serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            for task in engine.tasks.values():
                task.cancel()
            writer.transport.abort()
            gone.set()

    async with await asyncio.start_unix_server(serve, options.socket):
        await gone.wait()


if __name__ == "__main__":
    asyncio.run(main())
