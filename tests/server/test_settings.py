"""Settings: defaults, environment, keywords, faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import ConfigError
from lattice_serve.engine.processors import available_cpus
from lattice_serve.server.settings import Settings


def test_defaults() -> None:
    settings = Settings.load()
    assert (settings.host, settings.port, settings.api_keys) == ("127.0.0.1", 8000, ())
    assert settings.model_name == "lattice"
    expected = EngineConfig(model=settings.model, step_seconds=0.05, threads=available_cpus())
    assert settings.engine_configs() == [expected]


def test_idle_connections_outlast_those_of_common_clients() -> None:
    assert Settings.load().idle_connection_seconds > 90, "Go's pools"


def test_a_keyword_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_PORT", "9000")
    monkeypatch.setenv("LATTICE_MAX_ROWS", "3")
    monkeypatch.setenv("LATTICE_API_KEY", "a,b")
    monkeypatch.setenv("LATTICE_THREADS", "")
    settings = Settings.load(max_rows=5, port=None)
    assert (settings.port, settings.max_rows, settings.threads) == (9000, 5, None)
    assert settings.api_keys == (b"a", b"b")
    assert settings.engine_configs()[0].max_rows == 5


def test_replicas_share_processors_and_take_a_gpu_each() -> None:
    def configs(**fields: Any) -> list[tuple[str, int | None]]:
        return [(config.device, config.threads) for config in Settings.load(**fields).engine_configs()]

    assert configs(replicas=3, threads=2) == [("cpu", 2)] * 3
    assert configs(replicas=available_cpus()) == [("cpu", 1)] * available_cpus()
    assert configs(replicas=2, device="cuda") == [("cuda:0", None), ("cuda:1", None)]
    assert configs(device="cuda:3", threads=1) == [("cuda:3", 1)]
    assert configs(replicas=2, device="cuda", tensor_parallel_size=2) == [("cuda:0", None), ("cuda:2", None)]
    with pytest.raises(ConfigError, match="one for all replicas: give 'cuda'"):
        Settings.load(replicas=2, device="cuda:1")


def test_the_key_is_not_shown() -> None:
    assert "hunter2" not in repr(Settings.load(api_key="hunter2"))


def test_the_model_is_named_for_its_folder(tmp_path: Path) -> None:
    assert Settings.load(model=tmp_path / "small").model_name == "small"
    assert Settings.load(model=tmp_path / "small", served_model_name="mine").model_name == "mine"


def test_keys_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\na\n\n b, c \n  # d\n")
    assert Settings.load(api_key_file=keys, host="0.0.0.0").api_keys == (b"a", b"b, c")
    assert Settings.load(api_key_file=keys, api_key="k,l").api_keys == (b"k", b"l", b"a", b"b, c")


def test_keys_in_a_file_have_weights_and_comments(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\na weight=3\n\n  # none\nb\nc d  weight=1000\nweight=2\n#e\n")
    weights = Settings.load(api_key_file=keys, api_key="k,a").key_weights
    assert weights == {b"k": 1, b"a": 3, b"b": 1, b"c d": 1000, b"weight=2": 1}


@pytest.mark.parametrize("weight", ["0", "-1", "1001", "1.5", "", "x", "\u0663"])
def test_a_wrong_weight_names_its_line_and_not_the_key(tmp_path: Path, weight: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# one\nsecret weight={weight}\n")
    with pytest.raises(
        ConfigError, match="api_key_file: line 2: weight must be a whole number from 1 to 1000"
    ) as caught:
        Settings.load(api_key_file=keys)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("content", [None, b" \n", b"\xff", b"# a\n"])
def test_a_file_without_keys_is_told_at_once(tmp_path: Path, content: bytes | None) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Settings.load(api_key_file=keys)
    assert caught.value.param == "api_key_file"


def test_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().cors_origins == ()
    assert Settings.load(cors_origins=["http://a.example"]).cors_origins == ("http://a.example",)
    monkeypatch.setenv("LATTICE_CORS_ORIGINS", "http://a.example, http://b.example")
    assert Settings.load().cors_origins == ("http://a.example", "http://b.example")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert Settings.load(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="LATTICE_API_KEY") as caught:
        Settings.load(host=host, api_key=" , ")
    assert caught.value.param == "host"
    assert Settings.load(host=host, api_key="key").host == host


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70000), ("port", "x"), ("max_rows", 0), ("grace_period", float("nan")), ("log_level", "loud"), ("no", 1)],
)
def test_a_fault_names_its_field(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        Settings.load(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "x"),
        ("max_rows", "none"),
        ("state_memory", "1G"),
        ("log_level", "loud"),
        ("grace_period", "-1"),
        ("replicas", "0"),
        ("host", "0.0.0.0"),
        ("api_key_file", "missing"),
        ("prefix_cache_file", "missing/file"),
        ("dtype", "int3"),
        ("threads", "1.5"),
        ("watchdog_seconds", "nan"),
    ],
)
def test_a_fault_of_the_environment_names_its_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"LATTICE_{name.upper()}", value)
    with pytest.raises(ConfigError, match=f"^LATTICE_{name.upper()}: ") as caught:
        Settings.load()
    assert caught.value.param == name
    with pytest.raises(ConfigError, match=f"^{name}"):
        Settings.load(**{name: value})


def test_the_variables_of_a_kubernetes_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("LATTICE_SERVICE_PORT", "8000")
    monkeypatch.setenv("LATTICE_SERVICE_PORT_HTTP", "8000")
    for name, value in {"": "tcp://10.0.0.1:8000", "_PROTO": "tcp", "_PORT": "8000", "_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(f"LATTICE_PORT_8000_TCP{name}", value)
    assert Settings.load().port == 8000
    monkeypatch.setenv("LATTICE_PORT", "tcp://10.0.0.1:8000")
    assert Settings.load(port=9000).port == 9000
    with pytest.raises(
        ConfigError, match=r"LATTICE_PORT is 'tcp://10.* rename the Service.* enableServiceLinks: false"
    ):
        Settings.load()


def test_faults_across_fields_are_told_too() -> None:
    with pytest.raises(ConfigError, match="max_step_tokens"):
        Settings.load(max_rows=600, max_step_tokens=100)


def test_a_gpu_has_longer_steps_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().max_step_tokens == 512
    assert Settings.load(device="cuda").max_step_tokens == 2048
    monkeypatch.setenv("LATTICE_DEVICE", "cuda")
    assert [each.max_step_tokens for each in Settings.load(replicas=2).engine_configs()] == [2048, 2048]
    monkeypatch.setenv("LATTICE_MAX_STEP_TOKENS", "300")
    assert Settings.load().max_step_tokens == 300


def test_each_replica_has_a_cache_file_of_its_own(tmp_path: Path) -> None:
    path, key = tmp_path / "states", tmp_path / "key"
    seconds = "--cache-save-seconds=300.0"
    assert Settings.load(prefix_cache_file=path).cache_options() == [[f"--cache-file={path}", seconds]]
    given = {"prefix_cache_file": path, "prefix_cache_key_file": key, "prefix_cache_save_seconds": 5}
    assert Settings.load(**given, replicas=2).cache_options() == [
        [f"--cache-file={path}.{i}", "--cache-save-seconds=5.0", f"--cache-key-file={key}"] for i in range(2)
    ]
    assert Settings.load(replicas=2).cache_options() == [[], []]


@pytest.mark.parametrize("name", ["", "none/states"])
def test_a_cache_file_needs_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"prefix_cache_file is .*: give a file in a folder that can be written"):
        Settings.load(prefix_cache_file=tmp_path / name)
