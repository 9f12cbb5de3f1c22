"""What ranks do in the tests of checkpoints: a small training run that is saved, and the damage done to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny_models import make_config

DIGEST = "0123456789abcdef"


def make_policy(model: Path, tp: int = 1, pp: int = 1, distributed_optimizer: bool = False, ep: int = 1):
    """The policy of every run here; its learning rate depends on how many steps went before."""
    from tests.policies import make_policy

    config = make_config(
        model,
        model__tensor_model_parallel_size=tp,
        model__pipeline_model_parallel_size=pp,
        model__expert_model_parallel_size=ep,
        model__sequence_parallel=tp > 1 and ep > 1,  # as experts need it
        model__optim__sched__warmup_steps=8,
        model__optim__use_distributed_optimizer=distributed_optimizer,
    )
    return make_policy(config)


def make_checkpointer(directory: Path, keep_last: int = 2, digest: str = DIGEST, background: bool = False):
    from nemo_aapo.checkpoint.checkpointer import Checkpointer

    return Checkpointer(directory, (digest,), keep_last, background=background, timeout_s=60)


def train(policy: Any, step: int) -> None:
    """One optimizer step on four samples, dealt to the data-parallel ranks."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.learner.microbatch import PrefixGroup, collate
    from nemo_aapo.types import Sample

    generator = np.random.default_rng(step)
    samples = []
    for advantage in (1.0, -0.5, 2.0, -1.5):
        prompt, completion = (generator.integers(2, 160, n).astype(np.int32) for n in (4, 8))
        samples.append(Sample(prompt, completion, np.zeros(8, np.float32), advantage))
    own = samples[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    batch = collate(PrefixGroup.separate(own), [1 / 32] * len(own), multiple=1, device=torch.device("cpu"))
    policy.optimization.train_step(
        [batch], lambda logprobs, entropy, b: (-(b.weights * b.advantages * logprobs).sum(), {})
    )


def state_of(step: int) -> dict[str, Any]:
    """A trainer state."""
    return {"step": step, "sampler": {"epoch": 1, "cursor": 5 * step}, "policy_version": step}


def train_and_save(model: Path, directory: Path, tp: int, pp: int, distributed_optimizer: bool = False, ep: int = 1):
    """Three steps, saved after each; then the weights as they are now, and after one step more."""
    policy = make_policy(model, tp, pp, distributed_optimizer, ep)
    checkpoints = make_checkpointer(directory)
    for step in (1, 2, 3):
        train(policy, step)
        checkpoints.save(step, policy, state_of(step))
    now = weights(policy)
    train(policy, 4)
    return now, weights(policy)


def weights(policy: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in policy.named_weights()}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Equal to the bit."""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def error_of(action: Callable[[], Any]) -> str | None:
    """The message of the CheckpointError that ``action`` ends in; None if it ends in none."""
    from nemo_aapo.errors import CheckpointError

    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


@contextlib.contextmanager
def changed_copy(source: Path, target: Path) -> Iterator[Path | None]:
    """Inside, rank 0 changes a copy of a directory; the others get None, and wait for it."""
    from nemo_aapo.distributed import parallel

    if parallel.rank() == 0:
        shutil.copytree(source, target)
        yield target
    else:
        yield None
    parallel.barrier()


def reseal(path: Path) -> None:
    """Make a checkpoint's manifest fit a file that was changed, as an attacker would."""
    from nemo_aapo.checkpoint import manifest

    manifest_path = path.parent / manifest.FILE_NAME
    tree = json.loads(manifest_path.read_text())
    record = manifest.seal(path)
    tree["files"][path.name] = {"bytes": record.bytes, "sha256": record.sha256}
    del tree["sha256"]
    manifest_path.write_text(json.dumps({**tree, "sha256": manifest._tree_digest(tree)}))
    assert manifest.read(path.parent).files[path.name] == record


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {"missing": Path.unlink, "truncated": truncate, "altered": alter}
