"""The training loop: truncated backpropagation through time with the memory carried from segment to segment."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM, ModelState
from lattice_serve.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from lattice_serve.training.data import Books, Segment, Streams
from lattice_serve.training.evaluate import bits_per_byte
from lattice_serve.training.forward import Precision, compile_kernels, matmul_dtype, total_nll
from lattice_serve.training.optimizer import OptimizerName, build_optimizers, learning_rate
from lattice_serve.training.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Everything that a run is told. A resumed run must agree in `batch`, `seq`, `seed` and `optimizer`."""

    tokens: int
    """Tokens to train on in all."""
    batch: int = 16
    """Lanes."""
    seq: int = 512
    """Tokens a lane and step."""
    optimizer: OptimizerName = "muon"
    lr: float = 2e-3
    muon_lr: float | None = None
    """Of the hidden matrices under muon; None: `lr`."""
    weight_decay: float = 0.1
    warmup: int = 100
    """Steps in which the learning rate rises."""
    cooldown: float = 1.0
    """Last share of the run in which it falls along a cosine."""
    final_lr: float = 0.0
    """Where it ends, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm that is applied."""
    reset: float = 0.125
    """Probability that a lane starts a segment from the initial memory."""
    seed: int = 0
    precision: Precision = "auto"
    eval_every: int = 250
    """Steps between validations on the first `eval_tokens` tokens of every held-out document."""
    eval_tokens: int = 4096
    save_every: int = 250
    """Steps between checkpoints."""
    workers: int = 1
    """Threads that the lanes are shared out over, each with its share of the cores."""
    compile: bool = False
    """Fuse small operations with torch.compile, which wants a C++ compiler and a minute at the start."""
    hours: float | None = None
    """Only for the projection that is printed: the run ends by tokens, not by the clock."""

    @property
    def step_tokens(self) -> int:
        return self.batch * self.seq

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.step_tokens)


class Interrupted(Exception):
    """A signal ended the run; a checkpoint was written."""


class Trainer:
    """Trains `model` on `streams`; writes checkpoints and `metrics.jsonl` in `out`."""

    def __init__(
        self, model: LatticeForCausalLM, streams: Streams, books: Books, options: TrainOptions, out: Path
    ) -> None:
        if options.seq % model.config.chunk_size:
            raise ConfigError(f"seq {options.seq}: give a multiple of the model's chunk_size {model.config.chunk_size}")
        self.model, self.streams, self.books, self.options, self.out = model, streams, books, options, out
        self.optimizers = build_optimizers(
            model,
            options.optimizer,
            lr=options.lr,
            muon_lr=options.muon_lr or options.lr,
            weight_decay=options.weight_decay,
        )
        if options.compile:
            compile_kernels()
        self.dtype = matmul_dtype(options.precision)
        if options.batch % options.workers:
            raise ConfigError(f"batch {options.batch}: give a multiple of workers ({options.workers})", param="batch")
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(options.workers)
        self.watch = Watch()
        self.step = 0
        self.memory: ModelState = model.initial_state(options.batch).detach()
        self._last_good = "none yet"
        self._stopping = False
        out.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Continue from the newest checkpoint in `out`, as if the run had not stopped; `ConfigError` without one."""
        places = checkpoints(self.out)
        if not places:
            raise ConfigError(f"{self.out}: no checkpoint to resume from: leave --resume out", param="resume")
        run, self.memory = load_checkpoint(places[-1], self.model, self.optimizers, self.options.batch)
        for name in ("batch", "seq", "seed", "optimizer"):
            now, then = getattr(self.options, name), run["options"][name]
            if now != then:
                raise ConfigError(f"{name} is {now}, but the run was started with {then}: give that", param=name)
        self.step = run["step"]
        self.watch = Watch(history=run["norms"], skipped=run["skipped"])
        self._last_good = str(places[-1])
        self._cut_metrics()

    def run(self) -> None:
        """Train to the last step. SIGTERM or SIGINT writes a checkpoint and raises `Interrupted`; a second kills."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _loop(self) -> None:
        o = self.options
        first, began = self.step, time.monotonic()
        bar = tqdm(
            total=o.steps * o.step_tokens,
            initial=self.step * o.step_tokens,
            unit="tok",
            unit_scale=True,
            desc="train",
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        )
        with bar:
            while self.step < o.steps:
                record = self.train_step()
                bar.set_postfix(loss=f"{record['loss']:.3f}", norm=f"{record['norm']:.2f}", refresh=False)
                bar.update(o.step_tokens)
                if self.step == first + 20:
                    bar.write(self._projection((time.monotonic() - began) / 20))
                if self.step % o.eval_every == 0 or self.step == o.steps:
                    score = bits_per_byte(self.model, self.books, length=o.seq, dtype=self.dtype)
                    self._log({"step": self.step, "tokens": self.step * o.step_tokens, "validation_bpb": score})
                    bar.write(
                        f"step {self.step}: validation {score:.4f} bits per byte, train loss {record['loss']:.4f}, "
                        f"{self.watch.skipped} steps skipped"
                    )
                if self.step % o.save_every == 0 or self.step == o.steps or self._stopping:
                    self.save()
                if self._stopping:
                    raise Interrupted(f"stopped at step {self.step}; go on with --resume")

    def train_step(self) -> dict[str, float]:
        """One segment of every lane, one step of the optimizers; returns what was logged."""
        o = self.options
        began = time.monotonic()
        segment = self.streams.segment(self.step)
        value, self.memory = self._gradients(segment)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), o.clip, foreach=True))
        scale = learning_rate(
            (self.step + 1) / o.steps, warmup=min(1.0, o.warmup / o.steps), cooldown=o.cooldown, final=o.final_lr
        )
        if self.watch.admit(self.step, value, norm, self._last_good):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * scale
                optimizer.step()
        self.step += 1
        record = {
            "step": self.step,
            "tokens": self.step * o.step_tokens,
            "loss": value,
            "norm": norm,
            "lr": o.lr * scale,
            "seconds": round(time.monotonic() - began, 3),
        }
        self._log(record)
        return record

    def _gradients(self, segment: Segment) -> tuple[float, ModelState]:
        """Set every parameter's gradient of the mean loss; returns that loss and the memory after the segment.

        The lanes are shared out over threads of one core each: many small operations run faster on a core of their own
        than on all of them in turn, and other work on the machine delays no barrier inside an operation.
        """
        parameters = list(self.model.parameters())
        count = segment.targets.numel()
        workers = self.options.workers

        def lanes(
            tokens: Tensor, targets: Tensor, reset: Tensor, memory: ModelState
        ) -> tuple[float, tuple[Tensor, ...], ModelState]:
            torch.set_num_threads(max(1, self.threads // workers))
            memory = memory.where(reset, self.model.initial_state(len(reset)))
            nll, after = total_nll(self.model, tokens, targets, memory, self.dtype)
            gradients = torch.autograd.grad(nll / count, parameters)
            return float(nll.detach()) / count, gradients, after.detach()

        parts = [part.tensor_split(workers) for part in (segment.tokens, segment.targets, segment.reset)]
        losses, gradients, after = zip(*self._pool.map(lanes, *parts, self.memory.split(workers)), strict=True)
        for parameter, *shares in zip(parameters, *gradients, strict=True):
            total = shares[0]
            for share in shares[1:]:
                total = total + share
            parameter.grad = total
        return sum(losses), ModelState.join(after)

    def save(self) -> None:
        run = {"norms": self.watch.history, "skipped": self.watch.skipped, "options": asdict(self.options)}
        place = save_checkpoint(self.out, self.step, self.model, self.optimizers, self.memory, run)
        self._last_good = str(place)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        signal.signal(number, signal.SIG_DFL)

    def _projection(self, seconds: float) -> str:
        o = self.options
        rate = o.step_tokens / seconds
        left = (o.steps - self.step) * seconds / 3600
        text = f"{rate:,.0f} tokens/s: {o.tokens:,} tokens are done in {left:.2f} h"
        if o.hours is not None:
            text += f"; {o.hours:g} h from here hold {self.step * o.step_tokens + o.hours * 3600 * rate:,.0f} tokens"
        return text

    @property
    def _metrics(self) -> Path:
        return self.out / "metrics.jsonl"

    def _log(self, record: dict[str, Any]) -> None:
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _cut_metrics(self) -> None:
        """Forget what was logged after the checkpoint: those steps are done again."""
        if not self._metrics.exists():
            return
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        part = self._metrics.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        part.replace(self._metrics)
