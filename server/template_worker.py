"""Renders a chat template, in a process that can be lost: `python -m lattice_serve.server.template_worker`.

Speaks frames over stdin and stdout: a four-byte big-endian length, then a JSON object. The first one it reads has the
`source` of the template, the `seconds` that reading it may take, and each rendering, the `names` of control pieces, and
whether the template knows `developers`. The others have the `variables` of one rendering each, and the `request` that
gives more of them. Each, the first one too, is answered by an object with `text`, with `error`, which says why there is
none, or with `refused`, which says what is wrong with the request. A template runs in jinja's sandbox; this process
ends, without an answer, when one takes too long, and before one takes the machine's memory. It ends with its stdin.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_items
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lattice_serve.engine import child_process
from lattice_serve.server.chat_variables import Refused, TextArguments, chat_variables

MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 24
MAX_ERROR = 500


class Raised(TemplateError):
    """What a template raises itself, by `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own type is not a ClassVar)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise Raised(message)


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON: jinja's own filter escapes it for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(value.items() if isinstance(value, TextArguments) else do_items(value))


def _compile(source: str) -> Template:
    """The template, with the functions that chat templates count on."""
    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.filters["items"] = _items
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _render(template: Template, variables: dict[str, Any]) -> dict[str, str]:
    parts, size = [], 0
    try:
        for part in template.generate(variables):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARACTERS:
                return {"error": f"the text is longer than {MAX_CHARACTERS} characters"}
    except Raised as error:
        return {"error": str(error)[:MAX_ERROR]}
    # A template is a program: it may raise anything, for messages that its author did not think of.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR]}
    return {"text": "".join(parts)}


def _answer(template: Template, frame: dict[str, Any], setup: dict[str, Any]) -> dict[str, str]:
    variables = frame["variables"]
    if frame["request"] is not None:
        names, developers = setup["names"], setup["developers"]
        try:
            variables |= chat_variables(frame["request"], names, developers=developers, end=frame["end"])
        except Refused as error:
            return {"refused": str(error), "param": error.param}
    return _render(template, variables)


def _read() -> bytes:
    """The next frame; empty at the end."""
    return sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(4), "big"))


def _write(answer: dict[str, str]) -> None:
    # Escaped to ASCII: a template can make what is not valid Unicode.
    data = json.dumps(answer).encode()
    sys.stdout.buffer.write(len(data).to_bytes(4, "big") + data)
    sys.stdout.buffer.flush()


def main() -> None:
    child_process.wake_at_parents_end()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The default action is the system's, and ends the process whatever the interpreter is at.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    setup = json.loads(_read())
    signal.setitimer(signal.ITIMER_REAL, setup["seconds"])
    try:
        template = _compile(setup["source"])
    except Exception as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        _write({"error": f"{line}{error}"})
        return
    _write({"text": ""})
    signal.setitimer(signal.ITIMER_REAL, 0)
    while frame := _read():
        signal.setitimer(signal.ITIMER_REAL, setup["seconds"])
        _write(_answer(template, json.loads(frame), setup))
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
