"""The network where its products' parts are gathered by torch.distributed: on a GPU by NCCL, within captured graphs."""

from __future__ import annotations

from pathlib import Path

import torch

from lattice_serve.engine.tensor_parallel.group import Group
from lattice_serve.engine.tensor_parallel.share import WHOLE
from lattice_serve.kernels.mixers.lattice import StateLayout
from tests.kernels.decoder.test_triton import TOKENS, Network, tokens, truth
from tests.kernels.harness import same_bits
from tests.kernels.naive import error
from tests.triton_device import DEVICE

# isort: split
from lattice_serve.kernels.decoder.triton import TritonDecoder


def test_a_group_of_one_is_the_model(tmp_path: Path) -> None:
    """Of several there is a test of the engine, on CPUs."""
    network = Network(num_hidden_layers=1)
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    group = Group(WHOLE, "cuda:0" if DEVICE == "cuda" else DEVICE, tmp_path)
    try:
        layout = StateLayout(network.model.shape, 1)
        weights = network.model.decoder_weights()
        network.decoder = TritonDecoder(weights, layout, network.pool, max_tokens=TOKENS, gather=group.gather)
        prompt, answer = tokens(11), tokens(3, seed=1)
        logits = network.alone(prompt, answer)
        assert same_bits(network.alone(prompt, answer, row=1), logits)
        assert error(logits, truth(network.model, prompt + answer)) <= 1e-5
    finally:
        del network.decoder  # and with it the graphs that hold what the group is about to end
        group.close()
