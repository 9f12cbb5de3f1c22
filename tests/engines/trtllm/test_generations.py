"""Each generation of TensorRT-LLM's releases: asked for what it has, refused for what it can't do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.trtllm import engine as trtllm_engine
from nemo_aapo.errors import RunError
from tests import cuda_ipc, fake_trtllm
from tests.engines.trtllm.conftest import PROMPTS, SAMPLING, SEEDS, start, tokens
from tests.fake_trtllm_executor import TABLE, table


@pytest.mark.parametrize("generation", contract.CONTRACTS, ids=lambda generation: generation.version)
def test_each_generation_of_the_library_is_asked_for_what_it_has_and_lives_through_a_step(monkeypatch, generation):
    monkeypatch.setattr(memory, "share_on_gpu", cuda_ipc.share_on_gpu)
    fake = fake_trtllm.install(monkeypatch, generation)
    engine = start(max_concurrent_tokens=10 * 2040 + 7)
    arguments = vars(fake.engines[0].args)
    assert arguments["allreduce_strategy"] == "NCCL"
    assert arguments["max_batch_size"] == 10
    assert vars(arguments["cuda_graph_config"]) == {"batch_sizes": None, "enable_padding": True, "max_batch_size": 10}
    assert arguments.get("enable_sleep", True) is True
    assert ("sampler_type" in arguments) == (generation is not contract.V1_4)
    asleep = fake.seen[-1]
    assert asleep[0] == "sleep"
    assert sorted(asleep[1][0]) == sorted(fake_trtllm.memory_tags())  # nothing stays in the learner's memory
    engine.wake()
    before = tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))
    engine.sleep()
    engine.update_weights([(TABLE, table(seed=1))], 1)
    engine.wake()
    assert tokens(engine.generate(PROMPTS, SAMPLING, SEEDS)) != before
    engine.close()


def test_a_release_without_seeds_of_requests_is_refused_with_the_reason(monkeypatch):
    fake = fake_trtllm.install(monkeypatch, contract.V1_4)
    fake.ignore_seeds = True  # before pull request 17172
    with pytest.raises(RunError, match=r"ignores the seeds of requests.*Use version 1\.2\.1"):
        start()


@pytest.mark.parametrize("generation", contract.CONTRACTS, ids=lambda generation: generation.version)
def test_another_temperature_is_refused_where_log_probs_are_before_it(monkeypatch, generation):
    fake_trtllm.install(monkeypatch, generation)
    if generation is contract.V1_4:
        with pytest.raises(RunError, match=r"rollout.temperature=0.7.*before temperature"):
            start(temperatures={"rollout.temperature": 0.7})
    else:
        start(temperatures={"rollout.temperature": 0.7}).close()


@pytest.mark.parametrize(
    ("generation", "call", "times"), [(contract.V1_2, "abort", 7), (contract.V1_3, "pause_generation", 1)]
)
def test_requests_that_nobody_waits_for_any_more_are_ended_in_the_engine(monkeypatch, generation, call, times):
    monkeypatch.setattr(memory, "share_on_gpu", cuda_ipc.share_on_gpu)
    fake, ended = fake_trtllm.install(monkeypatch, generation), []
    engine = start()
    engine.wake()
    fake.hang_after = fake.requests + 5
    engine.generate(PROMPTS, SAMPLING, SEEDS, lambda *completion: ended.append(completion) or len(ended) == 5)
    assert [method for method, _ in fake.seen].count(call) == times
    engine.sleep()  # the stand-in refuses it while requests are under way, and what has no keys and values any more
    fake.hang_after = None
    engine.wake()  # without a refit, as before a validation
    assert tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))
    engine.close()


def test_the_library_is_imported_in_one_module_and_only_by_the_contracts_names():
    root = Path(trtllm_engine.__file__).parents[2]
    found = {
        (path.name, node.module, alias.name)
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] == "tensorrt_llm"
    }
    known = {(cls.module, cls.name) for generation in contract.CONTRACTS for cls in generation.classes}
    known.add(tuple(contract.WORKER_EXTENSION.module.rsplit(".", 1)))
    assert {file for file, _, _ in found} == {"library.py"}
    assert {(module, name) for _, module, name in found} <= known
