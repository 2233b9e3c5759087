"""Log lines: JSON, whoever writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, structlog
from lattice_serve.server import logs
logs.configure("info")
structlog.get_logger().info("ours", status=200)
logging.getLogger("uvicorn.error").warning("theirs %s", "too")
logging.getLogger("uvicorn.error").info("not asked for")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("asyncio").exception("a fault")
"""


def test_lines_of_libraries_are_json_too() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    ours, theirs, fault = map(json.loads, done.stderr.splitlines())
    assert (ours["event"], ours["level"], ours["status"]) == ("ours", "info", 200)
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("theirs too", "warning", "uvicorn.error")
    assert "ZeroDivisionError" in fault["exception"]
    assert all(line["timestamp"] for line in (ours, theirs, fault))


def test_lines_that_cannot_be_written_fail_nothing() -> None:
    # Buffered, as it is by default: what is left of it is written at the end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", SCRIPT + "print('went on')"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "went on\n")
