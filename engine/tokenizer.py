"""Text to token ids and back, over a sentencepiece model, without loss."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from lattice_serve.engine.errors import CheckpointError, InvalidParameter
from lattice_serve.engine.marks import unguarded, unmark

SPACE = "\u2581"
"""How sentencepiece writes a space inside a piece."""
_PROBE = " a  b\r\n\n\ufb01 \u1e9b\u0323 e\u0301 <unk> \U0001f600\0 "
"""What a tokenizer that normalises, trims or adds spaces, or lacks byte pieces, does not give back."""


class Tokenizer:
    """`decode(encode(text)) == text` for every text that is valid Unicode.

    Control pieces such as `<|endoftext|>` are never made from text: only ids name them, and `encode_marked`.
    """

    def __init__(self, processor: SentencePieceProcessor, vocab_size: int | None = None) -> None:
        """`processor` must have a piece for each byte, keep the text as it is and add no prefix (see `load`).

        A model's `vocab_size` may be larger than the number of pieces (padded): the ids beyond have no text.
        """
        self._processor = processor
        self.pieces: int = processor.vocab_size()
        padding = (vocab_size or self.pieces) - self.pieces
        self._bytes = (*(_piece_bytes(processor, token_id) for token_id in range(self.pieces)), *(b"",) * padding)
        self._space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.vocab_size: int = len(self._bytes)
        eos = processor.eos_id()
        self.eos_token_id: int | None = eos if eos >= 0 else None
        self.controls: dict[str, int] = {
            processor.id_to_piece(token_id): token_id
            for token_id in range(self.pieces)
            if processor.is_control(token_id)
        }
        """Name of each control piece, such as `<|endoftext|>`, and its id."""
        # A name of one character could not be told from text: there is no place in it for a guard.
        self.names = sorted((name for name in self.controls if len(name) > 1), key=len, reverse=True)
        """Of control pieces, as `marks.unmark` takes them."""
        self._marks = re.compile("|".join(map(re.escape, self.names)) or "(?!)")

    @classmethod
    def load(cls, folder: Path, vocab_size: int | None = None) -> Tokenizer:
        """Read `tokenizer.model` of a model folder, for a model of `vocab_size` tokens.

        Raises `CheckpointError` when it is missing, is no sentencepiece model, would lose or change text, or has more
        pieces than the model has tokens.
        """
        path = folder / "tokenizer.model"
        try:
            serialized = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}: give a folder that holds a model") from error
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(serialized)
        except (RuntimeError, ValueError) as error:  # it quotes pieces in its errors, which may be no UTF-8
            raise CheckpointError(f"{path}: not a sentencepiece model: copy the file again") from error
        if vocab_size is not None and processor.vocab_size() > vocab_size:
            raise CheckpointError(
                f"{path}: has {processor.vocab_size()} pieces, the model a vocab_size of {vocab_size}: "
                "give the tokenizer that the model was trained with"
            )
        try:
            tokenizer = cls(processor, vocab_size)
        except ValueError as error:  # a piece that is not UTF-8, or that names no byte
            raise CheckpointError(f"{path}: a piece is damaged: {error}: copy the file again") from error
        if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
            raise CheckpointError(
                f"{path}: does not give a text back as it was: train it with byte_fallback, "
                "normalization_rule_name=identity, add_dummy_prefix=false and remove_extra_whitespaces=false"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises `InvalidParameter` (param "prompt") on a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameter(
                f"prompt holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
                "give text that is valid Unicode",
                param="prompt",
            ) from error
        # A SPACE sign in the text itself would come back as a space: it is spelled in byte pieces.
        first, *rest = text.split(SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._space_ids
            ids += self._processor.encode(part)
        return ids

    @property
    def eos_token(self) -> str | None:
        """Name of the piece that ends a text."""
        return None if self.eos_token_id is None else str(self._processor.id_to_piece(self.eos_token_id))

    @property
    def bos_token(self) -> str | None:
        """Name of the piece that begins one."""
        bos = self._processor.bos_id()
        return None if bos < 0 else str(self._processor.id_to_piece(bos))

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of `text` in which the name of a control piece stands for that piece, but in what `unmark` gave."""
        ids: list[int] = []
        start = 0
        for match in self._marks.finditer(text):
            ids += self.encode(unguarded(text[start : match.start()]))
            ids.append(self.controls[match[0]])
            start = match.end()
        return ids + self.encode(unguarded(text[start:]))

    def unmark(self, text: str) -> str:
        """`text` with a guard in each name of a control piece, so that `encode_marked` takes it for text."""
        return unmark(text, self.names)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, each within the vocabulary; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, as UTF-8: often part of a character; nothing for a control piece."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        r"""The token as logprobs show it: its text, `bytes:\xNN` for part of a character, or a control piece's name."""
        data = self._bytes[token_id]
        if token_id >= self.pieces:
            return f"<|{token_id}|>"
        if not data:
            return str(self._processor.id_to_piece(token_id))
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    @staticmethod
    def check(ids: Collection[int], vocab_size: int, *, param: str = "prompt") -> None:
        """Raises `InvalidParameter` naming `param` and the first of `ids` that is not in 0 .. vocab_size - 1."""
        if not ids:
            return
        # A million ids side by side in memory are looked at in the time of ten thousand objects.
        numbers = np.frombuffer(ids, dtype=np.int32) if isinstance(ids, array) else None
        least, most = (min(ids), max(ids)) if numbers is None else (int(numbers.min()), int(numbers.max()))
        if least < 0 or most >= vocab_size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            raise InvalidParameter(
                f"{param} holds token id {wrong}: give ids from 0 to {vocab_size - 1}, the vocabulary of the model",
                param=param,
            )

    @staticmethod
    def checked(ids: Collection[int], vocab_size: int, *, param: str = "prompt") -> array[int]:
        """`ids` as int32 side by side in memory. Raises what `check` does."""
        try:
            packed = array("i", ids)
        except OverflowError:
            Tokenizer.check(ids, vocab_size, param=param)
            raise
        Tokenizer.check(packed, vocab_size, param=param)
        return packed


def _piece_bytes(processor: SentencePieceProcessor, token_id: int) -> bytes:
    if processor.is_control(token_id) or processor.is_unused(token_id):
        return b""
    if processor.is_unknown(token_id):
        return "\ufffd".encode()
    piece: str = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace(SPACE, " ").encode()
