"""Doctor's parity gate: the real engine passes on the real layout, a wrong one is found out."""

from __future__ import annotations

import dataclasses

import pytest

from tests.training_runs import make_input, settings


class OtherTemperature:
    """An engine that samples hotter than it was told, as its log-probs show."""

    def __init__(self, engine) -> None:
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, prompts, sampling, seeds, on_finish=None):
        hotter = dataclasses.replace(sampling, temperature=1.5 * sampling.temperature)
        return self.engine.generate(prompts, hotter, seeds, on_finish)


def _judge(words, wrong):
    from nemo_aapo import load_config
    from nemo_aapo.doctor.checks import parity
    from nemo_aapo.engines.build import build_engine
    from nemo_aapo.models.directory import read_model_dir

    config = load_config(words)

    def make(policy):
        return OtherTemperature(build_engine(config, policy, read_model_dir(config.model.path), str))

    finding = parity.judge(config, parity.measure(config, make if wrong else None))
    return finding.level, finding.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_input(tmp_path_factory.mktemp("doctor"))


@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "context_parallel_size"])
def test_engine_and_learner_agree_on_the_configured_layout_and_nothing_is_left_behind(ranks, folder, layout):
    words = settings(folder, folder / "run", f"model.{layout}=2", world=2)
    found = ranks.run(_judge, words, False, world=2, tp=None)
    assert found[0] == found[1]
    assert found[0][0] == "ok", found
    assert "of 8 prompts: mult_prob_error 1.0000" in found[0][1]
    assert not (folder / "run").exists()


def test_an_engine_that_draws_from_another_distribution_is_a_failure(ranks, folder):
    ((level, text),) = ranks.run(_judge, settings(folder, folder / "run"), True, tp=None)
    assert level == "failure"
    assert "engine and learner disagree" in text
    assert "rollout.temperature" in text
