"""A step of the whole network on a GPU: decode as one CUDA graph, prompts as another behind it.

A sequence's tokens run through one path while they are its prompt's and through another once the model has chosen them,
whatever else is in the batch; prompts are cut at multiples of C only. So a token's bits depend on its own sequence
alone, although the two paths round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lattice_serve.kernels.decoder.triton_network import TritonNetwork
from lattice_serve.kernels.decoder.triton_prompts import PromptStep
from lattice_serve.kernels.decoder.weights import DecoderWeights
from lattice_serve.kernels.mixers.base import StateLayout
from lattice_serve.kernels.mixers.chunks import DeviceSegments
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.triton.graph import Graph
from lattice_serve.kernels.triton.upload import pinned, upload

_LEAST_CAPTURED, _MOST_CAPTURED = 64, 8192
"""Tokens of prompts that graphs are captured for: for more, the device takes longer than the host for the launches."""


def ladder(most: int) -> list[int]:
    """Rows that graphs are captured for: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and `most`.

    Rows that fill up to the next of them cost little: the mixer leaves them out, and tiles of products are taller.
    """
    return sorted({size for n in range(most.bit_length()) for size in (1 << n, 3 << n) if size < most} | {most})


class TritonDecoder:
    """The network of `weights` on the device of the state pool."""

    def __init__(
        self,
        weights: DecoderWeights,
        layout: StateLayout,
        pool: Tensor,
        *,
        max_tokens: int,
        quantization: Literal["int8"] | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """pool: [rows, row_size], the state rows; they are read and written in place, always.

        quantization, gather: as `TritonNetwork`. On a GPU steps are captured here, for every size of the `ladder`.
        """
        self._network = TritonNetwork(weights, layout, pool, quantization=quantization, gather=gather)
        self._pool, self._row_size, self._max_tokens = pool, layout.row_size, max_tokens
        self.multiple = layout.chunk_size
        """A prompt is cut into segments at multiples of so many tokens."""
        on_gpu = pool.device.type == "cuda"
        self.arithmetic = torch.cuda.get_device_name(pool.device) if on_gpu else "Triton's interpreter"
        """What bits depend on, beside weights and tokens."""
        self.name = f"{self.arithmetic}, CUDA graphs" if on_gpu else self.arithmetic
        self._sizes = ladder(len(pool))
        most = self._sizes[-1]
        self._inputs = torch.zeros(3 * most, dtype=torch.int64, device=pool.device)
        self._logits = torch.zeros(most, self._network.vocab_size, dtype=torch.float32, device=pool.device)
        self._decode: dict[int, Callable[[], object]] = {n: self._decoding(n) for n in self._sizes}
        self._prompts: list[PromptStep] = []
        if on_gpu:
            memory, prompts = torch.cuda.graph_pool_handle(), self._prompt_steps()
            with torch.inference_mode():
                for n in reversed(self._sizes):
                    self._fill([], [], [], n)
                    self._decode[n] = Graph(self._decode[n], memory)
                self._check_sizes()
                self._compile_prefill()
                for step in reversed(prompts):
                    step.capture(memory)
            self._prompts = prompts

    def __call__(
        self, ids: Sequence[int], segments: Segments, wanted: Sequence[int], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """ids: the tokens of all segments; wanted: places among them, those of decode first -> logits [len(wanted), V];
        hidden: places in prompts -> final hidden states [len(hidden), hidden_size], both float32.

        They are good until the next call. State rows move on by their segments. Returns before the device is through.
        Raises ValueError for what does not fit; nothing has happened then.
        """
        V, M, n = self._network.vocab_size, len(ids), segments.decodes
        if not 0 < M == segments.starts[-1] <= self._max_tokens or max(ids) >= V or min(ids) < 0:
            raise ValueError(f"ids: give 1 to {self._max_tokens} ids below {V}, as many as segments have")
        if wanted and not (min(wanted) >= 0 and max(wanted) < M):
            raise ValueError(f"wanted: give places below {M}")
        if hidden and not (min(hidden) >= n and max(hidden) < M):
            raise ValueError(f"hidden: give places from {n} to {M - 1}, of tokens of prompts")
        if segments.starts[n] != n:
            raise ValueError("segments: give decode one token each")
        decoded, asked = [place for place in wanted if place < n], [place - n for place in wanted if place >= n]
        if [*decoded, *(place + n for place in asked)] != list(wanted):
            raise ValueError("wanted: give the places of decode before those of prompts")
        segments.check(self._pool, self._row_size)
        if n:
            size = next(size for size in self._sizes if size >= n)
            self._fill(ids[:n], segments.rows[:n].tolist(), segments.positions[:n].tolist(), size)
            self._decode[size]()
        logits = self._logits[: len(decoded)]
        if decoded != list(range(len(decoded))):
            logits = self._logits[self._upload(decoded)]
        if n == M:
            return logits, self._logits.new_empty(0, self._network.hidden_size)
        states = self._prefill(ids[n:], segments.prompts)
        prefilled = self._network.logits(self._chosen(states, asked))
        asked_for = self._chosen(states, [place - n for place in hidden]).float()
        return torch.cat((logits, prefilled)) if decoded else prefilled, asked_for

    def _prefill(self, ids: Sequence[int], segments: Segments) -> Tensor:
        """Final hidden states [T, hidden_size] of prompts."""
        step = next((step for step in self._prompts if step.holds(segments)), None)
        if step:
            return step(ids, segments)
        return self._network.prefill(self._upload(ids), DeviceSegments.of(segments, self.multiple, self._pool.device))

    def _check_sizes(self) -> None:
        """Raises RuntimeError unless a token has the same bits in graphs of every size, whose tiles differ."""
        rows = []
        for n in self._sizes:
            self._fill([1] * n, [-1] * n, [0] * n, n)
            self._decode[n]()
            rows.append(self._logits[0].clone())
        if not all(torch.equal(row, rows[0]) for row in rows):
            raise RuntimeError(
                f"{self.name}: a token has other bits in a large batch than in a small one: please report it with the "
                "device's name; in kernels/linear/tiles.py it needs one shape of tiles for decode"
            )

    def _prompt_steps(self) -> list[PromptStep]:
        sizes = [n for n in ladder(min(self._max_tokens, _MOST_CAPTURED)) if n >= _LEAST_CAPTURED]
        return [PromptStep(self._network, n, self.multiple, self._pool.device) for n in sizes or [self._max_tokens]]

    def _compile_prefill(self) -> None:
        """Tiles differ by the number of tokens: no prompt is to wait for a compiler."""
        kept, tokens = self._pool[0].clone(), 0
        while tokens < self._max_tokens:
            tokens = min(max(1, 2 * tokens), self._max_tokens)
            states = self._prefill([0] * tokens, Segments.of([(0, 0, tokens)]))
            self._network.logits(states[:1])
        self._pool[0].copy_(kept)

    def _decoding(self, size: int) -> Callable[[], object]:
        ids, rows, positions = self._inputs[: 3 * size].view(3, size)
        return lambda: self._network.decode(ids, rows, positions, self._logits[:size])

    def _fill(self, ids: Sequence[int], rows: list[int], positions: list[int], size: int) -> None:
        """Inputs of decode, filled up to `size` with rows of none."""
        missing = size - len(ids)
        columns = [*ids, *[0] * missing, *rows, *[-1] * missing, *positions, *[0] * missing]
        inputs = pinned(torch.tensor(columns, dtype=torch.int64), self._pool.device)
        self._inputs[: 3 * size].copy_(inputs, non_blocking=True)

    def _chosen(self, states: Tensor, places: Sequence[int]) -> Tensor:
        return states[self._upload(places)] if places else states[:0]

    def _upload(self, values: Sequence[int]) -> Tensor:
        return upload(torch.tensor(values, dtype=torch.int64), self._pool.device)
