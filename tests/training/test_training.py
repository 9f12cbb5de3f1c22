"""Whole runs on worker ranks: real text, every algorithm, layouts, interruption, numbers that are not finite."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2Config

from nemo_aapo.checkpoint import manifest
from tests.doctor.test_parity import OtherTemperature
from tests.tiny_models import SIZES, save_character_tokenizer, save_model
from tests.training_runs import IN_THE_THIRD_STEP, Parity, exported, kept, metrics, run, settings

SHARED = Path(__file__).parents[3] / "shared"
STEP_KEYS = {
    "step", "reward/mean", "reward/std", "reference_reward/mean", "advantage/abs_mean", "groups/zero_std",
    "groups/zero_advantage", "loss", "grad_norm", "lr", "entropy", "completion_length/mean", "completion_length/max",
    "truncated_fraction", "tokens_per_second", "time/rollout", "time/reward", "time/train", "time/refit", "time/step",
    "rollout/tail_factor", "rollout/idle_fraction", "rollout/tokens_per_second",
}  # fmt: skip


def test_a_run_leaves_what_its_contract_says(uninterrupted):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "finished",
        "logs",
        "tensorboard",
        "checkpoints/step_000006",
        "hf_model/config.json",
    ):
        assert (uninterrupted / name).exists(), name
    lines = metrics(uninterrupted, timeless=False)
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation/accuracy_greedy" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validations] == [0, 2, 4, 6]
    assert all(set(line) >= STEP_KEYS for line in steps)
    assert all(np.isfinite(line[key]) for line in steps for key in STEP_KEYS)
    assert all(line["parity/mult_prob_error"] < 1.0001 for line in steps)
    assert lines[0] == validations[0]  # before any update
    names = set().union(*lines)  # MLflow keeps a metric in a file of its name: none can be the folder of others
    assert not [name for name in names if any(other.startswith(f"{name}/") for other in names)]
    rows = [json.loads(line) for line in (uninterrupted / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * (1 + 2)
    assert set(rows[0]) >= {"prompt", "completion", "answer", "reward", "finish_reason"}


def test_some_rollouts_of_each_step_are_kept_with_their_tokens(uninterrupted):
    rows, tokens = kept(uninterrupted)
    assert list(rows) == list(tokens) == [f"train_{step:06d}" for step in range(1, 7)]
    for name, lines in rows.items():
        of = {key: np.array(value) for key, value in tokens[name].items()}
        assert len({line["group"] for line in lines}) == 2
        assert len(lines) == 2 * 4
        assert [line["tokens"] for line in lines] == of["lengths"].tolist()
        assert np.abs(of["logprobs"] - of["learner_logprobs"]).max() < 1e-4  # the engine's and the learner's
        assert (of["entropy"] > 0).all()
        assert len(of["entropy"]) == of["lengths"].sum()
        last = np.cumsum(of["lengths"]) - 1
        assert of["text_ends"][last].tolist() == [len(line["completion"]) for line in lines]
        for line in lines:
            assert line["group_advantage"] + line["margin"] == pytest.approx(line["advantage"], abs=1e-12)
            assert line["reference_rewards"]
            assert line["policy_version"] == line["step"] - 1


def test_a_run_is_replayed_without_an_engine_to_the_same_updates(ranks, folder, uninterrupted):
    """Of a run that kept all of its steps."""
    kept_all = ["rollout.keep_groups=all", "rollout.keep_tokens=true", "trainer.max_steps=2"]
    source, again = folder / "kept_all", folder / "replayed"
    assert ranks.run(run, settings(folder, source, *kept_all), tp=None) == [0]
    replay = [f"rollout.replay={source}", "trainer.val_check_interval=0", "trainer.max_steps=2"]
    assert ranks.run(run, settings(folder, again, *replay), tp=None) == [0]
    told = {"loss", "grad_norm", "entropy", "reward/mean", "advantage/abs_mean", "parity/mult_prob_error", "epoch"}
    for line, expected in zip(metrics(again), [m for m in metrics(source) if "loss" in m], strict=True):
        assert {key: line[key] for key in told} == {key: expected[key] for key in told}
    assert exported(again) == exported(source)
    (rows, _), (expected_rows, _) = kept(source), kept(uninterrupted)
    assert [line for line in rows["train_000001"] if line in expected_rows["train_000001"]] == expected_rows[
        "train_000001"
    ]


def test_a_stop_breaks_off_an_export_and_leaves_nothing_of_it(ranks, folder, uninterrupted, tmp_path):
    config = settings(folder, tmp_path / "run", "export_hf_model=false", world=2)
    assert ranks.run(_broken_off_export, config, str(tmp_path / "export"), world=2, tp=None) == [True, True]
    assert not list(tmp_path.glob("*export*"))


def _broken_off_export(overrides, directory):
    """Asked for on rank 1 alone."""
    import torch.distributed as dist

    from nemo_aapo import load_config
    from nemo_aapo.errors import Interrupted
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.training.build import build_policy, initialize

    config = load_config(overrides)
    initialize(config)
    policy = build_policy(resolve(config, 2, given=("rewards",)), trains=False)
    try:
        policy.export(directory, lambda: dist.get_rank() == 1)
    except Interrupted:
        return True
    return False


@pytest.mark.exact
def test_a_disagreement_of_engine_and_learner_stops_the_run_before_the_first_step(ranks, folder):
    strict = settings(folder, folder / "strict", "rollout.max_parity_error=1", "rollout.max_gen_kl=0")
    with pytest.raises(
        AssertionError, match=r"before the first step: engine and learner disagree .*rollout\.temperature"
    ):
        ranks.run(run, strict, tp=None)
    assert [line["step"] for line in metrics(folder / "strict")] == [0]


def _run_hotter(overrides):
    from nemo_aapo import RewardRunner, load_config, train
    from nemo_aapo.engines.build import build_engine
    from nemo_aapo.models.directory import read_model_dir

    config = load_config(overrides)

    def make(policy):
        return OtherTemperature(build_engine(config, policy, read_model_dir(config.model.path), str))

    return train(config, engine=make, rewards=RewardRunner([(Parity(), 1.0)], workers=0, timeout_s=10.0))


def test_a_resumed_run_that_trains_on_what_was_sampled_before_compares_its_own_engine(ranks, folder):
    run_dir = folder / "resumed_ahead"
    ahead = settings(folder, run_dir, "rollout.async_depth=1", "algorithm.importance_weight_cap=2.0")
    assert ranks.run(run, ahead, IN_THE_THIRD_STEP, tp=None) == [0]
    before = metrics(run_dir)
    with pytest.raises(AssertionError, match=r"before the first step: engine and learner disagree"):
        ranks.run(_run_hotter, ahead, tp=None)
    assert metrics(run_dir) == before


def test_a_cosine_schedule_warms_up_and_ends_at_its_minimum(ranks, folder):
    cosine = ["name=cosine", "warmup_steps=1", "min_lr=1e-4"]
    run_dir = folder / "cosine"
    config = settings(folder, run_dir, *(f"model.optim.sched.{word}" for word in cosine), "export_hf_model=false")
    assert ranks.run(run, config, tp=None) == [0]
    rates = [line["lr"] for line in metrics(run_dir) if "loss" in line]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("algorithm", ["aapo_paper", "gpg", "grpo"])
def test_every_algorithm_runs_with_its_papers_settings(ranks, folder, algorithm):
    run_dir = folder / algorithm
    config = settings(folder, run_dir, f"algorithm={algorithm}", "trainer.max_steps=2", "export_hf_model=false")
    assert ranks.run(run, config, tp=None) == [0]
    steps = [line for line in metrics(run_dir) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert (steps[0]["reference_reward/mean"] is not None) == (algorithm == "aapo_paper")
    assert ("kl" in steps[0]) == (algorithm == "grpo")
    assert all(line["grad_norm"] > 0 for line in steps)


@pytest.mark.exact
def test_numbers_that_are_not_finite_end_the_run_on_every_rank_and_leave_the_checkpoints(ranks, folder):
    """Whether engine or learner meets the overflow first is the processor's choice: how a sum of huge terms is cut
    into vectors decides where it becomes infinite."""

    run_dir = folder / "overflow"
    config = settings(folder, run_dir, "model.optim.sched.warmup_steps=3", "model.optim.lr=1e30", world=2, pp=2)
    config += ["checkpoint.save_interval=1", "trainer.val_check_interval=0"]
    with pytest.raises(AssertionError) as raised:
        ranks.run(run, config, world=2, tp=None)
    ends = re.findall(r"(?m)^nemo_aapo\.errors\.NonFiniteError: step (\d+).*[Nn]o checkpoint", str(raised.value))
    assert len(ends) == 2, raised.value  # both ranks say so
    done = [line["step"] for line in metrics(run_dir)]
    assert ends == [str(len(done) + 1)] * 2
    assert [manifest.read(path).step for path in sorted((run_dir / "checkpoints").iterdir())] == done != []
    assert not (run_dir / "finished").exists()


@pytest.mark.once
def test_real_text_with_the_real_vocabulary_flows_through_every_stage(ranks, tmp_path):
    make_real_input(tmp_path)
    (tmp_path / "length.py").write_text(
        "def by_length(prompt, completion, answer, **info):\n    return len(completion) % 5 / 4\n"
    )
    config = settings(
        tmp_path,
        tmp_path / "run",
        "trainer.max_steps=2",
        "trainer.val_check_interval=0",
        "data.max_prompt_tokens=256",
        "rollout.max_new_tokens=24",
        "rollout.max_concurrent_tokens=8192",
        "max_tokens_per_microbatch=1024",
        f"rewards=[{{name: accuracy, weight: 1.0}}, {{name: custom, function: '{tmp_path}/length.py:by_length'}}]",
        "validation.reward=accuracy",
        "export_hf_model=false",
    )
    assert ranks.run(run, config, None, False, tp=None) == [0]
    steps = metrics(tmp_path / "run")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["parity/mult_prob_error"] < 1.001 for line in steps)
    assert all(line["reward/by_length"] > 0 and line["grad_norm"] > 0 for line in steps)


def make_real_input(folder):
    """GSM8K rows, Qwen2's tokenizer with a chat template, and a random tiny model of its vocabulary.

    Without the shared material beside the checkout: rows of the same form, and a small tokenizer.
    """
    from transformers import Qwen2TokenizerFast

    sizes = {**SIZES, "vocab_size": 151_936, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    (folder / "model").mkdir()
    if (SHARED / "tokenizers" / "qwen2").is_dir():
        vocabulary = SHARED / "tokenizers" / "qwen2"
        tokenizer = Qwen2TokenizerFast(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        tokenizer.save_pretrained(folder / "model")
        sizes["eos_token_id"] = tokenizer.eos_token_id
    else:
        save_character_tokenizer(folder / "model")
        sizes["vocab_size"] = SIZES["vocab_size"]  # or few of the ids that are drawn would be text
    save_model(Qwen2Config(**sizes, tie_word_embeddings=True), folder / "model")
    gsm8k = SHARED / "data" / "gsm8k" / "train.jsonl"
    if gsm8k.exists():
        rows = gsm8k.read_text().splitlines()[:46]
    else:
        question = "A farm has {n} hens and each lays 2 eggs a day. How many eggs are there after 500 days?"
        rows = [
            json.dumps({"question": question.format(n=n), "answer": f"{n} * 2 * 500\n#### {n},000"})
            for n in range(1, 47)
        ]
    (folder / "train.jsonl").write_text("\n".join(rows[:40]))
    (folder / "validation.jsonl").write_text("\n".join(rows[40:]))
