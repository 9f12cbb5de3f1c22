"""Runs that go on: after a stop, elsewhere, on another layout, with other settings, or not at all."""

from __future__ import annotations

import dataclasses
import json
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
from tests.training_runs import IN_THE_THIRD_STEP, assert_same_run, exported, kept, metrics, run, settings


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


@pytest.mark.once
def test_a_run_that_was_moved_with_its_model_and_data_goes_on_to_the_same_bits(ranks, folder, uninterrupted, tmp_path):
    assert ranks.run(run, settings(folder, tmp_path / "here"), IN_THE_THIRD_STEP, tp=None) == [0]
    there, moved = tmp_path / "there", (tmp_path / "here").rename(tmp_path / "moved")
    shutil.copytree(folder / "model", there / "model")
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.copy(folder / name, there / name)
    assert ranks.run(run, settings(there, moved), tp=None) == [0]
    assert metrics(moved) == metrics(uninterrupted)
    assert exported(moved) == exported(uninterrupted)


@pytest.mark.once
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


@pytest.mark.once
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
    validated, alone = (validation_rows(d, step=0) for d in (run_dir, uninterrupted))
    assert validated == alone
    assert len(alone) == 6 * (1 + 2)  # of each held-out prompt one greedy completion, and two sampled ones
    (rows, tokens), (expected_rows, expected) = kept(run_dir), kept(uninterrupted)
    assert [[line["prompt"] for line in lines] for lines in rows.values()] == [
        [line["prompt"] for line in lines] for lines in expected_rows.values()
    ]
    for key, values in expected["train_000001"].items():  # later policies differ in their last bits
        np.testing.assert_allclose(tokens["train_000001"][key], values, atol=1e-4, err_msg=key)


def validation_rows(run_dir, step):
    return [json.loads(line) for line in (run_dir / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


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


@pytest.mark.once
def test_fewer_steps_than_were_made_are_refused_and_the_run_stays_finished(ranks, folder, uninterrupted):
    before = metrics(uninterrupted, timeless=False)
    fewer = settings(folder, uninterrupted, "trainer.max_steps=4")
    with pytest.raises(AssertionError, match=r"ConfigError: trainer\.max_steps=4: .* a checkpoint of step 6 already"):
        ranks.run(run, fewer, tp=None)
    assert (uninterrupted / "finished").exists()
    assert metrics(uninterrupted, timeless=False) == before


@pytest.mark.once
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


@pytest.mark.once
def test_a_directory_with_another_configuration_is_refused(ranks, folder, uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*.json*")}
    with pytest.raises(AssertionError, match=r"(?s)another configuration.*model\.optim\.lr: 0\.001 there, 0\.5 now"):
        ranks.run(run, settings(folder, uninterrupted, "model.optim.lr=0.5"), tp=None)
    assert before == {path: path.read_bytes() for path in uninterrupted.rglob("*.json*")}


@pytest.mark.once
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
