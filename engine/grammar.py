"""Grammars that answers keep to: compiled beside the engine's steps, kept, and turned into masks over the tokens."""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray
from torch import Tensor

from lattice_serve.engine.compiler import Compiler, Trial, error_of
from lattice_serve.engine.errors import EngineUnavailable, InvalidParameter, Overloaded
from lattice_serve.engine.sampling import Grammar
from lattice_serve.engine.scarcity import HEADROOM, check_room
from lattice_serve.engine.tokenizer import Tokenizer

MAX_CACHED = 64
MAX_CACHED_BYTES = 256 << 20
"""Memory of the grammars that are kept, as they are when compiled."""
MAX_PENDING = 16
"""Grammars that wait to be compiled."""
MAX_STEP_SECONDS = 0.05
"""Processor time that a grammar may take for a token, while others wait. What is not made to be hard takes 1/100."""

_LOWEST_SCORE = -1e300


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar, or why it is none; neither where it could not be tried."""

    root: LLMatcher | None = None
    error: str = ""
    bytes: int = 0


class Grammars:
    """Compiled grammars, the last used ones kept. Belongs to one engine's thread."""

    def __init__(self, model: Path, tokenizer: Tokenizer) -> None:
        self._cache: OrderedDict[tuple[str, str], Future[Compiled]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._tokenizer = tokenizer
        self._compiler: Compiler | None = None
        self._trial = Trial(model, tokenizer.vocab_size)
        self._spellings = _Spellings(tokenizer)

    def compile(self, grammar: Grammar) -> Future[Compiled]:
        """Raises `Overloaded` when `MAX_PENDING` others wait to be compiled."""
        key = (grammar.kind, grammar.text)
        known = self._cache.get(key)
        if known is not None and not (known.done() and known.result() == Compiled()):
            self._cache.move_to_end(key)
            return known
        compiled = {other: future.result().bytes for other, future in self._cache.items() if future.done()}
        if len(self._cache) - len(compiled) >= MAX_PENDING:
            raise Overloaded(f"{MAX_PENDING} grammars wait to be compiled already: come back later")
        size = sum(compiled.values())
        for oldest, freed in compiled.items():
            if len(self._cache) < MAX_CACHED and size <= MAX_CACHED_BYTES:
                break
            del self._cache[oldest]
            size -= freed
        self._cache[key] = self._thread.submit(self._compile, grammar)
        return self._cache[key]

    def matcher(self, compiled: Compiled, ends: Sequence[int], param: str) -> Matcher:
        """At the start of the grammar. Raises `InvalidParameter`, naming `param`, where it is none, and
        `EngineUnavailable` where it could not be tried.

        `ends`: the tokens that end an answer, allowed where its text is complete and nowhere else.
        """
        if compiled.error:
            raise InvalidParameter(f"{param}: {compiled.error}", param=param)
        if compiled.root is None:
            raise EngineUnavailable("grammars cannot be compiled now: try again in a few seconds")
        return Matcher(compiled.root.deep_copy(), self._spellings, ends, param)

    def discard(self, grammar: Grammar) -> None:
        """Compile it anew when it is next asked for: what its matchers share may have reached a limit."""
        self._cache.pop((grammar.kind, grammar.text), None)

    @property
    def kept(self) -> int:
        """Grammars in the cache."""
        return len(self._cache)

    def _compile(self, grammar: Grammar) -> Compiled:
        """In the thread. llguidance does not hold Python's lock meanwhile."""
        try:
            verdict = self._trial(grammar)
            if verdict.error:
                return Compiled(error=verdict.error)
            check_room(HEADROOM // 4 + verdict.bytes)  # where Rust finds none, it ends the process
            if self._compiler is None:
                self._compiler = Compiler(self._tokenizer)
            return Compiled(self._compiler.compile(verdict.source), bytes=verdict.bytes)
        except Exception as error:  # of one request: the engine goes on
            print(f"engine: a grammar could not be tried: {error}", file=sys.stderr)
            return Compiled()


class Matcher:
    """Where one sequence is in its grammar, and which tokens may come next."""

    __slots__ = ("_ends", "_matcher", "_param", "_spellings", "allowed", "complete")

    def __init__(self, matcher: LLMatcher, spellings: _Spellings, ends: Sequence[int], param: str) -> None:
        """See `Grammars.matcher`. Raises `InvalidParameter` as `push` does."""
        self._matcher = matcher
        self._spellings = spellings
        self._ends = list(ends)
        self._param = param
        self.allowed: Tensor
        """`[V]` bool, on the CPU."""
        self.complete: bool
        """Whether the text is complete and nothing could follow."""
        self._look()

    def push(self, token_id: int) -> None:
        """Take in an allowed token that ends nothing. Raises `InvalidParameter` where the grammar is too complex."""
        began = time.thread_time()
        self._matcher.consume_token(token_id)
        self._look()
        if time.thread_time() - began > MAX_STEP_SECONDS:
            raise self._too_complex("a token takes too long")

    def _look(self) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if error := error_of(self._matcher):
            raise self._too_complex(error)
        allowed, may_end = self._spellings.allowed(bits)
        allowed[self._ends] = False
        goes_on = bool(allowed.any())
        if not goes_on and not may_end:
            raise InvalidParameter(f"{self._param}: no token of the model continues the text", param=self._param)
        self.complete = not goes_on
        allowed[self._ends] = may_end
        self.allowed = torch.from_numpy(allowed)

    def _too_complex(self, reason: str) -> InvalidParameter:
        return InvalidParameter(f"{self._param} is too complex: {reason}", param=self._param)


class _Spellings:
    """Tokens of one spelling, of which llguidance knows one: the bytes of a character's piece are often one, too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocab_size = tokenizer.vocab_size
        groups: dict[bytes, list[int]] = {}
        for token_id in range(tokenizer.vocab_size):
            if text := tokenizer.token_bytes(token_id):
                groups.setdefault(text, []).append(token_id)
        several = [ids for ids in groups.values() if len(ids) > 1]
        self._ids = np.array([token_id for ids in several for token_id in ids], np.int64)
        self._group = np.array([group for group, ids in enumerate(several) for _ in ids], np.int64)
        self._groups = len(several)

    def allowed(self, bits: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], bool]:
        """`[V]`, and whether the text may end. bits: the bitmask of a grammar of `engine.compiler`."""
        allowed = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little").view(np.bool_)
        groups = np.zeros(self._groups, np.bool_)
        groups[self._group[allowed[self._ids]]] = True
        allowed[self._ids] = groups[self._group]
        return allowed[:-1], bool(allowed[-1])


def restrict(scores: Tensor, matchers: Sequence[Matcher | None]) -> None:
    """Take all weight from tokens that the matchers of their rows do not allow. scores: `[B, V]` float64, in place."""
    for i, matcher in enumerate(matchers):
        if matcher is not None:
            # Where the model rules out all that is allowed, it is equally likely: minus infinity would be no number.
            scores[i].clamp_(min=_LOWEST_SCORE).masked_fill_(~matcher.allowed.to(scores.device), -math.inf)
