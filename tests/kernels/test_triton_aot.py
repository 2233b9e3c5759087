"""What compilers for GPUs make of the kernels: held to the table, and to what no kernel may do, or do without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.aot import TABLE, Table, faults


@pytest.fixture(scope="module")
def made() -> Table:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Table = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def table() -> Any:
    return json.loads(TABLE.read_text())


def test_nothing_got_worse(made: Table, table: Any) -> None:
    """`python -m tests.kernels.aot --write` takes what is new into the table."""
    known: Table = table["compiled"]
    assert {target: set(cases) for target, cases in made.items()} == {t: set(cases) for t, cases in known.items()}
    worse = [
        (target, case, fact, known[target][case][fact], value)
        for target, cases in made.items()
        for case, facts in cases.items()
        for fact, value in facts.items()
        if (fact in ("registers", "spilled", "shared") and value > known[target][case][fact])
        or (fact == "warps" and value < known[target][case][fact])
    ]
    assert not worse


def test_every_kernel_is_as_it_should_be_or_is_listed_with_the_reason(made: Table, table: Any) -> None:
    """Nothing is spilled; it fits; loads and stores are of 16 bytes; products are the tensor cores'."""
    listed = {
        (target, case, fact, value)
        for target, cases in table["exceptions"].items()
        for case, facts in cases.items()
        for fact, value in facts.items()
        if fact != "reason" and facts["reason"]
    }
    assert set(faults(made)) == listed


SERVED = ["mix_token: C 1,", "mix_token: C 16,", "mix_tokens:", "linear:", "gated_linear:"]
SERVED += [f"add_rms_norm: P {parts}," for parts in (0, 1, 2)]


@pytest.mark.parametrize("kernel", SERVED)
def test_what_serving_launches_is_among_them(made: Table, kernel: str) -> None:
    for target, cases in made.items():
        assert any(case.startswith(kernel) for case in cases), target
