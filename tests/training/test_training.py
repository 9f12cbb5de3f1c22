"""Whole runs on worker ranks: real text, every algorithm, layouts, interruption, numbers that are not finite."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import Qwen2Config

from nemo_aapo.checkpoint import manifest
from nemo_aapo.config import digest, parse
from nemo_aapo.errors import ConfigError
from nemo_aapo.prepare.conversion import Layout, prepare_megatron_to_hf
from nemo_aapo.utils.safetensors import model_digest
from tests.tiny_models import SIZES, save_character_tokenizer, save_model
from tests.training_runs import exported, make_input, metrics, run, settings

SHARED = Path(__file__).parents[3] / "shared"
STEP_KEYS = {
    "step", "reward/mean", "reward/std", "reference_reward/mean", "advantage/abs_mean", "groups/zero_std",
    "groups/zero_advantage", "loss", "grad_norm", "lr", "entropy", "completion_length/mean", "completion_length/max",
    "truncated_fraction", "tokens_per_second", "time/rollout", "time/reward", "time/train", "time/refit", "time/step",
    "rollout/tail_factor", "rollout/idle_fraction", "rollout/tokens_per_second",
}  # fmt: skip

IN_THE_THIRD_STEP = 3
"""An epoch ends within it, and a checkpoint of the second is there."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer model and forty prompts."""
    return make_input(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def uninterrupted(ranks, folder):
    run_dir = folder / "uninterrupted"
    logged = settings(folder, run_dir, "exp_manager.create_tensorboard_logger=true", "rollout.keep_tokens=true")
    assert ranks.run(run, logged, tp=None) == [0]
    return run_dir


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


def test_a_stopped_run_goes_on_to_the_same_bits(ranks, folder, uninterrupted):
    run_dir = folder / "stopped"
    config = settings(folder, run_dir, "rollout.keep_tokens=true")
    assert ranks.run(run, config, IN_THE_THIRD_STEP, tp=None) == [0]
    assert [line["step"] for line in metrics(run_dir)] == [0, 1, 2, 2, 3]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    assert not (run_dir / "finished").exists()
    assert ranks.run(run, config, tp=None) == [0]
    assert metrics(run_dir) == metrics(uninterrupted)
    assert exported(run_dir) == exported(uninterrupted)
    assert expected_lengths(run_dir) == expected_lengths(uninterrupted) != {}
    assert kept(run_dir) == kept(uninterrupted)


def test_a_run_that_was_moved_with_its_model_and_data_goes_on_to_the_same_bits(ranks, folder, uninterrupted, tmp_path):
    assert ranks.run(run, settings(folder, tmp_path / "here"), IN_THE_THIRD_STEP, tp=None) == [0]
    there, moved = tmp_path / "there", (tmp_path / "here").rename(tmp_path / "moved")
    shutil.copytree(folder / "model", there / "model")
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.copy(folder / name, there / name)
    assert ranks.run(run, settings(there, moved), tp=None) == [0]
    assert metrics(moved) == metrics(uninterrupted)
    assert exported(moved) == exported(uninterrupted)


def test_a_run_from_before_contents_were_recorded_goes_on_to_the_same_bits(ranks, folder, uninterrupted):
    """Its record and its checkpoints have the digest in which paths stand for what they hold."""
    run_dir = folder / "of_before"
    assert ranks.run(run, settings(folder, run_dir), IN_THE_THIRD_STEP, tp=None) == [0]
    before = make_old(run_dir)
    assert ranks.run(run, settings(folder, run_dir), tp=None) == [0]
    assert metrics(run_dir) == metrics(uninterrupted)
    assert exported(run_dir) == exported(uninterrupted)
    newest = max((run_dir / "checkpoints").iterdir())
    assert manifest.read(newest).config_digest == json.loads((run_dir / "run.json").read_text())["digest"] != before


def make_old(run_dir: Path) -> str:
    """Rewrite a run's record and manifests as they were without contents; returns their digest."""
    config = parse(yaml.safe_load((run_dir / "config.yaml").read_text()))
    record = json.loads((run_dir / "run.json").read_text())
    record["digest"] = digest(config)
    del record["contents"]
    (run_dir / "run.json").write_text(json.dumps(record))
    for path in (run_dir / "checkpoints").iterdir():
        manifest.write(dataclasses.replace(manifest.read(path), config_digest=digest(config)), path)
    return digest(config)


def test_a_stopped_run_whose_prompts_go_by_accuracy_goes_on_to_the_same_run(ranks, folder):
    """Of a mixture: the prompts of steps 4 to 6 depend on what came of those before, also on another layout."""
    sources = f"data.train=[{{path: {folder}/train.jsonl}}, {{path: {folder}/validation.jsonl, weight: 0.5}}]"
    runs = {}
    for name, stop_in_step, layout in (("whole", None, {}), ("parts", IN_THE_THIRD_STEP, {"world": 2})):
        run_dir = folder / f"hard_{name}"
        more = [sources, "data.sampling=hard", "trainer.max_steps=8"]
        if stop_in_step:
            assert ranks.run(run, settings(folder, run_dir, *more), stop_in_step, tp=None) == [0]
            assert metrics(run_dir)[-1]["step"] == stop_in_step
        config = settings(folder, run_dir, *more, **layout)
        assert ranks.run(run, config, tp=None, **layout) == [0] * layout.get("world", 1)
        runs[name] = run_dir
    assert_same_run(runs["parts"], runs["whole"])
    assert sampler_of(runs["parts"]) == sampler_of(runs["whole"])


def sampler_of(run_dir):
    """What the next step's prompts would depend on."""
    newest = max((run_dir / "checkpoints").iterdir())
    state = manifest.read(newest).trainer_state["sampler"]
    assert any(stream["epoch"] >= 2 for stream in state["streams"])
    return state


def expected_lengths(run_dir):
    """What the order of the next rollout would depend on."""
    newest = max((run_dir / "checkpoints").iterdir())
    return manifest.read(newest).trainer_state["completion_lengths"]


def test_another_layout_takes_over_the_checkpoint_and_ends_in_the_same_weights(ranks, folder, uninterrupted):
    run_dir = folder / "moved"
    assert ranks.run(run, settings(folder, run_dir), IN_THE_THIRD_STEP, tp=None) == [0]
    moved = settings(folder, run_dir, world=4, tp=2, pp=2)
    assert ranks.run(run, moved, world=4, tp=None) == [0] * 4
    assert_same_run(run_dir, uninterrupted)


def test_the_distributed_optimizers_state_moves_to_another_layout_too(ranks, folder, uninterrupted):
    run_dir = folder / "dealt out"
    dealt = ("model.optim.use_distributed_optimizer=true", "model.sequence_packing=true")
    first = settings(folder, run_dir, *dealt, "model.optim.overlap_grad_reduce=true", world=2)
    assert ranks.run(run, first, IN_THE_THIRD_STEP, world=2, tp=None) == [0] * 2
    moved = settings(folder, run_dir, *dealt, world=4, tp=2)
    assert ranks.run(run, moved, world=4, tp=None) == [0] * 4
    assert_same_run(run_dir, uninterrupted)


def test_a_run_on_four_ranks_gives_the_metrics_of_one(ranks, folder, uninterrupted):
    run_dir = folder / "tp2dp2"
    config = settings(folder, run_dir, "model.sequence_parallel=true", "rollout.keep_tokens=true", world=4, tp=2)
    assert ranks.run(run, config, world=4, tp=None) == [0] * 4
    assert_same_run(run_dir, uninterrupted)
    (rows, tokens), (expected_rows, expected) = kept(run_dir), kept(uninterrupted)
    assert [[line["prompt"] for line in lines] for lines in rows.values()] == [
        [line["prompt"] for line in lines] for lines in expected_rows.values()
    ]
    for key, values in expected["train_000001"].items():  # later policies differ in their last bits
        np.testing.assert_allclose(tokens["train_000001"][key], values, atol=1e-4, err_msg=key)


def _states_of_generators(overrides):
    """Digests of the state of every global random generator, before and after the loop."""
    import random

    import torch

    from nemo_aapo.training.trainer import AAPOTrainer

    def states():
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

    found = []

    def fit(trainer):
        found.append(states())
        complete = original(trainer)
        found.append(states())
        return complete

    original, AAPOTrainer.fit = AAPOTrainer.fit, fit
    try:
        run(overrides)
    finally:
        AAPOTrainer.fit = original
    return found


def test_the_loop_draws_from_no_global_generator_so_a_checkpoint_needs_none(ranks, folder):
    """Validation, reference rewards, rollouts, updates and saves."""
    config = settings(folder, folder / "generators", "trainer.max_steps=2", "export_hf_model=false")
    [[before, after]] = ranks.run(_states_of_generators, config, tp=None)
    assert before == after


def kept(run_dir):
    """All that was kept of the training steps but the times, as plain numbers and texts."""
    from safetensors.numpy import load_file

    rows, tokens = {}, {}
    for path in sorted((run_dir / "rollouts").glob("train_*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows[path.stem] = [{key: value for key, value in line.items() if key != "time"} for line in lines]
        tokens[path.stem] = {k: v.tolist() for k, v in load_file(path.with_suffix(".safetensors")).items()}
    return rows, tokens


def assert_same_run(run_dir, other):
    from safetensors.numpy import load_file

    for line, expected in zip(metrics(run_dir), metrics(other), strict=True):
        assert line["step"] == expected["step"]
        for key in set(expected) & {"reward/mean", "loss", "grad_norm", "entropy", "validation/accuracy_sampled"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    weights, expected = (load_file(Path(d) / "hf_model" / "model.safetensors") for d in (run_dir, other))
    for name in expected:
        np.testing.assert_allclose(weights[name], expected[name], atol=1e-5, err_msg=name)


def test_a_time_limit_ends_a_run_with_a_checkpoint_and_the_best_one_stays(ranks, folder):
    run_dir = folder / "limited"
    kept = ["checkpoint.keep_last=1", "checkpoint.keep_best=reward/mean", "checkpoint.save_interval=1"]
    limited = settings(folder, run_dir, *kept, "checkpoint.max_time_s=1", "trainer.max_steps=400")
    assert ranks.run(run, limited, tp=None) == [0]
    rewards = {line["step"]: line["reward/mean"] for line in metrics(run_dir) if "loss" in line}
    assert 1 <= max(rewards) < 400
    assert not (run_dir / "finished").exists()
    best = max(rewards, key=lambda step: (rewards[step], step))
    left = {int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*")}
    assert left == {best, max(rewards)}


def test_fewer_steps_than_were_made_are_refused_and_the_run_stays_finished(ranks, folder, uninterrupted):
    before = metrics(uninterrupted, timeless=False)
    fewer = settings(folder, uninterrupted, "trainer.max_steps=4")
    with pytest.raises(AssertionError, match=r"ConfigError: trainer\.max_steps=4: .* a checkpoint of step 6 already"):
        ranks.run(run, fewer, tp=None)
    assert (uninterrupted / "finished").exists()
    assert metrics(uninterrupted, timeless=False) == before


def test_other_data_are_refused_before_the_model_is_loaded(ranks, folder, uninterrupted, tmp_path):
    """Data that differ in what no identity of files sees: here the checkpoint says that they were others."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    path = max((run_dir / "checkpoints").iterdir())
    content = manifest.read(path)
    state = {**content.trainer_state, "sampler": {**content.trainer_state["sampler"], "data_digest": "others"}}
    manifest.write(dataclasses.replace(content, trainer_state=state), path)
    words = settings(folder, run_dir, "trainer.max_steps=8")
    with pytest.raises(AssertionError, match=r"DataError: can't resume the order of prompts: data_digest was 'others'"):
        ranks.run(_run_without_loading, words, tp=None)


def _run_without_loading(overrides):
    from nemo_aapo.training import build

    def fail(*_, **__):
        raise AssertionError("the model was loaded")

    made, build.build_policy = build.build_policy, fail
    try:
        return run(overrides)
    finally:
        build.build_policy = made


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
    from nemo_aapo.checkpoint import manifest

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


def test_a_directory_with_another_configuration_is_refused(ranks, folder, uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*.json*")}
    with pytest.raises(AssertionError, match=r"(?s)another configuration.*model\.optim\.lr: 0\.001 there, 0\.5 now"):
        ranks.run(run, settings(folder, uninterrupted, "model.optim.lr=0.5"), tp=None)
    assert before == {path: path.read_bytes() for path in uninterrupted.rglob("*.json*")}


def test_a_run_with_kl_does_not_go_on_with_another_base_model(ranks, folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    kl = ["algorithm=grpo", "algorithm.kl_coefficient=0.1", f"model.path={model}", "export_hf_model=false"]
    words = settings(folder, tmp_path / "run", *kl, "trainer.val_check_interval=0", "checkpoint.save_interval=1")
    assert ranks.run(run, [*words, "trainer.max_steps=1"], tp=None) == [0]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["reference"] == model_digest(str(model))
    original = model.rename(tmp_path / "original")
    save_model(Qwen2Config(**{**SIZES, "num_hidden_layers": 2, "tie_word_embeddings": True}), model, seed=7)
    save_character_tokenizer(model)
    before = metrics(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another model than the one that the run was trained from"):
        prepare_megatron_to_hf(tmp_path / "run", None, tmp_path / "out", Layout())
    with pytest.raises(AssertionError, match=r"model.path: \S+ holds something else than it did"):
        ranks.run(run, [*words, "trainer.max_steps=2"], tp=None)
    assert metrics(tmp_path / "run") == before
    assert ranks.run(run, [*words, "trainer.max_steps=2", f"model.path={original}"], tp=None) == [0]
    assert len(metrics(tmp_path / "run")) == len(before) + 1


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
    from transformers import Qwen2Config, Qwen2TokenizerFast

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
