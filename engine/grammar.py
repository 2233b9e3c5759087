"""Grammars that answers keep to: compiled beside the engine's steps, kept, and turned into masks over the tokens."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray
from torch import Tensor

from lattice_serve.engine.compiler import Compiler, Trial, error_of
from lattice_serve.engine.distinct_names import DistinctNames, QuoteTokens
from lattice_serve.engine.errors import EngineUnavailable, InvalidParameter, Overloaded
from lattice_serve.engine.fair_executor import FairExecutor
from lattice_serve.engine.sampling import JSON_KINDS, Grammar
from lattice_serve.engine.scarcity import HEADROOM, check_room
from lattice_serve.engine.shares import ANYBODY, Shares, tenant_of
from lattice_serve.engine.tokenizer import Tokenizer

MAX_CACHED = 64
MAX_CACHED_BYTES = 256 << 20
"""Memory of the grammars that are kept, as they are when compiled."""
MAX_PENDING = 16
"""Grammars that wait to be compiled."""
MAX_STEP_SECONDS = 0.05
"""Processor time that a grammar may take for a token. What is not made to be hard takes 1/1000."""

_MEMORY = 0.9
"""How much of a token's processor time is expected of the next."""

_LOWEST_SCORE = -1e300


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar, or why it is none; neither where it could not be tried."""

    root: LLMatcher | None = None
    error: str = ""
    bytes: int = 0
    is_json: bool = False
    """Whether its texts are JSON, in whose objects no name may repeat."""


class Grammars:
    """Compiled grammars, the last used ones kept. Belongs to one engine's thread.

    Each belongs to a salt: how long one takes to compile tells nobody what others have used. Tenants have fair shares
    of the places in the cache and before the compiler, and of the compiler's time.
    """

    def __init__(self, model: Path, tokenizer: Tokenizer, shares: Shares | None = None) -> None:
        """shares: the weights of the tenants; None: all have the same."""
        self._cache: OrderedDict[tuple[str, str, str], Future[Compiled]] = OrderedDict()
        """By salt, kind and text."""
        self._shares = shares or Shares()
        self._thread: FairExecutor[Compiled] = FairExecutor("grammar", self._shares)
        self._tokenizer = tokenizer
        self._compiler: Compiler | None = None
        self._trial = Trial(model, tokenizer.vocab_size)
        self._spellings = _Spellings(tokenizer)
        self._quotes = QuoteTokens(tokenizer)

    def compile(self, grammar: Grammar, salt: str = ANYBODY) -> Future[Compiled]:
        """Raises `Overloaded` when `MAX_PENDING` others wait to be compiled, and the tenant has its share of them.

        salt: as `engine.shares.salted` makes it.
        """
        key = (salt, grammar.kind, grammar.text)
        known = self._cache.get(key)
        if known is not None and not (known.done() and known.result() == Compiled()):
            self._cache.move_to_end(key)
            return known
        tenant = tenant_of(salt)
        pending = Counter(tenant_of(other[0]) for other, future in self._cache.items() if not future.done())
        if not self._shares.allows(tenant, 1, pending, MAX_PENDING):
            raise Overloaded(f"{pending.total()} grammars wait to be compiled already: come back later")
        self._make_room(tenant)
        self._cache[key] = self._thread.submit(tenant, lambda: self._compile(grammar))
        return self._cache[key]

    def _make_room(self, tenant: str) -> None:
        """Forget compiled grammars until `tenant` has room for one: the oldest of who is most over its share."""
        sizes = {key: future.result().bytes for key, future in self._cache.items() if future.done()}
        while sizes and (len(self._cache) >= MAX_CACHED or sum(sizes.values()) > MAX_CACHED_BYTES):
            least = MAX_CACHED_BYTES // MAX_CACHED
            used: Counter[str] = Counter()
            for (salt, _, _), size in sizes.items():
                used[tenant_of(salt)] += max(least, size)
            if tenant in used:
                used[tenant] += least
            most = self._shares.most_over(used)
            oldest = next(key for key in sizes if tenant_of(key[0]) == most)
            del self._cache[oldest], sizes[oldest]

    def matcher(self, compiled: Compiled, ends: Sequence[int], param: str) -> Matcher:
        """At the start of the grammar. Raises `InvalidParameter`, naming `param`, where it is none, and
        `EngineUnavailable` where it could not be tried.

        `ends`: the tokens that end an answer, allowed where its text is complete and nowhere else.
        """
        if compiled.error:
            raise InvalidParameter(f"{param}: {compiled.error}", param=param)
        if compiled.root is None:
            raise EngineUnavailable("grammars cannot be compiled now: try again in a few seconds")
        names = DistinctNames(self._quotes) if compiled.is_json else None
        return Matcher(compiled.root.deep_copy(), self._spellings, ends, param, names)

    def discard(self, grammar: Grammar, salt: str = ANYBODY) -> None:
        """Compile it anew when it is next asked for: what its matchers share may have reached a limit."""
        self._cache.pop((salt, grammar.kind, grammar.text), None)

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
            root = self._compiler.compile(verdict.source)
            return Compiled(root, bytes=verdict.bytes, is_json=grammar.kind in JSON_KINDS)
        except Exception as error:  # of one request: the engine goes on
            print(f"engine: a grammar could not be tried: {error}", file=sys.stderr)
            return Compiled()


class Matcher:
    """Where one sequence is in its grammar, and which tokens may come next."""

    __slots__ = ("_ends", "_matcher", "_names", "_param", "_spellings", "allowed", "complete", "seconds")

    def __init__(
        self,
        matcher: LLMatcher,
        spellings: _Spellings,
        ends: Sequence[int],
        param: str,
        names: DistinctNames | None = None,
    ) -> None:
        """See `Grammars.matcher`. Raises `InvalidParameter` as `push` does."""
        self._matcher = matcher
        self._spellings = spellings
        self._names = names
        self._ends = list(ends)
        self._param = param
        self.allowed: Tensor
        """`[V]` bool, on the CPU."""
        self.complete: bool
        """Whether the text is complete and nothing could follow."""
        self.seconds = 0.0
        """Processor time to expect of the next token."""
        began = time.thread_time()
        self._look()
        self.seconds = time.thread_time() - began

    def push(self, token_id: int) -> None:
        """Take in an allowed token; one that ends an answer changes nothing. To be called in one thread at a time.

        Raises `InvalidParameter` where the grammar is too complex.
        """
        if token_id in self._ends:
            return
        began = time.thread_time()
        try:
            self._matcher.consume_token(token_id)
            if self._names is not None:
                self._names.push(self._spellings.text(token_id))
            self._look()
        finally:
            seconds = time.thread_time() - began
            # Some tokens are harder than others: one that was hard may be followed by another.
            self.seconds = max(seconds, _MEMORY * self.seconds)
        if seconds > MAX_STEP_SECONDS:
            raise self._too_complex("a token takes too long")

    def _look(self) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if error := error_of(self._matcher):
            raise self._too_complex(error)
        allowed, may_end = self._spellings.allowed(bits)
        if self._names is not None:
            allowed[self._names.repeating(allowed)] = False
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
        self.text = tokenizer.token_bytes
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
