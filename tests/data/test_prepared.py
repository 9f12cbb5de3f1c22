"""Large data sets, prepared once: the same prompts as from small ones, shared, whole or not there, and never stale."""

from __future__ import annotations

import dataclasses
import os
import pickle
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.data import loading
from nemo_aapo.data.loading import build_sampler, load_data
from nemo_aapo.data.prepared import cache, making
from nemo_aapo.data.prepared.answers import AnswerCheck
from nemo_aapo.data.prepared.table import PreparedPrompts, copied_to, prompt_schema
from nemo_aapo.errors import DataError, RunError
from nemo_aapo.rewards import REWARDS, build_reward
from nemo_aapo.utils.text import TimeLeft
from tests.tiny_models import make_config

pytest.importorskip("pyarrow")
HELD_OUT = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(0, 3000, 70)]


def messy_rows(count: int) -> list[object]:
    """Rows of which some repeat others, are too long, have no usable answer, or are among the held-out ones."""
    rng = random.Random(3)
    rows: list[object] = []
    for n in range(count):
        row: object = {"question": f"What is {n}+{n}?", "answer": str(2 * n)}
        kind = rng.randrange(40)
        if kind == 0 and rows:
            row = rng.choice(rows)
        elif kind == 1:
            row = {"question": "x" * 70, "answer": str(n % 3)}
        elif kind == 2:
            row = {"question": "y?", "answer": rng.choice(["nan", "word", "other word", None])}
        elif kind == 3:
            row = {"question": f"What is {n % 7}+{n % 7}? ", "answer": "#### 1"}
        rows.append(row)
    return rows


def only_numbers(answer: str) -> None:
    if not answer.isdigit():
        raise ValueError("not a number")


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """Where prepared prompts go; sources of 10 kB count as large."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(making, "LARGE_BYTES", 10_000)
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def config(write):
    """Two messy sources and held-out prompts."""
    sources = [
        {"path": str(write("one.jsonl", messy_rows(2500))), "weight": 3.0},
        {
            "path": str(
                write(
                    "two.jsonl",
                    [*HELD_OUT, *messy_rows(300)[:200], *({"question": f"z{n}", "answer": "5"} for n in range(9))],
                )
            )
        },
    ]
    return make_config(
        "model",
        validation=write("held_out.jsonl", HELD_OUT),
        data__train=sources,
        data__on_bad_line="skip",
        data__on_long_prompt="drop",
        data__on_contamination="drop",
        data__max_prompt_tokens=60,
    )


def contents(prompts) -> list[tuple]:
    return [(p.id, p.token_ids.tolist(), p.text, p.answer, p.source) for p in prompts]


@pytest.mark.slow
def test_prepared_prompts_are_those_of_a_small_source_one_by_one(config, tokenizer, cache_folder, monkeypatch, caplog):
    check = AnswerCheck(only_numbers, definition="numbers")
    with monkeypatch.context() as small:
        small.setattr(making, "LARGE_BYTES", 1 << 40)
        wanted, wanted_held_out = load_data(config.data, tokenizer, check)
        said = caplog.messages.copy()
    caplog.clear()
    train, held_out = load_data(config.data, tokenizer, check)
    assert isinstance(train.prompts, PreparedPrompts)
    assert contents(train.prompts) == contents(wanted.prompts)
    assert contents(held_out.prompts) == contents(wanted_held_out.prompts)
    for name in ("path", "bad_lines", "dropped_long", "duplicates", "digest", "contaminated", "shares"):
        assert getattr(train, name) == getattr(wanted, name), name
    assert min(train.bad_lines, train.dropped_long, train.duplicates, train.contaminated) > 5
    assert tuple(train.questions) == wanted.questions
    warnings = [text for text in caplog.messages if "once for all runs" not in text]
    assert warnings == said
    assert build_sampler(config, train).state_dict() == build_sampler(config, wanted).state_dict()
    token_ids = train.prompts[3].token_ids
    assert token_ids.dtype == np.int32
    assert token_ids.flags.writeable

    # A later start makes nothing, checks nothing, and says the same; runs may call the file what they like.
    caplog.clear()
    monkeypatch.setattr(making, "_maker", None)
    again, _ = load_data(config.data, tokenizer, check)
    assert (contents(again.prompts), again.digest, caplog.messages) == (contents(train.prompts), train.digest, said)
    monkeypatch.chdir(Path(config.data.train[0]["path"]).parent)
    elsewhere = make_config("m", data__train=[{**s, "path": Path(s["path"]).name} for s in config.data.train])
    data = dataclasses.replace(config.data, train=elsewhere.data.train)
    moved, _ = load_data(data, tokenizer, check)
    assert (moved.prompts[0].source, moved.digest) == (Path(train.prompts[0].source).name, train.digest)

    # Between processes only a path and the rows' numbers go; a copy gives the same.
    small = pickle.dumps(train)
    assert len(small) < 8 * len(train.prompts) + 2000
    copy = copied_to(pickle.loads(small), cache_folder.parent / "copy" / "prompts.arrow")
    assert contents(copy.prompts[5:9]) == contents(train.prompts)[5:9]
    assert copy.prompts.path != train.prompts.path


def test_what_the_prompts_depend_on_is_in_their_key(write, tokenizer, monkeypatch):
    rows = [{"question": f"q{n}", "answer": str(n)} for n in range(20)]
    path, held_out = write("rows.jsonl", rows), write("held_out.jsonl", rows[:1])
    monkeypatch.setattr(making, "LARGE_BYTES", 0)
    names: list[str] = []
    monkeypatch.setattr(making, "cached", lambda name, *_: names.append(name))
    monkeypatch.setattr(making, "_prompt_set", lambda *_: None)
    monkeypatch.setattr(loading, "without_contamination", lambda *_: None)

    def key(check=None, train=path, **changes):
        names.clear()
        load_data(make_config("m", train, held_out, **changes).data, tokenizer, check)
        return names[-1]

    first = key()
    assert key() == first
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(path.read_bytes())
    assert key(train=copy) == first
    others = [
        key(data__max_prompt_tokens=63),
        key(data__prompt_template="{question}!"),
        key(data__answer_form="boxed"),
        key(data__on_bad_line="skip"),
        key(data__date="2026-01-01"),
        key(data__template_arguments={"enable_thinking": False}),
        key(data__answer_field="question"),
        *(key(AnswerCheck(pytest.fail, definition=[{"name": name}])) for name in "ab"),
    ]
    before = path.stat()
    path.write_text(path.read_text().replace('"q7"', '"q8"'))  # a change that leaves size and time alone
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    others.append(key())
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    others.append(key())
    tokenizer.add_tokens(["<more>"])
    others.append(key())
    assert len({first, *others}) == len(others) + 1


@pytest.mark.slow
def test_rows_that_cant_be_used_are_refused_as_those_of_small_files(write, tokenizer, cache_folder, monkeypatch):
    monkeypatch.setattr(making, "LARGE_BYTES", 0)
    word, held_out = {"question": "a", "answer": "word"}, write("held_out.jsonl", HELD_OUT[:1])
    for rows, action, message in [
        (["no", word], "error", r"2 line\(s\) can't be used:\n  .*:1: not a JSON.*\n  .*:2: the gold answer 'word'"),
        ([word] * 9, "skip", "none of its 9 lines can be used, such as .*:1: the gold"),
        ([], "skip", "no prompts: empty"),
    ]:
        data = make_config("m", write("train.jsonl", rows), held_out, data__on_bad_line=action).data
        with pytest.raises(DataError, match=message):
            loading._load_all(
                loading.sources_of(data, "train"),
                ("train",),
                making.Making(data, tokenizer, {}, AnswerCheck(only_numbers), None, print),
            )
    assert all(entry.name.endswith(".lock") for entry in cache_folder.iterdir())


# ---------------------------------------------------------------- the cache


def write_twice(folder: Path) -> Path:
    """Makes a file, halfway through which it takes a moment."""
    with (folder / "half").open("w") as file:
        file.write("1")
        file.flush()
        time.sleep(0.3)
        file.write("2")
    return folder / "half"


def is_12(path: Path) -> bool:
    return path.is_file() and path.read_text() == "12"


def test_two_runs_that_start_at_once_make_a_file_once(tmp_path):
    made, said, notes = [], [], queue.Queue()

    def make(folder: Path) -> Path:
        made.append(folder)
        said.extend(notes.get(timeout=20) for _ in range(2))  # both others wait
        return write_twice(folder)

    with ThreadPoolExecutor(3) as pool:
        got = {*pool.map(lambda _: cache.cached("x", [tmp_path / "c"], is_12, make, notes.put), range(3))}
    assert (len(made), got) == (1, {tmp_path / "c" / "x"})
    assert notes.empty()
    assert "waiting for another run" in said[0]


def test_a_run_that_waited_too_long_makes_its_own_without_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_DEADLINE_S", 0.3)
    with cache._locked(tmp_path / ".x.lock", print):
        assert is_12(cache.cached("x", [tmp_path], is_12, write_twice, print))


@pytest.mark.slow
def test_a_kill_leaves_nothing_half_and_the_next_run_cleans_up(tmp_path):
    def killed(folder: Path) -> Path:
        (folder / "half").write_text("1")
        os.kill(os.getpid(), signal.SIGKILL)
        return folder / "half"

    if (child := os.fork()) == 0:
        cache.cached("x", [tmp_path], is_12, killed, print)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "x").exists()
    assert (tmp_path / ".x.partial" / "half").exists()
    assert is_12(cache.cached("x", [tmp_path], is_12, write_twice, print))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.lock", "x"]


def test_where_the_cache_cant_hold_a_file_the_run_directory_does(tmp_path):
    notes: list[str] = []
    (tmp_path / "file").write_text("")
    full, own = tmp_path / "full", tmp_path / "run" / "prepared"

    def make(folder: Path) -> Path:
        if folder.is_relative_to(full):
            raise OSError(28, "No space left on device")
        return write_twice(folder)

    folders = [tmp_path / "file" / "prompts", full, own]
    assert cache.cached("x", folders, is_12, make, notes.append) == own / "x"
    assert [("can't be kept in" in note) for note in notes] == [True, True]
    assert "No space left on device" in notes[1]
    assert cache.cached("x", folders, is_12, pytest.fail, notes.append) == own / "x"
    with pytest.raises(RunError, match=r"no place for the prepared prompts: .*No space left.* NEMO_AAPO_CACHE=FOLDER"):
        cache.cached("y", folders[:2], is_12, make, notes.append)


def test_the_cache_is_where_caches_are(monkeypatch):
    for name in (cache.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache.cache_folders(Path("run")) == [Path("/home/ada/.cache/nemo_aapo/prompts"), Path("run/prepared")]
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache.cache_folders(None) == [Path("/scratch/nemo_aapo/prompts")]
    monkeypatch.setenv(cache.CACHE_VARIABLE, "/data/shared")
    assert cache.cache_folders(None) == [Path("/data/shared/prompts")]


@pytest.mark.slow
def test_the_process_that_prepares_ends_with_the_trainer(tmp_path):
    program = (
        "import os, sys, time; from pathlib import Path; from nemo_aapo.data.prepared import making\n"
        "with making._maker(Path(sys.argv[1])) as maker:\n"
        "    print(maker._process.pid, flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    maker = int(trainer.stdout.readline())
    os.kill(maker, 0)
    trainer.kill()
    trainer.wait(20)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{maker}").exists() and "Z" not in Path(f"/proc/{maker}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- gold answers


def test_answers_are_checked_side_by_side_each_once_with_the_time_left():
    seconds = iter(range(0, 1000, 4))
    lines: list[str] = []
    told = TimeLeft("checking", lines.append, lambda: float(next(seconds)))
    for done in (0.1, 0.2, 0.5, 0.6, 0.9, 1.0):
        told(done)
    assert lines == ["checking: 20%, about 32 s left", "checking: 90%, about 2 s left"]

    together = threading.Barrier(4, timeout=20)

    def verify(answer: str) -> None:
        together.wait()
        only_numbers(answer)

    answers = ["1", "two", "3", "four"]
    assert list(AnswerCheck(verify, threads=4).refused(answers, 4)) == ["two", "four"]


def test_a_reward_that_takes_integers_unasked_takes_them_when_it_is_asked():
    rng = random.Random(0)
    whole = ["0", "-7", *(str(rng.randint(-(10**k), 10**k)) for k in range(1, 16) for _ in range(3))]
    rewards = [build_reward({"name": name}) for name, kind in REWARDS.items() if kind.takes_integers]
    assert {reward.name for reward in rewards} == {"accuracy", "integer"}
    for reward in rewards:
        for answer in whole:
            reward.check_answer(answer)


def test_prompts_that_were_read_do_not_stay_in_memory(tmp_path):
    """The file is larger than what a rank may hold of it: each page that is touched would stay for ever."""
    import pyarrow as pa

    text = "x" * 4096
    rows = [(n.to_bytes(16, "little"), 0, n, [n], text, str(n), text) for n in range(4000)]  # 32 MiB
    columns = [pa.array(c, type=f.type) for c, f in zip(zip(*rows, strict=True), prompt_schema(), strict=True)]
    path = tmp_path / "prompts.arrow"
    with pa.ipc.new_file(str(path), prompt_schema()) as writer:
        writer.write_table(pa.table(columns, schema=prompt_schema()), max_chunksize=500)
    prompts = PreparedPrompts(path, range(len(rows)), ("source",))
    order = random.Random(1).sample(range(len(rows)), len(rows))
    assert [prompts[n].source for n in order] == [f"source:{n}" for n in order]
    [resident] = [
        int(re.search(r"^Rss: +(\d+) kB", mapping, re.MULTILINE)[1])
        for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        if mapping.partition("\n")[0].endswith(str(path))
    ]
    assert resident < path.stat().st_size / 1024 / 4
