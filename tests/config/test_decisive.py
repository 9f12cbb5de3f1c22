"""What decides the result of a run: the settings whose facts say so, and a digest that old runs have too."""

from __future__ import annotations

import json

import pytest

from nemo_aapo.config import Config, decisive_settings, digest, digests_of_run, parse, with_machine_defaults
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.config.schema.facts import settings_of
from tests.config.test_config import config_of
from tests.tiny_models import make_config


def test_the_digest_covers_what_decides_the_result_and_nothing_that_may_change_between_parts():
    same = [
        ["run.name=other"],
        ["trainer.devices=4", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        ["max_tokens_per_microbatch=8192"],
        ["trainer.max_steps=7", "checkpoint.save_interval=1", "trainer.val_check_interval=3"],
        [
            "exp_manager.create_wandb_logger=true",
            "exp_manager.create_mlflow_logger=true",
            "export_hf_model=false",
            "reward_runner.workers=0",
        ],
    ]
    other = [
        ["seed=1"],
        ["group_size=4"],
        ["algorithm=gpg"],
        ["model.optim.lr=2e-6"],
        ["model.lora={rank: 4, alpha: 8, target_modules: [linear_qkv]}"],
        ["rollout.temperature=0.7"],
        ["data.train=/u"],
        ["rewards=[{name: accuracy, weight: 2.0}]"],
    ]
    of_page = digest(config_of())
    assert {digest(config_of(*words)) for words in same} == {of_page}
    assert len({of_page, *(digest(config_of(*words)) for words in other)}) == 1 + len(other)
    cosine = ["model.optim.sched.name=cosine"]  # ends at max_steps, which then decides the result
    assert digest(config_of(*cosine)) != digest(config_of(*cosine, "trainer.max_steps=7"))


@pytest.mark.parametrize(
    "changes", [{}, {"algorithm__clip": {"low": 0.2, "high": 0.3}, "algorithm__loss": "ratio_clip"}]
)
def test_the_decisive_settings_are_those_whose_facts_say_so(changes):
    tree = decisive_settings(make_config("/m", **changes))

    def holds(key: str) -> bool:
        inner = tree
        for part in key.split("."):
            if not isinstance(inner, dict) or part not in inner:
                return False
            inner = inner[part]
        return True

    null = {"algorithm.clip.", "algorithm.token_mask.", "algorithm.sequence_mask.", "model.lora."}
    null |= {"algorithm.margin_schedule."}
    null -= {"algorithm.clip."} if changes else set()
    for setting in settings_of(Config):
        if not setting.key.startswith(tuple(null)):
            decides = setting.facts.decides is True  # max_steps decides with a cosine schedule only
            assert holds(setting.key) == decides, setting.key


def test_contents_stand_for_paths_in_the_digest():
    here, there = make_config("/a", "/b.jsonl"), make_config("/m", "/n.jsonl")
    identity = {"model.path": "61e2124e1b751682", "data.train": "0a7c955cd14b2ffe"}
    assert digest(here) != digest(there)
    assert digest(here, identity) == digest(there, identity) != digest(here)
    assert digest(here, {**identity, "model.path": "other"}) != digest(here, identity)
    assert decisive_settings(here, identity)["model"]["path"] == "61e2124e1b751682"
    assert digests_of_run(here, identity) == (digest(here, identity), digest(here))


def test_runs_and_checkpoints_from_before_contents_counted_have_the_second_digest():
    """The digest is one that the version before wrote, with these words. A new setting that decides would change it."""
    words = ["experiment=quickstart", "run.name=half", "trainer.max_steps=20"]
    config = with_machine_defaults(parse(compose(read_command_line(words))), on_gpu=False)
    assert digests_of_run(config, {"model.path": "61e2124e1b751682"})[1] == "8a3f28bf208b29c2"
    assert json.loads(json.dumps(decisive_settings(config)))["trainer"] == {}
