"""A token that a sequence has taken, on its way to who asked for it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec

from lattice_serve.engine.messages import FinishReason, TokenLogprob, TokenOutput, output_size
from lattice_serve.engine.sampler import Sampled
from lattice_serve.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Taken:
    """What is known when the next step may begin; the text, if that does not depend on it, is made later."""

    sequence: Sequence
    sampled: Sampled | None
    """None: no token, see `TokenOutput`."""
    text: str | None = None
    """None: the detokenizer has yet to see the token."""
    stop_reason: int | str | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def size(self) -> int:
        """That of the message."""
        return output_size(None if self.sampled is None else self.sampled.logprob, self.prompt_logprobs)

    def output(self) -> TokenOutput:
        """The message. To be called once, in the order of the tokens."""
        sequence, sampled, text = self.sequence, self.sampled, self.text
        token_id = None if sampled is None else sampled.token_id
        if text is None:
            assert token_id is not None
            text, _ = sequence.detokenizer.push(token_id)
        if self.finish_reason is not None and not isinstance(self.stop_reason, str):
            rest, stop = sequence.detokenizer.flush()
            text += rest
            if stop is not None:  # complete with the character that is not
                self.finish_reason, self.stop_reason = "stop", stop
        output = TokenOutput(
            request_id=sequence.request_id,
            token_id=token_id,
            text=text,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprob=None if sampled is None else sampled.logprob,
            prompt_logprobs=self.prompt_logprobs,
        )
        if sequence.emitted or (sampled is None and self.finish_reason is None):
            return output
        sequence.emitted = True
        started = sequence.started or sequence.arrived
        return msgspec.structs.replace(
            output,
            cached_tokens=sequence.cached_tokens,
            embedding=None if sequence.pooled is None else sequence.pooled.result(),
            queue_seconds=started - sequence.arrived,
            prefill_seconds=time.monotonic() - started,
        )
