"""A converted model in lm-evaluation-harness, offline, on a task of the test's own: the scores are the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conversion.test_conversion import convert_there_and_back
from tests.peers.peers import needs, run_peer

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

pytestmark = needs("lm-eval")


def test_a_converted_model_has_in_the_harness_the_scores_that_transformers_gives(ranks, tiny_models, tmp_path):
    ranks.run(convert_there_and_back, tiny_models["qwen3"], tmp_path)
    questions = [f"1 + {answer} =" for answer in ANSWERS]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": q, "answer": a} for q, a in zip(questions, ANSWERS, strict=True)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "task.yaml").write_text(TASK.format(data=tasks / "data.jsonl"))
    told = run_peer("lm_eval_run", tmp_path / "back", tasks, home=tmp_path)
    theirs = json.loads(told.splitlines()[-1])
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
