"""Schemathesis at length: its requests, valid and not, against a real server that this starts, of the bundled model.

    python benchmarks/schemathesis_run.py [--examples 20000] [--seed 1]

No answer may be a 5xx, or anything that `/openapi.json` does not describe, and the server has to be ready at the end.
Answers are kept short: it is the requests that are tried. Ends with one line of JSON: how many requests the server
answered, by route and by status. Exits with 1 where a check failed, with what schemathesis says of it before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx
from served import Served

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
)
HOOKS = '''
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    """No answer of more than a few tokens, and of the model that there is: others are a 404, whatever else is asked."""
    body = case.body
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = "lattice"
        limits = ["max_tokens", "max_completion_tokens", "max_output_tokens"]
        given = [name for name in limits if body.get(name) is not None]
        for name in given or ["max_output_tokens" if "input" in body else "max_tokens"]:
            if name not in given or (isinstance(body[name], (int, float)) and body[name] > 8):
                body[name] = 8
'''
OPERATIONS = 15
"""About so many the description has; examples are counted for each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000, help="at least so many requests (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "short_answers.py").write_text(HOOKS)
        with Served(folder, threads=1) as server:
            schema = f"{server.url}/openapi.json"
            command = [str(programs / "schemathesis"), "run", schema, "--checks", CHECKS, "--no-color"]
            command += ["--max-examples", str(options.examples // OPERATIONS), "--seed", str(options.seed)]
            command += ["--request-timeout", "60", "--continue-on-failure"]
            environment = os.environ | {"SCHEMATHESIS_HOOKS": "short_answers", "PYTHONPATH": name}
            done = subprocess.run(command, cwd=name, env=environment)
            ready = httpx.get(f"{server.url}/ready").status_code == 200
        requests = server.logged("request")
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        errors = [line for line in lines if line["level"] in ("error", "critical")]
    for line in errors:
        print(json.dumps(line), file=sys.stderr)
    statuses = Counter(str(line["status"]) for line in requests)
    paths = Counter(line["path"].partition("?")[0] for line in requests)
    routes = {path: count for path, count in paths.most_common() if count > len(requests) / 200}
    result = {"requests": len(requests), "statuses": dict(statuses.most_common()), "routes": routes}
    print(json.dumps(result | {"errors_logged": len(errors), "ready_at_the_end": ready}))
    raise SystemExit(0 if done.returncode == 0 and ready and not errors else 1)


if __name__ == "__main__":
    main()
