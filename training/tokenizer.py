"""The tokenizer: a sentencepiece unigram model that gives back every text byte for byte.

    python -m lattice_serve.training.tokenizer DATA_DIR OUT.model [--vocab-size 4096]

Text is taken as it is (no normalisation, no dummy prefix, spaces kept), a newline is a piece of its own, and what no
piece covers falls back to UTF-8 bytes, so `decode(encode(x)) == x`. One piece, `<|endoftext|>`, never comes out of
text: it ends documents.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.tokenizer import SPACE

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterator[str], vocab_size: int, *, threads: int = 2) -> bytes:
    """Train on `texts` (documents) and return the serialised model.

    `vocab_size` counts all pieces: 256 bytes, the newline, the end of text, and what is learned.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            max_sentence_length=100_000,
            input_sentence_size=400_000,
            shuffle_input_sentence=True,
            num_threads=threads,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ConfigError(f"vocab_size {vocab_size}: {error}", param="vocab_size") from error
    return model.getvalue()


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """Load a sentencepiece model; `ConfigError` if there is none, or it has no end-of-text piece."""
    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"tokenizer {path}: {error}: give a sentencepiece model", param="tokenizer") from error
    if tokenizer.eos_id() < 0:
        raise ConfigError(f"tokenizer {path}: has no end-of-text piece: train it with one", param="tokenizer")
    return tokenizer


def token_bytes(tokenizer: spm.SentencePieceProcessor) -> np.ndarray:
    """UTF-8 bytes that each token stands for, int64 [vocab_size]; 0 for control pieces.

    A sum over the tokens of a text is the length of the text in bytes, which is what bits per byte divides by.
    """

    def size(token: int) -> int:
        if tokenizer.is_byte(token):
            return 1
        if tokenizer.is_control(token) or tokenizer.is_unknown(token):
            return 0
        return len(tokenizer.id_to_piece(token).replace(SPACE, " ").encode())

    return np.array([size(token) for token in range(tokenizer.vocab_size())], dtype=np.int64)


def main(arguments: list[str] | None = None) -> None:
    """Command line: train a tokenizer on the training files of a folder."""
    from lattice_serve.training.data import read_documents, training_files

    parser = argparse.ArgumentParser(prog="python -m lattice_serve.training.tokenizer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", type=Path, help="folder of .txt or .txt.xz files")
    parser.add_argument("out", type=Path, help="where to write the model")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces in all (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads that train it (default %(default)s)")
    options = parser.parse_args(arguments)
    texts = (text for path in training_files(options.data) for text in read_documents(path))
    model = train_tokenizer(texts, options.vocab_size, threads=options.threads)
    options.out.write_bytes(model)
    print(f"{options.out}: {options.vocab_size} pieces, {len(model):,} bytes")


if __name__ == "__main__":
    main()
