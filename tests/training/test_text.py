"""Whole runs whose completions are known: where they end, what of them rewards see, and which day prompts write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_aapo.reference_store.store import keys_of
from nemo_aapo.text import chat_template
from tests.evaluation.test_evaluation_ranks import evaluate
from tests.tiny_models import save_scripted_model
from tests.training_runs import exported, make_input, metrics, run, settings

SAYS = ("<think>", "h", "</think>", "<answer>", "7", "</answer>", "<end>", "x")
EOS, END = 1, 97 + 4  # of the special tokens that are not <eos>, the fifth
TEXT = "<think>h</think><answer>7</answer>"
DAYS = ("2025-01-31", "2025-02-01", "2025-02-02")
DATED = "{{ strftime_now('%d.%m') }} {% for m in messages %}{{ m.content }}{% endfor %}"


def on(day, task, *arguments, **more):
    """A task on one rank, begun on that day."""
    clock, chat_template.today = chat_template.today, lambda: day
    try:
        return task(*arguments, **more)
    finally:
        chat_template.today = clock


def fill(words):
    from nemo_aapo.jobs import fill_reference
    from nemo_aapo.launch.world import of_starter
    from nemo_aapo.prepare import prepare_fill

    return fill_reference.fill(prepare_fill(words, of_starter))


def evaluation(model: Path, run_dir: Path, problems: Path, *more: str) -> list[str]:
    return [
        *(f"model.path={model}", f"run.dir={run_dir}", "benchmarks=[held_out]", f"+sources.held_out={problems}"),
        *(
            "rewards=[{name: exact}]",
            "prompt_template=question",
            "sampling.temperature=0",
            "sampling.max_new_tokens=12",
        ),
        *("max_prompt_tokens=16", "max_concurrent_tokens=512", "trainer.devices=1", *more),
    ]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_completion_ends_where_the_model_says_and_keeps_its_special_tokens_in_the_text(ranks, tmp_path):
    """In training, validation, the reference rewards and evaluation; the export says so as well."""
    folder = make_input(tmp_path)
    save_scripted_model(folder / "model", SAYS, eos_token_id=[EOS, END])
    rewards = "rewards=[{name: format, weight: 1.0}]"
    words = settings(folder, folder / "run", rewards, "validation.reward=format", "trainer.max_steps=1")
    words += ["rollout.max_new_tokens=12", "model.optim.lr=1e-12", "reward_runner.workers=0"]
    assert ranks.run(run, words, None, False, tp=None) == [0]
    lines = metrics(folder / "run")
    step = next(line for line in lines if "loss" in line)
    assert (step["completion_length/max"], step["truncated_fraction"]) == (len(SAYS) - 1, 0)
    assert (step["reward/mean"], step["reference_reward/mean"]) == (1, 1)
    assert [line["validation/accuracy_greedy"] for line in lines if "validation/accuracy_greedy" in line] == [1, 1]
    shown = [row for file in (folder / "run" / "rollouts").iterdir() for row in rows(file)]
    assert {(row["completion"], row["tokens"], row["finish_reason"]) for row in shown} == {(TEXT, 7, "stop")}
    (key,) = keys_of(folder / "run" / "reference_rewards.sqlite")
    assert key["sampling"]["stop_token_ids"] == [EOS, END]
    name = "generation_config.json"
    assert (folder / "run/hf_model" / name).read_bytes() == (folder / "model" / name).read_bytes()
    words = evaluation(folder / "run" / "hf_model", folder / "evaluation", folder / "validation.jsonl")
    assert ranks.run(evaluate, words, tp=None) == [0]
    judged = rows(folder / "evaluation" / "completions" / "held_out.jsonl")
    assert {(row["completion"], row["tokens"], row["finish_reason"]) for row in judged} == {(TEXT, 7, "stop")}


@pytest.fixture(scope="module")
def dated(tmp_path_factory) -> Path:
    """A random model whose chat template writes the date."""
    folder = make_input(tmp_path_factory.mktemp("dated"))
    (folder / "model" / "chat_template.jinja").write_text(DATED)
    return folder


def test_a_run_resumed_on_another_day_goes_on_to_the_same_bits(ranks, dated):
    whole, parted = dated / "whole", dated / "parted"
    assert ranks.run(on, DAYS[0], run, settings(dated, whole), tp=None) == [0]
    assert ranks.run(on, DAYS[0], run, settings(dated, parted), 3, tp=None) == [0]
    assert not (parted / "finished").exists()
    assert ranks.run(on, DAYS[1], run, settings(dated, parted), tp=None) == [0]
    assert metrics(parted) == metrics(whole)
    assert exported(parted) == exported(whole)
    (key,) = keys_of(parted / "reference_rewards.sqlite")
    assert key["date"] == DAYS[0]
    assert "date: '2025-01-31'" in (parted / "config.yaml").read_text()
    words = evaluation(parted, dated / "evaluation", dated / "validation.jsonl", "max_problems=1")
    assert ranks.run(on, DAYS[2], evaluate, words, tp=None) == [0]
    (judged,) = rows(dated / "evaluation" / "completions" / "held_out.jsonl")
    assert judged["prompt"].startswith("31.01 ")


def test_a_run_renders_with_the_day_that_its_store_was_filled_on(ranks, dated):
    store = f"algorithm.reference_store={dated}/store.sqlite"
    exact = ["rewards=[{name: exact, weight: 1.0}]", "validation.reward=exact", "reward_runner.workers=0"]
    few = [store, *exact, "trainer.max_steps=1", "trainer.val_check_interval=0", "export_hf_model=false"]
    assert ranks.run(on, DAYS[0], fill, settings(dated, dated / "filled", *few), tp=None) == [0]
    before = (dated / "store.sqlite").read_bytes()
    assert ranks.run(on, DAYS[1], run, settings(dated, dated / "later", *few), None, False, tp=None) == [0]
    assert (dated / "store.sqlite").read_bytes() == before
