"""Rollouts in a checkpoint come back equal to the bit, whatever they hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nemo_aapo.distributed import parallel
from nemo_aapo.errors import DamagedCheckpointError
from nemo_aapo.rollout.saved.pending import pack, unpack
from nemo_aapo.rollout.scored import rows_of_all_ranks
from nemo_aapo.types import Completion, Group, Prompt, Routes

TEXTS = ("", "plain", "two\nlines", "\u221e\U0001f600", "\x00", "\ud800 alone")


def random_groups(rng, routed=False):
    """Groups of a mixture of experts with 3 layers and 2 choices, if they are routed."""

    def routes(prompt, length):
        fed = rng.integers(0, 256, (max(length - 1, 0), 3, 2)).astype(np.uint8)
        return Routes(prompt, fed) if routed else None

    def versions(length):
        if length < 2 or rng.random() < 0.5:
            return None
        return np.sort(np.append(rng.integers(5, 8, length - 2), (4, 9))).astype(np.int32)  # first and last differ

    groups = []
    for i in range(rng.integers(1, 5)):
        size = int(rng.integers(1, 5))
        of_prompt = rng.integers(0, 256, (i + 1, 3, 2)).astype(np.uint8)
        completions = tuple(
            Completion(
                rng.integers(0, 150_000, length).astype(np.int32),
                (-10 * rng.random(length)).astype(np.float32),
                "stop" if rng.random() < 0.5 else "length",
                int(rng.integers(0, 100)),
                routes(of_prompt, length),
                versions(length),
            )
            for length in rng.integers(0, 9, size)
        )
        prompt = Prompt(f"{rng.integers(1 << 60):016x}", np.arange(i + 1, dtype=np.int32), "question", "42", "file:1")
        parts = {name: rng.normal(size=size) for name in ("accuracy", "my reward \u00e9")}
        parts["accuracy"][0] = np.nan
        texts = tuple(str(text) for text in rng.choice(TEXTS, size))
        groups.append(Group(prompt, completions, texts, rng.normal(size=size), parts, rng.random(size) < 0.5))
    return groups


@pytest.mark.parametrize("seed", range(20))
def test_rollouts_come_back_equal_to_the_bit(seed):
    groups = random_groups(np.random.default_rng(seed), routed=seed % 2 == 1)
    for group, again in zip(groups, unpack(pack(groups), [group.prompt for group in groups]), strict=True):
        assert again.prompt is group.prompt
        assert again.texts == group.texts
        for name in ("rewards", "failed"):
            assert same(getattr(again, name), getattr(group, name))
        assert list(again.reward_parts) == list(group.reward_parts)
        assert all(same(again.reward_parts[name], group.reward_parts[name]) for name in group.reward_parts)
        for one, other in zip(again.completions, group.completions, strict=True):
            assert same(one.token_ids, other.token_ids)
            assert same(one.logprobs, other.logprobs)
            assert (one.finish_reason, one.policy_version) == (other.finish_reason, other.policy_version)
            assert (one.versions is None) is (other.versions is None)
            assert one.versions is None or same(one.versions, other.versions)
            assert (one.routes is None) is (other.routes is None)
            if one.routes is not None:
                assert one.routes.prompt is again.completions[0].routes.prompt  # once in memory, too
                assert same(one.routes.prompt, other.routes.prompt)
                assert same(one.routes.completion, other.routes.completion)


def test_rollouts_of_other_prompts_are_refused():
    groups = random_groups(np.random.default_rng(0))
    others = [dataclasses.replace(group.prompt, id="other") for group in groups]
    with pytest.raises(DamagedCheckpointError, match="other prompts"):
        unpack(pack(groups), others)


def texts_for_people(seed):
    """Of groups that the ranks of this model-parallel group have from a checkpoint; and of all, on rank 0."""
    groups = random_groups(np.random.default_rng(seed))
    packed = parallel.broadcast_in_model_parallel(pack(groups))
    loaded = unpack(packed, [group.prompt for group in groups])
    return [text for group in loaded for text in group.texts], [row["completion"] for row in rows_of_all_ranks(loaded)]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_completion_that_a_checkpoint_held_is_among_the_rows_for_people_once(ranks, tp):
    (of_one, rows), (of_other, nothing) = ranks.run(texts_for_people, 0, world=2, tp=tp)
    assert of_one == of_other  # each rank has the texts, with TP of the same completions
    assert (rows, nothing) == (of_one if tp == 2 else of_one + of_other, [])


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
