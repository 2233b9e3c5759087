"""Train a Lattice model on a folder of text files.

    python -m lattice_serve.training.train CONFIG.json DATA_DIR OUT_DIR --tokenizer T.model --tokens 20e6

CONFIG.json is a model's config.json. OUT_DIR gets checkpoints, metrics.jsonl, and at the end the model folder `model`
and `results.json` with the bits per byte over all held-out documents. --resume goes on from the newest checkpoint;
with --cooldown below 1 it may be given more --tokens than the run was started with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from lattice_serve.engine.errors import ConfigError, LatticeError
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.training.data import Books, Streams, encode_files, training_files, validation_files
from lattice_serve.training.evaluate import bits_per_byte
from lattice_serve.training.export import export_model
from lattice_serve.training.tokenizer import load_tokenizer
from lattice_serve.training.trainer import Interrupted, Trainer, TrainOptions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lattice_serve.training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="config.json of the model")
    parser.add_argument("data", type=Path, help="folder of .txt or .txt.xz files; validation* are held out")
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece model")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--tokens", type=lambda text: int(float(text)), help="tokens to train on, as 2e7")
    length.add_argument("--steps", type=int, help="or steps")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT_DIR")
    parser.add_argument("--threads", type=int, help="threads of the matrix products (default: one a core)")
    parser.add_argument("--cache", type=Path, help="folder for encoded text (default: OUT_DIR/tokens)")
    d = TrainOptions(tokens=0)
    option = parser.add_argument
    option("--batch", type=int, default=d.batch, help="lanes (%(default)s)")
    option("--seq", type=int, default=d.seq, help="tokens a lane and step (%(default)s)")
    option("--optimizer", choices=("adamw", "muon"), default=d.optimizer, help="(%(default)s)")
    option("--lr", type=float, default=d.lr, help="peak learning rate (%(default)s)")
    option("--muon-lr", type=float, help="peak learning rate of the hidden matrices under muon (default: --lr)")
    option("--weight-decay", type=float, default=d.weight_decay, help="of linear maps and embedding (%(default)s)")
    option("--warmup", type=int, default=d.warmup, help="steps in which the learning rate rises (%(default)s)")
    option("--cooldown", type=float, default=d.cooldown, help="last share of the run in which it falls (%(default)s)")
    option("--final-lr", type=float, default=d.final_lr, help="where it ends, as a share of the peak (%(default)s)")
    option("--clip", type=float, default=d.clip, help="largest gradient norm (%(default)s)")
    option("--reset", type=float, default=d.reset, help="chance that a lane forgets, a step (%(default)s)")
    option("--seed", type=int, default=d.seed, help="(%(default)s)")
    option(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default=d.precision,
        help="of the matrix products; auto: bfloat16 where the CPU has it in hardware",
    )
    option("--eval-every", type=int, default=d.eval_every, help="steps between validations (%(default)s)")
    option("--eval-tokens", type=int, default=d.eval_tokens, help="tokens of each document in them (%(default)s)")
    option("--save-every", type=int, default=d.save_every, help="steps between checkpoints (%(default)s)")
    option("--workers", type=int, default=d.workers, help="threads that share the lanes (%(default)s)")
    option("--compile", action="store_true", help="fuse small operations with torch.compile (wants a C++ compiler)")
    option("--hours", type=float, help="print how many tokens this many hours hold; does not end the run")
    return parser


def train(arguments: argparse.Namespace) -> float:
    """Run what the command line asks for; returns the bits per byte over all held-out documents."""
    began = time.monotonic()
    names = TrainOptions.__dataclass_fields__.keys() - {"tokens"}
    tokens = arguments.tokens or arguments.steps * arguments.batch * arguments.seq
    options = TrainOptions(tokens=tokens, **{name: getattr(arguments, name) for name in names})
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.tokenizer)
    config = LatticeConfig.model_validate_json(arguments.config.read_text(encoding="utf-8"))
    if config.vocab_size != tokenizer.vocab_size():
        raise ConfigError(
            f"vocab_size {config.vocab_size}: the tokenizer has {tokenizer.vocab_size()} pieces: give that",
            param="vocab_size",
        )
    cache = arguments.cache or arguments.out / "tokens"
    documents = encode_files(training_files(arguments.data), tokenizer, cache)
    held_out = encode_files(validation_files(arguments.data), tokenizer, cache)
    streams = Streams(
        documents,
        tokenizer.eos_id(),
        batch=options.batch,
        length=options.seq,
        seed=options.seed,
        reset_probability=options.reset,
    )
    model = LatticeForCausalLM(config)
    model.initialize(options.seed)
    trainer = Trainer(model, streams, Books(held_out, tokenizer, limit=options.eval_tokens), options, arguments.out)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {options.steps} steps, "
        f"{options.tokens / streams.tokens_per_epoch:.2f} epochs of {streams.tokens_per_epoch:,} tokens, "
        f"products in {trainer.dtype}, {torch.get_num_threads()} threads"
    )
    if arguments.resume:
        trainer.resume()
        print(f"resumed at step {trainer.step}")
    elif any(arguments.out.glob("step-*")):
        raise ConfigError(f"{arguments.out} holds a run: give --resume, or another folder", param="out")
    trainer.run()
    books = Books(held_out, tokenizer)
    score = bits_per_byte(model, books, length=options.seq, dtype=trainer.dtype, bar=True)
    folder = arguments.out / "model"
    export_model(model, arguments.tokenizer, folder)
    results = {
        "validation_bits_per_byte": score,
        "validation_bytes": books.bytes,
        "validation_documents": books.rows,
        "tokens": options.steps * options.step_tokens,
        "steps_skipped": trainer.watch.skipped,
        "minutes_of_this_process": round((time.monotonic() - began) / 60, 1),
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{score:.4f} bits per byte over {books.rows} held-out documents, {books.bytes:,} bytes; model in {folder}")
    return score


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 1 an error, 130 stopped by a signal."""
    try:
        train(build_parser().parse_args(arguments))
    except LatticeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
