"""The bundled model's logits and states on every path that this processor has, held to the torch reference in float64.

Nothing is frozen: the truth is computed anew, from weights and activations that are rounded as the path rounds them.
Within a path the bits must be the same by any threads, and whether weights or rows are shared out.
"""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import Tensor

from lattice_serve.engine.models.lattice.model import DenseOps, LatticeForCausalLM, ModelState
from lattice_serve.engine.weights import bundled_model, load_model
from lattice_serve.kernels.decoder.cpu import CpuDecoder
from lattice_serve.kernels.linear.quantize import quantize
from lattice_serve.kernels.mixers.lattice import StateLayout
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.numba.features import Products
from tests.kernels.decoder.test_cpu import PRODUCTS, RoundedOps
from tests.kernels.naive import error

PROMPTS = [[11, 7, 300, 12, 900, 4000, 5, 77] * 6, [3], list(range(100, 150))]
"""Longer than a chunk and not a multiple of it, one token, and between."""
ANSWER = [42, 9, 1000, 9, 42, 17, 260, 5, 5, 5, 8, 31, 2, 1, 90, 90, 3]
"""What is decoded behind each, past the end of a chunk."""
TOLERANCE: dict[Products, tuple[float, float]] = {
    "float32": (1e-5, 1e-4),
    "avx512_vnni": (1e-3, 1e-2),
    "amx_int8": (1e-3, 1e-2),
    "avx512_bf16": (1e-2, 5e-2),
    "amx": (1e-2, 5e-2),
}
"""Of the largest logit, and of a memory's largest value: roundings that float32 and float64 do differently."""


@pytest.fixture(scope="module")
def model() -> LatticeForCausalLM:
    loaded = load_model(bundled_model(), dtype=torch.bfloat16)
    assert isinstance(loaded, LatticeForCausalLM)
    return loaded


def run(
    model: LatticeForCausalLM, quantization: str | None, products: Products, threads: int, wide_from: int
) -> tuple[Tensor, Tensor, StateLayout]:
    """Logits of all tokens, those of prompts and then of each decode step, and the state rows after them."""
    layout = StateLayout(model.shape, model.config.num_hidden_layers)
    pool = torch.zeros(len(PROMPTS), layout.row_size)
    for row in pool:
        for i, layer in enumerate(model.layers):
            layout.initial(row, i, layer.mixer.weights())
    decoder = CpuDecoder(
        model.decoder_weights(), layout, pool, max_tokens=128, threads=threads, parallel_from=0, wide_from=wide_from,
        quantization="int8" if quantization else None, products=products,
    )  # fmt: skip
    ids = [token for prompt in PROMPTS for token in prompt]
    segments = Segments.of([(row, 0, len(prompt)) for row, prompt in enumerate(PROMPTS)])
    logits = [decoder(ids, segments, range(len(ids)))[0].clone()]
    for i, token in enumerate(ANSWER):
        step = Segments.of([(row, len(prompt) + i, 1) for row, prompt in enumerate(PROMPTS)], len(PROMPTS))
        logits.append(decoder([token] * len(PROMPTS), step, range(len(PROMPTS)))[0].clone())
    return torch.cat(logits), pool, layout


def truth(model: LatticeForCausalLM, quantization: str | None, products: Products) -> tuple[Tensor, list[ModelState]]:
    """The same logits in float64, and the states."""
    exact = copy.deepcopy(model).double()
    head = exact.head_weight
    if quantization:  # the embedding, which the head may be, is not rounded
        head = rounded(head)
        for name, parameter in exact.named_parameters():
            if name.endswith("weight"):
                parameter.data = rounded(parameter)
    prompts, answers, states = [], [], []
    for prompt in PROMPTS:
        state = exact.initial_state(1)
        ops = (RoundedOps if products in ("avx512_bf16", "amx") else DenseOps)(exact, state)
        logits = ops.linear(exact.hidden(torch.tensor([prompt + ANSWER]), ops), head)[0]
        prompts.append(logits[: len(prompt)])
        answers.append(logits[len(prompt) :])
        states.append(ops.state)
    return torch.cat((*prompts, torch.stack(answers, dim=1).flatten(0, 1))), states


def rounded(weight: Tensor) -> Tensor:
    whole, scales = quantize(weight)
    return whole.double() * scales.double()[:, None]


def digest(*tensors: Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize(("quantization", "products"), PRODUCTS)
def test_every_path_is_the_model_and_has_one_digest(
    model: LatticeForCausalLM, quantization: str | None, products: Products
) -> None:
    logits, pool, layout = run(model, quantization, products, threads=1, wide_from=1000)
    expected, states = truth(model, quantization, products)
    of_logits, of_memory = TOLERANCE[products]
    assert error(logits, expected) <= of_logits
    for row, (prompt, state) in enumerate(zip(PROMPTS, states, strict=True)):
        for i, layer in enumerate(state.layers):
            mine = layout.load(pool[row], i, len(prompt) + len(ANSWER))
            assert error(mine.lattice.memory(), layer.lattice.memory()) <= of_memory, (row, i)
    wide = run(model, quantization, products, threads=2, wide_from=16)
    assert digest(*wide[:2]) == digest(logits, pool)
