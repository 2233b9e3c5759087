from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from lattice_serve.clients.cli import main
from lattice_serve.clients.cli.serve import parse_size
from lattice_serve.clients.types import ChatCompletion
from lattice_serve.engine.errors import CheckpointError, EngineDied
from lattice_serve.engine.models.registry import load_config
from lattice_serve.engine.sampling import SamplingParams
from lattice_serve.engine.tokenizer import Tokenizer
from lattice_serve.server.settings import BUNDLED_MODEL, Settings

if TYPE_CHECKING:
    from tests.clients.conftest import PlayedServer

TEXT = "Once upon\u2028 é!"
"""What the played server says."""
CODE = "from lattice_serve.clients.cli import main; main()"
COMMANDS = [[], ["serve"], ["chat"], ["generate"], ["init"], ["bench"], ["bench", "offline"], ["bench", "http"]]


def _run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(main, arguments, input=stdin, env={"COLUMNS": "200", "TERM": "dumb"})


def _process(*arguments: str, code: str = CODE) -> Any:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


class PlayedLLM:
    """Stands for the engine in this process; the last one made is `made`."""

    made: PlayedLLM

    def __init__(self, model: Path | None = None, **fields: Any) -> None:
        if model == Path("nowhere"):
            raise CheckpointError("nowhere/config.json: No such file:\n give a folder that holds a Lattice model")
        self.model, self.fields = model, fields
        PlayedLLM.made = self

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[Any]:
        self.prompt, self.params = prompt, params
        yield SimpleNamespace(text=" upon")
        if prompt == "die":
            raise EngineDied("the engine died")
        if prompt == "interrupt":
            raise KeyboardInterrupt
        yield SimpleNamespace(text=" a time")


@pytest.fixture
def _played_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lattice_serve.engine.llm")
    module.LLM = PlayedLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lattice_serve.engine.llm", module)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str]) -> None:
    result = _run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    for example in [line for line in result.stdout.splitlines() if line.strip(" │").startswith("lattice ")]:
        assert typer.main.get_command(main).commands[example.split()[1]]  # type: ignore[attr-defined]


def test_help_and_version_from_a_shell_are_quick() -> None:
    code = (
        "import sys; from lattice_serve.clients.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'pydantic', 'httpx'} & set(sys.modules)))"
    )
    assert _process("--help", code=code).stdout.splitlines()[-1] == "[]"
    shown = _process("--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, version("lattice-serve") + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "Once", "--temperature", "-1"], "error: temperature is -1.0: give between 0 and 100\n"),
        (["serve", "--host", "0.0.0.0"], "error: host is '0.0.0.0', which others can reach: set an API key"),
        (["bench", "http", "--url", "http://127.0.0.1:1"], "error: http://127.0.0.1:1/v1/models: "),
        (["init", "no-config.json", "out"], "error: no-config.json: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_code_2(arguments: list[str], message: str) -> None:
    result = _process(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(played: PlayedServer, tmp_path: Path, closed: str) -> None:
    """An event loop, which aborts where one of its files is a standard one; and a chat, which reads."""
    report = tmp_path / "report.json"
    load = ["bench", "http", "--concurrency", "1", "--requests", "1", "--output-tokens", "5", "--json", str(report)]
    for command in load, ["chat"]:
        arguments = [sys.executable, "-c", CODE, *command, "--url", played.url]
        done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *arguments], input=b"", capture_output=True)
        assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["benchmark"] == "http"


def test_a_full_disk_is_one_line(played: PlayedServer) -> None:
    arguments = [sys.executable, "-c", CODE, "chat", "--url", played.url]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(arguments, input="Who?\n", stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")


@pytest.mark.usefixtures("_played_llm")
class TestGenerate:
    def test_text_and_parameters(self) -> None:
        result = _run(
            *["generate", "Once", "--model", "m", "--max-tokens", "9", "--temperature", "0.5", "--top-p", "0.9"],
            *[
                "--top-k",
                "4",
                "--min-p",
                "0.1",
                "--repetition-penalty",
                "1.2",
                "--seed",
                "3",
                "--stop",
                "x",
                "--stop",
                "y",
            ],
            *["--dtype", "float32", "--threads", "2"],
        )
        assert (result.exit_code, result.stdout) == (0, " upon a time\n")
        llm = PlayedLLM.made
        assert (llm.model, llm.prompt) == (Path("m"), "Once")
        assert llm.fields == {"dtype": "float32", "quantization": None, "threads": 2, "max_rows": 1}
        assert llm.params == SamplingParams(
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            min_p=0.1,
            repetition_penalty=1.2,
            seed=3,
            stop=("x", "y"),
        )

    def test_the_defaults(self) -> None:
        _run("generate", "Once")
        assert PlayedLLM.made.model is None
        assert PlayedLLM.made.params == SamplingParams(max_tokens=128)

    def test_a_prompt_from_standard_input(self) -> None:
        assert _run("generate", "-", stdin="It was\na night").exit_code == 0
        assert PlayedLLM.made.prompt == "It was\na night"

    def test_an_error_after_some_text(self) -> None:
        result = _run("generate", "die")
        assert (result.exit_code, result.stdout, result.stderr) == (2, " upon", "error: the engine died\n")

    def test_an_error_of_two_lines_is_shown_as_one(self) -> None:
        result = _run("generate", "Once", "--model", "nowhere")
        assert result.stderr == "error: nowhere/config.json: No such file: give a folder that holds a Lattice model\n"

    def test_control_c(self) -> None:
        assert _run("generate", "interrupt").exit_code == 130


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Settings that the server was started with."""
    from lattice_serve.server import app

    settings: list[Settings] = []
    monkeypatch.setattr(app, "serve", settings.append)
    return settings


def test_serve_leaves_what_is_not_given_to_the_environment(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_PORT", "9000")
    monkeypatch.setenv("LATTICE_MAX_ROWS", "7")
    assert _run("serve", "--max-rows", "8").exit_code == 0
    assert (served[0].model, served[0].host, served[0].port, served[0].max_rows) == (
        BUNDLED_MODEL,
        "127.0.0.1",
        9000,
        8,
    )


def test_serve_passes_every_option_on(served: list[Settings], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from file\n")
    result = _run(
        *["serve", "folder", "--host", "0.0.0.0", "--port", "1", "--api-key", "k", "--served-model-name", "n"],
        *[
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--threads",
            "2",
            "--max-rows",
            "3",
            "--state-memory",
            "2M",
            "--speculative-tokens",
            "5",
            "--prefix-cache-memory",
            "3M",
            "--prefix-cache-file",
            str(tmp_path / "states"),
            "--prefix-cache-key-file",
            str(tmp_path / "key"),
            "--prefix-cache-save-seconds",
            "7",
        ],
        *["--max-step-tokens", "64", "--max-waiting", "5", "--grace-period", "1.5", "--log-level", "debug"],
        *["--watchdog-seconds", "9"],
        *["--api-key-file", str(keys), "--cors-origin", "http://a.example", "--cors-origin", "http://b.example"],
    )
    assert result.exit_code == 0, result.output
    given = served[0].model_dump(exclude_defaults=True, exclude={"api_key"})
    assert given == {
        "model": Path("folder"),
        "host": "0.0.0.0",
        "port": 1,
        "served_model_name": "n",
        "dtype": "float32",
        "threads": 2,
        "max_rows": 3,
        "state_memory": 2 << 20,
        "prefix_cache_memory": 3 << 20,
        "prefix_cache_file": tmp_path / "states",
        "prefix_cache_key_file": tmp_path / "key",
        "prefix_cache_save_seconds": 7,
        "speculative_tokens": 5,
        "max_step_tokens": 64,
        "max_waiting": 5,
        "grace_period": 1.5,
        "watchdog_seconds": 9,
        "log_level": "debug",
        "api_key_file": keys,
        "cors_origins": ("http://a.example", "http://b.example"),
    }
    assert served[0].api_keys == (b"k", b"from file")


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("2K", 2048), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1 mb", 1 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1T", "1KK"])
def test_what_is_no_size(text: str) -> None:
    result = _run("serve", "--state-memory", text)
    assert result.exit_code == 2
    assert "such as 512M" in result.stderr


class TestInit:
    def _config(self, folder: Path, **fields: Any) -> Path:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 4, "num_slots": 2}
        vocab_size = Tokenizer.load(BUNDLED_MODEL).vocab_size
        path = folder / "config.json"
        path.write_text(json.dumps({"vocab_size": vocab_size, "intermediate_size": 8, **sizes, **fields}))
        return path

    @pytest.mark.parametrize("name", ["config.json", "."])
    def test_a_model_with_the_bundled_tokenizer(self, tmp_path: Path, name: str) -> None:
        self._config(tmp_path)
        out = tmp_path / "out"
        result = _run("init", str(tmp_path / name), str(out), "--seed", "5", "--dtype", "float32")
        assert result.exit_code == 0, result.output
        config = load_config(out)
        assert (config.model_dump()["num_slots"], config.torch_dtype) == (2, "float32")
        assert (out / "tokenizer.model").read_bytes() == (BUNDLED_MODEL / "tokenizer.model").read_bytes()

    def test_the_seed_decides_the_weights(self, tmp_path: Path) -> None:
        config = str(self._config(tmp_path))
        weights = []
        for place, seed in enumerate("556"):
            out = tmp_path / str(place)
            assert _run("init", config, str(out), "--seed", seed).exit_code == 0
            weights.append((out / "model.safetensors").read_bytes())
        assert weights[0] == weights[1] != weights[2]

    def test_the_dtype_of_the_config(self, tmp_path: Path) -> None:
        assert _run("init", str(self._config(tmp_path)), str(tmp_path / "out")).exit_code == 0
        assert load_config(tmp_path / "out").torch_dtype == "bfloat16"

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"vocab_size": 7}, "4096 pieces, the model a vocab_size of 7: give the tokenizer"),
            ({"hidden_size": 0, "color": 1}, "hidden_size: Input should be greater than or equal to 1; color: Extra"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, fields: dict[str, int], message: str) -> None:
        result = _run("init", str(self._config(tmp_path, **fields)), str(tmp_path / "out"))
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "out").exists()

    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        result = _run("init", str(self._config(tmp_path)), str(tmp_path))
        assert result.exit_code == 2
        assert "new or empty" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


class TestBenchHttp:
    def test_table_and_json(self, played: PlayedServer, tmp_path: Path) -> None:
        file, picture = tmp_path / "out.json", tmp_path / "out.png"
        result = _run(
            *["bench", "http", "--url", played.url, "--concurrency", "2", "--rate", "500", "--requests", "4"],
            *["--prompt-tokens", "3", "--output-tokens", "5", "--ttft-ms", "60000", "--json", str(file)],
            *["--plot", str(picture)],
        )
        assert result.exit_code == 0, result.output
        *table, line = result.stdout.splitlines()
        assert file.read_text() == line + "\n"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert [row.split()[0] for row in table if "0 of 4" in row] == ["2", "500"]
        shown = json.loads(line)
        assert (shown["benchmark"], shown["model"], shown["goal"]["ttft_ms"]) == ("http", "tiny", 60000)
        assert [(run["failed"], run["output_tokens"], run["goodput"]) for run in shown["runs"]] == [(0, 20, 1.0)] * 2
        # The list of models, a warm-up, and what was asked for.
        assert len(played.bodies) == 1 + 1 + 8

    def test_failures_are_named(self, played: PlayedServer) -> None:
        result = _run("bench", "http", "--url", played.url, "--model", "tiny", "--output-tokens", "6")
        assert result.exit_code == 2
        assert "5 tokens in 5 chunks, not 6 tokens" in result.stderr

    def test_a_file_that_cannot_be_written(self, played: PlayedServer, tmp_path: Path) -> None:
        file = tmp_path / "no" / "out.json"
        arguments = ["--concurrency", "1", "--requests", "1", "--output-tokens", "5", "--json", str(file)]
        result = _run("bench", "http", "--url", played.url, *arguments)
        assert result.exit_code == 2
        assert json.loads(result.stdout.splitlines()[-1])["benchmark"] == "http"
        assert str(file) in result.stderr


def test_chat(played: PlayedServer) -> None:
    result = _run("chat", "--url", played.url, "--system", "Rhyme.", "--max-tokens", "9", stdin="Who?\n \nAnd then?")
    assert (result.exit_code, result.stdout) == (0, f"{TEXT}\n{TEXT}\n")
    _, first, second = played.bodies  # that before them asks whether there is a server
    assert (first["max_tokens"], first["temperature"], "seed" in first) == (9, 1.0, False)
    said = [("system", "Rhyme."), ("user", "Who?"), ("assistant", TEXT), ("user", "And then?")]
    assert first["messages"] == second["messages"][:2]
    assert [(message["role"], message["content"]) for message in second["messages"]] == said


def test_an_answer_that_is_interrupted_is_part_of_the_chat(
    played: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ChatCompletion.text.fget  # type: ignore[attr-defined]

    def text(chunk: ChatCompletion) -> Any:
        if len(played.bodies) == 2 and whole(chunk) == "!":
            raise KeyboardInterrupt
        return whole(chunk)

    monkeypatch.setattr(ChatCompletion, "text", property(text))
    result = _run("chat", "--url", played.url, stdin="Who?\nAnd then?\n")
    cut = TEXT.removesuffix("!")
    assert (result.exit_code, result.stdout) == (0, f"{cut} ...\n{TEXT}\n")
    assert played.bodies[-1]["messages"][1] == {"role": "assistant", "content": cut}


def test_an_error_does_not_end_a_chat_at_a_terminal(played: PlayedServer) -> None:
    terminal, stdin = pty.openpty()
    arguments = [sys.executable, "-c", CODE, "chat", "--url", played.url]
    with subprocess.Popen(arguments, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.write(terminal, b"Who?\n")
        assert process.stdout.readline().endswith(f"{TEXT}\n")
        played.refusals.append((400, None))
        os.write(terminal, b"Lost.\nAnd then?\n")
        assert process.stdout.readline().endswith(f"{TEXT}\n")
        os.write(terminal, b"\x04")
        _, errors = process.communicate(timeout=60)
    os.close(terminal)
    os.close(stdin)
    assert (process.returncode, errors) == (0, "error: 400: refused\n")
    assert [message["content"] for message in played.bodies[-1]["messages"]] == ["Who?", TEXT, "And then?"]


def test_what_is_said_may_be_no_text(played: PlayedServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "chat", "--url", played.url],
        input=b"Wh\xff?\n",
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert played.bodies[-1]["messages"] == [{"role": "user", "content": "Wh\ufffd?"}]


def test_chat_without_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = _run("chat", "--url", url, stdin="Who?\n")
    assert result.exit_code == 2
    assert url in result.stderr
    assert "`lattice serve` starts one" in result.stderr
