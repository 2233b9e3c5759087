"""The engine: requests in, tokens out, one step at a time. One model, one device, one thread."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import torch

from lattice_serve.engine.backend import Backend, check_fit, make_backend
from lattice_serve.engine.bits import check_bits
from lattice_serve.engine.config import EngineConfig, ModelConfig
from lattice_serve.engine.detokenizer import Detokenizer
from lattice_serve.engine.drafter import Drafter
from lattice_serve.engine.errors import InvalidParameter, LatticeError
from lattice_serve.engine.grammar import Compiled, Grammars
from lattice_serve.engine.memory import Memory
from lattice_serve.engine.messages import EngineStats, Ready, RequestFailed, StepOutputs, Submit
from lattice_serve.engine.pace import Pace
from lattice_serve.engine.pooled import Pooled
from lattice_serve.engine.prefix_cache import PrefixCache, cache_budgets
from lattice_serve.engine.processors import available_cpus
from lattice_serve.engine.runner import Runner, Running
from lattice_serve.engine.sampler import Sampled, SampleRow, TokenCounts, penalised
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.scheduler import Scheduler
from lattice_serve.engine.sequence import Sequence, Status
from lattice_serve.engine.state_pool import StatePool, row_count
from lattice_serve.engine.taken import Taken
from lattice_serve.engine.tensor_parallel.commands import Reserve
from lattice_serve.engine.tensor_parallel.group import devices
from lattice_serve.engine.tensor_parallel.sharded import ShardedBackend, ShardedPool
from lattice_serve.engine.tensor_parallel.share import Share
from lattice_serve.engine.tensor_parallel.workers import Workers
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import load_model, pick_dtype
from lattice_serve.kernels.mixer import StateLayout

_COMPILE_SECONDS = 0.02
"""A step that has nothing but grammars to wait for takes that long: messages are read between steps."""


class Engine:
    def __init__(self, config: EngineConfig, *, progress: bool = False, beside: bool = False) -> None:
        """Load the model and reserve the state pool. beside: whether other work wants the processors too.

        Raises `CheckpointError` for a bad model folder, `ConfigError` for settings that do not fit it.
        """
        began = time.monotonic()
        threads = config.threads or available_cpus()
        # The kernels' threads are their own. Torch's would fight them, and the sampler's small work does not need any.
        torch.set_num_threads(1)
        self.config = config
        model_config = ModelConfig.load(config.model)
        self.tokenizer = Tokenizer.load(config.model, model_config.vocab_size)
        dtype = pick_dtype(config.dtype, model_config)
        self.workers: Workers | None = None
        """The processes that have the other shares of the model, if it is shared out."""
        try:
            backend = self._open(model_config, dtype, threads, progress=progress, beside=beside)
            check_fit(backend, config, self.pool.rows)
            check_bits(backend, self.pool, model_config.vocab_size, config.max_step_tokens)
        except BaseException:
            self.close()
            raise
        self.runner = Runner(backend, self.pool.memory.device)
        self._overlaps = self.pool.memory.device.type == "cuda"
        """Whether a step runs on while `launch` returns."""
        self.scheduler = Scheduler(
            rows=self.pool.rows,
            max_step_tokens=config.max_step_tokens,
            max_waiting=config.max_waiting,
            multiple=backend.multiple,
        )
        self.cache = PrefixCache(cache_budgets(config), backend.multiple)
        self.memory = Memory(self.pool, self.cache, backend.multiple)
        self._pace = Pace(config.step_seconds, config.max_step_tokens)
        self.grammars = Grammars(config.model, self.tokenizer)
        self._sequences: dict[str, Sequence] = {}
        self._running: Running | None = None
        self._began = 0.0
        self._taken: list[Taken] = []
        self._failures: list[RequestFailed] = []
        """Collected, and not emitted yet."""
        self._compiling: dict[str, Future[Compiled]] = {}
        """Of sequences that the scheduler does not know yet: they wait for their grammars."""
        self._seeds, self._eos = random.Random(os.urandom(16)), model_config.eos_token_id
        self._prompt_tokens = self._generated = self._steps = self._step_tokens = self._drafted = self._accepted = 0
        self._warm_up()
        self.info = Ready(
            model_name=Path(config.model).resolve().name,
            pid=os.getpid(),
            rows=self.pool.rows,
            bytes_per_row=self.pool.layout.row_bytes * config.tensor_parallel_size,
            vocab_size=self.model.config.vocab_size,
            device=f"{config.device} ({backend.name})",
            dtype=config.quantization or str(dtype).removeprefix("torch."),
            load_seconds=time.monotonic() - began,
        )

    def close(self) -> None:
        """End its other processes; it cannot be used after that."""
        if self.workers is not None:
            self.workers.close()

    def check(self, request: Submit) -> None:
        """Raises `InvalidParameter` for a request that could never be served."""
        params, vocab_size = request.params, self.model.config.vocab_size
        if not request.prompt_ids:
            raise InvalidParameter("prompt is empty: give at least one token", param="prompt")
        Tokenizer.check(request.prompt_ids, vocab_size)
        Tokenizer.check(params.stop_token_ids, vocab_size, param="stop_token_ids")
        Tokenizer.check(params.logit_bias, vocab_size, param="logit_bias")
        if not all(0 < point <= len(request.prompt_ids) for point in request.cache_points):
            raise InvalidParameter(
                f"cache_points must be from 1 to {len(request.prompt_ids)}, the tokens of the prompt",
                param="cache_points",
            )
        if params.max_tokens == 0 and params.prompt_logprobs is None and not (request.pooling or request.cache_points):
            raise InvalidParameter(
                "max_tokens is 0: give at least 1, or ask for prompt_logprobs, pooling or cache_points",
                param="max_tokens",
            )

    def submit(self, request: Submit) -> None:
        """Queue a request. Raises `InvalidParameter` or `Overloaded`; then nothing was queued."""
        params, vocab_size = request.params, self.model.config.vocab_size
        if request.request_id in self._sequences:
            raise InvalidParameter(f"request {request.request_id} runs already: give every request an id of its own")
        self.check(request)
        sequence = Sequence.of(
            request,
            arrived=time.monotonic(),
            sample_row=SampleRow(
                params=params,
                seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
                index=0,
                counts=TokenCounts(request.prompt_ids, vocab_size) if penalised(params) else None,
                forbidden=self._ends(params.stop_token_ids) if params.min_tokens else (),
            ),
            detokenizer=Detokenizer(self.tokenizer.token_bytes, params.stop, params.include_stop, params.min_tokens),
            pooled=None if request.pooling is None else Pooled(request.pooling),
        )
        self.memory.mark(sequence, request.cache_points)
        if params.grammar is not None:
            self._compiling[request.request_id] = self.grammars.compile(params.grammar)
        else:
            if self.config.speculative_tokens and not penalised(params):
                sequence.drafter = Drafter(self.config.speculative_tokens)
            self.scheduler.add(sequence)
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: str) -> None:
        """End a request in any phase, without a word; an unknown one is none of our business."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._taken = [each for each in self._taken if each.sequence is not sequence]
            self._finish(sequence)

    def credit(self, request_id: str, weight: int) -> None:
        """Outputs of a sequence, of that weight together, were taken; an unknown one has ended meanwhile."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.scheduler.credit(sequence, weight)

    @property
    def has_work(self) -> bool:
        """Whether there is a step to run, or something to emit."""
        return bool(self._taken or self._failures or self._compiling) or self.scheduler.active

    @property
    def idle(self) -> bool:
        """Whether there are no requests, not even paused ones."""
        return not (self._sequences or self.has_work)

    def step(self) -> StepOutputs:
        """Schedule, run, sample, advance, emit. At most `max_step_tokens` tokens.

        Who sends the outputs on does better to call the three itself, `emit` in between: on a GPU, texts and messages
        of one step are then made while the next one runs.
        """
        self.launch()
        self.collect()
        self.tidy()
        return self.emit()

    def launch(self) -> None:
        """Schedule and run a step. It is there when `collect` returns, and on the CPU when this does."""
        self._failures += self._queue_compiled()
        self.memory.move(self.scheduler.assign(), self.scheduler.running)
        decoding = self.scheduler.decoding
        pieces = self.scheduler.schedule(self._pace.tokens(decoding), self._pace.kept_tokens(decoding))
        self.memory.hold(pieces)
        self._began = time.monotonic()
        self._running = self.runner.launch(pieces) if pieces else None
        self._steps += bool(pieces)
        self._step_tokens = self._running.tokens if self._running else 0
        if not self._overlaps:
            self.collect()

    def collect(self) -> None:
        """Wait for the step that was launched last, and take its tokens into their sequences."""
        if self._running is None:
            return
        results, self._running = self._running.results(), None
        self._pace.record(self._step_tokens, time.monotonic() - self._began)
        for result in results:
            piece, sequence = result.piece, result.piece.sequence
            if sequence.status is Status.FINISHED:  # aborted meanwhile
                continue
            if not piece.decodes:
                self._prompt_tokens += min(piece.end, len(sequence.prompt_ids)) - piece.start
            if result.error is not None:
                self._failures.append(self._fail(sequence, result.error))
                continue
            if piece.draft:
                self._drafted += len(piece.draft)
                self._accepted += len(result.sampled) - 1
                self.memory.settle(piece, len(result.sampled) - 1)
            if not piece.decodes and piece.keeps:
                self._pace.record_kept(self.memory.keep_prompt(piece, result.logits))
            if not result.sampled:
                self._take_scores(sequence)
            try:
                for sampled in result.sampled:
                    self._advance(sequence, sampled)
                    if sequence.finish_reason is not None:
                        break
            except InvalidParameter as error:
                assert sequence.params.grammar is not None
                self.grammars.discard(sequence.params.grammar)
                self._failures.append(self._fail(sequence, error))

    def emit(self) -> StepOutputs:
        """What has been collected and not been emitted yet."""
        taken, self._taken = self._taken, []
        failures, self._failures = self._failures, []
        return StepOutputs(outputs=[each.output() for each in taken], failures=failures, stats=self.stats())

    def tidy(self) -> bool:
        """Put states away for some milliseconds, between steps, best when the outputs of one are out. Where it returns
        True, and there is no work, there is more to do."""
        return self.memory.tidy(idle=not self.has_work)

    def check_idle(self) -> None:
        """Assert that nothing is left of what has run. To be called when there is no work, and time for it."""
        self.memory.check_idle()

    def stats(self) -> EngineStats:
        waiting = self.scheduler.waiting
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(waiting) + len(self._compiling),
            rows=self.pool.rows,
            rows_used=self.memory.used,
            paused=len(self.scheduler.paused),
            preempted=sum(sequence.status is Status.PARKED for sequence in waiting),
            preemptions_total=self.scheduler.preemptions,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generated,
            steps_total=self._steps,
            step_tokens=self._step_tokens,
            draft_tokens_total=self._drafted,
            accepted_tokens_total=self._accepted,
            cache_entries=len(self.cache),
            cache_bytes=self.cache.nbytes,
            cache_outcomes=dict(self.cache.outcomes),
        )

    def _open(
        self, model_config: ModelConfig, dtype: torch.dtype, threads: int, *, progress: bool, beside: bool
    ) -> Backend:
        """Load the model, or this process's share of it, and make its state rows and what runs it."""
        config, share = self.config, Share(0, self.config.tensor_parallel_size)
        share.config(model_config)  # whether it can be shared out, before others are started
        device = devices(config.device, share.size)[0]
        if share.size > 1:
            self.workers = Workers(config)
        self.model = load_model(config.model, device=device, dtype=dtype, progress=progress, share=share)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # kernels and graphs run on the current one, wherever their tensors are
        layout = StateLayout(self.model.shape, len(self.model.layers))
        # Off the CPU's own kernels prompts are cut at chunks.
        multiple = 1 if config.device == "cpu" and self.workers is None else model_config.chunk_size
        rows = row_count(config, layout.row_bytes * share.size, multiple)
        gather = None
        if self.workers is None:
            self.pool = StatePool.of(self.model, rows, device)
        else:
            group = self.workers.meet(device)
            self.workers.send(Reserve(rows))
            self.pool = ShardedPool.of(self.model, rows, device, self.workers, group)
            gather = group.gather
        backend = make_backend(
            self.model,
            layout,
            self.pool.memory,
            max_tokens=config.max_step_tokens,
            threads=threads,
            beside=beside,
            quantization=config.quantization,
            gather=gather,
        )
        return backend if self.workers is None else ShardedBackend(backend, self.workers, share.size)

    def _warm_up(self) -> None:
        """Compile what compiles at its first call, on a row that is then scrubbed: no request waits for it."""
        params = SamplingParams(max_tokens=1, temperature=0)
        self.submit(Submit("warm-up", Tokenizer.checked([0, 0], self.model.config.vocab_size), params))
        while self.has_work:
            self.step()
        self._prompt_tokens = self._generated = self._steps = self._step_tokens = 0
        self.memory.clear()

    def _ends(self, stop_token_ids: tuple[int, ...], ignore_eos: bool = False) -> tuple[int, ...]:
        return stop_token_ids if self._eos is None or ignore_eos else (*stop_token_ids, self._eos)

    def _queue_compiled(self) -> list[RequestFailed]:
        """Hand the sequences whose grammars are compiled to the scheduler. Waits only where there is no other work."""
        if self._compiling and not self.scheduler.active:
            wait(self._compiling.values(), _COMPILE_SECONDS, FIRST_COMPLETED)
        failures = []
        for request_id in [request_id for request_id, future in self._compiling.items() if future.done()]:
            sequence = self._sequences[request_id]
            grammar, row = sequence.params.grammar, sequence.sample_row
            assert grammar is not None
            ends = self._ends(row.params.stop_token_ids, row.params.ignore_eos)
            try:
                compiled = self._compiling[request_id].result()
                row.matcher = self.grammars.matcher(compiled, ends, grammar.param)
                self.scheduler.add(sequence)
            except LatticeError as error:
                failures.append(self._fail(sequence, error))
            else:
                del self._compiling[request_id]
        return failures

    def _advance(self, sequence: Sequence, sampled: Sampled) -> None:
        """Take a sampled token into its sequence, and end that where it should.

        Raises `InvalidParameter` where its grammar is too complex to go on with.
        """
        params, token_id = sequence.params, sampled.token_id
        sequence.output_ids.append(token_id)
        sequence.sample_row.index += 1
        if sequence.sample_row.counts is not None:
            sequence.sample_row.counts.add(token_id)
        self._generated += 1
        taken = Taken(sequence, sampled, prompt_logprobs=sequence.take_scores())
        # Below min_tokens the sampler has not let any of these be chosen.
        if token_id in params.stop_token_ids:
            taken.text, sequence.finish_reason, taken.stop_reason = "", "stop", token_id
        elif token_id == self._eos and not params.ignore_eos:
            taken.text, sequence.finish_reason = "", "stop"
        else:
            matcher = sequence.sample_row.matcher
            if matcher is not None:
                matcher.push(token_id)
            if params.stop:
                taken.text, taken.stop_reason = sequence.detokenizer.push(token_id)
            if taken.stop_reason is not None or (matcher is not None and matcher.complete):
                sequence.finish_reason = "stop"
            elif len(sequence.output_ids) >= params.max_tokens:
                sequence.finish_reason = "length"
        self._take(taken)

    def _take_scores(self, sequence: Sequence) -> None:
        """Send the log-probabilities of a piece of a prompt, and end a request for no tokens with its prompt."""
        if sequence.decoding and sequence.params.max_tokens == 0:
            sequence.finish_reason = "length"
        scores = sequence.take_scores()
        if scores or sequence.finish_reason is not None:
            self._take(Taken(sequence, None, text="", prompt_logprobs=scores))

    def _take(self, taken: Taken) -> None:
        sequence = taken.sequence
        taken.finish_reason = sequence.finish_reason
        self._taken.append(taken)
        if sequence.finish_reason is not None:
            self.memory.keep_answer(sequence)
            self._finish(sequence)
        else:
            self.scheduler.debit(sequence, taken.weight)

    def _fail(self, sequence: Sequence, error: LatticeError) -> RequestFailed:
        self._finish(sequence)
        return RequestFailed.of(sequence.request_id, error)

    def _finish(self, sequence: Sequence) -> None:
        """Take a sequence out of everything, and scrub its state."""
        if self._compiling.pop(sequence.request_id, None) is None:
            self.scheduler.remove(sequence)
        self.memory.release(sequence)
        self.runner.forget()
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request_id]
