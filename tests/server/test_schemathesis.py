"""Schemathesis, the command itself, over our own description: no 5xx, nothing answered that is not described."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.server.harness import ServerProcess

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def test_the_description_holds(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start_server(engine_options=("--longest", "8"))
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json"),
            *(
                "--checks",
                ",".join(CHECKS),
                "--max-examples",
                "10",
                "--seed",
                "1",
                "--no-color",
                "--request-timeout",
                "20",
            ),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
