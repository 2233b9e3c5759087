"""The `lattice` command with the toy family registered: `python -m tests.toy_command serve ...`."""

from __future__ import annotations

import sys
from functools import partial

from lattice_serve.clients import cli
from lattice_serve.engine import process
from lattice_serve.engine.models.registry import FAMILIES
from lattice_serve.server import app
from tests.toy import TOY

if __name__ == "__main__":
    FAMILIES["toy"] = TOY
    if sys.argv[1] == "engine":
        sys.exit(process.main(sys.argv[2:]))
    # The engine is a process of its own, which has to know the family, too.
    engine_command = (sys.executable, "-m", "tests.toy_command", "engine")
    setattr(app, "serve", partial(app.serve, engine_command=engine_command))  # noqa: B010
    cli.main()
