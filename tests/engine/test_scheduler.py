"""The scheduler without a model: who runs, who holds a row, and that nobody waits for ever."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lattice_serve.engine import scheduler as scheduler_module
from lattice_serve.engine.detokenizer import Detokenizer
from lattice_serve.engine.errors import Overloaded
from lattice_serve.engine.messages import Submit
from lattice_serve.engine.sampler import SampleRow
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.scheduler import AGING, Piece, Scheduler
from lattice_serve.engine.sequence import Sequence, Status
from lattice_serve.engine.shares import Shares


@dataclass
class Step:
    """What the scheduler chose."""

    pieces: list[Piece] = field(default_factory=list)
    park: list[Sequence] = field(default_factory=list)
    admit: list[Sequence] = field(default_factory=list)


class Simulation:
    """A scheduler with what an engine does around it; holds every step against the rules."""

    def __init__(
        self,
        *,
        rows: int = 2,
        budget: int = 8,
        max_waiting: int = 1000,
        quantum: int = 256,
        multiple: int = 1,
        fair_rows: bool = True,
    ) -> None:
        self.shares = Shares()
        self.scheduler = Scheduler(
            rows=rows,
            max_step_tokens=budget,
            max_waiting=max_waiting,
            quantum=quantum,
            multiple=multiple,
            shares=self.shares,
            fair_rows=fair_rows,
        )
        self.live: list[Sequence] = []
        self.holders: list[Sequence] = []
        """Of state rows."""
        self.ran_at: defaultdict[str, list[int]] = defaultdict(list)
        """Steps, counted from 1, in which each sequence ran."""
        self.steps = 0
        self._made = 0

    def add(self, prompt: int = 1, max_tokens: int = 1, priority: int = 0, tenant: str = "") -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if max_tokens == 0 else None)
        sequence = Sequence.of(
            Submit(f"s{self._made}", array("i", [0] * prompt), params, priority, tenant=tenant),
            arrived=0.0,
            sample_row=SampleRow(params, seed=0, index=0),
            detokenizer=Detokenizer(lambda token_id: b"x"),
        )
        self.scheduler.add(sequence)
        self._made += 1
        self.live.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        sequence.status = Status.FINISHED
        self.live.remove(sequence)
        if sequence in self.holders:
            self.holders.remove(sequence)

    def step(self) -> Step:
        batch = self.schedule()
        self.run(batch)
        return batch

    def schedule(self) -> Step:
        """Choose a step, and check it."""
        before = list(self.holders)
        moves = self.scheduler.assign()
        chosen = [(piece.sequence, piece.start, piece.end) for piece in self.scheduler.schedule()]
        self.scheduler._steady = []  # choose anew: what was moved on must be the same
        batch = Step(self.scheduler.schedule(), moves.park, moves.admit)
        assert [(piece.sequence, piece.start, piece.end) for piece in batch.pieces] == chosen
        self.steps += 1
        assert all(sequence in self.holders and sequence.status is Status.PARKED for sequence in batch.park)
        self.holders = [sequence for sequence in self.holders if sequence not in batch.park]
        for sequence in batch.admit:
            assert sequence not in before, "a row was taken for nothing"
            assert sequence not in self.holders
            self.holders.append(sequence)
        self._check_rows()
        self._check_pieces(batch)
        return batch

    def run(self, batch: Step) -> None:
        """Do as if the model had run a step."""
        for piece in batch.pieces:
            sequence, samples = piece.sequence, piece.samples
            sequence.computed = piece.end
            self.ran_at[sequence.request_id].append(self.steps)
            if samples:
                sequence.output_ids.append(0)
            if sequence.decoding and len(sequence.output_ids) == sequence.params.max_tokens:
                self.remove(sequence)

    def drain(self, limit: int) -> None:
        """Step until all have finished, in `limit` steps at most."""
        end = self.steps + limit
        while self.live:
            assert self.steps < end, f"these still wait: {self.live}"
            self.step()

    def first_run(self, *sequences: Sequence) -> list[int]:
        return [self.ran_at[sequence.request_id][0] for sequence in sequences]

    def _check_rows(self) -> None:
        scheduler = self.scheduler
        assert scheduler.running == self.holders
        assert len(scheduler.running) == min(scheduler.rows, len(self.live))
        assert all(sequence.status is Status.RUNNING for sequence in scheduler.running)
        assert all(sequence.status in (Status.WAITING, Status.PARKED) for sequence in scheduler.waiting)
        assert sorted(map(id, scheduler)) == sorted(map(id, self.live))
        assert len(scheduler) == len(self.live)
        order = [(sequence.deadline, sequence.ticket) for sequence in scheduler.waiting]
        assert order == sorted(order)
        for tenant in {sequence.tenant for sequence in scheduler}:
            held = [s.deadline for s in scheduler.running if s.tenant == tenant]
            waiting = [s.deadline for s in scheduler.waiting if s.tenant == tenant]
            assert not (held and waiting) or min(waiting) >= max(held), "a later deadline holds a row"
        wanted = Counter(sequence.tenant for sequence in scheduler)
        rows = Counter(sequence.tenant for sequence in scheduler.running)
        for tenant, places in self.shares.places(scheduler.rows, wanted).items():
            assert rows[tenant] >= places, "a tenant has not its share of rows"

    def _check_pieces(self, batch: Step) -> None:
        running = self.scheduler.running
        decodes = [piece.decodes for piece in batch.pieces]
        assert decodes == sorted(decodes, reverse=True), "decode does not come first"
        if self.scheduler.multiple > 1:
            self._check_cuts(batch)
            return
        ran = [piece.sequence for piece in batch.pieces]
        if len({sequence.tenant for sequence in running}) <= 1:
            assert sorted(map(id, ran)) == sorted(map(id, running)), "a row lay idle"
        else:
            assert {sequence.tenant for sequence in ran} == {sequence.tenant for sequence in running}
        counts = [piece.end - piece.start for piece in batch.pieces]
        wanted = [piece.sequence.uncomputed for piece in batch.pieces]
        everything = sum(sequence.uncomputed for sequence in running)
        assert sum(counts) == min(self.scheduler.max_step_tokens, everything)
        assert all(piece.start == piece.sequence.computed for piece in batch.pieces)
        assert all(0 < count <= want for count, want in zip(counts, wanted, strict=True))
        for tenant in {sequence.tenant for sequence in running}:
            mine = [
                (count, want)
                for count, want, piece in zip(counts, wanted, batch.pieces, strict=True)
                if piece.sequence.tenant == tenant and not piece.decodes
            ]
            cut = [count for count, want in mine if count < want]
            assert not cut or max(mine)[0] <= min(cut) + 1, "one prompt got more than its share"

    def _check_cuts(self, batch: Step) -> None:
        """Of prompts that are cut at multiples: not all have their share in every step, but the oldest has."""
        multiple, running = self.scheduler.multiple, self.scheduler.running
        assert sum(piece.tokens for piece in batch.pieces) <= self.scheduler.max_step_tokens
        ran = [piece.sequence for piece in batch.pieces]
        assert all(sequence in ran for sequence in running if sequence.decoding)
        prompts = [sequence for sequence in running if not sequence.decoding]
        if len({sequence.tenant for sequence in running}) <= 1:  # else it may be another tenant's turn
            assert not prompts or prompts[0] in ran or self.scheduler.max_step_tokens >= len(running) * multiple
        assert not prompts or any(sequence in ran for sequence in prompts)
        for piece in batch.pieces:
            assert piece.start == piece.sequence.computed < piece.end <= piece.sequence.length
            assert piece.end == piece.sequence.length or piece.end % multiple == 0, "cut elsewhere than at a multiple"


def lengths(batch: Step) -> dict[str, int]:
    return {piece.sequence.request_id: piece.end - piece.start for piece in batch.pieces}


def test_a_step_mixes_decode_with_pieces_of_prompts() -> None:
    simulation = Simulation(rows=3, budget=10)
    simulation.add(prompt=2, max_tokens=50)
    assert lengths(simulation.step()) == {"s0": 2}
    simulation.add(prompt=25, max_tokens=2)
    steps = [lengths(simulation.step()) for _ in range(4)]
    assert [step["s0"] for step in steps] == [1, 1, 1, 1], "a long prompt delays no one's next token"
    assert [step["s1"] for step in steps] == [9, 9, 7, 1]


def test_pieces_move_on_while_nothing_else_is_to_choose() -> None:
    simulation = Simulation(rows=3, budget=20)
    scheduler = simulation.scheduler

    def step() -> list[Piece]:
        scheduler.assign()
        pieces = scheduler.schedule()
        assert all(piece.start == piece.sequence.computed for piece in pieces)
        simulation.run(Step(pieces))
        return pieces

    first, second = simulation.add(prompt=2, max_tokens=50), simulation.add(prompt=3, max_tokens=4)
    prompts, decode = step(), step()
    assert prompts is not decode
    assert step() is decode
    assert [piece.end for piece in decode] == [4, 5]
    assert scheduler.decoding == 2
    third = simulation.add(prompt=2, max_tokens=9)
    assert [piece.sequence for piece in step()] == [first, second, third], "one that has come is not left out"
    assert second.status is Status.FINISHED
    decode = step()
    assert [piece.sequence for piece in decode] == [first, third], "one that has ended is"
    assert step() is decode
    pieces = scheduler.schedule()
    assert scheduler.schedule() is not pieces, "what did not run is chosen again"
    assert [(piece.start, piece.end) for piece in scheduler.schedule()] == [(7, 8), (4, 5)]


def test_only_the_end_of_a_prompt_samples() -> None:
    simulation = Simulation(budget=4)
    simulation.add(prompt=10, max_tokens=2)
    simulation.add(prompt=3, max_tokens=0)
    seen = []
    for _ in range(5):
        batch = simulation.schedule()
        seen += [(piece.sequence.request_id, piece.start, piece.end, piece.samples) for piece in batch.pieces]
        simulation.run(batch)
    assert [piece for name, *piece in seen if name == "s0"] == [
        [0, 2, False],
        [2, 5, False],
        [5, 9, False],
        [9, 10, True],
        [10, 11, True],
    ]
    assert [piece for name, *piece in seen if name == "s1"] == [[0, 2, False], [2, 3, False]]


@pytest.mark.parametrize(
    ("prompts", "shares"),
    [([100, 100], [6, 6]), ([100, 2, 100], [5, 2, 5]), ([3, 100, 1], [3, 8, 1]), ([100] * 5, [2, 2, 2, 3, 3])],
)
def test_prompts_share_a_step_evenly(prompts: list[int], shares: list[int]) -> None:
    simulation = Simulation(rows=5, budget=12)
    for prompt in prompts:
        simulation.add(prompt=prompt)
    assert lengths(simulation.step()) == {f"s{i}": share for i, share in enumerate(shares)}


def test_prompts_are_cut_at_multiples_and_take_turns_where_room_is_short() -> None:
    simulation = Simulation(rows=4, budget=20, multiple=8)
    for prompt in (30, 9, 40):
        simulation.add(prompt=prompt, max_tokens=2)
    steps = [lengths(simulation.step()) for _ in range(4)]
    assert steps == [{"s0": 8, "s1": 8}, {"s0": 8, "s1": 1, "s2": 8}, {"s1": 1, "s0": 8, "s2": 8}, {"s0": 6, "s2": 8}]


def test_a_pace_leaves_room_for_a_multiple_beside_decode() -> None:
    simulation = Simulation(rows=2, budget=20, multiple=8)
    simulation.add(prompt=1, max_tokens=9)
    simulation.step()
    simulation.add(prompt=30)
    simulation.scheduler.assign()
    assert [piece.end - piece.start for piece in simulation.scheduler.schedule(3)] == [1, 8]


@pytest.mark.parametrize(
    ("kept", "ends"), [(0, [3, 3, 3, 3]), (4, [3, 2, 2, 2]), (100, [3, 0, 0, 0])], ids=["free", "dear", "dearer"]
)
def test_prompts_that_end_count_for_more(kept: int, ends: list[int]) -> None:
    """Their states are kept after the step, while others wait: those that have to wait for that end in the next."""
    simulation = Simulation(rows=5, budget=14)
    decoding = simulation.add(prompt=1, max_tokens=50)
    simulation.step()
    prompts = [simulation.add(prompt=3, max_tokens=2) for _ in range(4)]
    simulation.scheduler.assign()
    pieces = simulation.scheduler.schedule(kept=kept)
    counts = {piece.sequence.request_id: piece.tokens for piece in pieces}
    assert counts[decoding.request_id] == 1
    assert [counts.get(prompt.request_id, 0) for prompt in prompts] == ends


def test_a_short_prompt_waits_for_no_long_one() -> None:
    simulation = Simulation(rows=2, budget=10)
    simulation.add(prompt=10_000)
    simulation.step()
    short = simulation.add(prompt=5)
    simulation.step()
    assert short.status is Status.FINISHED


def test_the_lower_priority_goes_first_and_equal_ones_in_order_of_arrival() -> None:
    simulation = Simulation(rows=1)
    low, first, lowest, second, urgent = (simulation.add(priority=priority) for priority in (1, 0, 2, 0, -1))
    simulation.drain(5)
    assert simulation.first_run(urgent, first, second, low, lowest) == [1, 2, 3, 4, 5]


def test_urgent_sequences_take_the_rows_of_the_least_urgent_and_no_token_is_run_twice() -> None:
    simulation = Simulation(rows=2, budget=8)
    stays, leaves = simulation.add(prompt=3, max_tokens=9), simulation.add(prompt=30, max_tokens=3, priority=1)
    simulation.step()
    urgent = simulation.add(prompt=2, max_tokens=3, priority=-1)
    computed = leaves.computed
    batch = simulation.step()
    assert (batch.park, batch.admit) == ([leaves], [urgent])
    assert simulation.scheduler.running == [stays, urgent]
    assert simulation.scheduler.preemptions == 1
    simulation.step()
    simulation.step()
    assert urgent.status is Status.FINISHED
    assert (leaves.status, leaves.computed) == (Status.PARKED, computed)
    batch = simulation.step()
    assert batch.admit == [leaves]
    assert [piece.start for piece in batch.pieces if piece.sequence is leaves] == [computed]
    simulation.drain(20)


def test_rows_go_round_among_equals_every_quantum() -> None:
    simulation = Simulation(rows=1, quantum=5)
    sequences = [simulation.add(max_tokens=12) for _ in range(2)]
    simulation.drain(24)
    assert [simulation.ran_at[s.request_id] for s in sequences] == [
        [*range(1, 6), *range(11, 16), 21, 22],
        [*range(6, 11), *range(16, 21), 23, 24],
    ]
    assert simulation.scheduler.preemptions == 4


def test_nobody_is_parked_while_rows_are_enough() -> None:
    simulation = Simulation(rows=3, quantum=2)
    for priority in (2, 0, -2):
        simulation.add(max_tokens=30, priority=priority)
    simulation.drain(30)
    assert simulation.scheduler.preemptions == 0


def test_a_unit_of_priority_is_worth_so_many_steps() -> None:
    simulation = Simulation(rows=1)
    waits = simulation.add(priority=1)
    while waits.status is not Status.FINISHED:
        simulation.add()
        simulation.step()
        assert simulation.steps <= AGING + 1, "it waits for ever"
    # Its deadline was AGING, and it came before the one that has the same.
    assert simulation.first_run(waits) == [AGING + 1]


@given(
    rows=st.integers(1, 3),
    quantum=st.integers(1, 6),
    priority=st.integers(0, 3),
    others=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12), st.integers(-2, 3)), min_size=1, max_size=8),
)
def test_nothing_waits_for_ever(rows: int, quantum: int, priority: int, others: list[tuple[int, int, int]]) -> None:
    """A request every step, of higher priority, each more than a row does in a step: the one that waits still runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "AGING", 4)
        simulation = Simulation(rows=rows, budget=4, max_waiting=100_000, quantum=quantum)
        waits = simulation.add(prompt=3, max_tokens=3, priority=priority)
        # Those that come so early that their deadlines may be earlier; each holds a row for a quantum at most.
        ahead = 4 * (priority + 2) + 1
        limit = ahead * (quantum + 1) + ahead
        for number in range(limit):
            simulation.add(*others[number % len(others)])
            simulation.step()
            if waits.computed:
                break
        assert waits.computed, f"did not run in {limit} steps"
        simulation.drain(sum(sequence.length + sequence.params.max_tokens for sequence in simulation.live))


@pytest.mark.parametrize("max_waiting", [0, 3])
def test_beyond_the_rows_a_bounded_number_waits(max_waiting: int) -> None:
    simulation = Simulation(rows=2, max_waiting=max_waiting)
    for _ in range(2 + max_waiting):
        simulation.add(max_tokens=5)
    for _ in range(2):  # before the first step, and when rows are held
        with pytest.raises(Overloaded):
            simulation.add()
        assert len(simulation.scheduler) == 2 + max_waiting
        simulation.step()
    simulation.remove(simulation.live[-1])
    simulation.add()
    with pytest.raises(Overloaded):
        simulation.add()
    simulation.drain(100)


def test_what_is_parked_counts_as_waiting() -> None:
    simulation = Simulation(rows=1, max_waiting=1)
    simulation.add(max_tokens=9)
    simulation.step()
    simulation.add(priority=-1, max_tokens=9)
    simulation.step()
    assert simulation.scheduler.preemptions == 1
    with pytest.raises(Overloaded):
        simulation.add()


def _waiting(simulation: Simulation) -> Sequence:
    return simulation.add(priority=1)


def _prefilling(simulation: Simulation) -> Sequence:
    sequence = simulation.add(prompt=100, priority=-1)
    simulation.step()
    assert 0 < sequence.computed < 100
    return sequence


def _decoding(simulation: Simulation) -> Sequence:
    sequence = simulation.add(max_tokens=9, priority=-1)
    simulation.step()
    assert sequence.decoding
    return sequence


def _parked(simulation: Simulation) -> Sequence:
    sequence = _decoding(simulation)
    simulation.add(max_tokens=9, priority=-2)
    simulation.step()
    assert sequence.status is Status.PARKED
    return sequence


@pytest.mark.parametrize("reach", [_waiting, _prefilling, _decoding, _parked])
def test_a_sequence_is_removed_in_any_phase(reach: Callable[[Simulation], Sequence]) -> None:
    simulation = Simulation(rows=1, budget=4)
    simulation.add(prompt=3, max_tokens=5)
    sequence = reach(simulation)
    steps = len(simulation.ran_at[sequence.request_id])
    simulation.remove(sequence)
    simulation.drain(20)
    assert len(simulation.ran_at[sequence.request_id]) == steps
    assert sequence.status is Status.FINISHED


def test_nothing_to_do_is_an_empty_step() -> None:
    simulation = Simulation()
    assert simulation.step() == Step()
    simulation.add()
    simulation.step()
    assert simulation.step() == Step()


class TestTenants:
    def test_who_comes_has_its_share_of_rows_at_once(self) -> None:
        simulation = Simulation(rows=8, budget=64)
        greedy = [simulation.add(max_tokens=10**6, tenant="greedy") for _ in range(30)]
        for _ in range(300):
            simulation.step()
        polite = [simulation.add(max_tokens=50, tenant="polite") for _ in range(6)]
        batch = simulation.step()
        assert batch.admit == polite[:4]
        assert len(batch.park) == 4
        for _ in range(40):
            batch = simulation.step()
            assert len(batch.park) == len(batch.admit), "rows are not moved between them without need"
            assert all(sequence.tenant == "greedy" for sequence in batch.park)
        assert sum(sequence.tenant == "polite" for sequence in simulation.scheduler.running) == 4
        for sequence in greedy[8:]:
            simulation.remove(sequence)
        simulation.remove(polite[0])
        assert [sequence for sequence in simulation.step().admit if sequence.tenant == "polite"] == [polite[4]]

    @pytest.mark.parametrize(("weight", "rows"), [(1, 4), (3, 6), (7, 7)])
    def test_weights_part_the_rows(self, weight: int, rows: int) -> None:
        simulation = Simulation(rows=8, budget=64)
        simulation.shares.weigh("heavy", weight)
        for tenant in ["light", "heavy"] * 10:
            simulation.add(max_tokens=100, tenant=tenant)
        simulation.step()
        assert sum(sequence.tenant == "heavy" for sequence in simulation.scheduler.running) == rows

    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_fewer_rows_than_tenants_go_round(self, rows: int) -> None:
        simulation = Simulation(rows=rows, quantum=10)
        tenants = ["a", "a", "a", "a", "a", "b", "c", "d"]
        for tenant in tenants:
            simulation.add(max_tokens=10**6, tenant=tenant)
        served = Counter[str]()
        for _ in range(4000):
            served.update(piece.sequence.tenant for piece in simulation.step().pieces)
        assert min(served.values()) > 0.95 * 4000 * rows / 4
        assert simulation.scheduler.preemptions < 4000 * rows / 10

    def test_priority_acts_within_a_share(self) -> None:
        simulation = Simulation(rows=2)
        for _ in range(50):
            simulation.add(max_tokens=20, priority=1 - 2**31, tenant="greedy")
        simulation.step()
        later, urgent = (simulation.add(max_tokens=3, priority=p, tenant="polite") for p in (0, -1))
        simulation.drain(2000)
        assert simulation.first_run(urgent, later) == [2, 5]

    def test_or_among_all_where_the_operator_says_so(self) -> None:
        simulation = Simulation(rows=2, fair_rows=False)
        simulation._check_rows = lambda: None  # type: ignore[method-assign]  # which wants shares
        greedy = [simulation.add(max_tokens=20, priority=-1, tenant="greedy") for _ in range(4)]
        polite = simulation.add(tenant="polite")
        simulation.drain(2000)
        assert simulation.first_run(*greedy, polite) == [1, 1, 21, 21, 41]

    @pytest.mark.parametrize("clients", [1, 4, 8])
    def test_a_greedy_tenant_takes_nothing_from_a_polite_one(self, clients: int) -> None:
        """200 looping clients of one against a few of another: nearly as if the polite one were alone on its rows."""
        simulation = Simulation(rows=16, budget=64, max_waiting=32)
        first_waits, done = list[int](), 0
        for _ in range(1500):
            live = Counter(sequence.tenant for sequence in simulation.live)
            for _ in range(200 - live["greedy"]):
                try:
                    simulation.add(prompt=20, max_tokens=40, priority=-5, tenant="greedy")
                except Overloaded:
                    break
            for _ in range(clients - live["polite"]):
                simulation.add(prompt=5, max_tokens=15, tenant="polite")
            before = [s for s in simulation.live if s.tenant == "polite" and not s.output_ids]
            simulation.step()
            first_waits += [simulation.steps - simulation.ran_at[s.request_id][0] for s in before if s.output_ids]
            done += clients - sum(s.tenant == "polite" for s in simulation.live)
        # 15 tokens, the first in the step of the prompt.
        assert done >= 0.8 * clients * 1500 / 15
        assert max(first_waits) <= 1

    def test_a_full_queue_has_room_for_who_is_below_its_share(self) -> None:
        simulation = Simulation(rows=2, max_waiting=6)
        for _ in range(8):
            simulation.add(max_tokens=9, tenant="greedy")
        for _ in range(4):
            with pytest.raises(Overloaded):
                simulation.add(tenant="greedy")
            simulation.add(max_tokens=9, tenant="polite")
        with pytest.raises(Overloaded):
            simulation.add(tenant="polite")
        simulation.drain(200)

    def test_prompts_of_tenants_share_a_step(self) -> None:
        simulation = Simulation(rows=12, budget=24)
        for _ in range(6):
            simulation.add(prompt=300, tenant="greedy")
        polite = simulation.add(prompt=36, tenant="polite")
        assert [lengths(simulation.step())[polite.request_id] for _ in range(3)] == [12, 12, 12]
        assert polite.status is Status.FINISHED

    def test_prompts_cut_at_multiples_take_turns_by_tenant(self) -> None:
        simulation = Simulation(rows=8, budget=16, multiple=8)
        for _ in range(5):
            simulation.add(prompt=400, tenant="greedy")
        polite = [simulation.add(prompt=64, tenant=tenant) for tenant in ("b", "c")]
        tokens = Counter[str]()
        for _ in range(12):
            for piece in simulation.step().pieces:
                tokens[piece.sequence.tenant] += piece.tokens
        assert set(tokens.values()) == {64}
        assert all(sequence.status is Status.FINISHED for sequence in polite)


sizes = st.fixed_dictionaries({"prompt": st.integers(1, 30), "max_tokens": st.integers(0, 12)})
priorities = st.sampled_from([0, 0, 0, 1, -1, 5])
options = st.tuples(st.integers(1, 4), st.sampled_from([1, 1, 3, 4])).flatmap(
    lambda chosen: st.fixed_dictionaries(
        {
            "rows": st.just(chosen[0]),
            "multiple": st.just(chosen[1]),
            "budget": st.integers(chosen[0] - 1 + chosen[1], 16),
            "max_waiting": st.integers(0, 6),
            "quantum": st.integers(1, 8),
        }
    )
)


@given(options, st.lists(st.none() | st.tuples(sizes, priorities), max_size=30))
def test_the_same_calls_give_the_same_batches(
    chosen: dict[str, Any], calls: list[tuple[dict[str, Any], int] | None]
) -> None:
    def trace() -> list[object]:
        simulation = Simulation(**chosen)
        seen: list[object] = []
        for call in calls:
            if call is None:
                batch = simulation.step()
                pieces = [(piece.sequence.request_id, piece.start, piece.end) for piece in batch.pieces]
                moved = [[sequence.request_id for sequence in moves] for moves in (batch.park, batch.admit)]
                seen.append((pieces, moved))
                continue
            try:
                simulation.add(**call[0], priority=call[1])
            except Overloaded:
                seen.append("overloaded")
        return seen

    assert trace() == trace()


class SchedulerMachine(RuleBasedStateMachine):
    """Anything may come and go at any time: `Simulation` checks each step, and in the end all is done."""

    @initialize(chosen=options)
    def start(self, chosen: dict[str, Any]) -> None:
        self.simulation = Simulation(**chosen)

    @rule(size=sizes, priority=priorities, tenant=st.sampled_from(["", "", "a", "b"]))
    def add(self, size: dict[str, Any], priority: int, tenant: str) -> None:
        scheduler, live = self.simulation.scheduler, Counter(sequence.tenant for sequence in self.simulation.live)
        full = len(self.simulation.live) >= scheduler.rows + scheduler.max_waiting
        if live.keys() - {tenant}:
            live[tenant] += 1
            places = self.simulation.shares.places(scheduler.rows + scheduler.max_waiting, live)
            full = full and places[tenant] < live[tenant]
        try:
            self.simulation.add(**size, priority=priority, tenant=tenant)
        except Overloaded:
            assert full
        else:
            assert not full

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.simulation.step()

    @precondition(lambda self: bool(self.simulation.live))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.simulation.remove(data.draw(st.sampled_from(self.simulation.live)))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            # Every step runs at least one token.
            self.simulation.drain(sum(s.length + s.params.max_tokens for s in self.simulation.live))
            assert not self.simulation.holders


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30)
