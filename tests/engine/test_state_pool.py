"""Rows of state: initialised when given out, scrubbed when they come back, and bit for bit the same after parking."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.engine.models.registry import load_config, model_class
from lattice_serve.engine.state_pool import ParkedState, StatePool
from lattice_serve.engine.weights import bundled_model
from lattice_serve.kernels.numba.lanes import LANES

CONFIG = LatticeConfig(
    vocab_size=11,
    hidden_size=6,
    num_hidden_layers=2,
    num_heads=3,
    head_dim=5,
    num_slots=3,
    intermediate_size=5,
    chunk_size=4,
)


def make_model(**changes: Any) -> LatticeForCausalLM:
    model = LatticeForCausalLM(CONFIG.model_copy(update=changes))
    model.initialize(seed=3)
    return model


def make_pool(rows: int = 3) -> StatePool:
    return StatePool(make_model().initial_row(), rows, "cpu")


def bits(row: Tensor) -> Tensor:
    """To compare: NaNs are equal, the two zeros are not."""
    return row.view(torch.int32).clone()


def random_bits(pool: StatePool, seed: int) -> Tensor:
    """A row of any bits: NaNs with payloads, infinities, denormals."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (pool.memory.shape[1],), generator=generator).to(torch.int32)


def write(pool: StatePool, row: int, values: Tensor) -> None:
    pool.memory[row].view(torch.int32).copy_(values)


@pytest.mark.parametrize("dirt", [1.0, -0.0, math.nan, math.inf])
def test_a_row_given_out_holds_the_learned_memory_whatever_was_in_it(dirt: float) -> None:
    model = make_model()
    pool = StatePool(model.initial_row(), 3, "cpu")
    clean = bits(pool.memory[pool.allocate()])
    pool.memory[1:].fill_(dirt)
    for row in (pool.allocate(), pool.allocate()):
        assert torch.equal(bits(pool.memory[row]), clean)
        for i, layer in enumerate(model.layers):
            anchor = layer.mixer.anchor.detach()
            state = model.layout.load(pool.memory[row], i, 0)
            torch.testing.assert_close(state.lattice.anchor[0], anchor / anchor.norm(dim=1, keepdim=True))
            assert not state.tail.any()
            assert not state.lattice.pending


def test_a_row_that_comes_back_is_scrubbed_and_given_out_again() -> None:
    pool = make_pool()
    rows = [pool.allocate() for _ in range(3)]
    assert sorted(rows) == [0, 1, 2]
    pool.memory.fill_(math.nan)
    pool.free(rows[1])
    assert not pool.memory[rows[1]].any()
    assert pool.memory[[rows[0], rows[2]]].isnan().all(), "only the row that was freed"
    assert pool.allocate() == rows[1]


def test_a_parked_state_comes_back_bit_for_bit_into_any_row() -> None:
    pool = make_pool(rows=2)
    first = pool.allocate()
    values = random_bits(pool, seed=0)
    write(pool, first, values)
    parked = pool.park(first)
    assert parked.nbytes == pool.row_bytes
    assert (pool.used, bool(pool.memory.any())) == (0, False)
    # Another sequence takes the row, and does as it likes with it.
    assert pool.allocate() == first
    write(pool, first, random_bits(pool, seed=1))
    second = pool.restore(parked)
    assert second != first
    assert torch.equal(bits(pool.memory[second]), values)
    pool.memory[second].zero_()
    assert torch.equal(bits(parked.row), values), "the copy is its own"
    pool.check_integrity([first, second])


def _twice_free(pool: StatePool, row: int) -> set[int]:
    pool.free(row)
    pool.free(row)
    return set()


def _free_and_held(pool: StatePool, row: int) -> set[int]:
    pool.free(row)
    return {row}


def _lost(pool: StatePool, row: int) -> set[int]:
    return set()


def _dirty_at_first(pool: StatePool, row: int) -> set[int]:
    pool.free(row)
    pool.memory[row, 0] = 1e-30
    return set()


def _dirty_at_last(pool: StatePool, row: int) -> set[int]:
    pool.free(row)
    pool.memory[row, -1] = math.nan
    return set()


def _dirty_after_parking(pool: StatePool, row: int) -> set[int]:
    pool.memory[row].copy_(pool.park(row).row)
    return set()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_twice_free, "free twice"),
        (_free_and_held, "free and held"),
        (_lost, "neither free nor held"),
        (_dirty_at_first, "not scrubbed"),
        (_dirty_at_last, "not scrubbed"),
        (_dirty_after_parking, "not scrubbed"),
    ],
)
def test_the_integrity_check_finds_each_damage(damage: Callable[[StatePool, int], set[int]], message: str) -> None:
    pool = make_pool()
    kept, row = pool.allocate(), pool.allocate()
    pool.check_integrity([kept, row])
    held = damage(pool, row)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity({kept} | held)


@pytest.mark.parametrize(
    "changes",
    [{}, {"chunk_size": 1}, {"conv_kernel_size": 1}, {"num_heads": 1, "head_dim": 16, "num_slots": 7}],
    ids=str,
)
def test_the_bytes_are_those_of_the_formula(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    c = model.config
    d, m = (math.ceil(n / 16) * 16 for n in (c.head_dim, c.num_slots))
    C, taps = c.chunk_size, c.conv_kernel_size
    row = c.num_hidden_layers * c.num_heads * 4 * (d * m + (C - 1) * (d + m) + 2 * m + 16 + (taps - 1) * (2 * m + d))
    pool = StatePool(model.initial_row(), 5, "cpu")
    assert (pool.row_bytes, pool.nbytes) == (row, 5 * row)
    assert pool.memory.nbytes == 5 * row
    assert pool.memory[pool.allocate()].nbytes == row


def test_the_bundled_model_costs_what_the_readme_says() -> None:
    config = load_config(bundled_model())
    assert model_class(config)(config).row_size * 4 == 379_392


@pytest.mark.parametrize("rows", [10**13, 10**17])
def test_no_room_is_an_error_of_the_configuration(rows: int) -> None:
    with pytest.raises(ConfigError, match=r"no room for .* state rows of .* lower max_rows or state_memory") as caught:
        make_pool(rows)
    assert caught.value.param == "max_rows"


class PoolMachine(RuleBasedStateMachine):
    """Whatever is done to one row, the others keep their bits."""

    @initialize(rows=st.integers(1, 4))
    def start(self, rows: int) -> None:
        self.pool = make_pool(rows)
        row = self.pool.allocate()
        self.initial = bits(self.pool.memory[row])
        self.pool.free(row)
        self.held: dict[int, Tensor] = {}
        self.parked: list[tuple[ParkedState, Tensor]] = []

    def _take(self, row: int, values: Tensor) -> None:
        assert row not in self.held
        self.held[row] = values

    @precondition(lambda self: len(self.held) < self.pool.rows)
    @rule()
    def allocate(self) -> None:
        self._take(self.pool.allocate(), self.initial)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), seed=st.integers(0, 99))
    def advance(self, data: st.DataObject, seed: int) -> None:
        row = data.draw(st.sampled_from(sorted(self.held)))
        self.held[row] = random_bits(self.pool, seed)
        write(self.pool, row, self.held[row])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.free(row)
        del self.held[row]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.held)))
        self.parked.append((self.pool.park(row), self.held.pop(row)))

    @precondition(lambda self: self.parked and len(self.held) < self.pool.rows)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        parked, values = self.parked.pop(data.draw(st.integers(0, len(self.parked) - 1)))
        self._take(self.pool.restore(parked), values)

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.used == len(self.held)
        self.pool.check_integrity(self.held)
        for row in range(self.pool.rows):
            values = self.held.get(row, torch.zeros_like(self.initial))
            assert torch.equal(bits(self.pool.memory[row]), values)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=25)


def test_rows_on_a_cpu_begin_on_a_cache_line() -> None:
    """Or every vector of a state takes two loads: a quarter of a prompt's time."""
    memory = make_pool().memory
    assert all(row.data_ptr() % (4 * LANES) == 0 for row in memory)
