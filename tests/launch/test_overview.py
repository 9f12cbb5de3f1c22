"""All runs of a folder as a table, whatever state their files are in."""

from __future__ import annotations

import json
import os
import time

from nemo_aapo.launch.overview import overviews, runs_below, table
from nemo_aapo.run.directory import lock_directory


def make_run(folder, steps, **files):
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": 0.1, "reward/mean": step / 10} for step in range(1, steps + 1)]
    lines.append({"step": steps, "validation/accuracy_greedy": 0.5})
    metrics = "".join(f"{json.dumps(line)}\n" for line in lines)
    for name, text in {"run.json": "{}", "metrics.jsonl": metrics, **files}.items():
        (folder / name).write_text(text)
    old = time.time() - 3 * 3600 - 5
    for path in folder.iterdir():
        os.utime(path, (old, old))
    return folder


def test_a_folder_of_runs_and_sweeps_is_one_table(tmp_path):
    done = make_run(tmp_path / "a", 3, finished='{"steps": 3}')
    broken_off = make_run(tmp_path / "sweep" / "seed-1", 2)
    damaged = make_run(tmp_path / "sweep" / "seed-2", 2, **{"metrics.jsonl": "?\n{}\n"})
    new = tmp_path / "new"
    new.mkdir()
    (new / "run.json").write_text("{}")
    at_work = make_run(tmp_path / "z", 5)
    (tmp_path / "no_run").mkdir()
    (tmp_path / "file").write_text("")

    runs = runs_below(tmp_path)
    assert runs == [done, new, broken_off, damaged, at_work]
    assert runs_below(done) == [done]
    with lock_directory(at_work, "z"):
        found = overviews(runs)
    assert [of.state for of in found.values()][:3] == ["finished", "not begun", "interrupted"]
    assert found[damaged].state.startswith("damaged: ")
    of = found[at_work]
    assert (of.state, of.step, of.reward, of.accuracy) == ("running", 5, 0.5, 0.5)
    assert overviews([at_work])[at_work].state == "interrupted"

    lines = table(tmp_path, [done, broken_off]).splitlines()
    assert lines[0].split() == ["run", "step", "reward", "accuracy", "state", "last", "sign", "of", "life"]
    assert lines[2].split() == ["a", "3", "0.300", "0.500", "finished", "3", "h", "ago"]
    assert lines[3].split()[:2] == ["sweep/seed-1", "2"]
