"""Reference rewards with real models: the same values however they are drawn, what they cost, whose weights serve."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal

import pytest

from tests.rollout.reference_runs import SHORT, by_question, counted, fit, with_trainer
from tests.training_runs import make_input, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer model and ten prompts."""
    return make_input(tmp_path_factory.mktemp("reference"))


# ---------------------------------------------------------------- the same values


@pytest.fixture(scope="module")
def filled_first(ranks, folder):
    """A run of four steps that filled its store before the first."""
    ((complete, metrics, values, drawn),) = ranks.run(
        with_trainer, settings(folder, folder / "first", *SHORT), fit, tp=None
    )
    assert complete
    assert len(metrics) == 4
    assert len(values) == 10
    assert len(drawn) == 1 + 4  # one batch of reference completions, then the policy's alone
    return metrics, values


def test_a_store_that_is_filled_ahead_of_need_holds_the_same(ranks, folder, filled_first):
    ahead = settings(folder, folder / "ahead", *SHORT, "algorithm.reference_fill_steps=2")
    ((_, metrics, values, drawn),) = ranks.run(with_trainer, ahead, fit, tp=None)
    assert (metrics, values) == filled_first
    assert len(drawn) == 2 + 4  # before the first and the third step; by then under updated weights


@pytest.mark.parametrize(("tp", "pp", "world"), [(2, 1, 2), (1, 2, 2), (1, 1, 2)])
def test_a_deleted_store_is_filled_again_to_the_same_values_on_any_layout(ranks, folder, filled_first, tp, pp, world):
    config = settings(folder, folder / "first", *SHORT, tp=tp, pp=pp, world=world)
    (folder / "first" / "reference_rewards.sqlite").unlink()
    for _, values, _ in ranks.run(with_trainer, config, prepare, world=world, tp=None):
        assert values == filled_first[1]


def prepare(trainer):
    drawn = counted(trainer)
    complete = trainer.rollouts.reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served)
    return complete, by_question(trainer.rollouts.reference._known, trainer), drawn


def test_a_resumed_run_whose_store_is_gone_goes_on_to_the_same_metrics(ranks, folder, filled_first):
    half = settings(folder, folder / "half", *SHORT, "trainer.max_steps=2")
    ranks.run(with_trainer, half, fit, tp=None)
    (folder / "half" / "reference_rewards.sqlite").unlink()
    ((_, metrics, _, drawn),) = ranks.run(with_trainer, settings(folder, folder / "half", *SHORT), fit, tp=None)
    assert metrics == filled_first[0][2:]
    assert len(drawn) == 1 + 2


def test_a_stop_signal_while_the_store_is_filled_keeps_what_was_drawn(ranks, folder, filled_first):
    config = settings(folder, folder / "stopped", *SHORT)
    ((complete, metrics, values, _),) = ranks.run(with_trainer, config, stopped_fit, tp=None)
    assert not complete
    assert metrics == []
    assert len(values) == 4
    assert not list((folder / "stopped").glob("checkpoints/step_*"))
    ((complete, metrics, values, drawn),) = ranks.run(with_trainer, config, fit, tp=None)
    assert complete
    assert (metrics, values) == filled_first
    assert len(drawn) == 1 + 4


def stopped_fit(trainer):
    reference = trainer.rollouts.reference
    reference.fill_batch, reference.first = 4, 0  # which prompt comes first depends on run.dir
    trainer.reporter.stop_after = 0
    return fit(trainer)


@pytest.mark.parametrize(("tp", "pp", "world"), [(1, 1, 1), (2, 1, 2), (1, 1, 2)])
def test_a_stop_in_the_midst_of_a_batch_keeps_what_was_scored_by_then(ranks, folder, filled_first, tp, pp, world):
    run_dir = folder / f"midst{tp}{pp}{world}"
    config = settings(folder, run_dir, *SHORT, tp=tp, pp=pp, world=world)
    for stored, complete, asked in ranks.run(with_trainer, config, stopped_within_a_batch, world=world, tp=None):
        assert not complete
        assert asked > 0
        assert 0 < stored < 10 * 4
    ((complete, values, drawn),) = ranks.run(with_trainer, settings(folder, run_dir, *SHORT), prepare, tp=None)
    assert complete
    assert values == filled_first[1]
    assert len(drawn) == 1


def stopped_within_a_batch(trainer):
    """Two sequences run at a time, and a stop is asked for once some have ended; what is stored then, on rank 0."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.rollout import collector

    collector.WATCH_S, before = 0.0, collector.WATCH_S
    reference, asked = trainer.rollouts.reference, []
    trainer.rollouts.collector.engine.max_concurrent_tokens = 48
    reference.first = 0

    def stop():
        asked.append(1)
        return len(asked) > 6

    try:
        complete = reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served, stop_requested=stop)
    finally:
        collector.WATCH_S = before
    store, ids = reference.store, [prompt.id for prompt in trainer.rollouts.data]
    stored = parallel.broadcast_from_first_rank(store and sum(map(len, store.read(ids, 4).values())))
    return stored, complete, len(asked)


def test_a_run_skips_what_another_one_has_stored_meanwhile(ranks, folder, filled_first):
    config = settings(folder, folder / "meanwhile", *SHORT)
    ((values, drawn),) = ranks.run(with_trainer, config, prepare_beside_another, tp=None)
    assert values == filled_first[1]
    assert len(drawn) == 2
    assert sum(drawn) < sum(len(row) for row in values.values()) * 8  # of the second batch, another run drew a part
    more = [*config, "algorithm.reference_samples=6"]
    ((_, more_values, more_drawn),) = ranks.run(with_trainer, more, prepare, tp=None)
    assert {question: row[:4] for question, row in more_values.items()} == filled_first[1]
    assert len(more_drawn) == 1
    assert more_drawn[0] < sum(drawn)  # two samples of ten prompts, instead of four of eight


def prepare_beside_another(trainer):
    """Two batches; after the first, another run stores a part of the second."""
    from nemo_aapo.reference_store.store import RewardStore

    reference, last = trainer.rollouts.reference, list(trainer.rollouts.data[8:])
    reference.fill_batch, reference.first = 4, 0
    theirs = reference._sample(last, reference_seeds(reference, last))
    drawn = counted(trainer)

    def report(done, total):
        if done == 16:
            with contextlib.closing(RewardStore(reference.store.path, reference.key)) as other:
                other.write(theirs)

    assert reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served, report)
    return by_question(reference._known, trainer), drawn


def test_a_read_only_store_serves_what_it_has_and_refuses_what_it_lacks_before_it_is_sampled(
    ranks, folder, filled_first, tmp_path
):
    store = shutil.copy(folder / "first" / "reference_rewards.sqlite", tmp_path)
    config = settings(folder, tmp_path / "run", *SHORT, f"algorithm.reference_store={store}")
    ((values, message, drawn),) = ranks.run(with_trainer, config, prepare_from_read_only, tp=None)
    assert values == filled_first[1]
    assert "is read-only, and 10 prompts are not stored in it" in message
    assert drawn == []


def prepare_from_read_only(trainer):
    """All that the store has; then two samples more of each prompt."""
    from nemo_aapo.errors import StoreError

    drawn, reference = counted(trainer), trainer.rollouts.reference
    reference.store.read_only = True  # as it finds by itself, unless root asks
    assert reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served)
    values = by_question(reference._known, trainer)
    reference.samples = 6
    reference._known.clear()
    with pytest.raises(StoreError) as error:
        reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served)
    return values, str(error.value), drawn


@pytest.mark.parametrize("stores", [True, False])
def test_what_another_run_is_sampling_is_waited_for_or_taken_over_once_it_is_gone(ranks, folder, filled_first, stores):
    config = settings(folder, folder / f"claimed_{stores}", *SHORT)
    ((values, drawn, told),) = ranks.run(with_trainer, config, prepare_while_another_samples, stores, tp=None)
    assert values == filled_first[1]
    assert len(drawn) == (1 if stores else 2)  # the other run's four prompts are never sampled twice at once
    assert told.count(24) >= 3


def prepare_while_another_samples(trainer, stores):
    """A process has claimed four of ten prompts; left alone it ends, having stored them or not."""
    from nemo_aapo.reference_store.store import RewardStore
    from nemo_aapo.rollout import reference as module

    reference, theirs = trainer.rollouts.reference, list(trainer.rollouts.data[2:6])
    rewards = reference._sample(theirs, reference_seeds(reference, theirs))
    read, write = os.pipe()
    if not (other := os.fork()):
        taken = [reference.store.claims.take(prompt.id) for prompt in theirs]
        os.write(write, bytes(taken))
        signal.pause()
    assert os.read(read, 4) == bytes([1, 1, 1, 1])
    drawn, told = counted(trainer), []
    module.POLL_S, before = 0.01, module.POLL_S

    def report(done, total):
        told.append(done)
        if done == 24 and told.count(24) == 3:
            if stores:
                with contextlib.closing(RewardStore(reference.store.path, reference.key)) as store:
                    store.write(rewards)
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)

    try:
        assert reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served, report)
    finally:
        module.POLL_S = before
    return by_question(reference._known, trainer), drawn, told


def reference_seeds(reference, prompts):
    from nemo_aapo.seeds import stream_seed

    return [[stream_seed(reference.seed, "reference", p.id, k) for k in range(reference.samples)] for p in prompts]


def by_few_bytes(overrides, what):
    """``with_trainer`` where eight bytes of each tensor tell a model from others, as 64 KiB do of a large one."""
    from nemo_aapo.run import identity

    piece, identity.PIECE = identity.PIECE, 8
    try:
        return with_trainer(overrides, what)
    finally:
        identity.PIECE = piece


def test_a_checkpoint_is_not_resumed_with_the_rewards_of_another_reference(ranks, folder, tmp_path):
    """Of a model that differs in a number which the run's own identity of it does not look at."""
    from safetensors.torch import load_file, save_file

    for name in ("model", "train.jsonl", "validation.jsonl"):
        (shutil.copytree if name == "model" else shutil.copy)(folder / name, tmp_path / name)
    half = settings(tmp_path, tmp_path / "run", *SHORT, "trainer.max_steps=2")
    ranks.run(by_few_bytes, half, fit, tp=None)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    resumed = settings(tmp_path, tmp_path / "run", *SHORT, tp=2, world=2)
    with pytest.raises(AssertionError) as raised:
        ranks.run(by_few_bytes, resumed, fit, world=2, tp=None)
    assert str(raised.value).count("ConfigError: this run began with other reference rewards") == 2  # on both ranks
    assert "model: " in str(raised.value)


# ---------------------------------------------------------------- what it costs


def test_a_cached_step_draws_as_many_tokens_as_a_gpg_step_and_an_online_one_about_twice(ranks, folder, filled_first):
    words = ["trainer.max_steps=1", "prompts_per_step=8"]
    tokens = {}
    for algorithm in ("aapo", "gpg", "aapo_paper"):
        config = settings(folder, folder / f"cost_{algorithm}", *SHORT, *words, f"algorithm={algorithm}")
        (tokens[algorithm],) = ranks.run(with_trainer, config, drawn_by_fit, tp=None)
    (filling, cached), (gpg,), (policy, reference) = tokens["aapo"], tokens["gpg"], tokens["aapo_paper"]
    assert filling > 0  # once for all steps that take these prompts
    assert cached == gpg == policy
    assert 1.7 * gpg < reference + policy < 2.3 * gpg


def drawn_by_fit(trainer):
    drawn = counted(trainer)
    trainer.fit()
    return drawn
