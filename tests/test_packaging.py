"""The built wheel, installed away from the source tree, holds everything and serves the bundled model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("clients", "engine", "kernels", "server", "training")
READY_SECONDS = 120.0  # the first start compiles kernels
STOP_SECONDS = 30.0


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    """This environment, less what would make Python or the server look at the source tree."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("LATTICE_")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, so that one is checked as well and nothing left over in build/ gets in."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel; its dependencies are this environment's, not fetched again."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    _run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder.parent
    )
    purelib = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent)
    # A path line adds that folder alone: the .pth files in it, the editable install's among them, are not read.
    Path(purelib.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    sources += [path for package in PACKAGES for path in (ROOT / package).rglob("py.typed")]
    sources += [path for path in (ROOT / "engine" / "bundled").rglob("*") if path.is_file()]
    expected = {f"lattice_serve/{path.relative_to(ROOT).as_posix()}" for path in sources}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_wheel_holds_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in names
    assert "lattice = lattice_serve.clients.cli:main" in archive.read(names["entry_points.txt"]).decode()


def test_installed_wheel_is_what_is_imported(environment: Path, tmp_path: Path) -> None:
    found = _run(
        environment / "bin" / "python", "-c", "import lattice_serve.engine as e; print(e.__file__)", cwd=tmp_path
    )
    assert Path(found.strip()).is_relative_to(environment)


def test_installed_wheel_serves_the_bundled_model(environment: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [environment / "bin" / "lattice", "serve", "--port", str(port)],
            cwd=tmp_path,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            _wait_until_ready(client, server, log)
            model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
            body = {"model": model, "prompt": "It was a dark and stormy", "max_tokens": 8, "temperature": 0.0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"].strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_SECONDS) == 0, log.read_text(errors="replace")
        assert _processes(environment) == {}, "the server left a process behind"
    finally:
        for pid in _processes(environment):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait()


def _processes(environment: Path) -> dict[int, str]:
    """Running processes, process id to command line, that name a virtual environment: the server and its engine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"{environment}/" in command:
                found[int(path.parent.name)] = command
    return found


def _wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with {server.returncode}:\n{log.read_text(errors='replace')}"
        with contextlib.suppress(httpx.TransportError):
            if client.get("/ready").status_code == 200:
                return
        time.sleep(0.1)
    pytest.fail(f"not ready after {READY_SECONDS:.0f} s:\n{log.read_text(errors='replace')}")
