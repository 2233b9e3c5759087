"""Completions: prompts become sequences, and what the engine says of them becomes the choices of an answer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from lattice_serve.engine.detokenizer import Detokenizer
from lattice_serve.engine.messages import TokenLogprob, TokenOutput
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server import memory
from lattice_serve.server.answer import LOWEST_LOGPROB, Answer, check
from lattice_serve.server.joined import AnswerSize, JsonList, JsonText
from lattice_serve.server.schemas.completions import Choice, Completion, CompletionRequest, Logprobs, PromptLogprob
from lattice_serve.server.services import Services, one_by_one

_SCORE_BYTES, _PROMPT_SCORE_BYTES = 8, 40
"""That a log-probability takes in an answer, at least."""


class CompletionAnswer(Answer[CompletionRequest, Choice]):
    id_prefix = "cmpl"
    whole_type = chunk_type = Completion

    def __init__(self, services: Services, request: CompletionRequest, prompts: list[_Prompt]) -> None:
        params = [request.sampling(candidate) for candidate in range(request.candidates)]
        super().__init__(services, request, [prompt.ids for prompt in prompts], params)
        self._candidates = [
            _Candidate(index, prompts[index // request.candidates], request, services.tokenizer)
            for index in range(len(prompts) * request.candidates)
        ]

    @classmethod
    async def prepare(cls, services: Services, request: CompletionRequest, tenant: str) -> CompletionAnswer:
        check(services, request)
        services.admit(tenant, len(request.prompts) * request.candidates)
        prompts = [await _read(services, request, prompt) async for prompt in one_by_one(request.prompts)]
        return cls(services, request, prompts)

    def parts(self, index: int, output: TokenOutput) -> list[Choice]:
        candidate = self._candidates[index]
        return [candidate.part(output)] if output.token_id is not None or candidate.tells(output) else []

    @property
    def longest_param(self) -> str:
        fields = ("prompt_logprobs", "logprobs")
        asked = [name for name in fields if getattr(self._request, name) is not None]
        return asked[0] if asked else super().longest_param

    async def whole(self, salt: str) -> bytes:
        # Before a long prompt is run for nothing.
        request = self._request
        scores = 0 if request.prompt_logprobs is None else _PROMPT_SCORE_BYTES * (request.prompt_logprobs or 1)
        scores += 0 if request.logprobs is None or not request.echo else _SCORE_BYTES * (request.logprobs + 1)
        AnswerSize(self.longest_param).check(scores * request.choices * sum(map(len, self._prompts)))
        return await super().whole(salt)

    def keep(self, index: int, choice: Choice) -> int:
        return self._candidates[index].keep(choice)

    def joined(self) -> list[Choice]:
        """Of each prompt's candidates the `n` that are most likely, by the mean of their tokens' log-probabilities."""
        candidates, n = self._request.candidates, self._request.choices
        chosen: list[int] = []
        for start in range(0, len(self._candidates), candidates):
            indices = list(range(start, start + candidates))
            if candidates > n:
                indices.sort(key=lambda index: self._candidates[index].mean_logprob, reverse=True)
            chosen += indices[:n]
        return [self._candidates[candidate].joined(index) for index, candidate in enumerate(chosen)]


@dataclass(frozen=True)
class _Prompt:
    ids: array[int]
    text: str
    """Empty where it was given as ids and is not echoed."""


class _Candidate:
    """One choice as it grows."""

    def __init__(self, index: int, prompt: _Prompt, request: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._prompt = prompt
        self._request = request
        self._echo = prompt.text if request.echo else ""
        self._scored = 0
        """Prompt tokens whose log-probabilities have come."""
        self._answers = False
        """Whether all that belongs to the prompt has come."""
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.token_bytes)
        self._offset = 0
        """Characters before the next token."""
        self._tokens = 0
        self._logprob = 0.0
        self._text = JsonText()
        self._logprobs = Logprobs(*(JsonList() for _ in Logprobs.__struct_fields__))  # type: ignore[arg-type]
        self._prompt_logprobs = JsonList()
        self._last: Choice | None = None

    @property
    def mean_logprob(self) -> float:
        return self._logprob / max(1, self._tokens)

    def tells(self, output: TokenOutput) -> bool:
        """Whether an output without a token adds anything."""
        asked = self._request.prompt_logprobs is not None or (self._request.echo and self._request.logprobs is not None)
        return output.finish_reason is not None or bool(asked)

    def part(self, output: TokenOutput) -> Choice:
        """What `output` adds; the first part also has the prompt if it is echoed."""
        logprobs = None if self._request.logprobs is None else Logprobs()
        text, self._echo = self._echo + output.text, ""
        if self._request.echo and not self._answers:
            if logprobs is not None:
                self._add_prompt(logprobs, output.prompt_logprobs or [])
            if output.token_id is not None:
                self._answers = True
                self._detokenizer = Detokenizer(self._tokenizer.token_bytes)
                self._offset = len(self._prompt.text)
        if output.logprob is not None:
            self._tokens += 1
            self._logprob += max(output.logprob.logprob, LOWEST_LOGPROB)
            if logprobs is not None:
                self._add(logprobs, output.logprob.token_id, output.logprob)
        choice = Choice(self._index, text, logprobs, output.finish_reason, output.stop_reason)
        if self._request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice.prompt_logprobs = self._scores(output.prompt_logprobs, self._request.prompt_logprobs)
        return choice

    def keep(self, part: Choice) -> int:
        """Hold a part of a whole answer; how many bytes it takes."""
        self._last = part
        size = self._text.add(part.text)
        if part.logprobs is not None:
            for name in Logprobs.__struct_fields__:
                size += getattr(self._logprobs, name).add(getattr(part.logprobs, name))
        if part.prompt_logprobs is not msgspec.UNSET:
            size += self._prompt_logprobs.add(part.prompt_logprobs)
        return size

    def joined(self, index: int) -> Choice:
        """What was kept, as choice `index`."""
        assert self._last is not None, "an answer has a part"
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = Logprobs(*(getattr(self._logprobs, name).json for name in Logprobs.__struct_fields__))
        scores = msgspec.UNSET if self._request.prompt_logprobs is None else self._prompt_logprobs.json
        changes = {"text": self._text.json, "logprobs": logprobs, "prompt_logprobs": scores}
        return msgspec.structs.replace(self._last, index=index, **changes)

    def _add_prompt(self, logprobs: Logprobs, entries: Sequence[TokenLogprob | None]) -> None:
        start, self._scored = self._scored, self._scored + len(entries)
        for token_id, entry in zip(self._prompt.ids[start : self._scored], entries, strict=True):
            self._add(logprobs, token_id, entry)

    def _add(self, logprobs: Logprobs, token_id: int, entry: TokenLogprob | None) -> None:
        name = self._tokenizer.token_text
        logprobs.tokens.append(name(token_id))
        logprobs.text_offset.append(self._offset)
        # Not the length of its name: a token may be a part of a character, or no text.
        text, _ = self._detokenizer.push(token_id)
        self._offset += len(text)
        if entry is None:
            logprobs.token_logprobs.append(None)
            logprobs.top_logprobs.append(None)
            return
        # Two tokens can have one text: the more likely one keeps it.
        top: dict[str, float] = {}
        for other_id, logprob in (*entry.top[: self._request.logprobs], (token_id, entry.logprob)):
            top.setdefault(name(other_id), max(logprob, LOWEST_LOGPROB))
        logprobs.token_logprobs.append(max(entry.logprob, LOWEST_LOGPROB))
        logprobs.top_logprobs.append(top)

    def _scores(self, entries: Sequence[TokenLogprob | None], count: int) -> list[dict[int, PromptLogprob] | None]:
        scores: list[dict[int, PromptLogprob] | None] = []
        for entry in entries:
            if entry is None:
                scores.append(None)
                continue
            ranks: dict[int, tuple[float, int | None]] = {entry.token_id: (entry.logprob, None)}
            for rank, (token_id, logprob) in enumerate(entry.top[:count], 1):
                ranks[token_id] = (logprob, rank)
            scores.append(
                {
                    token_id: PromptLogprob(max(logprob, LOWEST_LOGPROB), rank, self._tokenizer.token_text(token_id))
                    for token_id, (logprob, rank) in ranks.items()
                }
            )
        return scores


async def _read(services: Services, request: CompletionRequest, prompt: str | list[int]) -> _Prompt:
    """Raises `InvalidParameter` when an id is not in the vocabulary."""
    if isinstance(prompt, str):
        return _Prompt(await services.encode(prompt), prompt)
    ids = Tokenizer.checked(prompt, services.tokenizer.vocab_size)
    text = await services.decode(ids) if request.echo else ""
    memory.current().hold(len(text))
    return _Prompt(ids, text)
