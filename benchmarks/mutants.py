"""Damaged model folders by the thousand: each must start, or end in a clear error, soon and in little memory.

    python benchmarks/mutants.py --count 2000 --seed 0

Each is loaded in a process of its own. Reported are the kinds of outcomes, and each mutant that crashed, took over
10 s or 1 GiB, or raised what is no error of this project.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

SECONDS = 10
MEMORY = 1 << 30
"""Bytes that loading may add."""
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1e308, 0.5, 1e-300,
    float("nan"), float("inf"), "", "1", "bfloat16", "\ud800", [], [1], {}, {"a": 1},
]  # fmt: skip


def mutants(model: Path, folder: Path, count: int, seed: int) -> Iterator[tuple[str, Path]]:
    """What was done to each, and its folder, which lasts until the next one is asked for."""
    draw = random.Random(seed)
    ways = [_config_field, _config_field, _config_text, _weights_head, _weights_body, _tokenizer_bytes, _tokenizer_cut]
    ways += [_another_kind, _index, _template]
    for number in range(count):
        target = folder / str(number)
        shutil.copytree(model, target)
        way = draw.choice(ways)
        yield f"{number} {way.__name__.lstrip('_')}: {way(target, draw)}", target
        shutil.rmtree(target)


def outcome(run: Callable[[], object]) -> str:
    """What comes of `run` in a process of its own: "ok", an error of this project, or what is wrong with that."""
    from lattice_serve.engine.errors import LatticeError

    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            try:
                run()
                said = "ok"
            except LatticeError as error:
                said = f"{type(error).__name__}: {error.message}"
                said.encode()
            except BaseException as error:
                said = f"WRONG {type(error).__name__}: {error}"
            os.write(writing, said[:4000].encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    if status:
        return f"WRONG signal {os.WTERMSIG(status)} after {time.monotonic() - began:.1f} s"
    return said


def load(folder: Path) -> None:
    """All that a server and its engine read of a folder."""
    from lattice_serve.engine.models.registry import load_config
    from lattice_serve.engine.weights import load_model, pick_dtype
    from lattice_serve.server.template import ChatTemplate

    config = load_config(folder)
    config.tokenizer.load(folder, config.vocab_size)
    load_model(folder, dtype=pick_dtype("auto", config))
    ChatTemplate(folder)


def start(folder: Path) -> None:
    """The same, and an engine."""
    from lattice_serve.engine.config import EngineConfig
    from lattice_serve.engine.engine import Engine

    load(folder)
    Engine(EngineConfig(model=folder, max_rows=2, prefix_cache_memory=1 << 20))


def _config_field(folder: Path, draw: random.Random) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = draw.sample([*config, "unknown"], draw.choice([1, 1, 1, 2]))
    for name in names:
        config[name] = draw.choice(_VALUES)
    if draw.random() < 0.1:
        del config[names[0]]
    path.write_text(json.dumps(config))
    return ", ".join(f"{name}={config.get(name, 'absent')!r}" for name in names)


def _config_text(folder: Path, draw: random.Random) -> str:
    return _bytes(folder / "config.json", draw)


def _weights_head(folder: Path, draw: random.Random) -> str:
    """In its JSON, or in the length before it."""
    path = folder / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return _bytes(path, draw, draw.choice([8, 8 + size]))


def _weights_body(folder: Path, draw: random.Random) -> str:
    return _bytes(folder / "model.safetensors", draw)


def _tokenizer_bytes(folder: Path, draw: random.Random) -> str:
    path = folder / "tokenizer.model"
    return _bytes(path, draw, draw.choice([64, path.stat().st_size]))


def _tokenizer_cut(folder: Path, draw: random.Random) -> str:
    path = folder / "tokenizer.model"
    data = path.read_bytes()
    size = draw.randrange(len(data))
    path.write_bytes(data[:size])
    return f"{size} bytes"


def _another_kind(folder: Path, draw: random.Random) -> str:
    """A folder, a dead link, nothing, or other data in the place of a file."""
    path = folder / draw.choice(["config.json", "model.safetensors", "tokenizer.model"])
    kind = draw.choice(["folder", "link", "nothing", "empty", "zeros", "text", "loop"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind in ("link", "loop"):
        path.symlink_to(folder / ("missing" if kind == "link" else path.name))
    elif kind != "nothing":
        path.write_bytes({"empty": b"", "zeros": bytes(10_000), "text": b"[1, 2]"}[kind])
    return f"{path.name} is {kind}"


def _index(folder: Path, draw: random.Random) -> str:
    """Shards, that one index or another lists."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    text = draw.choice(
        ["", "null", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000,
         '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"\\ud800": "\\ud800.safetensors"}}',
         '{"weight_map": {"embedding": "model-00001-of-00001.safetensors"}}'],
    )  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(text)
    return text[:60]


def _template(folder: Path, draw: random.Random) -> str:
    path = folder / "chat_template.jinja"
    data = draw.choice([b"\xff", b"{{", b"{% for %}", draw.randbytes(100)])
    path.write_bytes(data)
    return repr(data)


def _bytes(path: Path, draw: random.Random, end: int | None = None) -> str:
    """Some bytes before `end` are others, missing, or there again."""
    data = bytearray(path.read_bytes())
    done = []
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(max(1, min(len(data), end or len(data))))
        kind = draw.choice(["bit", "byte", "drop", "again", "high"])
        if kind == "bit" and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "byte" and data:
            data[at] = draw.randrange(256)
        elif kind == "high" and data:
            data[at : at + 2] = b"\xff\xfe"
        elif kind == "drop":
            del data[at : at + draw.choice([1, 8, 100])]
        else:
            data[at:at] = data[at : at + draw.choice([1, 8, 100])]
        done.append(f"{kind} at {at}")
    path.write_bytes(bytes(data))
    return ", ".join(done)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; by default a tiny one of random weights")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", action="store_true", help="start an engine, too, where the folder can be loaded")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # threads do not outlive a fork, and who waits for them waits forever
    kinds: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or _tiny(folder / "model")
        run = start if options.start else load
        if options.start:
            importlib.import_module("lattice_serve.engine.engine")  # takes seconds, once
        print("unchanged:", outcome(lambda: run(model)))
        for what, mutant in mutants(model, folder, options.count, options.seed):
            began = time.monotonic()
            said = outcome(partial(run, mutant))
            longest = max(longest, time.monotonic() - began)
            kinds[said.partition(":")[0]] += 1
            if said.startswith("WRONG"):
                print(what, said, sep="\n    ")
    print(f"{dict(kinds)}, the longest took {longest:.1f} s")
    return any(kind.startswith("WRONG") for kind in kinds)


def _tiny(folder: Path) -> Path:
    import torch

    from lattice_serve.engine.models.lattice.config import LatticeConfig
    from lattice_serve.engine.weights import bundled_model, init_model

    config = LatticeConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=8, num_slots=5,
        intermediate_size=48, eos_token_id=1,
    )  # fmt: skip
    init_model(config, folder, seed=0, dtype=torch.bfloat16)
    shutil.copyfile(bundled_model() / "tokenizer.model", folder / "tokenizer.model")
    return folder


if __name__ == "__main__":
    sys.exit(main())
