"""Writes the lists of packages that the images install, with hashes: `python deploy/lock.py`. It needs uv.

Versions are those of constraints.txt. torch is in none of them, nor is what its builds for CUDA alone ask for: whoever
builds an image chooses the index of torch, and each has other files.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import tomli

DEPLOY = Path(__file__).parent
ROOT = DEPLOY.parent
OF_TORCH = (
    "filelock",
    "fsspec",
    "jinja2",
    "networkx>=2.5.1",
    "setuptools>=77",
    "sympy>=1.13.3",
    "typing-extensions>=4.10",
)
"""What every build of torch asks for."""
SBOM = ("cyclonedx-bom>=7",)


def main() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dependencies = [each for each in project["dependencies"] if not each.startswith("torch")]
    _lock("requirements.txt", [*dependencies, *OF_TORCH], "every image installs, but torch")
    gpu = project["optional-dependencies"]["gpu"]
    _lock("requirements-gpu.txt", gpu, "the image for GPUs installs besides", "--no-deps")
    # Apart from the project's own packages: no versions have to fit both.
    _lock("requirements-sbom.txt", SBOM, "lists an image's packages; it is not in the image", constrained=False)


def _lock(name: str, wanted: Sequence[str], what: str, *options: str, constrained: bool = True) -> None:
    command = ["uv", "pip", "compile", "-", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", *options]
    command += ["--constraint", str(ROOT / "constraints.txt")] if constrained else []
    pinned = subprocess.run(command, input="\n".join(wanted), capture_output=True, text=True, check=True).stdout
    head = f"# What {what}: pip accepts no file without one of these hashes. Written by deploy/lock.py.\n"
    (DEPLOY / name).write_text(head + pinned, encoding="utf-8")


if __name__ == "__main__":
    main()
