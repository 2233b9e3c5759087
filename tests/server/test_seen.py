from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from lattice_serve.server import seen
from lattice_serve.server.seen import Seen, beginnings


def ids(*numbers: Sequence[int]) -> array[int]:
    return array("i", [each for some in numbers for each in some])


FIRST, SECOND = range(100), range(200, 300)


def test_a_prompt_goes_where_its_longest_beginning_went() -> None:
    engines: Seen[str] = Seen()
    assert engines.find(beginnings("", ids(FIRST))) is None
    engines.note(beginnings("", ids(FIRST)), "a")
    assert engines.find(beginnings("", ids(FIRST))) == "a"
    assert engines.find(beginnings("", ids(FIRST, SECOND))) == "a"
    assert engines.find(beginnings("", ids(range(20)))) == "a"
    assert engines.find(beginnings("", ids(range(15)))) is None
    assert engines.find(beginnings("", ids(SECOND))) is None
    engines.note(beginnings("", ids(range(40), SECOND)), "b")
    assert engines.find(beginnings("", ids(range(40), SECOND, FIRST))) == "b"
    assert engines.find(beginnings("", ids(FIRST, SECOND))) == "a"
    assert engines.find(beginnings("", ids(range(40), range(7)))) == "b", "not where what they share was read last"


def test_what_one_salt_knows_no_other_does() -> None:
    engines: Seen[str] = Seen()
    engines.note(beginnings("mine", ids(FIRST)), "a")
    assert engines.find(beginnings("yours", ids(FIRST))) is None


def test_what_is_used_least_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_MOST", 8)
    engines: Seen[str] = Seen()
    for number in (1, 2, 1, 3):
        engines.note(beginnings("", ids([number] * 100)), str(number))
    assert [engines.find(beginnings("", ids([number] * 100))) for number in (1, 2, 3)] == ["1", None, "3"]
