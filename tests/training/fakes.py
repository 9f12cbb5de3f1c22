"""Fakes for all parts of the training loop, which write down what happens to them in one journal."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.errors import CheckpointError
from nemo_aapo.training.trainer import AAPOTrainer
from nemo_aapo.types import Completion, Group, Prompt

STEPS = 5
AGREE = {"parity/mult_prob_error": 1.0, "parity/gen_kl": 0.0}
APART = {"parity/mult_prob_error": 9.0, "parity/gen_kl": 9.0}


class Journal(list):
    """What happened, in order; at one place something else happens as well."""

    def __init__(self) -> None:
        super().__init__()
        self.at = self.then = None

    def write(self, line: str) -> None:
        self.append(line)
        if line == self.at:
            self.then()

    def of(self, *verbs: str) -> list[str]:
        return [line for line in self if line.split()[0] in verbs]


class Policy:
    def __init__(self) -> None:
        self.version = 0


class Rollouts:
    """An engine with weights of its own, and a cursor: what a checkpoint has to bring back."""

    def __init__(self, journal, policy, disk, runs_ahead=False) -> None:
        self.journal, self.policy, self.disk, self.runs_ahead = journal, policy, disk, runs_ahead
        self.seconds, self.metrics = {"rollout": 0.0, "refit": 0.0}, {"rollout/idle_fraction": 0.0}
        self.served = self.cursor = 0
        self.ahead = {}  # what is under way: step -> version

    def fill_reference(self, step, report, stop_requested):
        self.journal.write(f"fill {step}")
        report(1, 2)
        return not stop_requested()

    def generate(self, step):
        if step not in self.ahead:
            assert self.served == self.policy.version, "stale weights in the engine"
        version = self.ahead.pop(step, self.served)
        self.journal.write(f"generate {step} by {version}")
        self.cursor = step + 1
        return groups(version)

    def begin(self, step):
        for later in range(self.cursor, min(step + 2, STEPS)):
            if later not in self.ahead:
                self.ahead[later] = self.served
                self.journal.write(f"begin {later} by {self.served}")

    def settle(self):
        self.journal.write("settle")

    def refit(self):
        if self.served != self.policy.version:
            self.journal.write(f"refit to {self.policy.version}")
            self.served = self.policy.version

    def epochs(self, step):
        return float(step)

    def state_dict(self):
        return {"sampler": self.cursor, "reference": None, "completion_lengths": {}}

    def load_state_dict(self, state):
        self.cursor = state["sampler"]

    def pending_files(self):
        return {"pending": repr(self.ahead).encode()} if self.ahead else {}

    def load_pending(self, checkpoint, step):
        self.journal.write(f"pending of {checkpoint.name}")
        self.ahead = ast.literal_eval(self.disk[step]["files"].get("pending", b"{}").decode())

    def drawn_later(self):
        return f"drawn later than {len(self.ahead)} others"

    def recover(self): ...

    def parity_sample(self):
        return groups(self.served) if self.ahead else None

    def checkpointed(self, step): ...


class Learner:
    def __init__(self, journal, policy) -> None:
        self.journal, self.policy = journal, policy
        self.agrees, self.later = AGREE, AGREE

    def parity(self, groups):
        assert {c.policy_version for group in groups for c in group.completions} == {self.policy.version}
        self.journal.write("parity")
        return self.agrees

    def update(self, groups):
        assert all(group.advantages is not None for group in groups)
        self.journal.write(f"update {self.policy.version}")
        self.policy.version += 1
        return {"loss": 0.5, "kl": float("nan"), **self.later}


class Validator:
    prompts = ("one", "two")

    def __init__(self, journal, policy) -> None:
        self.journal, self.policy = journal, policy

    def run(self):
        self.journal.write(f"validate {self.policy.version}")
        return {"validation/accuracy_greedy": 0.25}, []


class Checkpoints:
    """A disk that outlives the trainer."""

    def __init__(self, journal, disk, kept) -> None:
        self.journal, self.disk, self.kept, self.policy = journal, disk, kept, None
        self.seconds, self.resumed_from, self.broken = 0.0, None, False

    def resume(self, policy, mode):
        self.policy = policy
        if not self.disk:
            return None
        state = self.disk[max(self.disk)]
        policy.version, self.resumed_from = state["policy_version"], Path(f"step_{state['step']}")
        return state

    def save(self, step, policy, trainer_state, extra_files=None):
        self.journal.write(f"save {step}")
        assert self.kept.waiting is None, "a checkpoint before what was kept of its step"
        self.disk[step] = {**trainer_state, "files": extra_files}

    def failed(self):
        return self.broken

    def wait(self):
        self.journal.write("wait")
        if self.broken:
            raise CheckpointError("no space left")

    def close(self):
        self.journal.write("close")


class Kept:
    """Has to be on the disk before the checkpoint of its step."""

    def __init__(self) -> None:
        self.waiting = None

    def choose(self, step, groups):
        return [f"of {step}"]

    def write(self, step, kept):
        assert kept == [f"of {step - 1}"]
        self.waiting = step

    def wait(self):
        self.waiting = None


class Throughput:
    """Counts completion tokens."""

    def metrics(self, generated, trained, seconds):
        tokens = sum(sum(lengths) for _, lengths in generated)
        return {"tokens/generated": tokens, "tokens/trained": sum(group.lengths.sum() for group in trained)}


class Tracer:
    def begin(self, step): ...

    def end(self): ...

    def close(self): ...


class Reporter:
    """Keeps in memory what it is told, and the lines of steps and validations in a ``MetricsFile`` if it has one."""

    def __init__(self, journal) -> None:
        self.journal, self.stop, self.saved, self.notes, self.metrics = journal, False, [], [], []
        self.file = None

    def begin(self, step, *, validated):
        self.journal.write(f"begin_at {step}")
        if self.file:
            self.file.truncate_after(step, validated=validated)

    def phase(self, name, done, total): ...

    def note(self, text):
        self.notes.append(text)

    def sync(self):
        self.journal.write("sync")

    def log_step(self, step, metrics):
        self.metrics.append(metrics)
        if self.file:
            self.file.append(step, metrics)
        self.journal.write(f"log {step}")

    def log_validation(self, step, metrics, samples):
        if self.file:
            self.file.append(step, metrics)

    def save_rollouts(self, name, samples):
        self.saved.append((name, samples))

    def stop_requested(self):
        return self.stop


def groups(version):
    """Two prompts with one right completion each."""
    completions = tuple(
        Completion(np.array([3, 1], np.int32), np.zeros(2, np.float32), "stop", version) for _ in range(2)
    )
    rewards, nothing = np.array([1.0, 0.0]), np.zeros(2, bool)
    prompts = [Prompt(name, np.array([5], np.int32), "", "", "") for name in "ab"]
    return [Group(prompt, completions, ("", ""), rewards, {"r": rewards}, nothing) for prompt in prompts]


def make(config, disk=None, runs_ahead=False):
    """A trainer of fakes that share a journal."""
    journal, policy, kept = Journal(), Policy(), Kept()
    disk = {} if disk is None else disk
    return AAPOTrainer(
        config=config,
        policy=policy,
        rollouts=Rollouts(journal, policy, disk, runs_ahead),
        objective=Objective.of(config.algorithm, 4),
        learner=Learner(journal, policy),
        validator=Validator(journal, policy),
        checkpoints=Checkpoints(journal, disk, kept),
        kept=kept,
        throughput=Throughput(),
        tracer=Tracer(),
        reporter=Reporter(journal),
    )


def happen(trainer, line, action):
    """Have something happen when the journal comes to a line."""
    trainer.reporter.journal.at, trainer.reporter.journal.then = line, action


def fails_with(error):
    def fail():
        raise error

    return fail
