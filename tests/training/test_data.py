"""Text to tokens and back, and the walk of the lanes through the corpus."""

from __future__ import annotations

import lzma
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch

from lattice_serve.engine.errors import ConfigError
from lattice_serve.training import tokenizer as tokenizer_module
from lattice_serve.training.data import Books, Streams, encode_files, read_documents, training_files, validation_files
from lattice_serve.training.tokenizer import load_tokenizer, token_bytes, train_tokenizer

TEXTS = [
    "  Two  spaces, a tab\tand a newline\n\nthen Zoë said: “naïve” — 12,345 — 🦉.\n",
    "The owl and the pussy-cat went to sea\nin a beautiful pea-green boat.",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> spm.SentencePieceProcessor:
    text = "the owl and the cat went to sea in a beautiful boat , they took some honey and plenty of money ."
    words = text.split(" ")
    rng = np.random.default_rng(0)
    lines = (" ".join(rng.choice(words, 12)) for _ in range(300))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(lines, 300, threads=1))
    return load_tokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_give_the_text_back_and_count_its_bytes(tokenizer: spm.SentencePieceProcessor, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_end_of_text_never_comes_out_of_text(tokenizer: spm.SentencePieceProcessor) -> None:
    assert tokenizer.id_to_piece(tokenizer.eos_id()) == "<|endoftext|>"
    assert tokenizer.eos_id() not in tokenizer.encode("before<|endoftext|>after")


def test_command_line_trains_on_training_files_alone(tmp_path: Path, tokenizer: spm.SentencePieceProcessor) -> None:
    (tmp_path / "a.txt").write_text(
        "\n".join(" ".join(order) for order in permutations(["one", "two", "three", "four", "five"]))
    )
    (tmp_path / "validation.txt").write_text("zzz zzz zzz zzz")
    tokenizer_module.main([str(tmp_path), str(tmp_path / "out.model"), "--vocab-size", "274", "--threads", "1"])
    made = load_tokenizer(tmp_path / "out.model")
    assert made.vocab_size() == 274
    assert not any("z" in made.id_to_piece(i) for i in range(274) if not made.is_byte(i))


def test_folder_of_packed_and_plain_files(tmp_path: Path, tokenizer: spm.SentencePieceProcessor) -> None:
    both = "\n\n<|endoftext|>\n\n".join(TEXTS)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(both.encode()))
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"the unpacked one counts"))
    (tmp_path / "validation.txt").write_text("held out", encoding="utf-8")
    assert [path.name for path in training_files(tmp_path)] == ["a.txt", "b.txt.xz"]
    assert [path.name for path in validation_files(tmp_path)] == ["validation.txt"]
    assert list(read_documents(tmp_path / "b.txt.xz")) == [text.strip("\n") for text in TEXTS]
    for _ in range(2):  # encoded, then from the cache
        documents = encode_files(training_files(tmp_path), tokenizer, tmp_path / "cache")
        assert [tokenizer.decode(d.tolist()) for d in documents] == ["plain", *(text.strip("\n") for text in TEXTS)]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        training_files(tmp_path)
    with pytest.raises(ConfigError, match="validation"):
        validation_files(tmp_path)


def streams(length: int = 4, seed: int = 0, reset: float = 0.25, size: int = 211) -> Streams:
    documents = [np.arange(2, size + 1).astype(np.uint16)]
    return Streams(documents, 1, batch=3, length=length, seed=seed, reset_probability=reset)


def test_lanes_walk_on_and_see_the_corpus_once_an_epoch() -> None:
    walk = streams()
    segments = [walk.segment(step) for step in range(walk.steps_per_epoch)]
    for here, following in pairwise(segments):
        assert torch.equal(here.targets[:, -1], following.tokens[:, 0])
    for segment in segments:
        assert torch.equal(segment.tokens[:, 1:], segment.targets[:, :-1])
    seen = torch.cat([segment.tokens.flatten() for segment in segments])
    assert len(seen) == len(seen.unique()) == walk.tokens_per_epoch
    assert walk.tokens_per_epoch > 211 - 3 * 4 - 3


def test_end_of_text_follows_a_document() -> None:
    walk = streams()
    for step in range(walk.steps_per_epoch):
        segment = walk.segment(step)
        before_end = segment.tokens[segment.targets == 1]
        assert (before_end == 211).all()
        assert (segment.targets[segment.tokens == 1] == 2).all()


def test_segments_depend_on_seed_and_step_alone() -> None:
    walk, same, other = streams(), streams(), streams(seed=1)
    last = same.segment(40)
    for step in range(41):
        mine = walk.segment(step)
    assert torch.equal(mine.tokens, last.tokens)
    assert torch.equal(mine.reset, last.reset)
    assert not torch.equal(mine.tokens, other.segment(40).tokens)
    assert not torch.equal(walk.segment(0).tokens, walk.segment(walk.steps_per_epoch).tokens)


def test_resets() -> None:
    walk = streams(size=40_000)
    resets = torch.stack([walk.segment(step).reset for step in range(1, 1500)]).float()
    assert 0.22 < resets.mean() < 0.28
    for epoch in range(2):
        assert streams(reset=0.0).segment(epoch * streams().steps_per_epoch).reset.all()
    assert not streams(reset=0.0).segment(1).reset.any()


def test_corpus_too_small() -> None:
    with pytest.raises(ConfigError, match="batch 3"):
        streams(length=200)


def test_books_are_scored_whole_and_once(tokenizer: spm.SentencePieceProcessor) -> None:
    documents = [np.array(tokenizer.encode(text), dtype=np.uint16) for text in TEXTS]
    books = Books(documents, tokenizer)
    assert books.bytes == sum(len(text.encode()) for text in TEXTS)
    segments = list(books.segments(16))
    inputs, targets = (torch.cat(parts, dim=1) for parts in zip(*segments, strict=True))
    assert (inputs[:, 0] == tokenizer.eos_id()).all()
    for row, document in enumerate(documents):
        counted = targets[row] >= 0
        assert targets[row][counted].tolist() == document.tolist()
        assert inputs[row, 1 : len(document)].tolist() == document[:-1].tolist()
    cut = Books(documents, tokenizer, limit=5)
    assert cut.tokens == 10
    assert cut.bytes == sum(token_bytes(tokenizer)[document[:5]].sum() for document in documents)
