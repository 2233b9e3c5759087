"""Runs the real server with the fake engine: `run_server.py SETTINGS_JSON ENGINE_OPTION...`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from lattice_serve.engine.errors import ConfigError
from lattice_serve.server.app import serve
from lattice_serve.server.settings import Settings

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests, by nohup for one
    fake_engine = str(Path(__file__).with_name("fake_engine.py"))
    try:
        serve(Settings.load(**json.loads(sys.argv[1])), engine_command=(sys.executable, fake_engine, *sys.argv[2:]))
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
