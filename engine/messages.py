"""What the server and the engine process say to each other: msgpack, one frame a message.

A frame is a four-byte big-endian length and that many bytes of msgpack. The server connects to the
engine's Unix socket; the engine says `Ready` first. Every `Submit` is answered by `TokenOutput`s (in
`StepOutputs`), the last of which has a `finish_reason`, or by one `RequestFailed`; an aborted request is
answered by nothing more.

Flow control is by credit, as in HTTP/2: a sequence whose outputs are as large as its `window` is paused until
`Credit` says that some of them were taken.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from lattice_serve.engine.errors import LatticeError
from lattice_serve.engine.sampling import SamplingParams

if TYPE_CHECKING:
    TokenIds: TypeAlias = array[int]
else:  # Python 3.11 has no array[int], and msgspec looks at what it says
    TokenIds = array
_OUTPUT_SIZE, _SCORE_SIZE = 256, 96
FinishReason: TypeAlias = Literal["stop", "length"]
Pooling: TypeAlias = Literal["mean", "last"]
"""Of the final hidden states of a prompt's tokens: all of them, or the last."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token and its natural-log probability, with the most likely tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    prompt_ids: TokenIds
    """int32; on the wire as bytes, for a list of a million would hold up other requests while it is read."""
    params: SamplingParams
    priority: int = 0
    """Lower runs first; equal ones in order of arrival."""
    cache_salt: str = ""
    """Only requests of one tenant with the same one may share cached states and compiled grammars."""
    pooling: Pooling | None = None
    """What of its prompt's hidden states to give back, with the first output."""
    cache_points: tuple[int, ...] = ()
    """Numbers of prompt tokens after which to keep the state, beside the places that the cache chooses itself."""
    tenant: str = ""
    """Whose share of everything it takes from: see `engine.shares`."""
    weight: int = 1
    """Of the tenant, in what is shared."""
    window: int | None = None
    """Size of outputs (see `output_size`) that may be on their way; None: any."""
    same_prompt: bool = False
    """On the wire: the prompt is that of the `Submit` before it, and is not sent again."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Have the engine say something as soon as its step is done."""


class Credit(msgspec.Struct, frozen=True, tag=True):
    """Outputs of a sequence, of that `size` together, have been taken."""

    request_id: str
    size: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine has loaded its model and takes requests."""

    model_name: str
    pid: int
    rows: int
    """State rows: sequences that can hold a state on the device at once."""
    bytes_per_row: int
    vocab_size: int
    device: str
    dtype: str
    load_seconds: float


class TokenOutput(msgspec.Struct, frozen=True, tag=True):
    """One generated token. Without one (`token_id` None): more of the prompt's log-probabilities, or the end of a
    request for no tokens."""

    request_id: str
    token_id: int | None
    text: str
    """Text that became final with this token: often empty while a character or a possible stop string
    is unfinished."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended the answer; None at end-of-text."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """Where they were asked for: those of the next prompt tokens, None for the very first. The last of them come with
    the first token."""
    embedding: list[float] | None = None
    """With the first output of a request that asked for it: [hidden_size] float32."""
    cached_tokens: int = 0
    """Prompt tokens whose state was not computed for this request."""
    queue_seconds: float | None = None
    """With the first output: from submission to the first row."""
    prefill_seconds: float | None = None
    """With the first output: from the first row to the first token."""


class RequestFailed(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    error: str
    """Class name in `engine.errors`, e.g. "NumericalError"."""
    message: str
    param: str | None = None

    @classmethod
    def of(cls, request_id: str, error: LatticeError) -> RequestFailed:
        return cls(request_id, type(error).__name__, error.message, error.param)


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges are as of now; `*_total` count since the engine process started."""

    running: int = 0
    waiting: int = 0
    rows: int = 0
    rows_used: int = 0
    paused: int = 0
    """Sequences that wait until their outputs are taken, in rows or parked."""
    preempted: int = 0
    """Sequences whose state is parked in host memory."""
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    step_tokens: int = 0
    """Tokens in the step just run."""
    draft_tokens_total: int = 0
    """Tokens guessed in advance."""
    accepted_tokens_total: int = 0
    """Those of them that were right."""
    cache_entries: int = 0
    cache_bytes: int = 0
    cache_outcomes: dict[str, int] = {}
    """Look-ups in the prefix cache, by how they ended (`engine.prefix_cache.Outcome`)."""


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    outputs: list[TokenOutput]
    failures: list[RequestFailed]
    stats: EngineStats


ToEngine: TypeAlias = Submit | Abort | Ping | Credit
FromEngine: TypeAlias = Ready | StepOutputs


def output_size(logprob: TokenLogprob | None, prompt_logprobs: Sequence[TokenLogprob | None] | None) -> int:
    """About the bytes that an output takes where it waits to be taken: more, the more log-probabilities it has."""
    if logprob is None and not prompt_logprobs:
        return _OUTPUT_SIZE
    scores = [entry for entry in (logprob, *(prompt_logprobs or ())) if entry is not None]
    return _OUTPUT_SIZE + _SCORE_SIZE * (len(scores) + sum(len(entry.top) for entry in scores))


def encode(message: ToEngine | FromEngine) -> bytes:
    """A frame."""
    data = _ENCODER.encode(message)
    return len(data).to_bytes(4, "big") + data


def _packed(value: Any) -> Any:
    if isinstance(value, array):
        return memoryview(value).cast("B")
    raise NotImplementedError(f"{type(value).__name__} is nothing that messages hold")


def _unpacked(kind: Any, value: Any) -> Any:
    if not isinstance(value, bytes):
        raise TypeError(f"token ids come as the bytes of int32, not as {type(value).__name__}")
    return array("i", value)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_packed)
TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(
    Submit | Abort | Ping | Credit, dec_hook=_unpacked
)
FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(Ready | StepOutputs)
"""What is in a frame, behind its length. Both raise `msgspec.MsgspecError` for what is no such message."""
