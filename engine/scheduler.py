"""Which sequences run in a step, and which of them hold a state row.

Every sequence has a deadline, a step number: when it came plus `AGING` steps for each unit of priority. The earliest
goes first, so a lower number of priority is served sooner, and nothing waits for ever: the deadlines of what comes
later are later. A sequence that has held its row for `quantum` steps gets a new deadline, as if it had just come, so
that rows go round among long answers. When rows are short, a waiting sequence takes the row of the running one with
the latest deadline, if that is later than its own; the state is parked, one copy to host memory, and nothing is
computed twice. A sequence that is paused, for its outputs are not taken, is left out of steps, is the first to lose its
row, and queues again as if it had just come.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lattice_serve.engine.errors import Overloaded
from lattice_serve.engine.sequence import Sequence, Status

AGING = 1000
"""Steps that one unit of priority is worth."""


@dataclass(slots=True, eq=False)
class Piece:
    """Tokens `start` to `end` of one sequence, to be run in a step: none where its logits are there already."""

    sequence: Sequence
    start: int
    end: int
    draft: tuple[int, ...] = ()
    """Guesses at the tokens that follow."""

    @property
    def tokens(self) -> int:
        return self.end - self.start + len(self.draft)

    @property
    def decodes(self) -> bool:
        """Whether its tokens are such as the model has chosen."""
        return self.start >= len(self.sequence.prompt_ids)

    @property
    def next_alone(self) -> bool:
        """Whether it is the token chosen last and nothing else, as all but a few pieces are."""
        sequence, prompt = self.sequence, len(self.sequence.prompt_ids)
        last = prompt + len(sequence.output_ids)
        return not self.draft and self.end == last and self.start == last - 1 and self.start >= prompt

    @property
    def goes_on(self) -> bool:
        """Whether it is that, and what follows it will be."""
        return self.next_alone and self.sequence.drafter is None

    @property
    def samples(self) -> bool:
        """Whether the sequence's next token is chosen after this piece."""
        return self.end == self.sequence.length and self.sequence.params.max_tokens > 0

    @property
    def ends_prompt(self) -> bool:
        return self.end == len(self.sequence.prompt_ids)

    @property
    def keeps(self) -> bool:
        """Whether it ends at a place of interest in its prompt: the state there may come again."""
        sequence = self.sequence
        if self.end > len(sequence.prompt_ids):
            return False
        # What was asked for a vector is not gone on from.
        ends = self.ends_prompt and sequence.pooled is None
        return self.tokens > 0 and (ends or self.end in sequence.marks)

    @property
    def scored(self) -> list[int]:
        """Prompt tokens that follow those of this piece, if their log-probabilities are asked for."""
        if self.sequence.prompt_logprobs is None:
            return []
        return list(self.sequence.prompt_ids[self.start + 1 : self.end + 1])


@dataclass(slots=True)
class Moves:
    """Rows to take, and then to give, before a step."""

    park: list[Sequence] = field(default_factory=list)
    """Lose their rows, their states parked."""
    admit: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Deterministic: the same calls in the same order give the same steps. Of each, `assign` is the first half."""

    def __init__(
        self, *, rows: int, max_step_tokens: int, max_waiting: int, quantum: int = 256, multiple: int = 1
    ) -> None:
        """multiple: prompts are cut at multiples of so many tokens; `max_step_tokens` has room for one after decode."""
        self.rows = rows
        self.max_step_tokens = max_step_tokens
        self.max_waiting = max_waiting
        self.quantum = quantum
        self.multiple = multiple
        self.running: list[Sequence] = []
        """In order of admission."""
        self.waiting: list[Sequence] = []
        """Earliest deadline first; WAITING and PARKED."""
        self.paused: dict[str, Sequence] = {}
        """By request id: those in `running`, and PARKED ones that are not in `waiting`."""
        self.preemptions = 0
        self._step = 0
        self._steady: list[Piece] = []
        """What `schedule` chose last, where it chose nothing but the next token of all that run, and they run still."""
        self._tickets = 0
        self._since: dict[str, int] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises `Overloaded` when `max_waiting` beyond the free rows wait already."""
        free, waiting = self.rows - len(self.running), len(self) - len(self.running)
        if waiting >= self.max_waiting + free:
            raise Overloaded(f"{waiting} requests wait already: come back later, or raise max_waiting")
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence in any phase; its row is the caller's to free."""
        paused = self.paused.pop(sequence.request_id, None) is not None
        if sequence.status is Status.RUNNING or not paused:
            (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self._since.pop(sequence.request_id, None)
        self._steady = []

    def debit(self, sequence: Sequence, weight: int) -> None:
        """A running sequence has sent outputs of that weight: it is paused when its window is used up."""
        if sequence.window is None:
            return
        sequence.window -= weight
        if sequence.window <= 0 and not sequence.paused:
            sequence.paused = True
            self.paused[sequence.request_id] = sequence
            self._steady = []

    def credit(self, sequence: Sequence, weight: int) -> None:
        """Outputs of that weight were taken."""
        if sequence.window is None:
            return
        sequence.window += weight
        if sequence.window > 0 and sequence.paused:
            sequence.paused = False
            del self.paused[sequence.request_id]
            self._steady = []
            if sequence.status is Status.PARKED:
                self._enqueue(sequence)

    @property
    def active(self) -> bool:
        """Whether a sequence may run in the next step."""
        return bool(self.waiting) or any(not sequence.paused for sequence in self.running)

    @property
    def decoding(self) -> int:
        """Sequences that run and wait for their next token."""
        return len(self._steady) or sum(sequence.decoding and not sequence.paused for sequence in self.running)

    def assign(self) -> Moves:
        """Choose who holds a row in the next step. Sequences change their status; the caller moves their states."""
        self._step += 1
        moves = Moves()
        self._refresh_deadlines()
        self._assign_rows(moves)
        return moves

    def schedule(self, tokens: int | None = None, kept: int = 0) -> list[Piece]:
        """Choose what the next step runs, decode first, up to `tokens` or `max_step_tokens`.

        kept: as how many tokens it counts that a piece ends where its sequence's state is to be kept.
        Where nothing but the next token of the same sequences runs again, and there is no other to choose, it is the
        list returned last, its pieces moved on: that is most steps, of many pieces.
        """
        if self._steady and all(piece.sequence.computed == piece.end for piece in self._steady):
            for piece in self._steady:
                piece.start, piece.end = piece.end, piece.end + 1
            return self._steady
        self._steady = []
        # Decode goes first: a long prompt may delay the others' next token by one step's budget, never more. Prompts
        # share the rest evenly, what the short ones leave going to the long: none waits for another's to end.
        running = [sequence for sequence in self.running if not sequence.paused]
        decoding = [sequence for sequence in running if sequence.decoding]
        prompts = [sequence for sequence in running if not sequence.decoding and sequence.leader is None]
        left = self.max_step_tokens
        if tokens is not None:
            left = min(left, max(tokens, len(decoding) + self.multiple))
        # Where there is not a multiple for each, they take turns by age: the first has one in every step.
        if prompts and (left - len(decoding)) // len(prompts) >= self.multiple:
            prompts.sort(key=lambda sequence: sequence.uncomputed)
        order = decoding + prompts
        pieces = []
        for place, sequence in enumerate(order):
            if place < len(decoding):
                count = min(sequence.uncomputed, left)
            else:
                count = self._count(sequence, left // (len(order) - place), left)
            if count or sequence.recalled is not None:
                piece = Piece(sequence, sequence.computed, sequence.computed + count)
                pieces.append(piece)
                left -= min(left, count + (kept if kept and piece.keeps else 0))
        pieces = [self._with_draft(piece, left // len(pieces)) for piece in pieces]
        if len(pieces) == len(running) and all(piece.goes_on for piece in pieces):
            self._steady = pieces
        return pieces

    def _with_draft(self, piece: Piece, room: int) -> Piece:
        """The piece, and guesses at what follows where its sequence makes any."""
        sequence = piece.sequence
        if sequence.drafter is None:
            return piece
        limit = min(room, sequence.params.max_tokens - len(sequence.output_ids) - 1)
        if not (sequence.decoding and piece.tokens and piece.samples) or limit < 1:
            return piece
        return replace(piece, draft=tuple(sequence.drafter.draft(sequence.tokens, sequence.length, limit)))

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence that is not finished."""
        yield from self.running
        yield from self.waiting
        yield from (sequence for sequence in self.paused.values() if sequence.status is Status.PARKED)

    def __len__(self) -> int:
        parked = sum(sequence.status is Status.PARKED for sequence in self.paused.values())
        return len(self.running) + len(self.waiting) + parked

    def _count(self, sequence: Sequence, share: int, left: int) -> int:
        """Tokens of a prompt's next piece: about its share, cut at a multiple or at the prompt's end."""
        share = max(share, self.multiple - sequence.computed % self.multiple)
        end = sequence.computed + min(sequence.runnable, share, left)
        if end < sequence.length:
            end -= end % self.multiple
        return max(0, end - sequence.computed)

    def _enqueue(self, sequence: Sequence) -> None:
        self._tickets += 1
        sequence.ticket = self._tickets
        sequence.deadline = self._step + AGING * sequence.priority
        insort(self.waiting, sequence, key=_order)

    def _refresh_deadlines(self) -> None:
        for sequence in self.running:
            if self._step - self._since[sequence.request_id] >= self.quantum:
                self._since[sequence.request_id] = self._step
                sequence.deadline = self._step + AGING * sequence.priority

    def _assign_rows(self, moves: Moves) -> None:
        while self.waiting:
            first = self.waiting[0]
            if len(self.running) == self.rows:
                paused = [sequence for sequence in self.running if sequence.paused]
                last = max(paused or self.running, key=_order)
                if not paused and first.deadline >= last.deadline:
                    return
                self._park(last, moves)
            self.waiting.remove(first)
            first.status = Status.RUNNING
            self._steady = []
            self._since[first.request_id] = self._step
            self.running.append(first)
            moves.admit.append(first)

    def _park(self, sequence: Sequence, moves: Moves) -> None:
        self.running.remove(sequence)
        self._steady = []
        sequence.status = Status.PARKED
        self.preemptions += 1
        moves.park.append(sequence)
        if not sequence.paused:
            insort(self.waiting, sequence, key=_order)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.deadline, sequence.ticket
