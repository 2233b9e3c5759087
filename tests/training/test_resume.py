"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from lattice_serve.engine.errors import CheckpointError, ConfigError
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.training import trainer as trainer_module
from lattice_serve.training.checkpoint import checkpoints
from lattice_serve.training.data import Books, Streams
from lattice_serve.training.trainer import Interrupted, Trainer, TrainOptions
from lattice_serve.training.watch import Diverged

CONFIG = LatticeConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_heads=2,
    head_dim=12,
    num_slots=5,
    intermediate_size=32,
    chunk_size=4,
)


@pytest.fixture(autouse=True)
def no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "bits_per_byte", lambda *_, **__: 0.0)


def make_trainer(
    out: Path, *, tokens: int = 12 * 24, optimizer: str = "muon", batch: int = 3, **others: object
) -> Trainer:
    ids = np.random.default_rng(0).integers(2, CONFIG.vocab_size, 200).astype(np.uint16)
    settings = {"seq": 8, "warmup": 2, "cooldown": 0.5, "save_every": 5, "eval_every": 100, "precision": "float32"}
    options = TrainOptions(tokens=tokens, optimizer=optimizer, batch=batch, **(settings | others))  # type: ignore[arg-type]
    streams = Streams([ids], 1, batch=batch, length=8, seed=0, reset_probability=options.reset)
    model = LatticeForCausalLM(CONFIG)
    model.initialize(0)
    return Trainer(model, streams, Books.__new__(Books), options, out)


def losses(out: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["norm"]) for r in records if "loss" in r]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, optimizer: str) -> None:
    whole = make_trainer(tmp_path / "whole", optimizer=optimizer)
    whole.run()
    broken = make_trainer(tmp_path / "broken", optimizer=optimizer)
    for _ in range(5):
        broken.train_step()
    broken.save()
    for _ in range(2):
        broken.train_step()  # lost: after the checkpoint
    again = make_trainer(tmp_path / "broken", optimizer=optimizer)
    again.resume()
    again.run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 12
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_longer_run_goes_on_from_the_constant_phase(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", tokens=20 * 24)
    whole.run()
    short = make_trainer(tmp_path / "short", tokens=12 * 24)
    for _ in range(6):
        short.train_step()
    short.save()
    longer = make_trainer(tmp_path / "short", tokens=20 * 24)
    longer.resume()
    longer.run()
    assert losses(tmp_path / "short") == losses(tmp_path / "whole")


def test_signal_writes_a_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every=100)
    step = trainer.train_step

    def step_then_signal() -> dict[str, float]:
        record = step()
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    trainer.train_step = step_then_signal  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="step 3"):
        trainer.run()
    assert [place.name for place in checkpoints(tmp_path)] == ["step-00000003"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_keeps_the_last_two_checkpoints(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_every=3).run()
    assert [place.name for place in checkpoints(tmp_path)] == ["step-00000009", "step-00000012"]
    assert not list(tmp_path.glob("*.part"))


def test_half_written_checkpoint_is_not_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train_step()
    trainer.save()
    (tmp_path / "step-00000002.part").mkdir()
    assert [place.name for place in checkpoints(tmp_path)] == ["step-00000001"]


def test_other_options_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train_step()
    trainer.save()
    with pytest.raises(CheckpointError, match="lanes"):
        make_trainer(tmp_path, batch=2).resume()
    with pytest.raises(CheckpointError, match="optimizer"):
        make_trainer(tmp_path, optimizer="adamw").resume()
    with pytest.raises(ConfigError, match="seed is 1"):
        make_trainer(tmp_path, seed=1).resume()


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        make_trainer(tmp_path).resume()


def test_nan_stops_naming_step_and_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train_step()
    trainer.save()
    with torch.no_grad():
        trainer.model.embedding.fill_(torch.nan)
    with pytest.raises(Diverged, match=r"step 1: the loss is nan.*step-00000001"):
        trainer.train_step()


def test_segment_must_fit_the_chunk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chunk_size 4"):
        make_trainer(tmp_path, seq=6)
