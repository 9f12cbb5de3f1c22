"""Which policy draws the completions of a step, where steps are begun ahead."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_aapo.config.compose import load_config
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.distributed import parallel
from nemo_aapo.rollout.in_order import InOrderPipeline
from nemo_aapo.rollout.length_predictor import LengthPredictor
from nemo_aapo.rollout.unscored import TOTAL, Tally
from nemo_aapo.types import Completion, Group, Prompt

PROMPTS = [Prompt(f"{i:032x}", np.array([5], np.int32), "", "", "") for i in range(64)]


class Collector:
    """Draws completions that say by which version of the policy, all of them scored."""

    def __init__(self, policy):
        self.policy, self.tally = policy, Tally(4, {TOTAL: 4, "accuracy": 4})
        self.engine = SimpleNamespace(update_weights=lambda weights, version: None, shares_weights=True)
        self.lengths, self.metrics, self.seconds, self.length_predictor = [], {}, {}, LengthPredictor()

    def collect(self, prompts, sampling, seeds, observe_lengths):
        completion = Completion(np.array([1], np.int32), np.zeros(1, np.float32), "stop", self.policy.version)
        rewards, nothing = np.array([1.0, 0.0]), np.zeros(2, bool)
        return [Group(p, (completion,) * 2, ("", ""), rewards, {"r": rewards}, nothing) for p in prompts]


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: 1)
    monkeypatch.setattr(parallel, "gather_data_parallel", lambda value: [value])
    monkeypatch.setattr(parallel, "broadcast_from_first_rank", lambda value: value)


def part(folder, depth, end, until, step):
    """The version that drew each of these steps, of a run that is to end at ``end``; what it says when it goes on.

    It goes on from the checkpoint of ``step`` and leaves one of ``until``, unless that is the same.
    """
    words = ["model.path=/m", "data.train=/t", "data.validation=/v", "algorithm=gpg", "prompts_per_step=2"]
    words += ["group_size=2", f"rollout.async_depth={depth}", "algorithm.importance_weight_cap=2.0"]
    policy = SimpleNamespace(version=step, named_weights=tuple)
    pipeline = InOrderPipeline(
        config=load_config([*words, f"trainer.max_steps={end}"]),
        policy=policy,
        collector=Collector(policy),
        sampling=None,
        prompts=PROMPTS,
        sampler=PromptSampler(len(PROMPTS), 2, 1),
        reference=None,
    )
    said = ""
    if step:
        checkpoint = folder / str(step)
        pipeline.load_state_dict(json.loads((checkpoint / "state.json").read_text()))
        pipeline.load_pending(checkpoint, step)
        said = pipeline.drawn_later()
    drawn = []
    for at in range(step, until):
        pipeline.refit()
        pipeline.begin(at)
        drawn.append(pipeline.generate(at)[0].completions[0].policy_version)
        policy.version += 1
    pipeline._trained_before(until)
    if until > step:
        (checkpoint := folder / str(until)).mkdir()
        (checkpoint / "state.json").write_text(json.dumps(pipeline.state_dict()))
        for name, content in pipeline.pending_files().items():
            (checkpoint / name).write_bytes(content)
    return drawn, said


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(
    "parts",
    [
        *[[(4, stop), (8, 8)] for stop in (1, 2, 3, 4)],
        [(4, 4), (8, 4), (8, 8)],  # one that dies while it loads
        [(8, 4), (4, 4), (8, 8)],  # an earlier end, by which nothing was made
        [(8, 3), (4, 4), (8, 8)],  # and by which a step was made
        [(8, 5), (8, 8)],
    ],
)
def test_a_run_that_gets_a_later_end_says_from_which_step_it_is_another_one(one_rank, tmp_path, depth, parts):
    """Whenever it goes on from a checkpoint in which a step of it is missing, whatever the starts between did."""
    whole = [max(0, step - depth) for step in range(8)]
    assert part(tmp_path, depth, end=8, until=8, step=0) == (whole, "")
    shutil.rmtree(tmp_path / "8")
    drawn, said, starts = [], [], [0, *(until for _, until in parts)]
    for step, (end, until) in zip(starts, parts, strict=False):
        of_part, text = part(tmp_path, depth, end, until, step)
        drawn += of_part
        said.append(re.findall(r"from step (\d+) on", text))
    for step, (end, _), text in zip(starts, parts, said, strict=False):
        others = [str(k + 1) for k in range(step, end) if drawn[k] != whole[k]]
        assert text == (others[:1] if step else [])
