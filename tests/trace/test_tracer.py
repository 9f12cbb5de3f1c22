"""A traced step leaves a whole file or none, and whatever becomes of the file, the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_aapo.trace import spans


def life(folder: Path):
    """What a tracer leaves of several steps, on one rank."""
    import torch
    import torch.distributed as dist

    from nemo_aapo.trace.tracer import Tracer

    untouched, notes = dict(vars(dist.ProcessGroup)), []
    tracer = Tracer(folder, [1, 2, 3], notes.append)

    def step(number: int, name: str) -> None:
        tracer.begin(number)
        with spans.phase(name):
            dist.all_reduce(torch.zeros(3))
        tracer.end()

    step(1, "first")
    tracer.begin(2)
    recording = spans.recorder is not None
    tracer.close()  # as after an error in the middle of a step
    broken_off = spans.recorder is None and dict(vars(dist.ProcessGroup)) == untouched
    step(1, "again")
    step(4, "not traced")
    tracer.close()
    files = {path.name: path.read_text() for path in (folder / "trace").iterdir()}
    (folder / "trace" / "step_000001.json").unlink()
    (folder / "trace").rmdir()
    (folder / "trace").write_text("a file where the folder should be")
    step(3, "third")
    tracer.close()
    return recording, broken_off, files, notes


@pytest.mark.ranks
def test_a_step_broken_off_leaves_no_file_one_repeated_replaces_it_and_a_full_disk_is_a_warning(ranks, tmp_path):
    ((recording, broken_off, files, notes),) = ranks.run(life, tmp_path)
    assert recording
    assert broken_off, "an error leaves nothing recorded and nothing wrapped"
    assert list(files) == ["step_000001.json"]
    events = json.loads(files["step_000001.json"])["traceEvents"]
    names = {event["name"] for event in events}
    assert {"again", "all_reduce", "wait for all_reduce"} <= names
    assert "first" not in names
    (reduced,) = [event for event in events if event["name"] == "all_reduce"]
    assert reduced["args"] == {"group": "", "ranks": 1, "bytes": 12}
    assert [note.partition(":")[0] for note in notes] == ["trace of step 1", "trace of step 1", "warning"]
    assert "the trace of step 3 could not be written" in notes[-1]
