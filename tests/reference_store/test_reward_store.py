"""The store of reference rewards: real SQLite files, real processes that write them at the same time or are killed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.errors import ConfigError, StoreError
from nemo_aapo.reference_store.key import store_key
from nemo_aapo.reference_store.shards import Shard, merge_shards, shard_files
from nemo_aapo.reference_store.store import RewardStore, is_complete, other_rewards, padded
from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.definition import reward_definition
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.types import Prompt, SamplingSpec

SAMPLING = SamplingSpec(1.0, 8, (1,))
REWARDS = [{"name": "integer", "weight": 1.0}]
FORK = multiprocessing.get_context("fork")


def key(model="m", sampling=SAMPLING, rewards=REWARDS, seed=1):
    return store_key(model, sampling, rewards, seed)


def open_store(path, the_key=None, **more):
    return contextlib.closing(RewardStore(path, the_key or key(), **more))


def values(count, start=0.0):
    """Rewards [4] of some prompts, all different and none of them a short binary fraction."""
    return {f"p{i}": (np.arange(4) + i) / 7 + start for i in range(count)}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[p], expected[p], equal_nan=True) for p in expected
    )


# ---------------------------------------------------------------- values


def test_what_was_written_is_read_bit_for_bit_by_key_and_never_changes(tmp_path):
    with open_store(tmp_path / "deep" / "s.sqlite") as store:
        assert same(store.write(values(3)), values(3))
        assert same(store.write(values(4, start=1.0)), {**values(4, start=1.0), **values(3)})  # the first write stands
    with open_store(tmp_path / "deep" / "s.sqlite") as store, open_store(store.path, key(seed=2)) as other:
        assert same(store.read(["p0", "p1", "p9"], 4), values(2))
        assert same(other.read(["p0"], 4), {})
        other.write(values(1, start=5.0))
        assert same(other.read(["p0"], 4), values(1, start=5.0))
        assert same(store.read(["p0"], 4), values(1))


def test_runs_with_other_numbers_of_samples_share_what_both_need(tmp_path):
    with open_store(tmp_path / "s.sqlite") as store:
        store.write(values(1))
        assert store.read(["p0"], 2)["p0"].tolist() == values(1)["p0"][:2].tolist()
        assert len(store.read(["p0"], 8)["p0"]) == 4  # the caller draws four more
        more = np.concatenate([values(1)["p0"], [0.5] * 4])
        assert same(store.write({"p0": more}), {"p0": more})


def test_an_infinite_reward_is_refused(tmp_path):
    with open_store(tmp_path / "s.sqlite") as store:
        with pytest.raises(ValueError, match="prompt p0 are not finite"):
            store.write({"p0": np.array([0.0, np.inf])})
        assert store.read(["p0"], 1) == {}


def test_a_reward_whose_scoring_failed_is_not_stored_and_its_place_is_filled_later(tmp_path):
    nan = np.nan
    first = {"a": np.array([nan, 1.0, nan]), "b": np.full(3, nan), "c": np.array([0.0, 0.5, 1.0])}
    with open_store(tmp_path / "s.sqlite") as store, open_store(tmp_path / "t.sqlite") as other:
        assert same(store.write(first), first)
        found = store.read(list(first), 3)
        assert same(found, {"a": np.array([nan, 1.0]), "c": first["c"]})
        assert [is_complete(found.get(prompt), 3) for prompt in first] == [False, False, True]
        assert same({p: padded(found.get(p), 3) for p in first}, first)
        for batch in store.items():
            other.write(batch)
        assert same(other.read(list(first), 3), found)
        late = {"a": np.array([0.25, 9.0, 0.75]), "b": np.array([nan, nan, 2.0])}
        stands = {"a": np.array([0.25, 1.0, 0.75]), "b": late["b"]}  # the one that was there stays what it was
        assert same(store.write(late), stands)
        assert same(store.read(["a", "b"], 3), stands)


# ---------------------------------------------------------------- processes


def _write_batches(path, pipe):
    with open_store(path) as store:
        for batch in range(1000):
            store.write({f"{batch}-{i}": np.full(4, batch / 3) for i in range(2000)})
            pipe.send(batch)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_the_batch_at_hand_and_no_other(tmp_path):
    path, told = tmp_path / "s.sqlite", -1
    for delay in (0.0, 0.003, 0.006, 0.01, 0.013, 0.02):
        ours, theirs = FORK.Pipe()
        writer = FORK.Process(target=_write_batches, args=(path, theirs), daemon=True)
        writer.start()
        theirs.close()
        told = max(told, ours.recv())
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(10)
        with contextlib.suppress(EOFError):  # what it had said before it died
            while True:
                told = max(told, ours.recv())
        with open_store(path) as store:
            batches = [store.read([f"{batch}-{i}" for i in range(2000)], 4) for batch in range(told + 2)]
        assert all(len(batch) == 2000 for batch in batches[: told + 1])
        assert len(batches[told + 1]) in (0, 2000)  # committed and not yet told, or not there at all
        assert all((rewards == number / 3).all() for number, batch in enumerate(batches) for rewards in batch.values())


def _write_own(path, start, barrier, pipe):
    barrier.wait(20)
    with open_store(path) as store:
        pipe.send(
            [store.write({p: r for p, r in values(40, start).items() if int(p[1:]) // 4 == i}) for i in range(10)]
        )


@pytest.mark.slow
def test_processes_that_write_at_the_same_time_all_get_what_stands(tmp_path):
    path, barrier, pipes = tmp_path / "s.sqlite", FORK.Barrier(4), []
    for number in range(4):
        ours, theirs = FORK.Pipe()
        FORK.Process(target=_write_own, args=(path, float(number), barrier, theirs), daemon=True).start()
        pipes.append(ours)
    told = [{p: r for batch in pipe.recv() for p, r in batch.items()} for pipe in pipes]
    with open_store(path) as store:
        stored = store.read([f"p{i}" for i in range(40)], 4)
    assert all(same(each, stored) for each in told)
    for prompt, rewards in stored.items():  # of one writer as a whole
        assert rewards.tolist() in [values(40, float(number))[prompt].tolist() for number in range(4)]


def test_a_lock_that_is_kept_too_long_is_an_error_that_says_so(tmp_path):
    with open_store(tmp_path / "s.sqlite", timeout_s=0.1) as store:
        holder = sqlite3.connect(store.path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"s\.sqlite: database is locked\. Another process has kept it for 0\.1 s"):
            store.write(values(1))
        holder.execute("ROLLBACK")
        store.write(values(1))
        holder.close()


# ---------------------------------------------------------------- files that can't be used


def test_files_that_cannot_be_used_are_refused_with_a_remedy(tmp_path):
    good = tmp_path / "good.sqlite"
    with open_store(good) as store:
        store.write(values(500))
    names = ("cut", "torn", "noise", "foreign", "newer")
    cut, torn, noise, foreign, newer = (tmp_path / f"{name}.sqlite" for name in names)
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    whole = good.read_bytes()
    torn.write_bytes(whole[:-6000] + bytes(3000) + whole[-3000:])
    noise.write_bytes(b"not a store at all" * 100)
    with contextlib.closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE things (name)")
    shutil.copy(good, newer)
    with contextlib.closing(sqlite3.connect(newer)) as db:
        db.execute("PRAGMA user_version = 2")
    (tmp_path / "file").touch()
    for path, message in {
        tmp_path: "is a directory; name a file in it",
        cut: "damaged.*Move it away: it is filled again, to the same values",
        torn: "malformed.*Move it away",
        noise: "file is not a database.*Move it away",
        foreign: "not a store of reference rewards. Name another file",
        newer: "has format 2, this version of nemo_aapo reads 1",
        tmp_path / "file" / "s.sqlite": "File exists|Not a directory",
    }.items():
        with pytest.raises(StoreError, match=rf"(?s){path.name}.*({message})"):
            RewardStore(path, key())
    with pytest.raises(StoreError, match="no such file"):
        RewardStore(tmp_path / "missing.sqlite", key(), create=False)
    assert not (tmp_path / "missing.sqlite").exists()


def test_a_full_disk_leaves_what_was_stored_before(tmp_path):
    with open_store(tmp_path / "s.sqlite") as store:
        store.write(values(10))
        store._db.execute("PRAGMA max_page_count = 5")  # SQLite reports it as it reports a full disk
        with pytest.raises(StoreError, match=r"full\. Make room; what was stored before is whole"):
            store.write(values(2000))
    with open_store(tmp_path / "s.sqlite") as store:
        assert same(store.read([f"p{i}" for i in range(2000)], 4), values(10))


def _use_read_only(path, pipe):
    if os.getuid() == 0:
        os.setuid(65534)  # root may write anywhere
    with open_store(path) as store:
        found = store.read(["p0", "p1"], 4)
        try:
            store.write(values(2))
        except StoreError as error:
            pipe.send((found, str(error)))


@pytest.mark.slow
def test_a_read_only_store_serves_what_it_has_and_says_what_it_lacks():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.sqlite"
        with open_store(path) as store:
            store.write(values(1))
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        ours, theirs = FORK.Pipe()
        FORK.Process(target=_use_read_only, args=(path, theirs), daemon=True).start()
        assert ours.poll(20)
        found, message = ours.recv()
        Path(folder).chmod(0o755)
    assert same(found, values(1))
    assert "is read-only, and 2 prompts are not stored in it" in message


def test_a_write_ahead_log_that_somebody_switched_on_is_switched_off(tmp_path):
    with open_store(tmp_path / "s.sqlite") as store:
        store.write(values(1))
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite")) as db:
        assert db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    with open_store(tmp_path / "s.sqlite") as store:
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert same(store.read(["p0"], 4), values(1))


# ---------------------------------------------------------------- keys


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


# ---------------------------------------------------------------- shards


def prompts(count):
    return [Prompt(f"p{i}", np.array([5], np.int32), "", "", "") for i in range(count)]


def test_shards_are_disjoint_whole_and_named_by_their_numbers():
    shards = [Shard(i, 3) for i in range(3)]
    parts = [[prompt.id for prompt in shard.select(prompts(10))] for shard in shards]
    assert sorted(name for part in parts for name in part) == sorted(f"p{i}" for i in range(10))
    assert {len(part) for part in parts} == {3, 4}
    assert shards[2].path("a/s.sqlite") == Path("a/s.shard-0002-of-0003.sqlite")
    for index, count, message in ((3, 3, "between 0 and 2"), (-1, 3, "between 0 and 2"), (0, 0, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            Shard(index, count)


def test_a_merge_takes_every_shard_once_and_refuses_one_of_another_key_before_it_copies_anything(tmp_path):
    path = tmp_path / "s.sqlite"
    with pytest.raises(StoreError, match="no shards beside it"):
        merge_shards(path, key())
    (tmp_path / "s.sqlite.shard-note").touch()  # not one of ours
    for index in range(2):
        with open_store(Shard(index, 3).path(path)) as shard:
            shard.write({prompt.id: values(10)[prompt.id] for prompt in Shard(index, 3).select(prompts(10))})
    assert list(merge_shards(path, key()).values()) == [4, 3]
    with open_store(Shard(2, 3).path(path), key("other")) as shard:
        shard.write(values(1))
    path.unlink()
    with pytest.raises(StoreError, match=r's\.shard-0002-of-0003\.sqlite: was filled for.*model: "other" there'):
        merge_shards(path, key())
    assert not path.exists()
    Shard(2, 3).path(path).unlink()
    with open_store(Shard(2, 3).path(path)) as shard:
        shard.write({prompt.id: values(10)[prompt.id] for prompt in Shard(2, 3).select(prompts(10))})
    assert len(shard_files(path)) == 3
    for _ in range(2):
        assert list(merge_shards(path, key()).values()) == [4, 3, 3]
        with open_store(path, create=False) as store:
            assert same(store.read([f"p{i}" for i in range(10)], 4), values(10))
