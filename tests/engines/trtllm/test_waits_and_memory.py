"""The adapter's parts on their own: waiting ranks, and where the bytes of a refit and of a KV cache come from."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import queue
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.trtllm import client, placement, settings
from nemo_aapo.engines.trtllm.engine import TrtllmEngine
from nemo_aapo.engines.trtllm.placement import Beat, OwnerActions, OwnerFailed
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.utils.safetensors import INDEX
from tests import fake_trtllm
from tests.engines.trtllm.conftest import SETTINGS
from tests.tiny_models import make_config

GIB = 2**30


class Mailbox:
    """Two ranks in two threads; a wait of more than ``timeout_s`` fails, as a collective does."""

    def __init__(self, owner, box, timeout_s):
        self.owner, self._box, self._timeout_s = owner, box, timeout_s

    def broadcast(self, value):
        if self.owner:
            self._box.put(value)
            return value
        return self._box.get(timeout=self._timeout_s)


def ranks_at(action, hear, monkeypatch, timeout_s=10.0):
    """What the owner and another rank got or raised, of an action of the owner's ``OwnerActions``."""
    monkeypatch.setattr(placement, "BEAT_S", 0.02)
    box, ended = queue.Queue(), {}

    def run(owner):
        actions = OwnerActions(Mailbox(owner, box, timeout_s))
        try:
            ended[owner] = actions.run(lambda: action(actions), hear)
        except Exception as error:
            ended[owner] = error

    threads = [threading.Thread(target=run, args=(owner,)) for owner in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return ended[True], ended[False]


def draw_for(seconds):
    """An action that ends a completion every 50 ms and waits as the client does."""

    def action(actions):
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            actions.tell((0, number, f"completion {number}"))
            number += 1
            for _ in range(5):
                time.sleep(0.01)
                actions.beat()
        return number

    return action


def test_waiting_ranks_outlive_a_draw_that_is_longer_than_their_timeout_and_hear_of_it_meanwhile(monkeypatch):
    heard = []
    owner, other = ranks_at(
        draw_for(4.0), lambda i, j, completion: heard.append((time.monotonic(), j)), monkeypatch, timeout_s=3.0
    )
    assert owner == other == len(heard)
    assert [j for _, j in heard] == list(range(len(heard)))
    assert heard[-1][0] - heard[0][0] > 1.0  # as they ended, not all at the end


def test_what_fails_on_the_owner_or_in_a_listener_is_an_error_on_its_rank_and_nobody_waits(monkeypatch):
    def fails(actions):
        draw_for(0.1)(actions)
        raise ZeroDivisionError("engine")

    owner, other = ranks_at(fails, None, monkeypatch)
    assert isinstance(owner, OwnerFailed)
    assert isinstance(owner.__cause__, ZeroDivisionError)
    assert isinstance(other, OwnerFailed)
    assert str(other) == "engine"

    def hear(i, j, completion):
        raise LookupError("listener")

    owner, other = ranks_at(draw_for(0.2), hear, monkeypatch)
    assert isinstance(owner, int)
    assert isinstance(other, LookupError)


def test_a_beat_says_only_what_is_new_and_none_is_sent_outside_an_action(monkeypatch):
    sent = []
    ranks = placement.Alone()
    monkeypatch.setattr(ranks, "broadcast", sent.append)
    monkeypatch.setattr(placement, "BEAT_S", 0.0)
    actions = OwnerActions(ranks)
    actions.beat()
    assert sent == []

    def action():
        for item in ("a", "b"):
            actions.tell(item)
            actions.beat()
        actions.tell("c")

    actions.run(action)
    assert sent == [Beat(["a"]), Beat(["b"]), Beat(["c"], over=True)]


def test_ranks_that_wait_for_an_engines_start_hear_of_it_meanwhile(monkeypatch):
    fake_trtllm.install(monkeypatch)
    monkeypatch.setattr(placement, "BEAT_S", 0.0)
    monkeypatch.setattr(client, "LOOK_S", 0.02)

    async def slow_start(self):
        await asyncio.sleep(0.5)
        self.workers, self.ready = [self.worker_class("GPU-0")], True

    monkeypatch.setattr(fake_trtllm.AsyncLLM, "setup_async", slow_start)
    beats = []
    ranks = placement.Alone()
    monkeypatch.setattr(ranks, "broadcast", lambda beat: beats.append(beat) or beat)
    settings_ = dataclasses.replace(SETTINGS, timeout_s=20.0)
    TrtllmEngine(settings_, ranks, [placement.Gpu("node", 0, "GPU-0", 0)], colocated=False).close()
    assert [beat.over for beat in beats].index(True) > 5
    assert not any(beat.failure for beat in beats)


def test_adams_moments_are_counted_until_the_first_update_has_made_them(ranks, tiny_models):
    ((before, after, parameters),) = ranks.run(_moments, tiny_models["qwen2"])
    assert (before, after) == (8 * parameters, 0)


def _moments(model):
    from tests.checkpoint_runs import make_policy, train

    policy = make_policy(model)
    before = policy.moments_to_come()
    train(policy, 1)
    return before, policy.moments_to_come(), sum(parameter.numel() for parameter in policy.module.parameters())


def test_ranks_have_one_queue_of_launches_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)  # all that follows was done before
    for given, found in ((None, "1"), ("8", "8")):
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        if given:
            monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
        parallel.join(1.0)
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == found
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")


class Traffic(TorchDispatchMode):
    """Counts the bytes that are copied on a device, and refuses what would leave it."""

    def __init__(self):
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in ("_to_copy", "_local_scalar_dense"), f"{name}: a tensor leaves the device"
        assert kwargs.get("device", args[0].device if args and hasattr(args[0], "device") else None) in (
            None,
            torch.device("meta"),
        )
        if name == "copy_":
            assert args[1].device.type == "meta"
            self.copied += args[0].nbytes
        return function(*args, **kwargs)


def test_a_bucket_is_copied_once_into_one_buffer_on_its_device_and_never_through_the_host():
    """Meta tensors stand for a GPU's: they have no numbers, so that whatever took them to the host would fail."""
    shapes = {"a": ((3, 5), torch.bfloat16), "b": ((7,), torch.float32), "c": ((2, 2, 2), torch.bfloat16)}
    bucket = [(name, torch.empty(shape, dtype=dtype, device="meta")) for name, (shape, dtype) in shapes.items()]
    bucket[2] = ("c", bucket[2][1].transpose(0, 2))
    with Traffic() as traffic:
        views = memory.flat(bucket, lambda size: torch.empty(size, dtype=torch.uint8, device="meta"))
    assert traffic.copied == sum(tensor.nbytes for _, tensor in bucket)
    assert [(name, view.shape, view.dtype) for name, view in views] == [(n, t.shape, t.dtype) for n, t in bucket]
    assert len({view.untyped_storage()._cdata for _, view in views}) == 1


def on_cpu(size):
    return torch.empty(size, dtype=torch.uint8)


def test_the_buffer_has_each_tensors_numbers_aligned():
    tensors = [torch.arange(15).reshape(3, 5).t(), torch.tensor(3.5), torch.ones(4, 4, dtype=torch.bfloat16)]
    views = memory.flat([(str(i), tensor) for i, tensor in enumerate(tensors)], on_cpu)
    assert all(torch.equal(view, tensor) for (_, view), tensor in zip(views, tensors, strict=True))
    base = views[0][1].data_ptr()
    assert all((view.data_ptr() - base) % memory.ALIGNMENT == 0 for _, view in views)
    assert memory.flat([], on_cpu) == []


def save_hole(path, size):
    with path.open("wb") as file:
        file.truncate(size)


def test_the_kv_cache_leaves_room_for_the_moments_that_adam_does_not_have_yet(tmp_path):
    """In a directory as Mistral's: shards, and all of it once more in another form."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    for name, size in ((names[0], 12), (names[1], 8), ("consolidated.safetensors", 20)):
        save_hole(tmp_path / name, size * GIB)
    assert settings.cache_fraction(0.4, [(80 * GIB, 0)], tmp_path) == 0.4
    assert settings.cache_fraction(0.4, [(0, 0)], tmp_path) == 0.4  # nothing to leave room for
    # 70 GiB after the weights, of which 35 are Adam's; the fullest GPU decides for all
    assert settings.cache_fraction(0.4, [(80 * GIB, 35 * GIB), (80 * GIB, 0)], tmp_path) == pytest.approx(0.2)
    with pytest.raises(RunError, match=r"80.0 GiB free, of which its weights take 20.0 .*rollout.offload_learner=true"):
        settings.cache_fraction(0.4, [(80 * GIB, 60 * GIB)], tmp_path)


@pytest.mark.parametrize(
    ("value", "refused"),
    [("expandable_segments:True", True), ("max_split_size_mb:64, expandable_segments : true", True), ("", False)],
)
def test_expandable_segments_are_refused_before_anything_starts(monkeypatch, value, refused):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(settings, "ray_difference", str)
    monkeypatch.setattr(settings, "_has_gpu", lambda: True)
    config = make_config("/m", rollout__engine="trtllm", precision__name="bf16")
    for variable in settings.ALLOCATOR_VARIABLES:
        with monkeypatch.context() as inside:
            inside.setenv(variable, value)
            if refused:
                with pytest.raises(ConfigError, match=f"Take expandable_segments out of {variable}"):
                    settings.check(config)
            else:
                settings.check(config)
    monkeypatch.setattr(settings, "ray_difference", lambda: "the installed one has no such name")
    with pytest.raises(ConfigError, match=r"needs ray==2\.54\.0, .*no such name"):
        settings.check(config)
