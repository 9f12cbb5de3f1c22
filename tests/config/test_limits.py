"""Every number has a least and a greatest value, and what lies outside is refused with its key."""

from __future__ import annotations

import math

import pytest

from nemo_aapo.config import parse
from nemo_aapo.config.build import check_limits, check_name
from nemo_aapo.config.command_line import EVALUATION, read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.config.schema.facts import settings_of, without_null
from nemo_aapo.config.schema.reference import SCHEMAS
from nemo_aapo.errors import ConfigError

GIVEN = ["model.path=/m", "data.train=/t", "data.validation=/v"]
SAMPLED = [
    ("seed", 2**63), ("seed", -1), ("group_size", 10**9), ("group_size", 0), ("prompts_per_step", 10**8),
    ("trainer.distributed_timeout_s", 1e12), ("trainer.distributed_timeout_s", 1e300), ("trainer.fault_timeout_s", 0),
    ("trainer.distributed_timeout_s", math.inf), ("reward_runner.timeout_s", math.nan), ("trainer.max_steps", 10**12),
    ("model.optim.betas", [0.9, 1.0]), ("model.optim.betas", [-0.1, 0.9]), ("model.optim.betas", [0.9]),
    ("model.optim.betas", [0.9, 0.9, 0.9]), ("model.optim.eps", 0), ("model.optim.eps", -1e-8),
    ("model.optim.lr", 10**400), ("reward_runner.workers", 10**9),
    ("model.optim.sched.min_lr", -1.0), ("model.optim.sched.min_lr", 1.0), ("validation.temperature", -1),
    ("validation.temperature", 1e-30), ("rollout.temperature", 0), ("rollout.server.port", 65536),
    ("trainer.devices", 10**6), ("run.name", ""), ("run.name", " "), ("run.name", ".."),
    ("run.name", "/"), ("run.name", "a/../../b"), ("run.name", "n" * 300), ("run.name", "a\0b"), ("run.name", "\udcff"),
    ("run.dir", ""), ("run.dir", "."), ("run.dir", ".."), ("run.dir", "/"), ("cluster.chain", 10**6),
]  # fmt: skip


@pytest.fixture(scope="module")
def tree():
    return compose(read_command_line(GIVEN))


def changed(tree: dict, key: str, value: object) -> dict:
    section, _, rest = key.partition(".")
    return {**tree, section: changed(tree[section], rest, value) if rest else value}


@pytest.mark.parametrize(("key", "value"), SAMPLED, ids=lambda value: str(value)[:30])
def test_numbers_and_names_that_would_do_harm_are_refused_with_their_key(tree, key, value):
    with pytest.raises(ConfigError, match=rf"^{key}|^prompts_per_step"):
        parse(changed(tree, key, value))


def test_what_lies_at_the_edge_is_taken(tree):
    for key, value in (("seed", 2**63 - 1), ("run.name", "n" * 128), ("run.name", "a b/√")):
        parse(changed(tree, key, value))


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_number_has_a_least_and_a_greatest_value(name):
    for setting in settings_of(SCHEMAS[name]):
        if without_null(setting.annotation) in (int, float):
            facts = setting.facts
            most = [limit for limit in (facts.maximum, facts.below, facts.sane) if limit is not None]
            assert most, f"{setting.key}: setting(..., maximum=...) or sane=..., far above what anybody wants"
            assert not facts.allow(2 * max(most) + 1) or facts.complaint(2 * max(most) + 1), setting.key
            assert facts.complaint(-2 * max(most) - 1), setting.key


def test_an_evaluation_has_the_same_limits():
    whole = EVALUATION.parse(compose(read_command_line(["model.path=/m"], EVALUATION)))
    check_limits(whole)
    for name in ("", "..", "n" * 300):
        with pytest.raises(ConfigError):
            check_name(name, "results/x")
