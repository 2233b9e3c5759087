"""Chat templates: messages to the text that a model continues."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog

from lattice_serve.engine import child_process
from lattice_serve.engine.errors import CheckpointError, EngineUnavailable, InvalidParameter, Overloaded

log = structlog.get_logger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
TOOL_CALL = "<tool_call>"
"""Where a template has it, its model writes calls as Hermes models do: this, JSON, and the same with a slash."""

_SECONDS = 1.0
_LOST_SECONDS, _START_SECONDS = 10.0, 60.0
"""After which a process that does not answer is given up: stopped, it cannot end itself in time. The longer one: until
it has begun."""
_UNAVAILABLE = "chat templates cannot be rendered now: try again in a few seconds"
_WORKER = (sys.executable, "-m", "lattice_serve.server.template_worker")

PLAIN_STOP = "\nUser:"
PLAIN_TEMPLATE = """\
{%- if tools -%}
System: To call functions, answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call> for each call:
{%- for tool in tools %} {{ tool.function | tojson }}{% endfor %}
{{- "\n" }}
{%- endif %}
{%- for message in messages %}
{{- message.role | capitalize }}:
{{- " " if message.content and (message.role != "assistant" or message.content[0].isalnum()) }}{{ message.content }}
{%- for call in message.tool_calls or [] %} <tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{{- "\n" if not loop.last or add_generation_prompt }}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
"""For models without a template, which have seen no chats: a transcript, as in a book.

    System: Answer in rhyme.
    User: Who are you?
    Assistant:

The answer ends before a line that begins with `User:`. A space before its first word is the transcript's: it is taken
off there and put back here, so that the next turn's prompt begins with the very tokens of this one.
"""


class ChatTemplate:
    """The template of a model folder, or `PLAIN_TEMPLATE`, rendered by a process of its own.

    A template, or messages that make it run long, can hold up other renderings for about a second, and nothing else.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        """names: of control pieces, which are text in what a client gives; only the template's own are more.

        Raises `CheckpointError` when the file is there and cannot be read.
        """
        path = folder / TEMPLATE_FILE
        self.plain = not path.exists()
        try:
            self.source = PLAIN_TEMPLATE if self.plain else path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {error}: give a text file, or none") from error
        self.stop = (PLAIN_STOP,) if self.plain else ()
        self.knows_tools = TOOL_CALL in self.source
        self.knows_developers = "developer" in self.source
        self._names = names
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, variables: Mapping[str, Any], request: bytes | None = None, *, end: str = "") -> str:
        """The text for `variables`, which JSON can hold, and those of a `request`, see `chat_variables`, which is JSON.

        Raises `InvalidParameter` when the template refuses them, fails, or takes too long, `CheckpointError` when it is
        no template, `Overloaded` when others that take long are before this one, and `EngineUnavailable` when the
        process cannot be started, or is stopped.
        """
        loop = asyncio.get_running_loop()
        asked = loop.time()
        # Integers of any size, which msgspec does not write.
        parts = (json.dumps(variables).encode(), json.dumps(end).encode(), request or b"null")
        frame = b'{"variables":%b,"end":%b,"request":%b}' % parts
        async with self._lock:
            if loop.time() - asked > _SECONDS:
                raise Overloaded("other chat templates take too long: try again later")
            try:
                if self._ended:  # killed between two renderings
                    await self._stop()
                if self._process is None:
                    await self._start()
                rendered = await self._ask(frame, _LOST_SECONDS)
            except BaseException as error:
                # What it would still say is an answer to this request, and must not become that of the next one.
                await self._stop()
                if isinstance(error, asyncio.IncompleteReadError | ConnectionError):
                    raise InvalidParameter(
                        f"messages: the chat template took over {_SECONDS:g} s or too much memory: send less",
                        param="messages",
                    ) from error
                raise
        if "refused" in rendered:
            raise InvalidParameter(f"{rendered['param']}: {rendered['refused']}", param=rendered["param"])
        if "error" in rendered:
            raise InvalidParameter(
                f"messages: the chat template does not take them: {rendered['error']}", param="messages"
            )
        return rendered["text"]

    async def __aenter__(self) -> ChatTemplate:
        """Ready for the first request. A bad template, or want of a process, is logged here, and fails each request."""
        with suppress(CheckpointError, EngineUnavailable):
            await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def _ended(self) -> bool:
        process = self._process
        return process is not None and (
            process.returncode is not None or process.stdin is None or process.stdin.is_closing()
        )

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            await process.wait()

    async def _start(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *_WORKER,
                # No keys, for a template that would find a way out of its sandbox.
                env=child_process.environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:  # no memory for a process, or too many of them, or of open files
            log.error("chat templates cannot be rendered", error=str(error))
            raise EngineUnavailable(_UNAVAILABLE) from error
        try:
            setup = {"names": self._names, "developers": self.knows_developers}
            setup |= {"source": self.source, "seconds": _SECONDS}
            answer = await self._ask(json.dumps(setup).encode(), _START_SECONDS)
            fault = answer.get("error")
        except (asyncio.IncompleteReadError, ConnectionError):
            fault = f"reading it takes over {_SECONDS:g} s or too much memory"
        if fault is not None:
            await self._stop()
            log.error("bad chat template", fault=fault)
            raise CheckpointError(f"{TEMPLATE_FILE} of the model folder: {fault}: mend the template")

    async def _ask(self, data: bytes, seconds: float) -> dict[str, str]:
        """Its answer. Raises `EngineUnavailable` when none comes within so many seconds."""
        process, loop = self._process, asyncio.get_running_loop()
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = loop.call_later(seconds, _kill, process)
        try:
            process.stdin.write(len(data).to_bytes(4, "big") + data)
            await process.stdin.drain()
            size = int.from_bytes(await process.stdout.readexactly(4), "big")
            answer: dict[str, str] = json.loads(await process.stdout.readexactly(size))
            return answer
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if loop.time() < timer.when():
                raise
            log.error("the process that renders chat templates did not answer", seconds=seconds)
            raise EngineUnavailable(_UNAVAILABLE) from error
        finally:
            timer.cancel()


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
