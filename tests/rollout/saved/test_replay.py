"""What was kept of a step comes back as it was, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_aapo.errors import RunError
from nemo_aapo.rollout.saved.kept import KeptFiles, KeptGroup, _rows, _tokens
from nemo_aapo.rollout.saved.replay import read_kept
from nemo_aapo.types import Completion, Group, Prompt

pytestmark = pytest.mark.unit


AAPO = SimpleNamespace(margin=SimpleNamespace(low=-0.2), scale_rewards=True)


def make_group(name: str, seed: int) -> Group:
    rng = np.random.default_rng(seed)
    lengths = (3, 0, 5)
    completions = [
        Completion(rng.integers(0, 9, n).astype(np.int32), -rng.random(n, np.float32), "stop" if n else "length", 4)
        for n in lengths
    ]
    completions[2] = dataclasses.replace(completions[2], versions=np.array([4, 4, 5, 7, 7], np.int32))
    rewards = np.array([1 / 3, math.nan, -0.0])
    return Group(
        prompt=Prompt(name, np.array([1, 2], np.int32), "2+2=", "4", "train.jsonl:1"),
        completions=tuple(completions),
        texts=("a\u2028b", "", "c\ud800"),
        rewards=rewards,
        reward_parts={"math": rewards, "format": np.array([0.1, math.nan, 1e-300])},
        failed=np.isnan(rewards),
        reference_rewards=np.array([0.7, math.nan]),
        advantages=np.array([0.5, math.nan, -0.5]),
    )


def keep(directory, groups) -> None:
    figures = {
        k: np.zeros((2, len(c.token_ids)), np.float32) for k, c in enumerate(c for g in groups for c in g.completions)
    }
    kept = [KeptGroup(_rows(7, i, group, AAPO), _tokens(group, 3 * i, figures)) for i, group in enumerate(groups)]
    KeptFiles(directory / "rollouts", 10**6, lambda ids: "x").write(7, kept)


def test_a_kept_step_comes_back_equal_to_the_bit(tmp_path):
    groups = [make_group("p", 1), make_group("q", 2)]
    keep(tmp_path, groups)
    for found, group in zip(read_kept(tmp_path, 7, [g.prompt for g in groups]), groups, strict=True):
        assert found.texts == group.texts
        for name in ("rewards", "failed", "reference_rewards"):
            np.testing.assert_array_equal(getattr(found, name), getattr(group, name))
        for name, values in group.reward_parts.items():
            np.testing.assert_array_equal(found.reward_parts[name], values)
        for one, other in zip(found.completions, group.completions, strict=True):
            assert one.token_ids.tobytes() == other.token_ids.tobytes()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()
            assert (one.finish_reason, one.policy_version) == (other.finish_reason, other.policy_version)
            assert one.token_versions.tobytes() == other.token_versions.tobytes()


def test_what_was_not_kept_whole_or_of_other_prompts_is_refused(tmp_path):
    groups = [make_group("p", 1), make_group("q", 2)]
    keep(tmp_path, groups)
    prompts = [group.prompt for group in groups]
    with pytest.raises(RunError, match=r"train_000008\.jsonl: not there.*keep_groups=all"):
        read_kept(tmp_path, 8, prompts)
    for others in (prompts[:1], prompts[::-1], [*prompts[:1], dataclasses.replace(prompts[1], id="r")]):
        with pytest.raises(RunError, match="holds 2 groups of other prompts"):
            read_kept(tmp_path, 7, others)
    path = tmp_path / "rollouts" / "train_000007.jsonl"
    path.write_text(path.read_text() + json.dumps({"group": 1})[:5])
    with pytest.raises(RunError, match=r"train_000007\.jsonl: can't be read"):
        read_kept(tmp_path, 7, prompts)
