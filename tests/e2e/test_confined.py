"""A service on a file system that cannot be written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.confined import needs_confinement, read_only
from tests.e2e.harness import RealServer


@needs_confinement
def test_a_service_without_a_home_on_a_read_only_root(
    start_server: Callable[..., RealServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no folder for temporary files but the memory's: engine, grammars and templates, and compiled code of before,
    where there is some."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir("/")
    server = start_server(prefix=read_only(), environment={"HOME": "/nonexistent", "PYTHONWARNINGS": "default"})
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": [7]}}}
    answer = server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], response_format=schema, max_tokens=9
    )
    assert answer.json()["choices"][0]["message"]["content"] == "7"
    log = server.log_path.read_text()
    assert "Traceback" not in log
    assert log.count("compiled kernels are not kept") <= 1
