"""EleutherAI's lm-evaluation-harness, the command itself, against a real server: its likelihoods are the model's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lattice_serve.engine.llm import LLM
from lattice_serve.engine.weights import bundled_model
from tests.e2e.harness import RealServer

QUESTIONS: list[dict[str, Any]] = [
    {"question": "It was a dark night, and", "choices": [" the moon was not up", " seven and"], "answer": 0},
    {"question": "She said that she", "choices": [" was happy.", " of the", " is"], "answer": 0},
    {"question": "The king of", "choices": [" France", " very"], "answer": 0},
]
TASK = """\
task: little
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_the_models(
    start_server: Callable[..., RealServer], tmp_path: Path, batch_size: int
) -> None:
    server = start_server(model=bundled_model())
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "little.yaml").write_text(TASK.format(data=data))
    model = f"model=lattice,base_url={server.url}/v1/completions,tokenizer_backend=remote"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model),
            *("--tasks", "little", "--include_path", tmp_path, "--batch_size", str(batch_size)),
            *("--output_path", tmp_path / "out", "--log_samples"),
        ],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [samples] = (tmp_path / "out").rglob("samples_little_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    llm = LLM(bundled_model(), max_rows=1)
    for question, row in zip(QUESTIONS, rows, strict=True):
        context = llm.tokenizer.encode(str(question["question"]))
        for choice, response in zip(question["choices"], row["filtered_resps"], strict=True):
            whole = llm.tokenizer.encode(str(question["question"]) + choice)
            assert whole[: len(context)] == context
            truth = sum(llm.score(whole)[len(context) - 1 :])
            assert float(response[0]) == pytest.approx(truth, abs=1e-4)
