"""A converted model in lm-evaluation-harness, offline, on a task of the test's own: the scores are the model's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.test_conversion import convert_there_and_back

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"
VERSION = re.search(r"^lm-eval==(.+)$", (ROOT / "requirements" / "peers.txt").read_text(), re.MULTILINE)[1]
CHOICES = ("1", "2", "3")
ANSWERS = (0, 1, 2, 0, 1)
TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["1", "2", "3"]
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

pytestmark = pytest.mark.skipif(
    not (PEERS / f"lm_eval-{VERSION}.dist-info").is_dir(),
    reason=f".venv-peers has no lm-eval {VERSION}: run scripts/peers.sh, which says what is in the way",
)


def test_a_converted_model_has_in_the_harness_the_scores_that_transformers_gives(ranks, tiny_models, tmp_path):
    ranks.run(convert_there_and_back, tiny_models["qwen3"], tmp_path)
    questions = [f"1 + {answer} =" for answer in ANSWERS]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": q, "answer": a} for q, a in zip(questions, ANSWERS, strict=True)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "task.yaml").write_text(TASK.format(data=tasks / "data.jsonl"))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.peers.lm_eval_run", tmp_path / "back", tasks],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(PEERS), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = json.loads(run.stdout.splitlines()[-1])
    ours = _loglikelihoods(tiny_models["qwen3"], questions)
    torch.testing.assert_close(torch.tensor(theirs["loglikelihoods"]), ours, rtol=1e-5, atol=1e-4)
    assert theirs["acc"] == pytest.approx((ours.argmax(1) == torch.tensor(ANSWERS)).float().mean().item())


@torch.no_grad()
def _loglikelihoods(path: Path, questions: list[str]) -> torch.Tensor:
    """Of each choice after each question, by transformers from the model before it was converted."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    choices = [tokenizer(choice)["input_ids"][0] for choice in CHOICES]
    rows = [model(torch.tensor([tokenizer(question)["input_ids"]])).logits[0, -1] for question in questions]
    return torch.stack(rows).log_softmax(-1)[:, choices]
