"""Model folders: reading and writing `config.json` with `model.safetensors`, whole or in shards.

Only safetensors are read, so no code from a model folder runs. What is wrong with a folder is said all at once.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lattice_serve.engine.config import DType
from lattice_serve.engine.errors import CheckpointError, ConfigError
from lattice_serve.engine.models.base import ModelConfig
from lattice_serve.engine.models.causal_lm import CausalLM
from lattice_serve.engine.models.registry import load_config, model_class
from lattice_serve.engine.tensor_parallel.share import WHOLE, Share

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json")
"""The weight files that a saved model replaces."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_STORED = ("F32", "BF16", "F16")
_NAMES: Final[dict[torch.dtype, DType]] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LISTED = 8
"""Names of each kind of fault that a message lists; the rest are counted."""
_BUNDLED = Path(__file__).parent / "bundled"


def load_model(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype, progress: bool = False, share: Share = WHOLE
) -> CausalLM:
    """The model of `folder`, or a share of it, on `device`, in eval mode, its parameters without gradients.

    The matrices that the family names (`ModelConfig.matrices`) are `dtype` (float32 or bfloat16). The small tensors are
    float32 always: they cost little, and the recurrence runs in float32.

    Tensors that need no conversion and stay on the CPU are views of the memory-mapped file, so the processes of one
    machine share them; their peak memory is the model's and one tensor's. Such a file may be renamed or
    replaced (`save_model` does) but not written in place while the model lives.

    Raises `CheckpointError` for everything that is wrong with the folder, `ConfigError` for `device` or `dtype`.
    """
    _check_dtype(dtype)
    place = _device(device)
    config = load_config(folder)
    own = share.config(config)
    with ExitStack() as stack:
        stored = _open(folder, stack)
        if config.num_hidden_layers > len(stored):  # said before as many layers are built
            raise CheckpointError(
                f"{folder}: config.json has num_hidden_layers = {config.num_hidden_layers}, "
                f"the weights only {len(stored)} tensors: use the files of one model"
            )
        model = _skeleton(config)
        _compare(folder, {name: tuple(p.shape) for name, p in model.state_dict().items()}, stored)
        tensors, bad = {}, []
        size = sum(p.numel() * _dtype(name, config, dtype).itemsize for name, p in model.named_parameters())
        with tqdm(desc="load", total=size, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            for name, file in stored.items():
                try:
                    tensor = share.take(name, file.get_tensor(name), config).to(place, _dtype(name, config, dtype))
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"{folder}: {name}: {error}: get the weights again") from error
                tensors[name] = tensor
                if not _is_finite(tensor):
                    bad.append(name)
                bar.update(tensor.nbytes)
    _fail(folder, {"with values that are not finite": bad}, "get the weights again")
    if own != config:
        model = _skeleton(own)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def save_model(model: CausalLM, folder: Path, dtype: torch.dtype, *, max_shard_bytes: int | None = None) -> None:
    """Write `config.json` and the weights, in shards of at most `max_shard_bytes` (or one tensor) if that is given.

    Matrices are stored in `dtype` (float32 or bfloat16), small tensors in float32. The files are complete on disk
    before the first of them takes its name, and `config.json` goes away first and comes last: a folder that has one
    holds one whole model. Other files of the folder stay.

    Raises `CheckpointError` when a value is not finite, or the folder cannot be written; what was in it then remains.
    """
    _check_dtype(dtype)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}: give at least 1, or None", param="max_shard_bytes")
    tensors: dict[str, Tensor] = model.state_dict()
    config = model.config.model_copy(update={"torch_dtype": _NAMES[dtype]})
    converted = ((name, tensor.to(_dtype(name, config, dtype))) for name, tensor in tensors.items())
    bad = [name for name, tensor in converted if not _is_finite(tensor)]
    _fail(folder, {"with values that are not finite": bad}, "a model that diverged is not saved")
    sizes = {name: tensor.numel() * _dtype(name, config, dtype).itemsize for name, tensor in tensors.items()}
    shards = _shards(sizes, max_shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as inside:
            temporary = Path(inside)
            (temporary / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            for file, names in shards.items():
                shard = {name: tensors[name].to("cpu", _dtype(name, config, dtype)).contiguous() for name in names}
                save_file(shard, temporary / file, metadata={"format": "pt"})
                # Some versions of safetensors let only the owner read what they write.
                (temporary / file).chmod((temporary / "config.json").stat().st_mode)
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            _replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot write the model: {error}: make room, or name another") from error


def init_model(config: ModelConfig, folder: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Write a model of random weights; the same seed gives the same weights. Raises as `save_model` does."""
    model = _skeleton(config).to_empty(device="cpu")
    model.initialize(seed)
    save_model(model, folder, dtype)


def bundled_model() -> Path:
    """The folder of the model that ships with the package. Raises `CheckpointError` when the package has none."""
    if not ((_BUNDLED / "config.json").is_file() and (_BUNDLED / SINGLE).is_file()):
        raise CheckpointError(f"{_BUNDLED}: this installation holds no model: install lattice-serve again, or name one")
    return _BUNDLED


def resolve_model(name: str | Path | None) -> Path:
    """The absolute path of the model folder `name`, the bundled model's for None.

    Raises `CheckpointError` when there is no such folder, or it has no `config.json`.
    """
    if name is None:
        return bundled_model()
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{name}: no such folder: give a model folder; models are not downloaded", param="model")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: holds no config.json: give a folder that holds a model", param="model")
    return folder


def pick_dtype(name: Literal["auto", "float32", "bfloat16"], config: ModelConfig) -> torch.dtype:
    """What to load the matrices in; "auto" is what they are stored in, so that nothing is rounded.

    Raises `ConfigError` for another name.
    """
    wanted = config.torch_dtype if name == "auto" else name
    for dtype, known in _NAMES.items():
        if wanted == known:
            return dtype
    raise ConfigError(f"dtype {name!r} is not known: give auto, float32 or bfloat16", param="dtype")


def _dtype(name: str, config: ModelConfig, matrices: torch.dtype) -> torch.dtype:
    return matrices if name.rpartition(".")[2] in config.matrices else torch.float32


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _NAMES:
        raise ConfigError(f"dtype {dtype} is not supported: give torch.float32 or torch.bfloat16", param="dtype")


def _device(name: str) -> torch.device:
    """Raises `ConfigError` when the device is not known, or not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError(f"device {name!r}: {error}: give cpu, or cuda with a GPU", param="device") from error


def _skeleton(config: ModelConfig) -> CausalLM:
    """The model on the meta device, where parameters have shapes and no memory."""
    try:
        with torch.device("meta"):
            return model_class(config)(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError("config.json: these sizes are more than a tensor can have: lower them") from error


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file of each tensor in `folder`; `stack` closes them. No tensor is read."""
    if (folder / SINGLE).is_file():
        file = _open_file(folder / SINGLE, stack)
        return dict.fromkeys(file.keys(), file)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder}: {_some(pickles)} may run code when read, so pickles are not: "
                f"convert them to {SINGLE} with safetensors.torch.save_file, where you trust them"
            )
        raise CheckpointError(f"{folder}: holds no {SINGLE} and no {INDEX}: give a folder that holds a model")
    index = _read_index(folder / INDEX)
    names = sorted(set(index.values()))
    _fail(folder, {"shards missing": [n for n in names if not (folder / n).is_file()]}, "get the weights again")
    files = {name: _open_file(folder / name, stack) for name in names}
    held = {(tensor, name) for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118
    listed = set(index.items())
    faults = {
        "not in the shard that the index names": [tensor for tensor, _ in sorted(listed - held)],
        "in a shard for which the index does not list them": [tensor for tensor, _ in sorted(held - listed)],
    }
    _fail(folder, faults, f"use the shards and the {INDEX} of one model")
    return {tensor: files[index[tensor]] for tensor in sorted(index, key=lambda tensor: (index[tensor], tensor))}


def _open_file(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cut short, or no safetensors: {error}: get the file again") from error


def _read_index(path: Path) -> dict[str, str]:
    """File name of each tensor. Raises `CheckpointError`, also for file names that lead out of the folder."""
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}: get the file again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: needs a weight_map from tensor names to file names: get the file again")
    outside = {file for file in weight_map.values() if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file)}
    _fail(path, {"no plain names of safetensors": sorted(outside)}, "only files of the model folder are read")
    return weight_map


def _compare(folder: Path, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` that lists each tensor which the model and the files do not have alike."""
    slices = {name: stored[name].get_slice(name) for name in stored if name in shapes}
    found = {name: tuple(view.get_shape()) for name, view in slices.items()}
    dtypes = {name: view.get_dtype() for name, view in slices.items()}
    faults = {
        "missing": [name for name in shapes if name not in stored],
        "unexpected": [name for name in stored if name not in shapes],
        "of the wrong shape": [
            f"{name} is {list(found[name])}, not {list(shapes[name])}" for name in found if found[name] != shapes[name]
        ],
        f"of a dtype other than {', '.join(_STORED)}": [
            f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _STORED
        ],
    }
    _fail(folder, faults, "use the config.json and the weights of one model")


def _fail(path: Path, faults: Mapping[str, list[str]], remedy: str) -> None:
    """Raises `CheckpointError` if there are any, kind by kind."""
    kinds = [f"{len(names)} {kind}: {_some(names)}" for kind, names in faults.items() if names]
    if kinds:
        raise CheckpointError(f"{path}: {'; '.join(kinds)}: {remedy}")


def _some(names: Iterable[str]) -> str:
    """The first names, each short and printable, as they may come from a hostile file."""
    names = list(names)
    shown = [name if name.isprintable() and len(name) <= 200 else ascii(name[:200]) for name in names[:_LISTED]]
    return ", ".join(shown) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # both are NaN if any value is; needs no second tensor, as isfinite does
    return bool(low.isfinite() & high.isfinite())


def _shards(sizes: Mapping[str, int], limit: int | None) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order, as many as fit `limit` bytes and at least one."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if limit is not None and groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _replace(temporary: Path, folder: Path) -> None:
    """Move the files of `temporary` into `folder`, in place of the model that is there."""
    new = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == "config.json")
    for name in new:
        _sync(temporary / name)
    (folder / "config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in new:
            path.unlink()
    for name in new:
        (temporary / name).replace(folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
