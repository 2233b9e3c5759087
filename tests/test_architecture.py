"""The rules of the source tree that no linter knows: who may import whom, and what is packaged."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli

ROOT = Path(__file__).parents[1]
NAMESPACE = "lattice_serve"
MAY_IMPORT = {
    "kernels": set[str](),
    "engine": {"kernels"},
    "server": {"kernels", "engine"},
    "clients": {"kernels", "engine", "server"},
    "training": {"kernels", "engine"},
}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|tmp|opt/pypi|opt/wheels)/")
MAX_LINES = 400


def _modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, `from a import b` as `a.b`, those in functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _pyproject() -> dict[str, Any]:
    return tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_run_one_way(layer: str) -> None:
    allowed = MAY_IMPORT[layer] | {layer}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _modules(layer)
        for name in _imports(path)
        if name.split(".")[0] == NAMESPACE and name.split(".")[1] not in allowed
    ]
    assert not wrong


def test_no_module_is_imported_by_its_folder_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _modules(*MAY_IMPORT, "tests", "benchmarks")
        for name in _imports(path)
        if name.split(".")[0] in MAY_IMPORT
    ]
    assert not wrong


FAMILY_WORDS = re.compile(
    r"\b(LatticeForCausalLM|LatticeConfig|num_slots|head_dim|chunk_size|MixerShape|StateLayout)\b"
)


def test_the_registry_alone_knows_a_model_family() -> None:
    """Engine, server and clients name nothing of Lattice's own but in its module and the registry's line."""
    own = ROOT / "engine" / "models"
    allowed = {own / "registry.py", *(own / "lattice").rglob("*.py")}
    wrong = []
    for path in _modules("engine", "server", "clients"):
        if path in allowed:
            continue
        family = (
            f"{NAMESPACE}.engine.models.lattice",
            f"{NAMESPACE}.kernels.mixers.lattice",
            f"{NAMESPACE}.kernels.decoder",
        )
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in _imports(path) if name.startswith(family)]
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        wrong += [f"{path.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in lines if FAMILY_WORDS.search(line)]
    assert not wrong


def test_reading_a_config_imports_no_torch() -> None:
    """The server, which reads it, never computes."""
    bundled = ROOT / "engine" / "bundled"
    code = (
        f"import sys; from pathlib import Path; from {NAMESPACE}.engine.models.registry import load_config; "
        f"load_config(Path({str(bundled)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", ["engine/scheduler.py", "engine/sequence.py"])
def test_scheduling_knows_no_torch(module: str) -> None:
    assert "torch" not in {name.split(".")[0] for name in _imports(ROOT / module)}


def test_no_module_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _modules(*MAY_IMPORT)}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_pyproject_lists_every_package_folder() -> None:
    folders = {path.parent.relative_to(ROOT) for path in _modules(*MAY_IMPORT)}
    setuptools = _pyproject()["tool"]["setuptools"]
    assert setuptools["packages"] == sorted(".".join((NAMESPACE, *folder.parts)) for folder in folders)
    assert setuptools["package-dir"] == {f"{NAMESPACE}.{layer}": layer for layer in sorted(MAY_IMPORT)}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


def test_every_package_that_is_imported_is_declared() -> None:
    project = _pyproject()["project"]
    required = {_package(each) for each in project["dependencies"]}
    extras = {_package(each) for name in ("gpu", "plot", "train") for each in project["optional-dependencies"][name]}
    imported = {name.split(".")[0].replace("_", "-") for path in _modules(*MAY_IMPORT) for name in _imports(path)}
    imported -= {name.replace("_", "-") for name in sys.stdlib_module_names} | {NAMESPACE.replace("_", "-")}
    assert imported - required - extras == set()
    assert required - imported == {"uvloop"}, "uvicorn's, by name"


def _package(requirement: str) -> str:
    return re.split(r"[\[<>=~!;@ ]", requirement)[0]


def test_triton_is_for_gpus_alone() -> None:
    """Without it all but its kernels can be imported, and a model runs on the CPU."""
    modules = [
        ".".join((NAMESPACE, *path.relative_to(ROOT).with_suffix("").parts))
        for path in _modules(*MAY_IMPORT)
        if "triton" not in {name.split(".")[0] for name in _imports(path)} and "triton" not in path.as_posix()
    ]
    script = (
        f"import sys; sys.modules['triton'] = None; import importlib; [importlib.import_module(m) for m in {modules}]"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_every_layer_is_typed_and_guarded_from_bare_import() -> None:
    assert [layer for layer in MAY_IMPORT if not (ROOT / layer / "py.typed").is_file()] == []
    banned = _pyproject()["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(MAY_IMPORT)


def test_no_text_names_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # not text, or deleted and not yet committed
            continue
        wrong += [f"{name}:{i}" for i, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]
    assert not wrong
