"""Runs the model over one step: tokens in, next tokens out, states updated in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lattice_serve.engine.backend import Backend
from lattice_serve.engine.errors import LatticeError, NumericalError
from lattice_serve.engine.sampler import Sampled, SampleRow, prompt_logprobs, sample, start
from lattice_serve.engine.scarcity import reported
from lattice_serve.engine.scheduler import Piece
from lattice_serve.kernels.mixers.segments import Segments

_NOTHING = slice(0, 0)


@dataclass(slots=True, eq=False)
class StepResult:
    """What came out for one piece of a step."""

    piece: Piece
    sampled: list[Sampled]
    """The next token, where the piece ends in a choice, and those after it as far as the draft was right."""
    error: LatticeError | None = None
    logits: Tensor | None = None
    """[V] that the first token of an answer was chosen from; good until the next step."""


class Runner:
    def __init__(self, backend: Backend, device: torch.device) -> None:
        """device: where the backend's tensors are, and tokens are chosen."""
        self.backend, self._device = backend, device
        self._plan: _Plan | None = None
        """Of the last step, as long as all that it ran may go on."""

    @torch.inference_mode()
    def launch(self, pieces: Sequence[Piece]) -> Running:
        """Begin a forward pass over `pieces`, whose sequences hold rows. On a GPU it runs while this returns.

        The same list as the last time is the same pieces moved on: see `Scheduler.schedule`.
        """
        plan = self._plan
        if plan is not None and pieces is plan.pieces:
            plan.move_on()
        else:
            plan = self._plan = _Plan(pieces)
        logits = hidden = torch.empty(0, device=self._device)
        if plan.segments is not None:
            logits, hidden = self.backend(plan.ids, plan.segments, plan.wanted, plan.pooled)
        return Running(plan, logits, hidden)

    def forget(self) -> None:
        """A sequence has ended: hold nothing of it."""
        self._plan = None


class Running:
    """A step that the device has been given."""

    def __init__(self, plan: _Plan, logits: Tensor, hidden: Tensor) -> None:
        self._plan, self._logits, self._hidden = plan, logits, hidden
        self._chosen: Tensor | None = None
        """[B, V] that tokens are chosen from; None where there was no memory for it."""
        self._sampled: Callable[[], list[Sampled]]
        self._failed: dict[int, LatticeError] = {}
        """By the place among those sampled, which has no token then."""
        try:
            self._chosen = plan.chosen(logits)
            self._sampled = start(self._chosen, plan.rows)
        except (MemoryError, RuntimeError) as error:
            reported(error)
            self._chosen, self._sampled = None, self._each_alone

    @property
    def tokens(self) -> int:
        return len(self._plan.ids)

    @torch.inference_mode()
    def results(self) -> list[StepResult]:
        """Wait for it; advances what its sequences have computed and scored. To be called once, before the next."""
        try:
            sampled = self._sampled()
        except (MemoryError, RuntimeError) as failure:
            reported(failure)
            sampled = self._each_alone()
        results = []
        first = 0
        for part in self._plan.parts:
            piece = part.piece
            choices = sampled[first : first + part.choices]
            error: LatticeError | None = None
            try:
                if part.gives:
                    part.take(self._logits, self._hidden)
                if choices and not choices[0].finite:
                    raise self._failed.get(first) or NumericalError(
                        "the model's output for this request is not finite: its state was discarded"
                    )
            except (LatticeError, MemoryError, RuntimeError) as failure:
                error = reported(failure)
            piece.sequence.computed = piece.end
            row = self._chosen[first] if choices and piece.ends_prompt and self._chosen is not None else None
            first += part.choices
            right = choices if error is None and not piece.draft else list(_right(choices, piece.draft))
            results.append(StepResult(piece, right, error, row))
        return results

    def _each_alone(self) -> list[Sampled]:
        """Choose for one after another: it takes less memory, and where there is not enough for one it fails alone."""
        sampled = []
        for place, row in enumerate(self._plan.rows):
            try:
                sampled += sample(self._plan.chosen_one(place, self._logits), [row])
            except (MemoryError, RuntimeError) as error:
                self._failed[place] = reported(error)
                sampled.append(Sampled(0, None, False))
        return sampled


@dataclass(slots=True, eq=False)
class _Part:
    """Where in a step to find what one piece asks for."""

    piece: Piece
    choices: int
    scored: slice
    pooled: slice

    @property
    def gives(self) -> bool:
        """Whether there is anything to `take`."""
        sequence = self.piece.sequence
        return sequence.prompt_logprobs is not None or sequence.pooled is not None

    def take(self, logits: Tensor, hidden: Tensor) -> None:
        """Give its sequence what was asked of the prompt. Raises `NumericalError` where that is not finite."""
        sequence = self.piece.sequence
        if sequence.prompt_logprobs is not None and (targets := self.piece.scored):
            k = sequence.params.prompt_logprobs or 0
            sequence.prompt_logprobs += prompt_logprobs(logits[self.scored], targets, k)
        if sequence.pooled is not None:
            sequence.pooled.add(hidden[self.pooled])


class _Plan:
    """A step as the backend takes it."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.ids: list[int] = []
        self._segments: list[tuple[int, int, int]] = []
        self._decodes = 0
        """How many of them, the first ones, are of decode."""
        self.wanted: list[int] = []
        """Tokens whose logits are wanted, by their places."""
        self.pooled: list[int] = []
        """Tokens whose hidden states are."""
        self.rows: list[SampleRow] = []
        """What is to be chosen."""
        self._chosen: list[int | Tensor] = []
        """From which logits: a place among those wanted, or what a sequence came with."""
        self.parts = [self._add(piece) for piece in pieces]
        self.segments = Segments.of(self._segments, self._decodes) if self._segments else None

    def move_on(self) -> None:
        """To the next token of each piece, all of which `goes_on`."""
        assert self.segments is not None
        self.ids = [piece.sequence.output_ids[-1] for piece in self.pieces]
        self.segments = self.segments.moved_on()

    def _add(self, piece: Piece) -> _Part:
        sequence = piece.sequence
        assert sequence.row is not None, "a sequence runs without a state row"
        begin, scored, pooled = len(self.ids), len(self.wanted), len(self.pooled)
        if piece.next_alone:
            self.ids.append(sequence.output_ids[-1])
            self._segments.append((sequence.row, piece.start, 1))
            self._decodes += 1
            self._chosen.append(scored)
            self.wanted.append(begin)
            self.rows.append(sequence.sample_row)
            return _Part(piece, 1, _NOTHING, _NOTHING)
        if piece.tokens:
            self.ids += [*sequence.tokens(piece.start, piece.end), *piece.draft]
            self._segments.append((sequence.row, piece.start, piece.tokens))
            self._decodes += piece.decodes
        end = begin + piece.end - piece.start
        self.wanted += range(begin, begin + len(piece.scored))
        if sequence.pooled is not None and not sequence.output_ids:
            self.pooled += sequence.pooled.places(begin, end, piece.ends_prompt)
        choices = 1 + len(piece.draft) if piece.samples else 0
        for ahead in range(choices):
            index = sequence.sample_row.index + ahead
            self.rows.append(replace(sequence.sample_row, index=index) if ahead else sequence.sample_row)
            if sequence.recalled is not None and sequence.recalled.logits is not None:
                self._chosen.append(sequence.recalled.logits)
                sequence.recalled = None
            else:
                self._chosen.append(len(self.wanted))
                self.wanted.append(end - 1 + ahead)
        return _Part(piece, choices, slice(scored, scored + len(piece.scored)), slice(pooled, len(self.pooled)))

    def chosen(self, logits: Tensor) -> Tensor:
        """[B, V] for `rows`, from the logits of what was wanted."""
        places = [place for place in self._chosen if isinstance(place, int)]
        if len(places) == len(self._chosen) == len(self.wanted):
            return logits
        if len(places) == len(self._chosen):
            return logits[places]
        return torch.cat([self.chosen_one(place, logits) for place in range(len(self._chosen))])

    def chosen_one(self, place: int, logits: Tensor) -> Tensor:
        """[1, V] for the row of that place."""
        chosen = self._chosen[place]
        return (logits[chosen] if isinstance(chosen, int) else chosen.to(logits.device))[None]


def _right(choices: list[Sampled], draft: tuple[int, ...]) -> Iterator[Sampled]:
    """The choices that were made from what is true: up to the first that is not what the draft went on with."""
    for place, choice in enumerate(choices):
        if not choice.finite:
            return
        yield choice
        if place < len(draft) and choice.token_id != draft[place]:
            return
