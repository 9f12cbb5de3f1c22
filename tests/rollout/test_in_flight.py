"""The pipeline in flight, with servers and rewards of random speed, killed, stopped and resumed at random moments."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_aapo.distributed import parallel
from nemo_aapo.errors import Interrupted, RewardError
from nemo_aapo.rollout import in_flight
from nemo_aapo.rollout.collector import BegunRollout, _Shard
from nemo_aapo.rollout.in_flight import InFlightPipeline
from nemo_aapo.rollout.saved import pending
from nemo_aapo.rollout.saved.bank import RolloutBank
from nemo_aapo.types import Completion, Prompt, SamplingSpec

GROUP = 2
SCHEDULES = 150


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """The collectives among one rank, without a process group."""
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    monkeypatch.setattr(parallel, "gather_data_parallel", lambda value: [value])
    monkeypatch.setattr(parallel, "exchange_data_parallel", lambda outgoing: list(outgoing[0]))
    for name in ("broadcast_in_model_parallel", "broadcast_from_first_rank"):
        monkeypatch.setattr(parallel, name, lambda value: value)
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)
    monkeypatch.setattr(in_flight, "POLL_S", 0.0)


class Killed(Exception):
    """The process is gone."""


class Servers:
    """Generates a token of random sequences whenever it is asked for an error, as ``_wait`` does."""

    shares_weights, refit_bytes = False, 0

    def __init__(self, run) -> None:
        self.run, self.under_way, self.version = run, [], 0

    def update_weights(self, named_tensors, version):
        self.version = version

    def error(self):
        """Some tokens are made; a sequence that has all of its tokens ends."""
        if self.run.rng.random() < self.run.kill_rate:
            raise Killed
        for sequence in self.run.rng.sample(self.under_way, self.run.rng.randrange(len(self.under_way) + 1)):
            shard, i, j, seed, versions = sequence
            versions.append(self.version)
            if len(versions) == 1 + seed % 3:
                self.under_way.remove(sequence)
                self.run.ended(shard, i, j, seed, versions)


class Run:
    """What outlives processes: the disk. ``trained`` is by step what the policy of that step was made of."""

    def __init__(self, seed: int, folder) -> None:
        self.rng = rng = random.Random(seed)
        self.lag, self.count, self.steps = rng.randrange(1, 4), rng.randrange(1, 4), rng.randrange(2, 8)
        self.kill_rate, self.folder, self.checkpoint = rng.choice((0.0, 0.02, 0.1)), folder, None
        self.stop_rate, self.broken, self.twice = rng.choice((0.0, 0.05)), False, False
        self.trained: dict[int, list] = {}
        self.deaths = 0

    def live(self) -> None:
        """One process, up to its end."""
        policy = SimpleNamespace(version=0, named_weights=lambda: iter(()))
        self.servers = Servers(self)
        scorer = SimpleNamespace(collect=self.scores)
        self.collector = SimpleNamespace(
            engine=self.servers, rewards=scorer, begin=self.begin,
            length_predictor=SimpleNamespace(observe=lambda lengths: None, state_dict=dict, load_state_dict=id),
        )  # fmt: skip
        config = SimpleNamespace(
            rollout=SimpleNamespace(max_lag=self.lag, oversample=None, bank="exact"), prompts_per_step=self.count,
            group_size=GROUP, seed=1, trainer=SimpleNamespace(max_steps=self.steps),
            algorithm=SimpleNamespace(updates_per_rollout=1),
        )  # fmt: skip
        self.pipeline = pipeline = InFlightPipeline(
            config=config, policy=policy, collector=self.collector, sampling=SamplingSpec(1.0, 3, ()),
            prompts=[
                Prompt(f"p{0 if self.twice else i}", np.array([i], np.int32), "", "", "")
                for i in range(self.count * self.steps)
            ],
            sampler=Sampler(self.count), reference=None, bank=RolloutBank(self.folder, ("run",), 0, lambda text: None),
        )  # fmt: skip
        step = 0
        if self.checkpoint is not None:
            step, state, files = self.checkpoint
            pipeline.load_state_dict(state)
            (self.folder.parent / pending.FILE_NAME).write_bytes(files.get(pending.FILE_NAME, b""))
            pipeline.load_pending(self.folder.parent, step)
            policy.version = step
            assert not pipeline.drawn_later()
            config.trainer.max_steps += 1  # a later end, whose groups may be missing
            assert pipeline.not_begun() == (self.steps if step + self.lag > self.steps else None)
            config.trainer.max_steps -= 1
        pipeline.recover()
        first = step
        for step in range(first, self.steps):
            pipeline.refit()
            pipeline.begin(step)
            try:
                groups = pipeline.generate(step)
            except (Interrupted, RewardError):
                self.save(step)
                raise
            if step == first and not pipeline._taken_up:  # the parity gate compares these, and no others
                sampled = [completion for group in groups for completion in group.completions]
                assert {(c.policy_version, *c.logprobs.tolist()) for c in sampled} <= {
                    (step, *[self.deaths] * n) for n in (1, 2, 3)
                }
            self.train(step, groups)
            policy.version = step + 1
            if self.rng.random() < 0.3:
                self.save(step + 1)

    def save(self, step) -> None:
        files = self.pipeline.pending_files()
        state = self.pipeline.state_dict()
        assert json.loads(json.dumps(state)) == state
        self.checkpoint = step, state, files
        self.pipeline.checkpointed(step)

    def train(self, step, groups) -> None:
        """A step that was made before is made on the same tokens; its versions are within the bound."""
        assert len(groups) == self.count
        versions = [v for group in groups for c in group.completions for v in (c.policy_version, *c.token_versions)]
        assert step - self.lag <= min(versions) <= max(versions) <= step
        made = [
            (g.prompt.id, [(c.token_ids.tolist(), c.token_versions.tolist()) for c in g.completions]) for g in groups
        ]
        assert self.trained.setdefault(step, made) == made
        assert all(group.rewards.tolist() == [0.5] * GROUP for group in groups)

    def begin(self, prompts, sampling, seeds, found, keep) -> BegunRollout:
        order = self.rng.sample(range(len(prompts)), len(prompts))
        before = {place: found[i] for place, i in enumerate(order) if i in found}
        shard = _Shard(0, order, [prompts[i] for i in order], [seeds[i] for i in order], found=before, keep=keep)
        for i, row in enumerate(shard.seeds):
            for j, seed in enumerate(row):
                shard.texts[i, j] = ""
                if i not in before:
                    self.servers.under_way.append((shard, i, j, seed, []))
        return BegunRollout(shard, self.servers)

    def ended(self, shard, i, j, seed, versions) -> None:
        several = np.array(versions, np.int32) if versions[0] != versions[-1] else None
        tokens = np.array([self.rng.randrange(1000) for _ in versions], np.int32)  # drawn anew it would be another one
        logprobs = np.full(len(versions), self.deaths, np.float32)  # which process it is
        ended = shard.ended.setdefault(i, {})
        ended[j] = Completion(tokens, logprobs, "stop", versions[0], versions=several)
        if len(ended) == GROUP:
            shard.keep(shard.prompts[i], [ended[j] for j in sorted(ended)])

    def scores(self, places):
        if self.rng.random() < self.stop_rate:
            raise Interrupted
        score, failure = (np.nan, "error") if self.broken else (0.5, None)
        return {place: SimpleNamespace(score=score, parts={"r": score}, failure=failure, detail="") for place in places}


class Sampler:
    """Each prompt once, in order."""

    def __init__(self, count) -> None:
        self.count, self.step = count, 0

    def indices(self, step):
        return list(range(step * self.count, (step + 1) * self.count))

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def test_no_schedule_with_kills_loses_a_group_trains_on_one_twice_or_makes_a_step_again_on_others(tmp_path):
    deaths = 0
    for seed in range(SCHEDULES):
        run = Run(seed, tmp_path / str(seed) / "bank")
        (tmp_path / str(seed)).mkdir()
        for _ in range(200):
            try:
                run.live()
                break
            except (Killed, Interrupted):
                run.deaths += 1
        deaths += run.deaths
        trained = sorted(name for made in run.trained.values() for name, _ in made)
        assert trained == sorted(f"p{i}" for i in range(run.count * run.steps)), seed
    assert deaths > SCHEDULES


def test_what_could_not_be_scored_is_scored_anew_by_the_run_that_goes_on(tmp_path):
    run = Run(0, tmp_path / "bank")
    run.kill_rate, run.stop_rate, run.broken = 0.0, 0.0, True
    with pytest.raises(RewardError, match="step 1: not one of"):
        run.live()
    assert run.checkpoint[2] == {}
    run.broken = False
    run.live()
    assert sorted(run.trained) == list(range(run.steps))


def test_a_prompt_that_a_step_has_twice_is_two_groups(tmp_path):
    """A source without end may make it again."""
    run = Run(0, tmp_path / "bank")
    run.kill_rate, run.stop_rate, run.count, run.twice = 0.0, 0.0, 2, True
    run.live()
    assert [name for made in run.trained.values() for name, _ in made] == ["p0"] * 2 * run.steps
