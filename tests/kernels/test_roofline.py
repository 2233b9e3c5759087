"""The bytes that floors are worked out from, held to every load and store that Triton's interpreter carries out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from roofline import BATCHES, DEVICES, MODELS, decode_step, matrix_sizes, mixer_decode_bytes, prefill

from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.kernels.mixers.lattice import MixerShape, MixerState, MixerWeights, StateLayout
from tests.kernels.naive import normal
from tests.triton_device import DEVICE

# isort: split
from triton.runtime.interpreter import InterpreterBuilder

from lattice_serve.kernels.mixers.lattice.triton.decode import mix_decode

only_here = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


class Moved:
    """Addresses of bytes that were read, and that were written."""

    def __init__(self) -> None:
        self.read, self.written = set[int](), set[int]()

    @staticmethod
    def add(places: set[int], pointers: Any, mask: Any) -> None:
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        for address in np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].flatten().tolist():
            places.update(range(address, address + size))

    @property
    def bytes(self) -> int:
        return len(self.read) + len(self.written)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moved]:
    moved = Moved()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        moved.add(moved.read, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved.add(moved.written, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield moved


@only_here
@pytest.mark.parametrize(("C", "forget", "taps"), [(4, True, 4), (4, False, 2), (1, True, 1)])
def test_a_token_moves_what_is_counted(monkeypatch: pytest.MonkeyPatch, C: int, forget: bool, taps: int) -> None:
    shape = MixerShape(
        H=2, d=24, m=20, C=C, taps=taps, objective="decoding", use_forget_gate=forget, norm_eps=1e-6
    )  # fmt: skip
    layout = StateLayout(shape, 1)
    weights = MixerWeights(
        conv=normal(shape.conv_width, taps, seed=1).float(), gate_bias=normal(2 * shape.H, seed=2).float(),
        norm=normal(shape.d, seed=3).float(), anchor=normal(shape.H, shape.d, shape.m, seed=4).float(),
    ).by_taps()  # fmt: skip
    pool = torch.zeros(1, layout.row_size)
    layout.store(pool[0], 0, MixerState.initial(shape, weights, 1))
    out = torch.empty(1, shape.out_width)
    for position in range(C + 1):
        z = normal(1, shape.in_width, seed=10 + position).float()
        with counted(monkeypatch) as moved:
            mix_decode(z, pool, 0, torch.tensor([0]), torch.tensor([position]), weights, layout, out)
        assert moved.bytes == mixer_decode_bytes(shape, position % C, z.element_size())


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_all_counted(name: str) -> None:
    with torch.device("meta"):
        model = LatticeForCausalLM(MODELS[name])
    matrices = sum(x.numel() for key, x in model.named_parameters() if key.endswith("weight"))
    assert matrix_sizes(MODELS[name]) == (matrices, model.head_weight.numel())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_floors_grow_with_the_work(name: str, device: str) -> None:
    floors = [decode_step(MODELS[name], batch).seconds(DEVICES[device]) for batch in BATCHES]
    assert floors == sorted(floors)
    assert decode_step(MODELS[name], 1, weight_bytes=1).bytes < decode_step(MODELS[name], 1).bytes
    assert prefill(MODELS[name], 8192).seconds(DEVICES[device]) > prefill(MODELS[name], 512).seconds(DEVICES[device])
