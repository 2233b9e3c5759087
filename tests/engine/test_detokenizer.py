"""The detokenizer against decoding everything at once and looking for the stop strings afterwards."""

from __future__ import annotations

from itertools import pairwise
from time import process_time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lattice_serve.engine.detokenizer import Detokenizer, _fallback

# Few characters, of every UTF-8 length, so that stop strings match, nearly match and overlap themselves.
characters = "ab\né€👍\ufffd"
texts = st.text(characters, max_size=40) | st.text("ab", max_size=80)
string = st.text(characters, min_size=1, max_size=5) | st.text("ab", min_size=1, max_size=8)
stops = st.lists(string, max_size=3).map(tuple)
any_bytes = texts.map(str.encode) | st.lists(
    st.sampled_from([b"a", b"b", "👍".encode(), *(bytes([b]) for b in "👍€".encode()), b"\xff"]), max_size=30
).map(b"".join)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def run(tokens: list[bytes], *args: object) -> tuple[list[str], str | None, int]:
    """Pieces of text, the stop string that matched, and the number of tokens read."""
    detokenizer = Detokenizer(tokens.__getitem__, *args)  # type: ignore[arg-type]
    pieces, stop, number = [], None, 0
    for number in range(1, len(tokens) + 1):
        piece, stop = detokenizer.push(number - 1)
        pieces.append(piece)
        if stop is not None:
            break
    pieces.append(detokenizer.flush()[0])
    return pieces, stop, number


def cut(text: str, stop: tuple[str, ...], include_stop: bool, ignore_up_to: int) -> tuple[str, str | None]:
    """Text up to the stop string that is complete first, if it is complete after `ignore_up_to` characters."""
    ends = []
    for string in stop:
        start = text.find(string, max(0, ignore_up_to - len(string) + 1))
        if start >= 0:
            ends.append((start + len(string), start, string))
    if not ends:
        return text, None
    end, start, string = min(ends)
    return text[: end if include_stop else start], string


@given(any_bytes, st.lists(st.integers(0), max_size=20), stops, st.booleans())
def test_equals_the_oracle_however_the_text_is_split(
    data: bytes, cuts: list[int], stop: tuple[str, ...], include_stop: bool
) -> None:
    pieces, _, _ = run(split(data, cuts), stop, include_stop)
    assert "".join(pieces) == cut(data.decode(errors="replace"), stop, include_stop, 0)[0]


@given(any_bytes, st.lists(st.integers(0), max_size=20), stops)
def test_a_stop_is_reported_by_the_token_that_completes_it(data: bytes, cuts: list[int], stop: tuple[str, ...]) -> None:
    tokens = split(data, cuts)
    # What an unfinished character at the end becomes is text, but no token completes it.
    text = "".join(run(tokens)[0][:-1])
    _, found, number = run(tokens, stop)
    expected = cut(text, stop, True, 0)
    assert found == expected[1]
    if found is not None:
        read = "".join(run(tokens)[0][:number])
        before = "".join(run(tokens)[0][: number - 1])
        assert len(before) < len(expected[0]) <= len(read)


@given(any_bytes, st.lists(st.integers(0), max_size=20), stops, st.integers(0, 10), st.booleans())
def test_stops_before_min_tokens_do_not_count(
    data: bytes, cuts: list[int], stop: tuple[str, ...], min_tokens: int, include_stop: bool
) -> None:
    tokens = split(data, cuts)
    assume(min_tokens <= len(tokens))
    pieces, found, number = run(tokens, stop, include_stop, min_tokens)
    before = len("".join(run(tokens)[0][: max(0, min_tokens - 1)]))
    assert "".join(pieces) == cut(data.decode(errors="replace"), stop, include_stop, before)[0]
    assert found is None or number >= min_tokens


@given(any_bytes, st.lists(st.integers(0), max_size=20), stops)
def test_nothing_is_taken_back_and_little_is_held(data: bytes, cuts: list[int], stop: tuple[str, ...]) -> None:
    tokens = split(data, cuts)
    everything = "".join(run(tokens)[0])
    sent = ""
    detokenizer = Detokenizer(tokens.__getitem__, stop)
    longest = max((len(string) for string in stop), default=1)
    for index in range(len(tokens)):
        piece, found = detokenizer.push(index)
        sent += piece
        assert everything.startswith(sent)
        if found is not None:
            assert detokenizer.flush() == ("", None)
            break
        read = b"".join(tokens[: index + 1]).decode(errors="ignore")
        assert len(sent) + longest - 1 >= len(read.rstrip("\ufffd"))


def test_half_a_character_waits_for_the_rest() -> None:
    detokenizer = Detokenizer(lambda byte: bytes([byte]))
    assert [detokenizer.push(byte)[0] for byte in "é👍".encode()] == ["", "é", "", "", "", "👍"]
    assert detokenizer.flush() == ("", None)


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    detokenizer = Detokenizer(lambda byte: bytes([byte]))
    assert [detokenizer.push(byte)[0] for byte in "👍".encode()[:3]] == ["", "", ""]
    assert detokenizer.flush() == ("\ufffd", None)


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces", "found"),
    [
        (["one\n", "\ntwo"], ("\n\n",), ["one", ""], "\n\n"),
        (["one\n", "two"], ("\n\n",), ["one", "\ntwo"], None),
        (["E", "N", "D", "x"], ("END",), ["", "", ""], "END"),
        (["aa", "aab"], ("aab",), ["", "aa"], "aab"),
        (["abc"], ("b", "abc"), ["a"], "b"),
        (["xab"], ("b", "ab"), ["x"], "ab"),
        (["a", "b"], (), ["a", "b"], None),
    ],
)
def test_stop_strings(tokens: list[str], stop: tuple[str, ...], pieces: list[str], found: str | None) -> None:
    got, got_found, _ = run([token.encode() for token in tokens], stop)
    assert got == [*pieces, ""]
    assert got_found == found


@pytest.mark.parametrize("string", ["aabaaab", "abababb", "aaab", "aabaabaaab"])
def test_a_string_that_overlaps_itself_is_found_at_every_place(string: str) -> None:
    """All texts of a few overlapping copies: a match begins inside a match that failed, or that did not count."""
    for overlap in range(len(string)):
        text = (string[:-1] + string[overlap:]) * 2 + string
        for min_tokens in range(1, len(text) + 1):
            pieces, found, number = run([character.encode() for character in text], (string,), False, min_tokens)
            expected = cut(text, (string,), False, min_tokens - 1)
            assert ("".join(pieces), found) == expected
            assert number == (len(expected[0]) + len(string) if found else len(text))


def test_bytes_after_the_stop_leave_nothing() -> None:
    pieces, found, _ = run([b"x END\xf0\x9f"], ("END",), True)
    assert (pieces, found) == (["x END", ""], "END")


def test_the_worst_stop_string_takes_linear_time() -> None:
    """Quadratic work would be a thousand million steps here."""
    tokens = ["a" * 1000] * 100
    start = process_time()
    pieces, found, _ = run([token.encode() for token in tokens], ("a" * 10_000 + "b",))
    assert (len("".join(pieces)), found) == (100_000, None)
    assert process_time() - start < 5


def test_sequences_share_what_is_built_of_their_stop_strings() -> None:
    stops = tuple("ab" * 100 + "c" * place for place in range(16))
    before = _fallback.cache_info().misses
    for _ in range(128):
        Detokenizer(lambda _: b"", stops)
    assert _fallback.cache_info().misses - before <= len(stops)
