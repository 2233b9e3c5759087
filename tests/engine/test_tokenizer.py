"""The tokenizer, over the one that ships with the bundled model."""

from __future__ import annotations

import io
from array import array
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lattice_serve.engine import tokenizer as module
from lattice_serve.engine.errors import CheckpointError, InvalidParameter
from lattice_serve.engine.tokenizer import SPACE, Tokenizer

BUNDLED = Path(module.__file__).parent / "bundled"
TOKENIZER = Tokenizer.load(BUNDLED)

words = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "\0", SPACE, "the", "<|endoftext|>", "<unk>", "<0x41>", "👍🏽", "e\u0301"]
)
texts = st.one_of(st.text(), st.lists(words | st.text(max_size=3)).map("".join))


@given(texts)
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


@given(texts)
def test_no_text_makes_a_control_or_unknown_token(text: str) -> None:
    assert not {0, TOKENIZER.eos_token_id} & set(TOKENIZER.encode(text))


@given(texts)
def test_control_pieces_are_made_only_of_marked_text(text: str) -> None:
    assert TOKENIZER.encode_marked(TOKENIZER.unmark(text)) == TOKENIZER.encode(text)
    ids = TOKENIZER.encode_marked(f"<|endoftext|>{TOKENIZER.unmark(text)}<|endoftext|>")
    assert ids == [1, *TOKENIZER.encode(text), 1]


@pytest.mark.parametrize(
    "text", ["<|endoftext|><|endoftext|>", "<<|endoftext|>\ufdd0", "<\ufdd0|endoftext|>", "\ufdd0"]
)
def test_a_guard_in_the_text_is_kept(text: str) -> None:
    assert TOKENIZER.encode_marked(TOKENIZER.unmark(text)) == TOKENIZER.encode(text)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_ids_decode_to_their_bytes(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids) == b"".join(map(TOKENIZER.token_bytes, ids)).decode(errors="replace")


def test_ordinary_text_takes_few_tokens() -> None:
    text = "It was the best of times, it was the worst of times."
    assert len(TOKENIZER.encode(text)) < len(text) / 2


def test_the_vocabulary() -> None:
    assert TOKENIZER.vocab_size == 4096
    assert TOKENIZER.eos_token_id == 1
    assert TOKENIZER.encode("") == []
    assert {TOKENIZER.token_bytes(i) for i in range(4096)} >= {bytes([byte]) for byte in range(256)}


def test_token_text_shows_text_bytes_and_names() -> None:
    (space_the,) = TOKENIZER.encode(" the")
    first, *_, last = TOKENIZER.encode("👍")
    assert TOKENIZER.token_text(space_the) == " the"
    assert TOKENIZER.token_text(first) == "bytes:\\xf0"
    assert TOKENIZER.token_text(last) == "bytes:\\x8d"
    assert TOKENIZER.token_text(TOKENIZER.encode("\r")[0]) == "\r"
    assert TOKENIZER.token_text(1) == "<|endoftext|>"
    assert TOKENIZER.token_text(0) == TOKENIZER.decode([0]) == "\ufffd"
    assert TOKENIZER.token_bytes(1) == b""


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "\ud83d \udc4d"])
def test_a_lone_surrogate_is_the_callers_mistake(text: str) -> None:
    with pytest.raises(InvalidParameter, match=r"lone surrogate \(U\+D") as caught:
        TOKENIZER.encode(text)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("ids", [[], [0], [4095], [3, 0, 4095]])
def test_check_takes_the_vocabulary(ids: list[int]) -> None:
    Tokenizer.check(ids, 4096)
    assert Tokenizer.checked(ids, 4096) == Tokenizer.checked(array("i", ids), 4096) == array("i", ids)


def test_what_was_checked_is_the_callers_no_more() -> None:
    mine = array("i", [1, 2, 3])
    checked = Tokenizer.checked(mine, 4096)
    mine[0] = 5000
    assert checked[0] == 1


@pytest.mark.parametrize(("ids", "wrong"), [([4096], "4096"), ([1, -1, 5000], "-1"), ([2**70], str(2**70))])
def test_check_names_the_field_the_id_and_the_range(ids: list[int], wrong: str) -> None:
    with pytest.raises(InvalidParameter, match=f"logit_bias holds token id {wrong}: give ids from 0 to 4095") as caught:
        Tokenizer.check(dict.fromkeys(ids, 1.0), 4096, param="logit_bias")
    assert caught.value.param == "logit_bias"
    for check in (Tokenizer.check, Tokenizer.checked):
        with pytest.raises(InvalidParameter, match=f"prompt holds token id {wrong}: ") as caught:
            check(ids, 4096)
        assert caught.value.param == "prompt"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: No such file.*give a folder"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 64])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "fault",
    [{"byte_fallback": False}, {"normalization_rule_name": "nfkc"}, {"add_dummy_prefix": True}],
    ids=lambda fault: next(iter(fault)),
)
def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path, fault: dict[str, Any]) -> None:
    _train(tmp_path, **fault)
    with pytest.raises(CheckpointError, match="does not give a text back as it was"):
        Tokenizer.load(tmp_path)


def test_names_of_control_pieces_that_overlap(tmp_path: Path) -> None:
    _train(tmp_path, control_symbols=["<a<a", "<a", "|a|", "~"])
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.controls
    for text in ("<a<a<a<a", "|a|a|a|", "<a|a|<a<a", "~"):
        assert tokenizer.encode_marked(tokenizer.unmark(text)) == tokenizer.encode(text)
    assert tokenizer.encode_marked("<a<a<a|a|") == [ids["<a<a"], ids["<a"], ids["|a|"]]


def _train(folder: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn from", "and a few more words"] * 4),
        model_writer=model,
        vocab_size=290,
        hard_vocab_limit=False,
        minloglevel=2,
        **(settings | changes),
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
