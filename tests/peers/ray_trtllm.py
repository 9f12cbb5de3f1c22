"""The stand-in of ``tests/fake_trtllm.py`` on a real Ray: workers are actors, each with a part of a small model.

Clusters, placement groups, actors and calls are those of TensorRT-LLM's ``executor/ray_executor.py`` and
``ray_gpu_worker.py``. In place of GPUs there are numbers that Ray is told of, gloo in place of NCCL, and calls of
actors in place of the library's own RPC for requests.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroupSchedulingStrategy, placement_group, remove_placement_group

from tests import fake_trtllm
from tests.fake_trtllm_executor import TABLE, VOCAB, table

SHUTDOWN_S = 30.0


class RankWorker(fake_trtllm.Worker):
    """One rank's worker: it holds some columns of the table, and all ranks gather them for each completion."""

    def __init__(self, device_id: str, device_index: int) -> None:
        super().__init__(device_id)
        self.device_index = device_index
        self.engine.weights = {TABLE: self._own(table())}

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].clone()

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        self.engine.weights.update({name: self._own(tensor) for name, tensor in tensors.items()})

    def draw(self, prompt: list[int], sampling: dict[str, Any], sampler: str | None) -> fake_trtllm.CompletionOutput:
        own = self.engine.weights[TABLE].contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        with self.engine.running(prompt):
            dist.all_gather(parts, own)
            arguments = fake_trtllm.SamplingParams(**sampling)
            return fake_trtllm.draw(torch.cat(parts, dim=1), sampler, None, prompt, arguments)

    def look(self) -> dict[str, Any]:
        """What it sees of its place."""
        return {"pid": os.getpid(), "environment": dict(os.environ), "columns": self.engine.weights[TABLE].shape[1]}


class RayWorkerWrapper:
    """The actor, as ``ray_gpu_worker.RayWorkerWrapper``."""

    def __init__(self, extension: str, world_size: int, rank: int) -> None:
        fake_trtllm.install(pytest.MonkeyPatch())  # this process is the actor's, to its end
        self.address, self.world_size, self.rank = os.environ["MASTER_ADDR"], world_size, rank
        self.gpu = int(ray.get_gpu_ids()[0])
        self.local_gpu = [int(number) for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",")].index(self.gpu)
        module, _, name = extension.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert not [n for n in dir(found) if not n.startswith("__") and hasattr(RankWorker, n)]
        self.worker_class = type("ExtendedWorker", (RankWorker, found), {})

    def _store(self, port: int = 0) -> dist.TCPStore:
        return dist.TCPStore(self.address, port, self.world_size, is_master=self.rank == 0, wait_for_workers=False)

    def setup_tcp_store(self) -> int:
        self.store = self._store()
        return self.store.port

    def setup_distributed_env_and_worker(self, port: int) -> None:
        store = self.store if self.rank == 0 else self._store(port)
        dist.init_process_group("gloo", store=store, world_size=self.world_size, rank=self.rank)
        self.worker = self.worker_class(f"GPU-{self.gpu}", self.local_gpu)

    def report_device_id(self) -> str:
        return self.worker.report_device_id()

    def call_worker_method(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, method_name)(*args, **kwargs)

    def shutdown(self) -> None:
        dist.destroy_process_group()


class AsyncLLM(fake_trtllm.AsyncLLM):
    """The engine's owner, as ``async_llm.AsyncLLM`` over ``ray_executor.RayExecutor``."""

    async def setup_async(self) -> None:
        os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        assert os.environ["TLLM_RAY_FORCE_LOCAL_CLUSTER"] == "1"
        alone = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        ray.init("local", include_dashboard=False, namespace="trtllm", ignore_reinit_error=True, runtime_env=alone)
        size, address = self.args.tensor_parallel_size, ray.util.get_node_ip_address()
        self.group = placement_group([{"GPU": size, "CPU": size, f"node:{address}": 0.01}], strategy="PACK")
        await self.group.ready()
        environment = {**os.environ, "TLLM_DISABLE_MPI": "1", "MASTER_ADDR": address}
        actor = ray.remote(RayWorkerWrapper).options(
            num_gpus=1.0,
            runtime_env=ray.runtime_env.RuntimeEnv(env_vars=environment),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0),
        )
        extension = self.args.ray_worker_extension_cls
        self.workers = [actor.remote(extension, size, rank) for rank in range(size)]
        await asyncio.gather(*(worker.__ray_ready__.remote() for worker in self.workers))
        port = await self.workers[0].setup_tcp_store.remote()
        await asyncio.gather(*(worker.setup_distributed_env_and_worker.remote(port=port) for worker in self.workers))
        self.ready = True

    def _refs(self, method: str, *args: Any) -> list[Any]:
        try:
            return [getattr(worker, method).remote(*args) for worker in self.workers]
        except AttributeError:  # a method of the worker or its extension, and not of the actor
            return [worker.call_worker_method.remote(method, *args) for worker in self.workers]

    async def collective_rpc(self, method: str, args: tuple = ()) -> list[Any]:
        fake_trtllm.FAULTS.seen.append((method, args))
        return await asyncio.gather(*self._refs(method, *args))

    async def _draw(self, number: int, prompt: list[int], sampling: Any, sampler: str | None) -> Any:
        first, *_ = await asyncio.gather(*self._refs("draw", prompt, vars(sampling), sampler))
        return first

    def shutdown(self) -> None:
        super().shutdown()
        ray.get([worker.shutdown.remote() for worker in self.workers], timeout=SHUTDOWN_S)
        remove_placement_group(self.group)
        ray.shutdown()


def install() -> fake_trtllm.Faults:
    """Put it in the place of ``tensorrt_llm`` for the rest of this process."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(
        fake_trtllm,
        "CLASSES",
        tuple(
            (cls, AsyncLLM if stand_in is fake_trtllm.AsyncLLM else stand_in) for cls, stand_in in fake_trtllm.CLASSES
        ),
    )
    return fake_trtllm.install(monkeypatch)


assert VOCAB % 2 == 0, "two ranks have columns of the same number"
