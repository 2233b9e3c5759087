"""Text files to token arrays, and the order in which training walks through them.

A folder holds `*.txt` or `*.txt.xz` files, documents in them parted by a line `<|endoftext|>`. Files whose name
starts with `validation` are held out; all others are trained on.
"""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
from tqdm import tqdm

from lattice_serve.engine.errors import ConfigError
from lattice_serve.training.tokenizer import END_OF_TEXT, token_bytes


def training_files(folder: Path) -> list[Path]:
    """The files of `folder` to train on, by name; `ConfigError` if there are none."""
    return _files(folder, held_out=False)


def validation_files(folder: Path) -> list[Path]:
    """The held-out files of `folder` (`validation*`), by name; `ConfigError` if there are none."""
    return _files(folder, held_out=True)


def _files(folder: Path, *, held_out: bool) -> list[Path]:
    """A text that lies there both packed and unpacked counts once, unpacked."""
    by_name = {path.name.removesuffix(".xz"): path for path in sorted(folder.glob("*.txt.xz"))}
    by_name |= {path.name: path for path in sorted(folder.glob("*.txt"))}
    chosen = [path for name, path in sorted(by_name.items()) if name.startswith("validation") is held_out]
    if not chosen:
        pattern = "validation*.txt or validation*.txt.xz" if held_out else "*.txt or *.txt.xz"
        raise ConfigError(f"data {folder}: no file {pattern} there", param="data")
    return chosen


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, without the blank lines around the separator."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    for document in text.split(END_OF_TEXT):
        if stripped := document.strip("\n"):
            yield stripped


def encode_files(paths: Sequence[Path], tokenizer: spm.SentencePieceProcessor, cache: Path) -> list[np.ndarray]:
    """Token ids of every document, uint16 [length], end of text not included.

    Kept in `cache` under a name made from the contents of the file and of the tokenizer. Raises `ConfigError` when the
    vocabulary is too large for uint16 or a document does not come back from its tokens unchanged.
    """
    if tokenizer.vocab_size() > 1 << 16:
        raise ConfigError(f"tokenizer: {tokenizer.vocab_size()} pieces do not fit 16 bits: train a smaller one")
    cache.mkdir(parents=True, exist_ok=True)
    return [document for path in paths for document in _encode_file(path, tokenizer, cache)]


def _encode_file(path: Path, tokenizer: spm.SentencePieceProcessor, cache: Path) -> list[np.ndarray]:
    key = hashlib.sha256(tokenizer.serialized_model_proto() + path.read_bytes()).hexdigest()[:16]
    stored = cache / f"{path.name.split('.')[0]}-{key}.npy"
    if not stored.exists():
        ids: list[np.ndarray] = []
        for text in tqdm(read_documents(path), desc=f"encode {path.name}", unit=" documents", leave=False):
            document = np.array(tokenizer.encode(text), dtype=np.uint16)
            if tokenizer.decode(document.tolist()) != text:
                raise ConfigError(
                    f"tokenizer: {path} does not come back unchanged: train it as training.tokenizer does"
                )
            ids += [document, np.array([tokenizer.eos_id()], dtype=np.uint16)]
        written = stored.with_suffix(f".{os.getpid()}.tmp")
        with written.open("wb") as file:
            np.save(file, np.concatenate(ids))
        written.replace(stored)
    tokens = np.load(stored)
    # The separator is a control piece: it can only stand where a document ended.
    return [part[:-1] for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id()) + 1) if len(part)]


@dataclass(frozen=True, slots=True)
class Segment:
    """One training step's worth: int64 [B, T] each, and which lanes start from the initial state, bool [B]."""

    tokens: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor


class Streams:
    """B lanes, each walking contiguously through its own part of the corpus, T tokens a step.

    The corpus is a ring: the documents, each followed by the end-of-text token. An epoch turns the ring by a random
    offset, cuts it in B equal parts and deals them out to the lanes in random order; it ends when the parts are
    walked through, and the next begins from the initial state. Within an epoch a lane goes on where its last segment
    ended, so that the memory can be carried over; with probability `reset_probability` a lane starts from the initial
    state instead, so that the model also learns to begin. `segment(step)` is a function of the seed and the step
    alone.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        eos_id: int,
        *,
        batch: int,
        length: int,
        seed: int = 0,
        reset_probability: float = 0.125,
    ) -> None:
        end = np.array([eos_id], dtype=np.uint16)
        self._ring = np.concatenate([part for document in documents for part in (document, end)])
        self._batch, self._length, self._seed = batch, length, seed
        self._reset_probability = reset_probability
        self.steps_per_epoch = len(self._ring) // batch // length
        if not self.steps_per_epoch:
            raise ConfigError(
                f"batch {batch} of {length} tokens is more than the corpus of {len(self._ring)}: make it smaller",
                param="batch",
            )

    @property
    def tokens_per_epoch(self) -> int:
        return self.steps_per_epoch * self._batch * self._length

    def segment(self, step: int) -> Segment:
        """The tokens of step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        deal = np.random.default_rng((self._seed, 0, epoch))
        turn = int(deal.integers(len(self._ring)))
        starts = turn + deal.permutation(self._batch) * (len(self._ring) // self._batch) + within * self._length
        index = (starts[:, None] + np.arange(self._length + 1)) % len(self._ring)
        ids = torch.from_numpy(self._ring[index].astype(np.int64))
        draws = np.random.default_rng((self._seed, 1, step)).random(self._batch)
        reset = torch.from_numpy((draws < self._reset_probability) | (within == 0))
        return Segment(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), reset)


class Books:
    """Held-out documents for scoring: rows start at the end-of-text token and the initial state.

    `bytes` is the UTF-8 length of all that is scored. With `limit`, only the first `limit` tokens of each document are.
    """

    def __init__(
        self, documents: Sequence[np.ndarray], tokenizer: spm.SentencePieceProcessor, *, limit: int | None = None
    ) -> None:
        self._documents = [document[:limit] for document in documents]
        self._eos_id = tokenizer.eos_id()
        sizes = token_bytes(tokenizer)
        self.bytes = int(sum(sizes[document].sum() for document in self._documents))
        self.tokens = sum(len(document) for document in self._documents)
        self.rows = len(self._documents)

    def segments(self, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets, int64 [rows, length] each, in order; past a document's end the target is -100."""
        longest = max(len(document) for document in self._documents)
        padded = -(-longest // length) * length
        inputs = torch.full((self.rows, padded), self._eos_id, dtype=torch.int64)
        targets = torch.full((self.rows, padded), -100, dtype=torch.int64)
        for row, document in enumerate(self._documents):
            ids = torch.from_numpy(document.astype(np.int64))
            inputs[row, 1 : len(ids)] = ids[:-1]
            targets[row, : len(ids)] = ids
        yield from zip(torch.split(inputs, length, dim=1), torch.split(targets, length, dim=1), strict=True)
