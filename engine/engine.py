"""The engine: requests in, tokens out, one step at a time. One model, one device, one thread."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch

from lattice_serve.engine.assembly import assemble
from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.detokenizer import Detokenizer
from lattice_serve.engine.drafter import Drafter
from lattice_serve.engine.errors import InvalidParameter, LatticeError, NumericalError, OutOfMemory
from lattice_serve.engine.grammar import Grammars
from lattice_serve.engine.grammar_queue import GrammarQueue
from lattice_serve.engine.grammar_steps import GrammarSteps
from lattice_serve.engine.memory import Memory
from lattice_serve.engine.messages import EngineStats, Ready, RequestFailed, StepOutputs, Submit
from lattice_serve.engine.models.registry import load_config
from lattice_serve.engine.pace import Pace
from lattice_serve.engine.pooled import Pooled
from lattice_serve.engine.prefix_cache import PrefixCache, cache_budgets
from lattice_serve.engine.processors import available_cpus
from lattice_serve.engine.runner import Runner, Running
from lattice_serve.engine.sampler import Sampled, SampleRow, TokenCounts, penalised
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.scarcity import reported
from lattice_serve.engine.scheduler import Scheduler
from lattice_serve.engine.sequence import Sequence, Status
from lattice_serve.engine.shares import Shares
from lattice_serve.engine.taken import Taken
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.engine.weights import pick_dtype


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
        model_config = load_config(config.model)
        self.tokenizer = model_config.tokenizer.load(config.model, model_config.vocab_size)
        dtype = pick_dtype(config.dtype, model_config)
        self.model, self.pool, self.workers, backend = assemble(
            config, model_config, dtype, threads, progress=progress, beside=beside
        )
        self.runner = Runner(backend, self.pool.memory.device)
        self._overlaps = self.pool.memory.device.type == "cuda"
        """Whether a step runs on while `launch` returns."""
        self.shares = Shares()
        self.scheduler = Scheduler(
            rows=self.pool.rows,
            max_step_tokens=config.max_step_tokens,
            max_waiting=config.max_waiting,
            multiple=backend.multiple,
            shares=self.shares,
            fair_rows=config.priority_scope == "key",
        )
        self.cache = PrefixCache(cache_budgets(config), backend.multiple, self.shares)
        self.memory = Memory(self.pool, self.cache, backend.multiple)
        self._pace = Pace(config.step_seconds, config.max_step_tokens)
        self.grammars = Grammars(config.model, self.tokenizer, self.shares)
        self._eos = model_config.eos_token_id
        # Not a method of this object: an engine that holds itself would outlive who drops it, and its workers with it.
        self.grammar_queue = GrammarQueue(self.grammars, partial(_ends, self._eos))
        self.grammar_steps = GrammarSteps(self.shares)
        self._sequences: dict[str, Sequence] = {}
        self._running: Running | None = None
        self._began = 0.0
        self._taken: list[Taken] = []
        self._failures: list[RequestFailed] = []
        """Collected, and not emitted yet."""
        self._seeds = random.Random(os.urandom(16))
        self._prompt_tokens = self._generated = self._steps = self._step_tokens = self._drafted = self._accepted = 0
        self._warm_up()
        self.info = Ready(
            model_name=Path(config.model).resolve().name,
            pid=os.getpid(),
            rows=self.pool.rows,
            bytes_per_row=self.pool.row_bytes * config.tensor_parallel_size,
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
        """Queue a request. Raises `InvalidParameter`, `Overloaded` or `OutOfMemory`; then nothing was queued."""
        try:
            self._submit(request)
        except (MemoryError, RuntimeError) as error:
            self.grammar_queue.remove(request.request_id)
            raise self._scarce(error) from error

    def _submit(self, request: Submit) -> None:
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
                forbidden=_stops(self._eos, params) if params.min_tokens else (),
            ),
            detokenizer=Detokenizer(self.tokenizer.token_bytes, params.stop, params.include_stop, params.min_tokens),
            pooled=None if request.pooling is None else Pooled(request.pooling),
        )
        self.shares.weigh(request.tenant, request.weight)
        self.memory.mark(sequence, request.cache_points)
        if params.grammar is not None:
            self.grammar_queue.add(sequence)
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

    def credit(self, request_id: str, size: int) -> None:
        """Outputs of a sequence, of that size together, were taken; an unknown one has ended meanwhile."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.scheduler.credit(sequence, size)

    @property
    def has_work(self) -> bool:
        """Whether there is a step to run, or something to emit."""
        return bool(self._taken or self._failures or self.grammar_queue) or self.scheduler.active

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
        for sequence, error in self.grammar_queue.hand_over(self.scheduler):
            self._fail(sequence, self._scarce(error))
        for pending in self.grammar_steps.finished():
            self.scheduler.resume(pending.sequence)
            self._accept(pending.sequence, [pending.sampled], pending.done)
        for sequence in self.memory.move(self.scheduler.assign(), self.scheduler.running):
            self._fail(sequence, reported(MemoryError()))
        decoding = self.scheduler.decoding
        pieces = self.scheduler.schedule(self._pace.tokens(decoding), self._pace.kept_tokens(decoding))
        self.memory.hold(pieces)
        self._began = time.monotonic()
        try:
            self._running = self.runner.launch(pieces) if pieces else None
        except (MemoryError, RuntimeError) as error:
            for piece in pieces:
                self._fail(piece.sequence, self._scarce(error))
        if not pieces:
            self.grammar_steps.wait()
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
                numerical = isinstance(result.error, NumericalError)
                if not numerical or not self.memory.distrust(sequence):
                    self._fail(sequence, result.error)
                continue
            if piece.draft:
                self._drafted += len(piece.draft)
                self._accepted += len(result.sampled) - 1
                self.memory.settle(piece, len(result.sampled) - 1)
            if not piece.decodes and piece.keeps:
                self._pace.record_kept(self.memory.keep_prompt(piece, result.logits))
            if not result.sampled:
                self._take_scores(sequence)
            self._accept(sequence, result.sampled)

    def emit(self) -> StepOutputs:
        """What has been collected and not been emitted yet."""
        taken, self._taken = self._taken, []
        outputs = []
        for each in taken:
            try:
                outputs.append(each.output())
            except (MemoryError, RuntimeError) as error:
                self._fail(each.sequence, self._scarce(error))
        failures, self._failures = self._failures, []
        return StepOutputs(outputs=outputs, failures=failures, stats=self.stats())

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
            waiting=len(waiting) + len(self.grammar_queue),
            rows=self.pool.rows,
            rows_used=self.memory.used,
            paused=len(self.scheduler.paused),
            preempted=sum(each.status is Status.PARKED for each in (*waiting, *self.scheduler.paused.values())),
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

    def _warm_up(self) -> None:
        """Compile what compiles at its first call, on a row that is then scrubbed: no request waits for it."""
        params = SamplingParams(max_tokens=1, temperature=0)
        self.submit(Submit("warm-up", Tokenizer.checked([0, 0], self.model.config.vocab_size), params))
        while self.has_work:
            self.step()
        self._prompt_tokens = self._generated = self._steps = self._step_tokens = 0
        self.memory.clear()

    def _accept(self, sequence: Sequence, sampled: list[Sampled], pushed: Future[None] | None = None) -> None:
        """Take sampled tokens into their sequence, up to one that ends it. pushed: into its grammar already, when done.

        It fails where its grammar is too complex to go on with, or there is no memory for it.
        """
        try:
            for each in sampled:
                if pushed is not None:
                    pushed.result()
                elif not self.grammar_steps.push(sequence, each):
                    self.scheduler.hold(sequence)
                    return
                self._advance(sequence, each)
                if sequence.finish_reason is not None:
                    return
        except InvalidParameter as error:
            assert sequence.params.grammar is not None
            self.grammars.discard(sequence.params.grammar, sequence.cache_salt)
            self._fail(sequence, error)
        except (MemoryError, RuntimeError) as error:
            self._fail(sequence, self._scarce(error))

    def _advance(self, sequence: Sequence, sampled: Sampled) -> None:
        """Take a token, which its grammar has taken in, into its sequence, and end that where it should."""
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
            if sequence.row is not None:  # it may have been parked while its grammar took the token in
                self.memory.keep_answer(sequence)
            self._finish(sequence)
        else:
            self.scheduler.debit(sequence, taken.size)

    def _scarce(self, error: Exception) -> LatticeError:
        """What to tell of an error that a request has met; where it is of memory, the cache gives up its own."""
        known = reported(error)
        if isinstance(known, OutOfMemory):
            self.memory.give_way()
        return known

    def _fail(self, sequence: Sequence, error: LatticeError) -> None:
        if sequence.status is not Status.FINISHED:
            self._finish(sequence)
        self._failures.append(RequestFailed.of(sequence.request_id, error))

    def _finish(self, sequence: Sequence) -> None:
        """Take a sequence out of everything, and scrub its state."""
        self.grammar_steps.drop(sequence.request_id)
        if not self.grammar_queue.remove(sequence.request_id):
            self.scheduler.remove(sequence)
        self.memory.release(sequence)
        self.runner.forget()
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request_id]


def _stops(eos: int | None, params: SamplingParams) -> tuple[int, ...]:
    """Returns the stop tokens of a request, and the end of text."""
    return params.stop_token_ids if eos is None else (*params.stop_token_ids, eos)


def _ends(eos: int | None, params: SamplingParams) -> tuple[int, ...]:
    """Returns the tokens that end an answer."""
    return params.stop_token_ids if params.ignore_eos else _stops(eos, params)
