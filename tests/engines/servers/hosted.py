"""An engine behind real servers beside the in-process one, on the same weights."""

from __future__ import annotations

import time
from unittest import mock

import numpy as np

from nemo_aapo.config.compose import load_config
from nemo_aapo.launch.world import Machine, decide
from nemo_aapo.types import SamplingSpec

SPEC = SamplingSpec(temperature=0.9, max_new_tokens=48, stop_token_ids=(3, 7), min_new_tokens=2)
PROMPTS = [np.random.default_rng(n).integers(2, 150, n).astype(np.int32) for n in (3, 19, 1, 8, 8, 13)]
SEEDS = [[1000 * i + j for j in range(size)] for i, size in enumerate((6, 4, 7, 1, 0, 7))]
LONG = SamplingSpec(temperature=1.0, max_new_tokens=200, stop_token_ids=(3,))


class Engines:
    """The in-process engine and the remote one, on the same weights."""

    def __init__(self, words, *more):
        import torch

        from nemo_aapo.engines.build import build_hosted_engine, build_sender
        from nemo_aapo.engines.megatron.engine import MegatronEngine
        from nemo_aapo.engines.remote.engine import RemoteEngine
        from nemo_aapo.mcore.bridge.weights import WeightMap
        from nemo_aapo.models import directory as model_dir

        config = decide(load_config([*words, *more]), Machine.present())
        hosted = build_hosted_engine(config, model_dir.read_model_dir(config.model.path))
        self.local: MegatronEngine = hosted.engine
        shape = model_dir.read_model_dir(config.model.path)
        self.map = WeightMap(config.model.path, torch.float32)
        sender = build_sender(config, hosted.engine.model, shape.vocab_size, self.exported)
        self.remote = RemoteEngine.from_config(config, sender)
        self.tolerance = 0.0 if config.rollout.remote.servers == 1 else 1e-5
        self.said: list[str] = []
        self.remote.fleet._log = self.said.append

    def train(self, version):
        """New weights, as after an optimizer step, on both."""
        import torch

        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in self.local.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        self.local.update_weights((), version)
        self.remote.update_weights(self.exported(), version)

    def exported(self):
        return self.map.export(self.local.model)

    def assert_same(self, spec=SPEC, seeds=SEEDS, on_finish=None):
        """Both draw the same tokens, and log-probs up to what batches of another size round otherwise; each completion
        is told once. Returns what the remote one drew."""
        wanted = self.local.generate(PROMPTS, spec, seeds)
        told = []

        def tell(i, j, completion):
            told.append((i, j))
            if on_finish is not None:
                on_finish(len(told))

        got = self.remote.generate(PROMPTS, spec, seeds, tell)
        assert sorted(told) == [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        for row, wanted_row in zip(got, wanted, strict=True):
            for one, other in zip(row, wanted_row, strict=True):
                assert one.token_ids.tobytes() == other.token_ids.tobytes()
                np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=self.tolerance)
                assert (one.finish_reason, one.policy_version) == (other.finish_reason, other.policy_version)
        return got


def on_layout(words):
    """On each rank: what it was given and told. Data-parallel ranks ask for shares of their own.

    Each rank meets another server first.
    """
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.build import build_sender
    from nemo_aapo.engines.collective import sender
    from nemo_aapo.engines.remote.engine import RemoteEngine
    from tests.policies import make_policy

    meet = sender.meet

    def meets(*words, server: int, **more):
        time.sleep(0.3 * ((server + parallel.rank()) % 2))
        return meet(*words, server=server, **more)

    config = load_config(words)
    policy = make_policy(config)
    sends = build_sender(config, policy.module, policy.shape.vocab_size, policy.named_weights)
    remote = RemoteEngine.from_config(config, sends)
    for parameter in policy.module.parameters():
        parameter.data.mul_(1.1)
    with mock.patch.object(sender, "meet", meets):
        remote.update_weights(policy.named_weights(), 3)
    told = []
    part = slice(parallel.data_parallel_rank(), None, parallel.data_parallel_size())
    drawn = remote.generate(PROMPTS[part], SPEC, SEEDS[part], lambda i, j, c: told.append((i, j)))
    parallel.barrier()
    remote.close()
    return [[c.token_ids.tolist() for c in row] for row in drawn], told, remote.stats.tokens
