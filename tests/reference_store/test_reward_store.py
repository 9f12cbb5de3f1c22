"""The store of reference rewards: real SQLite files, real processes that write them at the same time or are killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.errors import StoreError
from nemo_aapo.reference_store.store import RewardStore, is_complete, padded
from tests.reference_store.stores import FORK, key, open_store, same, values

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
