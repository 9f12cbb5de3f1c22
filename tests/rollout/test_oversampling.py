"""More groups than a step needs: which are trained on is decided by advantages and order, on any number of ranks."""

from __future__ import annotations

import numpy as np

from nemo_aapo.rollout.oversampling import chosen
from tests.training_runs import Parity, assert_same_run, exported, make_input, metrics, settings

IN_THE_THIRD_STEP = 3


def test_the_first_groups_with_a_signal_are_taken_in_order_and_others_only_where_those_are_too_few():
    rng = np.random.default_rng(0)
    for _ in range(500):
        signals = list(rng.random(rng.integers(1, 12)) < rng.random())
        needed = int(rng.integers(1, len(signals) + 1))
        taken = chosen(signals, needed)
        assert taken == sorted(set(taken))
        assert len(taken) == needed
        assert sum(signals[i] for i in taken) == min(needed, sum(signals))
        for worth in (True, False):  # within each kind the first
            of_kind = [i for i, signal in enumerate(signals) if signal == worth]
            mine = [i for i in taken if signals[i] == worth]
            assert mine == of_kind[: len(mine)]


class Rare(Parity):
    """Some groups have equal rewards, hence no signal without a margin."""

    def __call__(self, prompt, text, completion):
        super().__call__(prompt, text, completion)
        return float(int(completion.token_ids.sum()) % 4 == 0)


def _run(words, stop_in_step=None):
    from pathlib import Path

    from nemo_aapo import RewardRunner, load_config, train

    config = load_config(words)
    reward = Rare(Path(config.run.dir), stop_in_step)
    return train(config, rewards=RewardRunner([(reward, 1.0)], workers=0, timeout_s=10.0))


OVER = ("algorithm=gpg", "rollout.oversample=1.8", "trainer.max_steps=4", "prompts_per_step=2")


def test_a_run_leaves_out_groups_without_a_signal_on_any_number_of_ranks_and_after_a_stop(ranks, tmp_path):
    """Of 4 groups of 4 for a step of 2; two rollouts ahead where it is stopped."""
    folder = make_input(tmp_path)
    assert ranks.run(_run, settings(folder, folder / "one", *OVER), tp=None) == [0]
    assert ranks.run(_run, settings(folder, folder / "two", *OVER, world=2), world=2, tp=None) == [0, 0]
    assert_same_run(folder / "two", folder / "one")
    steps = [line for line in metrics(folder / "one") if "loss" in line]
    for line in steps:
        signals = round(4 * (1 - line["rollout/no_signal_fraction"]))
        assert line["groups/zero_advantage"] == max(0, 2 - signals) / 2
        assert line["rollout/wasted_fraction"] == max(0, signals - 2) / 4
    assert len({line["rollout/no_signal_fraction"] for line in steps}) > 1
    ahead = (*OVER, "rollout.async_depth=2", "algorithm.importance_weight_cap=2.0")
    assert ranks.run(_run, settings(folder, folder / "whole", *ahead), tp=None) == [0]
    for stop in (IN_THE_THIRD_STEP, None):
        assert ranks.run(_run, settings(folder, folder / "stopped", *ahead), stop, tp=None) == [0]
    assert metrics(folder / "stopped") == metrics(folder / "whole")
    assert exported(folder / "stopped") == exported(folder / "whole")
