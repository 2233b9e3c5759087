"""Memory that is kept: nothing is lost of it, nothing is given to two, and it grows by what is wanted at once."""

from __future__ import annotations

import pytest
import torch

from lattice_serve.engine import slab as slab_module
from lattice_serve.engine.slab import Slab


def test_copies_are_their_own() -> None:
    slab = Slab(5)
    tensors = [torch.full((5,), float(i)) for i in range(9)]
    places = [slab.copy(tensor) for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert [place.tolist() for place in places] == [[float(i)] * 5 for i in range(9)]


def test_memory_is_used_again() -> None:
    slab = Slab(5)
    places = [slab.copy(torch.ones(5)) for _ in range(3)]
    before = {place.data_ptr() for place in places}
    for place in places:
        slab.give_back(place)
    assert set(slab.free) == before
    assert {slab.copy(torch.ones(5)).data_ptr() for _ in range(3)} == before
    assert (slab.places, slab.ready) == (3, 0)


def test_memory_is_made_ready_by_portions() -> None:
    slab = Slab(10)
    for touched in range(12, 200, 12):
        slab.prepare(12)
        assert slab.ready == slab.places == touched // 40
    slab.copy(torch.ones(10))
    assert (slab.ready, slab.places) == (3, 4), "there was room already"


def test_blocks_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "_BLOCK_BYTES", 2 * 40)
    slab = Slab(10)
    places = [slab.copy(torch.full((10,), float(i))) for i in range(7)]
    slab.prepare(1000)
    assert [place[0].item() for place in places] == list(range(7))
    assert slab.places == 8, "a portion ends with its block"
    assert len({place.data_ptr() for place in places} | set(slab.free)) == 8
