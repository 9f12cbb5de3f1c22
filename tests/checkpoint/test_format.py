"""The format: megatron-core reads it; code in a checkpoint's pickles never runs."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch

from nemo_aapo.errors import CheckpointError
from tests.checkpoint_runs import error_of, make_checkpointer, make_policy, reseal, same, train_and_save, weights


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models["qwen3"]


@pytest.fixture(scope="module")
def saved(ranks, model, tmp_path_factory):
    """The newest checkpoint, written by two data-parallel ranks, and its weights."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    now, _ = ranks.run(train_and_save, model, directory, 1, 1, world=2)[0]
    return directory / "step_000003", now


def _load_with_mcore(model, directory):
    from megatron.core import dist_checkpointing

    policy = make_policy(model)
    policy.load_state_dict(dist_checkpointing.load(policy.sharded_state_dict(is_loading=True), str(directory)))
    return weights(policy)


def test_megatron_core_reads_the_files(ranks, model, saved):
    directory, now = saved
    [loaded] = ranks.run(_load_with_mcore, model, directory)
    assert same(loaded, now)


def test_data_parallel_ranks_share_the_writing(saved):
    sizes = [(saved[0] / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.1 * min(sizes)


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _load_malicious(model, source, scratch, mark):
    """Errors for checkpoints with code in a pickle, and a manifest that fits."""
    policy = make_policy(model)

    def with_metadata(name, **changes):
        metadata = pickle.loads((source / ".metadata").read_bytes())
        for key, value in changes.items():
            setattr(metadata, key, value)
        return error_after_writing(name, ".metadata", pickle.dumps(metadata))

    def error_after_writing(name, file_name, content):
        directory = scratch / name / "step_000003"
        shutil.copytree(source, directory)
        if isinstance(content, bytes):
            (directory / file_name).write_bytes(content)
        else:
            torch.save(content, directory / file_name)
        reseal(directory / file_name)
        return error_of(lambda: make_checkpointer(scratch / name).resume(policy))

    storage = pickle.loads((source / ".metadata").read_bytes()).storage_data
    next(iter(storage.values())).relative_path = "../../elsewhere"
    return {
        "metadata": error_after_writing("metadata", ".metadata", pickle.dumps(Payload(mark))),
        "inside metadata": with_metadata("inside", planner_data=Payload(mark)),
        "common": error_after_writing("common", "common.pt", {"version": 3, "scheduler": Payload(mark)}),
        "other file": with_metadata("other", storage_data=storage),
        "unchanged": with_metadata("unchanged"),
    }


def test_code_in_a_pickle_is_refused_and_not_run(ranks, model, saved, tmp_path):
    mark = tmp_path / "code_was_run"
    [errors] = ranks.run(_load_malicious, model, saved[0], tmp_path, mark)
    assert not mark.exists()
    for name, path in {"metadata": ".metadata", "inside metadata": ".metadata", "common": "common.pt"}.items():
        assert f"step_000003/{path} holds posix.mkdir, which may run code" in errors[name]
    assert "names a file outside of the checkpoint: ../../elsewhere" in errors["other file"]
    assert errors["unchanged"] is None


def _sharded_objects(directory, mark):
    """Objects that were saved in shards (TransformerEngine's layers have such): plain ones, then one with code."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from nemo_aapo.checkpoint import format as torch_dist
    from nemo_aapo.distributed import parallel

    def state(data):
        return {"a": ShardedObject("a", data, (2,), (parallel.rank(),)), "b": 5}

    answers = []
    for name, value in (("plain", {"rank": parallel.rank(), "t": torch.ones(2)}), ("code", Payload(mark))):
        target = directory / name
        target.mkdir(exist_ok=True)
        parallel.barrier()
        replicas = parallel_state.get_data_parallel_group_gloo()
        torch_dist.write(torch_dist.snapshot(state(value), replicas, copied=name == "plain"), target)
        try:
            answers.append(torch_dist.read(state(None), target, torch_dist.read_header(target)))
        except CheckpointError as error:
            answers.append(str(error))
    return answers


def test_objects_saved_in_shards_are_plain_data_or_refused(ranks, tmp_path):
    mark = tmp_path / "code_was_run"
    for rank, (plain, code) in enumerate(ranks.run(_sharded_objects, tmp_path, mark, world=2)):
        assert plain["a"]["rank"] == rank
        assert plain["a"]["t"].tolist() == [1, 1]
        assert plain["b"] == 5
        assert "posix.mkdir, which may run code" in code
    assert not mark.exists()
