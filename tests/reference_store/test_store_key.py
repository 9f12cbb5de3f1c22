"""What stored reference rewards belong to: every part of the key decides, and is named where it differs."""

from __future__ import annotations

import importlib.metadata
import shutil

import pytest

from nemo_aapo.errors import ConfigError
from nemo_aapo.reference_store.store import other_rewards
from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.definition import reward_definition
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.types import SamplingSpec
from tests.reference_store.stores import key, open_store, values


def definition(*entries):
    rewards = [(build_reward({k: v for k, v in e.items() if k != "weight"}), e.get("weight", 1.0)) for e in entries]
    return WithoutWorkers(rewards).definition()


class WithoutWorkers(RewardRunner):
    """Rewards that want workers, without starting any: only their definition is asked for."""

    def __init__(self, rewards):
        self._rewards, self._weights = [r for r, _ in rewards], [w for _, w in rewards]


def test_every_part_of_the_key_decides_and_is_named(tmp_path, monkeypatch):
    source = tmp_path / "mine.py"
    source.write_text("def score(prompt, completion, answer, **info):\n    return 1.0\n")
    custom = {"name": "custom", "function": f"{source}:score"}
    accuracy, cosine = {"name": "accuracy"}, {"name": "cosine", "max_tokens": 8}
    base = key(rewards=definition(accuracy, cosine, custom))
    moved = tmp_path / "moved.py"
    shutil.copy(source, moved)
    assert key(rewards=definition(accuracy, cosine, {**custom, "function": f"{moved}:score"})) == base
    changed = {
        "model": key("n", rewards=base.parts["rewards"]),
        "seed": key(rewards=base.parts["rewards"], seed=2),
        "sampling.temperature": key(sampling=SamplingSpec(0.7, 8, (1,)), rewards=base.parts["rewards"]),
        "sampling.stop_token_ids": key(sampling=SamplingSpec(1.0, 8, (2,)), rewards=base.parts["rewards"]),
        "rewards[accuracy].weight": key(rewards=definition({**accuracy, "weight": 2.0}, cosine, custom)),
        "rewards[cosine].max_tokens": key(rewards=definition(accuracy, {**cosine, "max_tokens": 9}, custom)),
    }
    source.write_text("def score(prompt, completion, answer, **info):\n    return 2.0\n")
    changed["rewards[score].source"] = key(rewards=definition(accuracy, cosine, custom))
    for name, other in changed.items():
        assert other.digest != base.digest, name
        (difference,) = other.differences(base.parts)
        assert difference.startswith(f"{name}: "), difference
        assert " there, " in difference
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    updated = key(rewards=definition(accuracy, cosine, custom)).differences(changed["rewards[score].source"].parts)
    assert {name.split(": ")[0] for name in updated} == {
        f"rewards[{reward}].{library}"
        for reward in ("accuracy", "cosine")
        for library in ("math-verify", "latex2sympy2_extended")
    }


def test_a_custom_function_is_defined_by_its_text_wherever_it_is_found_and_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "their" / "rewards"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "mine.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    by_module = reward_definition(build_reward({"name": "custom", "function": "their.rewards.mine:score"}))
    by_file = reward_definition(build_reward({"name": "custom", "function": f"{package}/mine.py:score"}))
    assert by_module == by_file
    assert len(by_module["source"]) == 16
    nowhere = reward_definition(build_reward({"name": "custom", "function": "their.rewards.nothing:score"}))
    assert nowhere["source"] is None


class OwnReward:
    kind = name = "own"

    def __call__(self, prompt, text, completion):
        return 0.5


def test_a_reward_of_ones_own_class_is_defined_by_its_source():
    class Other(OwnReward): ...

    assert reward_definition(OwnReward())["source"] != reward_definition(Other())["source"]


def test_a_named_store_with_other_rewards_only_is_refused_and_the_difference_named(tmp_path):
    path = tmp_path / "s.sqlite"
    with open_store(path) as store:
        assert other_rewards(store, own=False) == ""  # empty: there is nothing to mistake
        store.write(values(1))
        assert other_rewards(store, own=False) == ""
    with open_store(path, key("base-2", seed=2)) as store:
        with pytest.raises(ConfigError, match=r'(?s)none for this run.*model: "m" there, "base-2" here.*seed: 1.*name'):
            other_rewards(store, own=False)
        assert 'model: "m" there' in other_rewards(store, own=True)
    with open_store(path, key(seed=2)) as store:
        assert "seed: 1 there, 2 here" in other_rewards(store, own=False)  # a sweep over seeds may share a file
        store.write(values(1))
        assert other_rewards(store, own=False) == ""
