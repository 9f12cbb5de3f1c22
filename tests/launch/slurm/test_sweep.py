"""A sweep as an array of jobs, and an evaluation of one of its runs as a job with rollout servers."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from tests.launch.slurm.cluster import jobs_of, make_run

pytestmark = pytest.mark.timeout(600)
ONE_RANK = ("trainer.num_nodes=1", "model.tensor_model_parallel_size=1", "trainer.max_steps=1")


def test_a_sweep_is_an_array_whose_runs_share_a_store_and_one_of_them_is_evaluated(cluster, given):
    whole = make_run(cluster, given, "sweep", *ONE_RANK, "run.name=trial")
    said = cluster.launch("sweep", *whole.words, "seed=1,2", "max_parallel=2")
    array = re.search(r"submitted (\d+) \(array of 2\)", said)[1]
    runs = [dataclasses.replace(whole, directory=whole.directory / f"seed-{seed}") for seed in (1, 2)]
    assert "submitted" not in cluster.launch("sweep", *whole.words, "seed=1,2")  # both wait or run
    for task, run in enumerate(runs):
        assert [job["id"] for job in jobs_of(run)] == [f"{array}_{task}"]
        run.wait_until(f"{array}_{task}", "COMPLETED")
        assert f"job         {array}_{task} COMPLETED" in run.say("status")
        assert "finished: the run is complete" in run.log()
    assert [path.parent for path in whole.directory.rglob("*.sqlite")] == [whole.directory]
    listed = cluster.launch("status", str(whole.directory))
    assert re.search(r"^seed-1 +1 .* finished ", listed, re.MULTILINE), listed
    assert "nothing is missing" in cluster.launch("sweep", *whole.words, "seed=1,2")

    problems = given / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(3)))
    words = [f"model.path={runs[0].directory}", f"run.dir={given}/measured", "run.name=measured", "benchmarks=[mine]"]
    words += [f"+sources.mine={problems}", "prompt_template=question", "chat_template=none", "samples=2"]
    words += ["sampling.max_new_tokens=4", "max_prompt_tokens=16", "max_concurrent_tokens=512"]
    slurm = ["cluster=slurm_servers", "cluster.servers.gpus_per_node=0", "cluster.signal_s=10"]
    slurm += ["cluster.gpus_per_node=1", 'cluster.time="00:10:00"']
    measured = dataclasses.replace(whole, directory=given / "measured", words=["evaluate", *words, *slurm])
    job = measured.submit()[0]

    more = ("seed=1,2,3,4", "+cluster.sbatch_args.hold=true")
    held = re.search(r"submitted (\d+) \(array of 2\)", cluster.launch("sweep", *whole.words, *more))[1]
    assert cluster.launch("cancel", str(whole.directory)) == f"cancelled {held}_0, {held}_1\n"
    assert "no job of 4 runs waits or runs" in cluster.launch("cancel", str(whole.directory))
    requeued = cluster.launch("requeue", str(whole.directory)).splitlines()
    assert requeued[:2] == ["seed-1: finished", "seed-2: finished"]
    again = [re.match(rf"seed-{n}: submitted (\d+): ", line)[1] for n, line in enumerate(requeued[2:], 3)]
    assert cluster.launch("cancel", str(whole.directory)) == f"cancelled {again[0]}, {again[1]}\n"

    measured.wait_until(job, "COMPLETED")
    assert json.loads((measured.directory / "results.json").read_text())["benchmarks"]["mine"]["problems"] == 3
    assert "finished    yes" in measured.say("status")
    assert "to the rollout servers of" in (measured.paths.logs / "rank_0.log").read_text()
