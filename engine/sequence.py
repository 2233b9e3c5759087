"""One sequence in the engine: what was asked, how far it is, and what has come out."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from lattice_serve.engine.messages import FinishReason, Submit, TokenLogprob
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.shares import salted

if TYPE_CHECKING:
    from lattice_serve.engine.detokenizer import Detokenizer
    from lattice_serve.engine.drafter import Drafter
    from lattice_serve.engine.pooled import Pooled
    from lattice_serve.engine.sampler import SampleRow
    from lattice_serve.engine.state_pool import ParkedState
    from lattice_serve.engine.tier import Snapshot


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    """Waiting for a row with its state in host memory."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned by the engine; the scheduler moves it between its queues."""

    request_id: str
    prompt_ids: array[int]
    """As C integers: a prompt may have millions of tokens, and so may an answer."""
    params: SamplingParams
    priority: int
    arrived: float
    """Monotonic seconds."""
    sample_row: SampleRow
    detokenizer: Detokenizer
    status: Status = Status.WAITING
    computed: int = 0
    """Tokens of prompt and answer that its state has seen."""
    row: int | None = None
    """State row, while RUNNING."""
    parked: ParkedState | None = None
    deadline: int = 0
    """Step before which the scheduler would like to run it; earlier goes first."""
    ticket: int = 0
    """Order of arrival, which parts equal deadlines."""
    output_ids: array[int] = field(default_factory=lambda: array("i"))
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """Where they are asked for: those of the prompt tokens that have run, and have not been sent yet."""
    window: int | None = None
    """Size of outputs that it may yet send; None: any."""
    paused: bool = False
    """Whether it waits until outputs are taken."""
    pooled: Pooled | None = None
    """Of its prompt's hidden states, where they are asked for."""
    cache_salt: str = ""
    """As `engine.shares.salted` makes it."""
    tenant: str = ""
    """Whose share of rows it takes from."""
    marks: list[int] = field(default_factory=list)
    """Places in the prompt where its state is to be kept: no piece goes beyond the next one."""
    leader: Sequence | None = None
    """A running sequence with the same prompt, whose state at the prompt's end this one waits for."""
    cached_tokens: int = 0
    """Tokens whose state was not computed for it."""
    drafter: Drafter | None = None
    known: Snapshot | None = None
    """The last of its states that the cache was found to have, or was given."""
    recalled: Snapshot | None = None
    """A state of the whole prompt with the logits of its last token: the next one is chosen without running any."""
    started: float | None = None
    """Monotonic seconds of its first step."""
    finish_reason: FinishReason | None = None
    emitted: bool = False
    """Whether its first token has been sent."""

    @classmethod
    def of(
        cls,
        request: Submit,
        *,
        arrived: float,
        sample_row: SampleRow,
        detokenizer: Detokenizer,
        pooled: Pooled | None = None,
    ) -> Sequence:
        scored: list[TokenLogprob | None] | None = None if request.params.prompt_logprobs is None else [None]
        return cls(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            params=request.params,
            priority=request.priority,
            arrived=arrived,
            sample_row=sample_row,
            detokenizer=detokenizer,
            prompt_logprobs=scored,
            pooled=pooled,
            cache_salt=salted(request.tenant, request.cache_salt),
            tenant=request.tenant,
            window=request.window,
        )

    def take_scores(self) -> list[TokenLogprob | None] | None:
        """The log-probabilities of its prompt that are still to be sent, if there are any."""
        if not self.prompt_logprobs:
            return None
        scores, self.prompt_logprobs = self.prompt_logprobs, []
        return scores

    @property
    def needs_every_token(self) -> bool:
        """Whether each token of its prompt has to be run, even if the state behind it is known."""
        return self.prompt_logprobs is not None or self.pooled is not None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def uncomputed(self) -> int:
        """Tokens that its state has yet to see; in decode 1, or more after a wrong draft."""
        return self.length - self.computed

    @property
    def runnable(self) -> int:
        """Tokens of its prompt that may run in one piece."""
        return min([self.uncomputed, *(mark - self.computed for mark in self.marks if mark > self.computed)])

    @property
    def decoding(self) -> bool:
        return self.computed >= len(self.prompt_ids)

    def seen(self, start: int = 0) -> array[int]:
        """Ids of the tokens that its state has seen, from place `start` on."""
        prompt = len(self.prompt_ids)
        answer = self.output_ids[max(0, start - prompt) : max(0, self.computed - prompt)]
        return self.prompt_ids[start : self.computed] + answer

    def tokens(self, start: int, end: int) -> list[int]:
        """Ids at places `start` to `end` of prompt and answer together."""
        prompt = len(self.prompt_ids)
        return [*self.prompt_ids[start:end], *self.output_ids[max(0, start - prompt) : max(0, end - prompt)]]
