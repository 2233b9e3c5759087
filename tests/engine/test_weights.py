"""Model folders: what is written is read back, and what is wrong with a folder is said."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lattice_serve.engine import weights
from lattice_serve.engine.errors import CheckpointError, ConfigError
from lattice_serve.engine.models.base import IGNORED_FIELDS
from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.engine.models.registry import load_config, model_class
from lattice_serve.engine.weights import (
    bundled_model,
    init_model,
    load_model,
    pick_dtype,
    resolve_model,
    save_model,
)
from lattice_serve.kernels.numba import features as cpu_features

SMALL = ("norm", "mixer_norm", "mlp_norm", "conv", "gate_bias", "anchor")


def _config(**changes: Any) -> LatticeConfig:
    sizes = {"vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 4, "num_slots": 3}
    return LatticeConfig(**(sizes | {"intermediate_size": 5} | changes))


def _model(config: LatticeConfig) -> LatticeForCausalLM:
    model = LatticeForCausalLM(config)
    model.initialize(seed=7)
    return model


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of float32."""
    path = tmp_path / "model"
    save_model(_model(_config()), path, torch.float32)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several shards."""
    path = tmp_path / "sharded"
    save_model(_model(_config()), path, torch.float32, max_shard_bytes=500)
    return path


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _fault(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, dtype=dtype)
    return caught.value.message


@given(
    layers=st.integers(1, 3),
    tied=st.booleans(),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    wanted=st.sampled_from([torch.float32, torch.bfloat16]),
    limit=st.none() | st.integers(1, 5000),
)
@settings(max_examples=25)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    layers: int,
    tied: bool,
    stored: torch.dtype,
    wanted: torch.dtype,
    limit: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    model = _model(_config(num_hidden_layers=layers, tie_word_embeddings=tied))
    save_model(model, folder, stored, max_shard_bytes=limit)
    loaded = load_model(folder, dtype=wanted)
    assert not loaded.training
    assert loaded.config == model.config.model_copy(update={"torch_dtype": str(stored).removeprefix("torch.")})
    truth = model.state_dict()
    assert loaded.state_dict().keys() == truth.keys()
    for name, parameter in loaded.named_parameters():
        small = name.rsplit(".", 1)[-1] in SMALL
        assert not parameter.requires_grad
        assert parameter.dtype == (torch.float32 if small else wanted)
        expected = truth[name] if small else truth[name].to(stored).to(wanted)
        assert torch.equal(parameter, expected), name
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
        assert limit is None or len(names) == 1 or sum(t.nbytes for t in load_file(path).values()) <= limit


def test_a_loaded_model_computes_what_the_saved_one_did(folder: Path) -> None:
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth, _ = _model(_config())(tokens)
    y, _ = load_model(folder, dtype=torch.float32)(tokens)
    assert torch.equal(y, truth)
    assert not y.requires_grad


def test_tensors_that_need_no_conversion_are_not_copied(tmp_path: Path) -> None:
    save_model(_model(_config(vocab_size=4096, hidden_size=64)), tmp_path, torch.bfloat16)
    path = str(tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype=torch.bfloat16)
    ranges = [
        tuple(int(end, 16) for end in line.split(maxsplit=1)[0].split("-"))
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if line.endswith(path)
    ]
    assert all(any(low <= p.data_ptr() < high for low, high in ranges) for p in model.parameters())


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_counts_the_bytes_on_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    load_model(folder, dtype=torch.float32)
    assert not capsys.readouterr().err
    load_model(folder, dtype=torch.float32, progress=True)
    assert ("100%" in capsys.readouterr().err) is terminal


def test_half_precision_is_read(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.update(embedding=tensors["embedding"].half()))
    expected = _model(_config()).embedding.detach().half().float()
    assert torch.equal(load_model(folder, dtype=torch.float32).state_dict()["embedding"], expected)


def test_every_difference_is_listed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["layers.0.mixer.conv"], tensors["norm"]
        tensors["layers.7.extra"] = torch.ones(1)
        tensors["layers.1.mlp_norm"] = torch.ones(5)
        tensors["embedding"] = tensors["embedding"].double()

    _edit(folder, change)
    fault = _fault(folder)
    assert "2 missing: norm, layers.0.mixer.conv" in fault or "2 missing: layers.0.mixer.conv, norm" in fault
    assert "1 unexpected: layers.7.extra" in fault
    assert "1 of the wrong shape: layers.1.mlp_norm is [5], not [6]" in fault
    assert re.search(r"1 of a dtype other than F32, BF16, F16: embedding is F64", fault)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_stored_dtypes_are_refused(folder: Path, dtype: torch.dtype) -> None:
    _edit(folder, lambda tensors: tensors.update(norm=tensors["norm"].to(dtype)))
    assert "norm is " in _fault(folder)


def test_lists_are_bounded_and_names_made_printable(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for i in range(100):
            tensors[f"a{i:03d}\x1b[2J" + "x" * 10_000] = torch.ones(1)

    _edit(folder, change)
    fault = _fault(folder)
    assert "100 unexpected: " in fault
    assert "and 92 more" in fault
    assert fault.isprintable()
    assert len(fault) < 5000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["norm", "embedding", "layers.1.mlp.down_proj.weight"])
def test_values_that_are_not_finite_are_refused(folder: Path, name: str, value: float) -> None:
    _edit(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    fault = _fault(folder)
    assert f"1 with values that are not finite: {name}:" in fault


def test_values_that_bfloat16_cannot_hold_are_refused(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors["embedding"][0].fill_(torch.finfo(torch.float32).max))
    load_model(folder, dtype=torch.float32)
    assert "embedding" in _fault(folder, torch.bfloat16)


@settings(max_examples=50)
@given(data=st.data())
def test_no_cut_or_garbled_file_gets_past(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("model")
    save_model(_model(_config(num_hidden_layers=1)), folder, torch.float32)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    kind = data.draw(st.sampled_from(["cut", "longer", "header", "other"]))
    if kind == "cut":
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    elif kind == "longer":
        path.write_bytes(raw + data.draw(st.binary(min_size=1, max_size=9)))
    elif kind == "other":
        path.write_bytes(data.draw(st.binary(max_size=200)))
    else:
        at = data.draw(st.integers(0, header - 1))
        path.write_bytes(raw[:at] + data.draw(st.binary(min_size=1, max_size=1)) + raw[at + 1 :])
    if kind == "header":  # a changed byte of the metadata or the padding may leave the model as it was
        try:
            loaded = load_model(folder, dtype=torch.float32)
        except CheckpointError:
            return
        assert loaded.state_dict().keys() == model_class(loaded.config)(loaded.config).state_dict().keys()
    else:
        assert "model.safetensors: cut short, or no safetensors" in _fault(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"1 shards missing: {gone.name}" in _fault(sharded)


def test_a_cut_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in _fault(sharded)


def _edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1].name
    _edit_index(sharded, lambda weight_map: weight_map.update({"embedding": last}))
    fault = _fault(sharded)
    assert "1 not in the shard that the index names: embedding" in fault
    assert "1 in a shard for which the index does not list them: embedding" in fault


def test_an_index_that_leaves_tensors_out_is_refused(sharded: Path) -> None:
    _edit_index(sharded, lambda weight_map: weight_map.pop("layers.0.mlp.gate_up_proj.weight"))
    assert "layers.0.mlp.gate_up_proj.weight" in _fault(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "x.safetensors\n",
        ".safetensors",
        "x.bin",
        "",
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(sharded: Path, name: str) -> None:
    shutil.copyfile(next(sharded.glob("*.safetensors")), sharded.parent / "x.safetensors")
    _edit_index(sharded, lambda weight_map: weight_map.update({"embedding": name}))
    fault = _fault(sharded)
    assert "1 no plain names of safetensors" in fault
    assert "only files of the model folder are read" in fault


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"embedding": 3}}', "[" * 100_000, b"\xff\xfe"],
)
def test_a_broken_index_is_refused(sharded: Path, text: str | bytes) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "model.safetensors.index.json: " in _fault(sharded)


def test_an_empty_index_lacks_everything(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}', encoding="utf-8")
    assert "only 0 tensors" in _fault(sharded)


def test_pickles_are_not_read(folder: Path) -> None:
    torch.save(_model(_config()).state_dict(), folder / "pytorch_model.bin")
    load_model(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    fault = _fault(folder)
    assert "pytorch_model.bin" in fault
    assert "safetensors.torch.save_file" in fault


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no model.safetensors" in _fault(folder)


def test_fields_that_transformers_adds_are_ignored(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    added = {"transformers_version": "5.0.0", "use_cache": True, "id2label": {"0": "a"}, "_name_or_path": "x"}
    path.write_text(json.dumps(config | added), encoding="utf-8")
    assert load_config(folder).model_dump() == LatticeConfig.model_validate(config).model_dump()
    path.write_text(json.dumps(config | {"num_head": 3}), encoding="utf-8")
    assert "num_head: " in _fault(folder), "a misspelt field of ours"
    del config["torch_dtype"]
    path.write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    assert load_config(folder).torch_dtype == "float32"


def test_transformers_adds_no_field_of_ours() -> None:
    assert not IGNORED_FIELDS & LatticeConfig.model_fields.keys()


def test_sizes_of_another_world_are_refused_at_once(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"num_hidden_layers": 10**9}), encoding="utf-8")
    assert "num_hidden_layers = 1000000000" in _fault(folder)
    for size in (2**40, 2**62, 2**80):
        path.write_text(json.dumps(config | {"vocab_size": size, "hidden_size": size}), encoding="utf-8")
        assert "config.json" in _fault(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_dtypes_are_bounded(folder: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"give torch\.float32 or torch\.bfloat16") as caught:
        load_model(folder, dtype=dtype)
    assert caught.value.param == "dtype"
    with pytest.raises(ConfigError, match=r"give torch\.float32 or torch\.bfloat16"):
        save_model(_model(_config()), folder, dtype)


@pytest.mark.parametrize("device", ["", "cpuu", "cuda:99"])
def test_a_device_must_be_there(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="give cpu, or cuda") as caught:
        load_model(folder, device=device, dtype=torch.float32)
    assert caught.value.param == "device"


def test_saving_replaces_another_layout_and_keeps_other_files(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"t")
    (folder / "model-of-mine.safetensors").write_bytes(b"m")
    kept = {"config.json", "tokenizer.model", "model-of-mine.safetensors"}
    loaded = load_model(folder, dtype=torch.float32)
    truth = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    save_model(loaded, folder, torch.float32, max_shard_bytes=1)
    names = {path.name for path in folder.iterdir()}
    shards = {name for name in names - kept if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    assert len(shards) == len(truth)
    assert names == kept | shards | {"model.safetensors.index.json"}
    loaded = load_model(folder, dtype=torch.float32)
    save_model(loaded, folder, torch.bfloat16)
    assert {path.name for path in folder.iterdir()} == kept | {"model.safetensors"}
    # The views of the files that were replaced are still whole.
    assert all(torch.equal(tensor, truth[name]) for name, tensor in loaded.state_dict().items())


def test_all_files_can_be_read_alike(sharded: Path) -> None:
    assert len({stat.S_IMODE(path.stat().st_mode) for path in sharded.iterdir()}) == 1


def test_a_model_that_diverged_is_not_saved(folder: Path) -> None:
    model = _model(_config())
    model.norm.data[0] = float("nan")
    with pytest.raises(CheckpointError, match="1 with values that are not finite: norm:"):
        save_model(model, folder, torch.float32)
    load_model(folder, dtype=torch.float32)


def test_a_failed_write_leaves_the_old_model(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, before = _tensors(sharded), sorted(sharded.iterdir())
    written: list[Path] = []

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", full)
    other = LatticeForCausalLM(_config())
    other.initialize(seed=8)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(other, sharded, torch.float32, max_shard_bytes=500)
    assert sorted(sharded.iterdir()) == before
    assert all(torch.equal(tensor, truth[name]) for name, tensor in _tensors(sharded).items())


def test_a_write_that_stops_midway_leaves_no_mixture(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, moved = Path.replace, list[Path]()

    def stops(self: Path, target: Path) -> Path:
        if len(moved) == 2:
            raise OSError(5, "Input/output error")
        moved.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stops)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_model(_model(_config()), sharded, torch.float32, max_shard_bytes=500)
    assert "config.json" in _fault(sharded)


def test_a_file_is_no_place_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot write the model"):
        save_model(_model(_config()), tmp_path / "file", torch.float32)
    with pytest.raises(ConfigError, match="max_shard_bytes is 0"):
        save_model(_model(_config()), tmp_path / "model", torch.float32, max_shard_bytes=0)


def test_a_seed_gives_one_model(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        init_model(_config(), tmp_path / name, seed=seed, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert load_model(tmp_path / "a", dtype=torch.bfloat16).config == _config(torch_dtype="bfloat16")


def test_bundled_model_is_a_folder_with_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BUNDLED", folder)
    assert bundled_model() == resolve_model(None) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="install lattice-serve again"):
        resolve_model(None)


def test_resolve_model_wants_a_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(folder) == resolve_model(str(folder)) == folder
    monkeypatch.chdir(folder)
    assert resolve_model(".") == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model") == folder
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve_model(folder.parent)
    for name in ("someone/some-model", folder / "config.json"):
        with pytest.raises(CheckpointError, match="no such folder") as caught:
            resolve_model(name)
        assert caught.value.param == "model"


def test_dtype_is_as_stored_unless_named() -> None:
    for stored, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        config = _config().model_copy(update={"torch_dtype": stored})
        assert pick_dtype("auto", config) == dtype
        assert pick_dtype("float32", config) == torch.float32
        assert pick_dtype("bfloat16", config) == torch.bfloat16
    with pytest.raises(ConfigError, match="give auto, float32 or bfloat16"):
        pick_dtype("float16", _config())  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give cpu, or cuda with a GPU"):
        load_model(tmp_path, device="cuda", dtype=torch.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("model name\t: a bf16 chip\nflags\t\t: fpu avx512f\n", False),
        ("", False),
    ],
)
def test_cpu_flags_are_read(tmp_path: Path, text: str, expected: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text, encoding="utf-8")
    assert cpu_features.has_bf16(path) is expected


def test_a_machine_without_cpu_flags_has_none(tmp_path: Path) -> None:
    assert cpu_features.has_bf16(tmp_path / "cpuinfo") is False
