"""Trainers whose reference rewards a test looks at."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from tests.training_runs import TIMES, Parity

SHORT = ["trainer.max_steps=4", "checkpoint.save_interval=2", "trainer.val_check_interval=0", "export_hf_model=false"]


class Quiet:
    """A reporter that keeps what it is told."""

    def __init__(self, stop_after=None):
        self.metrics, self.phases, self.notes, self.asked, self.stop_after = [], [], [], 0, stop_after

    def begin(self, step, validated): ...
    def phase(self, name, done, total):
        self.phases.append((name, done, total))

    def note(self, text):
        self.notes.append(text)

    def log_step(self, step, metrics):
        self.metrics.append({k: v for k, v in metrics.items() if not k.startswith(TIMES)})

    def log_validation(self, step, metrics, samples): ...
    def sync(self): ...
    def save_rollouts(self, name, samples): ...
    def stop_requested(self):
        self.asked += 1
        return self.stop_after is not None and self.asked > self.stop_after


def with_trainer(overrides, job, *arguments, stop_after=None):
    """What ``job(trainer, *arguments)`` returns, on one rank."""
    from nemo_aapo import RewardRunner, load_config
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.training.build import build_training, initialize

    config = load_config(overrides)
    initialize(config)
    resolved = resolve(config, int(os.environ["WORLD_SIZE"]), given=("rewards",))
    with contextlib.ExitStack() as stack:
        rewards = RewardRunner([(Parity(), 1.0)], workers=0, timeout_s=10.0)
        reporter = Quiet(stop_after)
        trainer = build_training(resolved, reporter=reporter, stack=stack, rewards=rewards)
        return job(trainer, *arguments)


def by_question(rewards, trainer):
    return {p.text: rewards[p.id].tolist() for p in trainer.rollouts.data if p.id in rewards}


def counted(trainer):
    """Tokens of each ``generate`` call from now on."""
    tokens, generate = [], trainer.rollouts.collector.engine.generate

    def counting(*arguments, **more):
        out = generate(*arguments, **more)
        tokens.append(sum(len(completion.token_ids) for row in out for completion in row))
        return out

    trainer.rollouts.collector.engine.generate = counting
    return tokens


def fit(trainer):
    drawn = counted(trainer)
    complete = trainer.fit()
    return complete, trainer.reporter.metrics, by_question(trainer.rollouts.reference._known, trainer), drawn


def rows(store: Path):
    with contextlib.closing(sqlite3.connect(store)) as db:
        return db.execute("SELECT digest, prompt, sample, reward FROM rewards JOIN keys ON key = number").fetchall()
