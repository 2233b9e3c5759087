"""What compilers for GPUs make of the kernels: held to the table, and to what decode must not do without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.aot import SHARED_BYTES, TABLE

Facts = dict[str, dict[str, dict[str, int]]]


@pytest.fixture(scope="module")
def facts() -> Facts:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    made: Facts = json.loads(done.stdout)
    return made


@pytest.fixture(scope="module")
def table() -> Facts:
    known: Facts = json.loads(TABLE.read_text())
    return known


def test_nothing_got_worse(facts: Facts, table: Facts) -> None:
    """`python -m tests.kernels.aot --write` takes what is new into the table."""
    assert facts.keys() == table.keys()
    worse: list[Any] = []
    for case, targets in facts.items():
        for target, found in targets.items():
            before = table[case][target]
            worse += [
                (case, target, name, before[name], found[name])
                for name in ("registers", "spilled", "shared")
                if found[name] > before[name]
            ]
    assert not worse


def test_decode_keeps_to_registers(facts: Facts) -> None:
    spilled = {case: {target: f["spilled"] for target, f in targets.items()} for case, targets in facts.items()}
    assert all(not any(targets.values()) for case, targets in spilled.items() if case.startswith("decode")), spilled


def test_state_is_moved_16_bytes_at_a_time(facts: Facts) -> None:
    assert all(f["wide_loads"] and f["wide_stores"] for targets in facts.values() for f in targets.values()), facts


def test_prefill_uses_tensor_cores(facts: Facts) -> None:
    prefill = [targets for case, targets in facts.items() if case.startswith("prefill")]
    assert all(f["tensor_cores"] > 0 for targets in prefill for f in targets.values()), facts


def test_shared_memory_is_there(facts: Facts) -> None:
    assert all(f["shared"] <= SHARED_BYTES[target] for targets in facts.values() for target, f in targets.items()), (
        facts
    )
