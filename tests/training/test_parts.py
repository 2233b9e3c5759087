"""Loss, score, optimizers, schedule and watch, each against a plain account of what it should do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.training import forward
from lattice_serve.training.data import Books
from lattice_serve.training.evaluate import bits_per_byte
from lattice_serve.training.forward import IGNORED, linear_cross_entropy, matmul_dtype, total_nll
from lattice_serve.training.mqar import recall_set, train_single_layer
from lattice_serve.training.optimizer import Muon, build_optimizers, learning_rate, orthogonalise
from lattice_serve.training.watch import Diverged, Watch

CONFIG = LatticeConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_heads=2,
    head_dim=12,
    num_slots=5,
    intermediate_size=32,
    chunk_size=4,
)


@pytest.fixture
def model() -> LatticeForCausalLM:
    made = LatticeForCausalLM(CONFIG)
    made.initialize(0)
    return made


def test_cross_entropy_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_ROWS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (30,))
    targets[::4] = IGNORED
    mine = linear_cross_entropy(hidden, weight, targets, torch.float64)
    truth = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(mine, truth, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(mine * 0.3, (hidden, weight)),
        torch.autograd.grad(truth * 0.3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, torch.float64) == pytest.approx(float(truth.detach()))


def test_training_loss_is_the_models(model: LatticeForCausalLM) -> None:
    tokens = torch.randint(0, CONFIG.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    nll, _ = total_nll(model, tokens[:, :-1], tokens[:, 1:], model.initial_state(3), torch.float32)
    mean, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert float(nll.detach()) / 24 == pytest.approx(float(mean.detach()), rel=1e-5)
    rough, _ = total_nll(model, tokens[:, :-1], tokens[:, 1:], model.initial_state(3), torch.bfloat16)
    assert float(rough.detach()) == pytest.approx(float(nll.detach()), rel=1e-2)
    assert float(rough.detach()) != float(nll.detach())
    rough.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_precision_is_a_choice() -> None:
    assert matmul_dtype("float32") == torch.float32
    assert matmul_dtype("bfloat16") == torch.bfloat16
    assert matmul_dtype("auto") in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("length", [4, 7, 64])
def test_bits_per_byte_is_that_of_each_book_alone(model: LatticeForCausalLM, length: int) -> None:
    class Tokenizer:
        """Every token is two bytes; token 1 ends a text."""

        def eos_id(self) -> int:
            return 1

        def vocab_size(self) -> int:
            return CONFIG.vocab_size

        def is_byte(self, token: int) -> bool:
            return False

        def is_control(self, token: int) -> bool:
            return token == 1

        def is_unknown(self, token: int) -> bool:
            return False

        def id_to_piece(self, token: int) -> str:
            return "ab"

    rng = np.random.default_rng(0)
    documents = [rng.integers(2, CONFIG.vocab_size, size).astype(np.uint16) for size in (23, 5, 16)]
    score = bits_per_byte(model, Books(documents, Tokenizer()), length=length)  # type: ignore[arg-type]
    nats = 0.0
    for document in documents:
        ids = torch.tensor([[1, *document.tolist()]])
        logits, _ = model(ids[:, :-1])
        nats += float(F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").detach())
    assert score == pytest.approx(nats / math.log(2) / (2 * 44), rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (30, 12), (12, 30), (3, 10, 20)])
def test_orthogonalised_matrices(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(matrix)
    values = torch.linalg.svdvals(out)
    assert values.max() < 1.3
    assert values.median() > 0.6
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    cosine = F.cosine_similarity(out.flatten(), (u @ vh).flatten(), dim=0)
    assert cosine > 0.9


def test_muon_orthogonalises_sections_apart() -> None:
    def after_step(grad: torch.Tensor, sections: list[int] | None) -> torch.Tensor:
        param = torch.nn.Parameter(torch.zeros(16, 24))
        param.grad = grad.clone()
        Muon([{"params": [param], "sections": sections}], lr=1.0).step()
        return param.detach()

    grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    split = after_step(grad, [10, 6])
    other = after_step(torch.cat((grad[:10] * 50, grad[10:])), [10, 6])
    torch.testing.assert_close(split[10:], other[10:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(split, after_step(grad, None), rtol=1e-2)
    assert split.square().mean().sqrt() == pytest.approx(0.2, rel=0.3)


def test_every_parameter_has_one_optimizer(model: LatticeForCausalLM) -> None:
    for name, count in (("adamw", 1), ("muon", 2)):
        made = build_optimizers(model, name, lr=1e-3, muon_lr=2e-3, weight_decay=0.1)  # type: ignore[arg-type]
        assert len(made) == count
        params = [param for optimizer in made for group in optimizer.param_groups for param in group["params"]]
        assert sorted(map(id, params)) == sorted(map(id, model.parameters()))
        for group in made[0].param_groups:
            small = all(p.ndim != 2 or min(p.shape) <= 4 for p in group["params"])
            assert (group["weight_decay"] == 0) == small
    assert all(p.ndim == 2 for group in made[1].param_groups for p in group["params"])
    assert {group["peak_lr"] for group in made[1].param_groups} == {2e-3}


def test_learning_rate() -> None:
    def rate(progress: float, **others: float) -> float:
        return learning_rate(progress, **({"warmup": 0.1, "cooldown": 0.4, "final": 0.2} | others))

    assert [rate(p) for p in (0.0, 0.05, 0.1, 0.5, 0.6)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert rate(0.8) == pytest.approx(0.6)
    assert rate(1.0) == pytest.approx(0.2)
    assert rate(0.55, cooldown=1.0, final=0.0) == pytest.approx(0.5)
    assert rate(1.0, cooldown=0.0) == 1.0


def test_watch_skips_spikes_and_stops_at_nan() -> None:
    watch = Watch()
    assert all(watch.admit(step, 2.0, 1.0 + 0.01 * step, "none") for step in range(20))
    assert not watch.admit(20, 2.0, 50.0, "none")
    assert watch.skipped == 1
    assert watch.admit(21, 2.0, 9.0, "none")
    assert 50.0 not in Watch(history=watch.history, skipped=1).history
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(Diverged, match=r"step 22.*step-7"):
            watch.admit(22, loss, norm, "step-7")


def test_first_steps_are_not_called_spikes() -> None:
    assert all(Watch().admit(step, 5.0, norm, "none") for step, norm in enumerate((0.1, 100.0)))


def test_recall_set_asks_what_it_showed() -> None:
    tokens, targets = recall_set(20, 5, 32)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(shown) == 5
        assert wanted[:10] == [IGNORED] * 10
        assert [shown[key] for key in row[10:]] == wanted[10:]


def test_one_layer_learns_to_recall() -> None:
    config = LatticeConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=1,
        num_heads=2,
        head_dim=24,
        num_slots=16,
        intermediate_size=48,
        chunk_size=4,
    )
    losses = train_single_layer(config, *recall_set(32, 6, 64), steps=120)
    assert losses[0] > 3
    assert losses[-1] < 0.01
