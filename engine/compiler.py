"""Grammars to matchers of llguidance, and a process to try each in first.

llguidance compiles little ahead and walks the rest token by token, so that its own limits bound the time and memory of
most of what can be asked. Not of all: thousands of rules in a chain overflow its stack, which nothing catches. So a
grammar is compiled, and followed for some tokens, in a process that may die of it; only then in the engine's own.

The process is `python -m lattice_serve.engine.compiler FOLDER VOCAB_SIZE`. It answers each `Grammar`, a line of JSON,
with a `Verdict`, and ends with its stdin. Each is tried in a fork of it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from lattice_serve.engine import child_process
from lattice_serve.engine.gbnf import is_gbnf, to_lark
from lattice_serve.engine.json_schema.rewriter import Rewriter
from lattice_serve.engine.json_schema.tool_calls import rewrite_calls
from lattice_serve.engine.sampling import Grammar
from lattice_serve.engine.tokenizer import Tokenizer

_LEXER_STATES = 20_000
_MAX_LEXER_STATES = 200_000
# Without a bound a model may fill its answer with white space.
_JSON_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"
# Not \u: a name spelled by it would count as another one than the same name spelled out.
_JSON_ESCAPES = 'nrbtf\\"'
_NEEDS_UNICODE_ESCAPE = re.compile(r"\\(u00|x)[01]|\x7f")
_LONGEST_ERROR = 300
_ONE_OF = "oneOf can be enforced where no value matches two of its schemas, and some of them overlap: give anyOf"

_TRIED_TOKENS = 64
_CPU_SECONDS = 1
_MEMORY = 256 << 20
"""Bytes of address space that a trial may add."""
_STACK = 7 << 18
"""Bytes of stack in a trial: fewer than any thread of the engine has. 5,000 properties of an object take 1.5 MiB."""
_WALL_SECONDS = 10.0
"""For the same, on a machine that is busy."""
_START_SECONDS = 60.0
_READY = b"ready\n"


class Verdict(msgspec.Struct, frozen=True):
    error: str = ""
    """What is wrong with the grammar; empty: nothing."""
    source: str = ""
    """The grammar as `Compiler.compile` takes it."""
    bytes: int = 0
    """Memory that it takes, compiled."""


class Compiler:
    """For the vocabulary of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))
        self.end: int = tokenizer.vocab_size
        """The token that stands for the end of a text."""

    def compile(self, source: str) -> LLMatcher:
        """At its start, with at least one token to come. Raises `ValueError` that says what is wrong with the grammar.

        Its bitmasks have a bit more than the model has tokens: `end`, whether the text may end.
        """
        matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=_limits(source))
        _check(matcher)
        # The first mask is the dearest, and copies of a matcher share what it finds out.
        matcher.compute_bitmask()
        if matcher.is_stopped():
            raise ValueError("it admits no text")
        _check(matcher)
        return matcher


class Trial:
    """The process, started when the first grammar is to be tried. Not thread-safe."""

    def __init__(self, model: Path, vocab_size: int) -> None:
        self._command = [sys.executable, "-m", "lattice_serve.engine.compiler", str(model), str(vocab_size)]
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, grammar: Grammar) -> Verdict:
        """Raises `OSError` when the process does not start, or has died."""
        if self._process is None or self._process.poll() is not None:
            self._process = process = subprocess.Popen(
                self._command,
                bufsize=0,
                env=child_process.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
            weakref.finalize(self, _end, process)
            if _ask(process, b"", _START_SECONDS) != _READY:
                raise OSError("the grammar compiler did not start")
        question = msgspec.json.encode(grammar) + b"\n"
        return msgspec.json.decode(_ask(self._process, question, 2 * _WALL_SECONDS), type=Verdict)


class _Vocabulary:
    """The tokenizer as llguidance asks for it, with one token more, for the end of a text.

    So a model needs no end-of-text of its own, and what ends an answer is the engine's to say.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        end = tokenizer.vocab_size
        # llguidance marks tokens that are not text by 0xFF.
        self.tokens = [*map(tokenizer.token_bytes, range(end)), b"\xff[end]"]
        self.eos_token_id = end
        self.special_token_ids = [end]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode())


def _limits(source: str) -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        # Of optional properties that may come next, each is four.
        max_items_in_row=5_000,
        # Each character of a name or a value takes one.
        max_lexer_states=min(_LEXER_STATES + len(source), _MAX_LEXER_STATES),
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def source_of(grammar: Grammar) -> str:
    """Returns a grammar in llguidance's terms. Raises `ValueError`."""
    if grammar.kind in ("json_schema", "tool_calls"):
        given = json.loads(grammar.text)
        rewriter = Rewriter()
        root = rewriter.document(given) if grammar.kind == "json_schema" else rewrite_calls(rewriter, **given)
        schema = json.dumps(rewriter.with_definitions(root), ensure_ascii=False)
        escapes = _JSON_ESCAPES + ("u" if _NEEDS_UNICODE_ESCAPE.search(schema) else "")
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _JSON_WHITE_SPACE, "json_allowed_escapes": escapes}
        )
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        # One lexeme: of thousands, each would be an item of the parser.
        choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    return LLMatcher.grammar_from_lark(to_lark(grammar.text) if is_gbnf(grammar.text) else grammar.text)


def error_of(matcher: LLMatcher) -> str:
    """Why it cannot go on, in one line; empty where it can."""
    if not matcher.is_error():
        return ""
    error = matcher.get_error().replace("<non-verbose/>", "")
    return _ONE_OF if "coerce_one_of" in error else _line(error)


def _line(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= _LONGEST_ERROR:
        return line
    # Some say first what is wrong, and others last.
    return f"{line[: _LONGEST_ERROR // 2]} ... {line[-_LONGEST_ERROR // 2 :]}"


def _check(matcher: LLMatcher, reason: str = "") -> None:
    if error := error_of(matcher):
        raise ValueError(f"{reason}{error}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _ask(process: subprocess.Popen[bytes], question: bytes, seconds: float) -> bytes:
    """Returns the answer: one line, and nothing after it. Raises `OSError` when it is not there in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    # One that is stopped does not read either, and a long question does not fit into its pipe.
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    line = bytearray()
    try:
        process.stdin.write(question)
        while not line.endswith(b"\n") and (part := os.read(process.stdout.fileno(), 1 << 16)):
            line += part
    finally:
        timer.cancel()
    if not line.endswith(b"\n"):
        _end(process)
        raise OSError("the grammar compiler died")
    return bytes(line)


def _try(compiler: Compiler, grammar: Grammar) -> Verdict:
    before = _resident()
    try:
        source = source_of(grammar)
        matcher = compiler.compile(source)
        # One path of it, too, for some explode only after some tokens.
        for place in range(_TRIED_TOKENS):
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, count=compiler.end, bitorder="little").nonzero()[0]
            if not allowed.size:
                break
            matcher.consume_token(int(allowed[place * 31 % allowed.size]))
        _check(matcher, "it is too complex: ")
    except RecursionError:
        return Verdict("it nests too deeply")
    except ValueError as error:
        return Verdict(_line(str(error)))
    return Verdict(source=source, bytes=max(0, _resident() - before))


def _resident() -> int:
    return _memory_pages()[1] * resource.getpagesize()


def _memory_pages() -> list[int]:
    """Of address space, and of memory in use."""
    return [int(field) for field in Path("/proc/self/statm").read_text().split()[:2]]


def _fork(compiler: Compiler, grammar: Grammar) -> None:
    """Answer within limits, and exit."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the last words of what the limits end
        size = _memory_pages()[0] * resource.getpagesize() + _MEMORY
        for limit, value in (resource.RLIMIT_AS, size), (resource.RLIMIT_STACK, _STACK), (resource.RLIMIT_CORE, 0):
            resource.setrlimit(limit, (value, value))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, _WALL_SECONDS)
        verdict = _try(compiler, grammar)
        # Nothing may end it between its answer and its exit.
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(verdict)
        status = 0
    finally:
        os._exit(status)


def _answer(verdict: Verdict) -> None:
    os.write(sys.stdout.fileno(), msgspec.json.encode(verdict) + b"\n")


def main(folder: str, vocab_size: str) -> None:
    child_process.wake_at_parents_end()
    compiler = Compiler(Tokenizer.load(Path(folder), int(vocab_size)))
    os.nice(10)  # The engine's steps come first.
    os.write(sys.stdout.fileno(), _READY)
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=Grammar)
        child = os.fork()
        if child == 0:
            _fork(compiler, grammar)
        if os.waitpid(child, 0)[1] != 0:
            _answer(Verdict("it takes too long, too much memory or too deep a recursion to compile"))


if __name__ == "__main__":
    main(*sys.argv[1:])
