"""What sequences remember, and where: in a row of the pool, parked beside it, or in the cache for those to come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as AbstractSequence
from itertools import takewhile

from torch import Tensor

from lattice_serve.engine.prefix_cache import FIRST_INTERVAL, PrefixCache, intervals
from lattice_serve.engine.scarcity import reported
from lattice_serve.engine.scheduler import Moves, Piece
from lattice_serve.engine.sequence import Sequence, Status
from lattice_serve.engine.state_pool import ParkedState, StatePool
from lattice_serve.engine.tier import Snapshot

_TIDY_SECONDS = 0.003
"""For so long others wait while states are put away: a part of the shortest step of a model with large ones."""
_TIDY_BYTES = 1 << 18
"""New memory that is touched at a time: up to a millisecond, on a virtual machine that has never had it."""
_AHEAD = 8
"""States that there is memory for before they come."""


class Memory:
    """Carries out what the scheduler decides about rows, and spares sequences the tokens that others have run."""

    def __init__(self, pool: StatePool, cache: PrefixCache, multiple: int = 1) -> None:
        """multiple: of so many tokens is where prompts are cut; states of answers are kept where that is anywhere."""
        self._pool, self._cache, self._multiple = pool, cache, multiple
        self._held: dict[Piece, Tensor] = {}
        """Rows as they were before pieces with drafts."""
        self._lent: deque[tuple[Snapshot, int]] = deque()
        """What the cache has in rows of the pool, which no sequence holds any more; the oldest first."""

    @property
    def used(self) -> int:
        """Rows that sequences hold."""
        return self._pool.used - len(self._lent)

    def mark(self, sequence: Sequence, places: AbstractSequence[int]) -> None:
        """Keep the state of a prompt at the last places that are no further than these, and at which it can be cut."""
        sequence.marks += [place - place % self._multiple for place in places]

    def move(self, moves: Moves, running: AbstractSequence[Sequence]) -> list[Sequence]:
        """Take and give rows; `running` are all that hold one then. Returns those whose states could not be kept, for
        want of memory."""
        lost = []
        for sequence in moves.park:
            assert sequence.row is not None, "a parked sequence had no state row"
            try:
                sequence.parked = self._park(sequence.row)
            except (MemoryError, RuntimeError) as error:
                reported(error)
                self._pool.free(sequence.row)
                lost.append(sequence)
            sequence.row = None
        for sequence in moves.admit:
            if not self._pool.spare:
                self._put_away()
            if sequence.parked is not None:
                sequence.row, sequence.parked = self._pool.restore(sequence.parked), None
            else:
                sequence.row = self._pool.allocate()
                self._begin(sequence, running)
            if sequence.started is None:
                sequence.started = time.monotonic()
        for sequence in running:
            leader = sequence.leader
            if leader is not None and (leader.status is not Status.RUNNING or leader.decoding or leader.paused):
                self._begin(sequence, running)
        return lost

    def hold(self, pieces: AbstractSequence[Piece]) -> None:
        """Before a step: remember the states that its drafts may spoil."""
        self._held = {}
        for piece in pieces:
            if piece.draft:
                try:
                    self._held[piece] = self._pool.read(_row(piece.sequence)).clone()
                except (MemoryError, RuntimeError) as error:
                    reported(error)
                    piece.draft = ()

    def settle(self, piece: Piece, accepted: int) -> None:
        """After it: where its draft was wrong, back to the state before it; what was right is run again, with the next
        token, in no more time than that takes alone."""
        sequence = piece.sequence
        if accepted == len(piece.draft):
            sequence.computed = piece.end + accepted
        else:
            self._pool.write(_row(sequence), self._held[piece])
            sequence.computed = piece.start
        if sequence.drafter is not None:
            sequence.drafter.learn(len(piece.draft), accepted)

    def keep_prompt(self, piece: Piece, logits: Tensor | None) -> float:
        """Cache the state after a piece that has run, and ends at a place of interest; how many seconds that took.

        logits: [V] of its last token, if they are known.
        """
        began = time.monotonic()
        self._keep(piece.sequence, logits if piece.ends_prompt else None, last=False)
        return time.monotonic() - began

    def keep_answer(self, sequence: Sequence) -> None:
        """Cache the state at the end of an answer: the next turn of a conversation begins with this one."""
        # Where decode rounds otherwise than prefill, a next turn could not tell that its prompt was once an answer.
        if self._multiple == 1 and len(sequence.prompt_ids) < sequence.computed < sequence.length:
            self._keep(sequence, None, last=True)

    def distrust(self, sequence: Sequence) -> bool:
        """Forget the cached states that a sequence whose numbers went wrong goes on from. Where one of them was not its
        own, and nothing has come of it yet, it begins anew without them, and this returns True."""
        self._cache.discard(sequence.cache_salt, sequence.seen())
        sequence.known = sequence.recalled = None
        if not sequence.cached_tokens or sequence.output_ids:
            return False
        sequence.computed = sequence.cached_tokens = 0
        self._pool.initialise(_row(sequence))
        return True

    def release(self, sequence: Sequence) -> None:
        """Scrub and take back whatever a sequence holds."""
        if sequence.row is not None:
            self._pool.free(sequence.row)
            sequence.row = None
        sequence.parked = sequence.leader = sequence.known = sequence.recalled = sequence.drafter = None

    def give_way(self) -> None:
        """Give the memory of the cache to what needs it more."""
        self._cache.give_way()
        while self._lent:
            self._put_away()

    def clear(self) -> None:
        """Forget all that is cached."""
        self._cache.clear()
        while self._lent:
            self._put_away()

    def tidy(self, *, idle: bool) -> bool:
        """Put states away for a moment, if there is nothing else to do or rows become few; whether more is to be done.

        They have been left in their rows, for a copy takes time, and more where its memory is new: many prompts and
        answers may end in one step, and all would wait for it.
        """
        until = time.monotonic() + _TIDY_SECONDS
        while self._cache.enabled and (idle or self._pool.spare <= self._pool.rows // 4):
            if self._lent and self._cache.ready(1):
                self._put_away()
            elif not self._cache.ready(1 if self._lent else _AHEAD):
                self._cache.prepare(_TIDY_BYTES)
            else:
                return False
            if time.monotonic() >= until:
                return True
        return False

    def check_idle(self) -> None:
        """Assert that no sequence holds anything, and that nothing of the cache is lost."""
        self._pool.check_integrity([row for _, row in self._lent])
        self._cache.check()

    def _park(self, row: int) -> ParkedState:
        try:
            return self._pool.park(row)
        except (MemoryError, RuntimeError) as error:
            reported(error)
            self.give_way()
            return self._pool.park(row)

    def _keep(self, sequence: Sequence, logits: Tensor | None, *, last: bool) -> None:
        """Cache what a sequence remembers. last: whether it needs its row no more."""
        if not self._cache.enabled:
            return
        # Only what follows the last state that is cached: however long the text is, that is not.
        after = sequence.known if sequence.known is not None and sequence.known in self._cache else None
        row = _row(sequence)
        lent = self._pool.lends and (last or self._pool.spare > 0)
        try:
            ids, state = sequence.seen(after.length if after else 0), self._pool.read(row)
            sequence.known = self._cache.put(sequence.cache_salt, ids, state, logits, lent=lent, after=after)
        except (MemoryError, RuntimeError) as error:
            reported(error)
            self.give_way()
            return
        if sequence.known is not None and sequence.known.row is state:
            self._lent.append((sequence.known, row))
            sequence.row = None if last else self._pool.copy(row)

    def _put_away(self) -> None:
        snapshot, row = self._lent.popleft()
        self._cache.settle(snapshot)
        self._pool.free(row)

    def _begin(self, sequence: Sequence, running: AbstractSequence[Sequence]) -> None:
        """Give a sequence that has run nothing the state of as much of its prompt as is known, or let it wait for one
        before it among `running` that is at work on the same prompt."""
        if not self._cache.enabled:
            return
        if sequence.needs_every_token:
            self._cache.outcomes["bypass"] += 1
            return
        before = takewhile(lambda other: other is not sequence, running)
        sequence.leader = next((other for other in before if _leads(other, sequence)), None)
        if sequence.leader is not None:
            return
        chooses = sequence.params.max_tokens > 0
        snapshot, shared = self._cache.find(sequence.cache_salt, sequence.prompt_ids, chooses=chooses)
        if snapshot is not None:
            sequence.known = snapshot
            self._pool.write(_row(sequence), snapshot.row)
            sequence.computed = sequence.cached_tokens = snapshot.length
            if sequence.decoding:
                sequence.recalled = snapshot
        # Where this prompt leaves what is known, the next one may, too: that is where a system prompt ends.
        self.mark(sequence, [shared, *intervals(sequence.computed, len(sequence.prompt_ids))])
        if self._multiple > 1 and len(sequence.prompt_ids) > FIRST_INTERVAL:
            # What goes on after this prompt can begin where it could be cut last.
            self.mark(sequence, [len(sequence.prompt_ids)])


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None, "a sequence has run without a state row"
    return sequence.row


def _leads(other: Sequence, sequence: Sequence) -> bool:
    """Whether `other` will leave what `sequence` needs to begin with its answer."""
    return (
        other.leader is None
        and not other.decoding
        and not other.paused
        and other.params.max_tokens > 0
        and other.cache_salt == sequence.cache_salt
        and (other.prompt_ids is sequence.prompt_ids or other.prompt_ids == sequence.prompt_ids)
    )
