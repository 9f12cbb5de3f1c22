"""A server that is refitted for days keeps nothing of the weights before; ``benchmark.py refits`` looks at 3,000."""

from __future__ import annotations

from nemo_aapo.config.compose import load_config
from tests.training_runs import make_input, settings

WARM, COUNTED = 30, 60


def _blocks_kept(words, folder):
    """Blocks of Python's memory that a refit leaves behind, and the tensors that it reads."""
    import gc
    import sys

    from nemo_aapo.engines.build import build_hosted_engine
    from nemo_aapo.engines.remote.weight_store import WeightStore
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.models.directory import read_model_dir
    from nemo_aapo.models.reader import WeightFiles

    config = decide(load_config(words), Machine.present())
    hosted = build_hosted_engine(config, read_model_dir(config.model.path))
    store, weights = WeightStore(folder, config.model.path), WeightFiles(folder / "model")
    for version in range(1, WARM + COUNTED + 1):
        given = store.write(weights.items(), version)
        hosted.load((folder / given.manifest).parent, version)
        store.prune(keep=())
        if version == WARM:
            gc.collect()
            before = sys.getallocatedblocks()
    gc.collect()
    return (sys.getallocatedblocks() - before) / COUNTED, len(hosted.tensors)


def test_a_refit_keeps_nothing_of_what_it_read(ranks, tmp_path):
    """safetensors' own reader keeps two integers of each tensor, the Bridge's the index of each directory."""
    words = settings(make_input(tmp_path), tmp_path / "run", "rollout.max_concurrent_tokens=2200")
    ((kept, tensors),) = ranks.run(_blocks_kept, words, tmp_path, tp=None)
    assert kept < tensors
