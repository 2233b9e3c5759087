"""Which sequences run in a step, and which of them hold a state row.

Every sequence has a deadline, a step number: when it came plus `AGING` steps for each unit of priority. The earliest
goes first, so a lower number of priority is served sooner, and nothing waits for ever: the deadlines of what comes
later are later. A sequence that has held its row for `quantum` steps gets a new deadline, as if it had just come, so
that rows go round among long answers. When rows are short, a waiting sequence takes the row of the running one with
the latest deadline, if that is later than its own; the state is parked, one copy to host memory, and nothing is
computed twice. A sequence that is paused, for its outputs are not taken, is left out of steps, is the first to lose its
row, and queues again as if it had just come.

All that is among the sequences of one tenant. Between tenants, rows, prompt tokens and places in the queue go by fair
shares (`engine.shares`): what one has too many of, another that asks for its share is given in the next step.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

from lattice_serve.engine.errors import Overloaded
from lattice_serve.engine.prompt_shares import PromptShares
from lattice_serve.engine.row_shares import RowShares
from lattice_serve.engine.sequence import Sequence, Status
from lattice_serve.engine.shares import Shares

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
        self,
        *,
        rows: int,
        max_step_tokens: int,
        max_waiting: int,
        quantum: int = 256,
        multiple: int = 1,
        shares: Shares | None = None,
        fair_rows: bool = True,
    ) -> None:
        """multiple: prompts are cut at multiples of so many tokens; `max_step_tokens` has room for one after decode.

        shares: the weights of the tenants; None: all have the same. fair_rows: whether rows and prompt tokens go by
        them, or by the deadlines of all sequences, whosever they are.
        """
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
        self._held: set[Sequence] = set()
        self._tickets = 0
        self._since: dict[str, int] = {}
        self._shares = shares or Shares()
        self._fair_rows = fair_rows
        self._row_shares = RowShares(self._shares)
        self._prompt_shares = PromptShares(self._shares, multiple)
        self._live: Counter[str] = Counter()
        """Sequences of each tenant, in any phase."""

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises `Overloaded` when `max_waiting` beyond the free rows wait already, and its
        tenant has its fair share of all places."""
        if not self._shares.allows(sequence.tenant, 1, self._live, self.rows + self.max_waiting):
            raise Overloaded(f"{len(self.waiting)} requests wait already: come back later, or raise max_waiting")
        self._live[sequence.tenant] += 1
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence in any phase; its row is the caller's to free."""
        paused = self.paused.pop(sequence.request_id, None) is not None
        if sequence.status is Status.RUNNING or not paused:
            (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self._since.pop(sequence.request_id, None)
        self._live[sequence.tenant] -= 1
        if not self._live[sequence.tenant]:
            del self._live[sequence.tenant]
        self._held.discard(sequence)
        self._steady = []

    def hold(self, sequence: Sequence) -> None:
        """Leave a sequence out of steps until `resume`: its last token is not known yet. It keeps its row, or place."""
        self._held.add(sequence)
        self._steady = []

    def resume(self, sequence: Sequence) -> None:
        self._held.discard(sequence)
        self._steady = []

    def debit(self, sequence: Sequence, size: int) -> None:
        """A sequence has sent outputs of that size: it is paused when its window is used up."""
        if sequence.window is None:
            return
        sequence.window -= size
        if sequence.window <= 0 and not sequence.paused:
            sequence.paused = True
            self.paused[sequence.request_id] = sequence
            self._steady = []
            if sequence.status is not Status.RUNNING:
                self.waiting.remove(sequence)

    def credit(self, sequence: Sequence, size: int) -> None:
        """Outputs of that size were taken."""
        if sequence.window is None:
            return
        sequence.window += size
        if sequence.window > 0 and sequence.paused:
            sequence.paused = False
            del self.paused[sequence.request_id]
            self._steady = []
            if sequence.status is not Status.RUNNING:
                self._enqueue(sequence)

    @property
    def active(self) -> bool:
        """Whether a sequence may run in the next step, or will without a word from outside."""
        return bool(self.waiting) or any(not sequence.paused for sequence in self.running)

    @property
    def decoding(self) -> int:
        """Sequences that run and wait for their next token."""
        return len(self._steady) or sum(sequence.decoding for sequence in self._ready)

    def assign(self) -> Moves:
        """Choose who holds a row in the next step. Sequences change their status; the caller moves their states."""
        self._step += 1
        moves = Moves()
        self._prompt_shares.turn()
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
        ready = self._ready
        decoding = [sequence for sequence in ready if sequence.decoding]
        prompts = [sequence for sequence in ready if not sequence.decoding and sequence.leader is None]
        left = self.max_step_tokens
        if tokens is not None:
            left = min(left, max(tokens, len(decoding) + self.multiple))
        pieces = []
        for sequence in decoding:
            count = min(sequence.uncomputed, left)
            if count or sequence.recalled is not None:
                pieces.append(Piece(sequence, sequence.computed, sequence.computed + count))
                left -= count
        if len(self._live) == 1 or not self._fair_rows:
            cut, used = self._cut_prompts(prompts, left, kept)
            pieces += cut
            left -= used
        else:
            groups = _by_tenant(prompts)
            demands = {tenant: sum(each.runnable for each in group) for tenant, group in groups.items()}
            for tenant, budget in self._prompt_shares.budgets(left, demands):
                cut, used = self._cut_prompts(groups[tenant], budget, kept)
                self._prompt_shares.took(tenant, used)
                pieces += cut
                left -= used
        pieces = [self._with_draft(piece, left // len(pieces)) for piece in pieces]
        if len(pieces) == len(ready) and all(piece.goes_on for piece in pieces):
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
        yield from self._put_by

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting) + len(self._put_by)

    @property
    def _ready(self) -> list[Sequence]:
        """Those with a row that can go on."""
        if not self._held and not self.paused:
            return self.running
        return [sequence for sequence in self.running if not sequence.paused and sequence not in self._held]

    @property
    def _put_by(self) -> list[Sequence]:
        """Paused sequences without a row."""
        return [sequence for sequence in self.paused.values() if sequence.status is not Status.RUNNING]

    def _cut_prompts(self, prompts: list[Sequence], left: int, kept: int) -> tuple[list[Piece], int]:
        """The next pieces of prompts that share `left` tokens evenly, and how many tokens they take. See `schedule`."""
        room, pieces = left, []
        # Where there is not a multiple for each, they take turns by age: the first has one in every step.
        if prompts and left // len(prompts) >= self.multiple:
            prompts.sort(key=lambda sequence: sequence.uncomputed)
        for place, sequence in enumerate(prompts):
            count = self._count(sequence, left // (len(prompts) - place), left)
            if count or sequence.recalled is not None:
                piece = Piece(sequence, sequence.computed, sequence.computed + count)
                pieces.append(piece)
                left -= min(left, count + (kept if kept and piece.keeps else 0))
        return pieces, room - left

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
        if not self.waiting:
            return
        self._park_paused(len(self.running) + len(self.waiting) - self.rows, moves)
        if len(self._live) == 1 or not self._fair_rows:
            self._assign_by_deadline(self.running, self.waiting, self.rows, moves)
            return
        running, waiting = _by_tenant(self.running), _by_tenant(self.waiting)
        held = {tenant: len(sequences) for tenant, sequences in running.items()}
        wanted = self._live - Counter(sequence.tenant for sequence in self._put_by)
        counts = self._row_shares.assign(self.rows, held, wanted, self.quantum)
        # Those that lose rows first, so that never more are held than there are.
        for tenant in sorted(counts, key=lambda tenant: counts[tenant] - held.get(tenant, 0)):
            self._assign_by_deadline(running.get(tenant, []), waiting.get(tenant, []), counts[tenant], moves)

    def _park_paused(self, rows: int, moves: Moves) -> None:
        """Free so many rows of paused sequences, if there are as many; those with the latest deadlines first."""
        if rows > 0 and self.paused:
            paused = sorted((sequence for sequence in self.running if sequence.paused), key=_order)
            for sequence in paused[-rows:]:
                self._park(sequence, moves)

    def _assign_by_deadline(
        self, running: AbstractSequence[Sequence], waiting: AbstractSequence[Sequence], rows: int, moves: Moves
    ) -> None:
        """Let those of `running` and `waiting` hold `rows` rows whose deadlines are the earliest."""
        holders, queue = sorted(running, key=_order), iter(list(waiting))
        while len(holders) > rows:
            self._park(holders.pop(), moves)
        held = len(holders)
        for first in queue:
            if held == rows:
                if not holders or first.deadline >= holders[-1].deadline:
                    return
                self._park(holders.pop(), moves)
            else:
                held += 1
            self._admit(first, moves)

    def _admit(self, sequence: Sequence, moves: Moves) -> None:
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        self._steady = []
        self._since[sequence.request_id] = self._step
        self.running.append(sequence)
        moves.admit.append(sequence)

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


def _by_tenant(sequences: AbstractSequence[Sequence]) -> dict[str, list[Sequence]]:
    groups: dict[str, list[Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.tenant, []).append(sequence)
    return groups
