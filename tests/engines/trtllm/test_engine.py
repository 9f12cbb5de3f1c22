"""The TensorRT-LLM engine against a strict stand-in for the library (fake_trtllm.py): nothing here ran on the real one.

CUDA IPC needs a GPU: ``share`` hands the tensors themselves over instead of handles.
"""

from __future__ import annotations

import math
import os
import sys
import threading

import numpy as np
import pytest
import torch

from nemo_aapo.config import digest
from nemo_aapo.engines.base import RolloutEngine
from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.trtllm import placement as trtllm_placement
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.engines.trtllm.engine import TrtllmEngine
from nemo_aapo.engines.trtllm.placement import Gpu
from nemo_aapo.errors import ConfigError, RequestError, RunError
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import SamplingSpec
from tests.engines.trtllm.conftest import PROMPTS, SAMPLING, SEEDS, SETTINGS, STOP, pretend_gpus, start, tokens
from tests.fake_trtllm_executor import TABLE, table
from tests.tiny_models import make_config

# ---------------------------------------------------------------- generation


def test_completions_come_in_order_with_the_log_probs_of_the_drawn_tokens(engine):
    seen = []
    assert isinstance(engine, RolloutEngine)
    engine.wake()
    out = engine.generate(PROMPTS, SAMPLING, SEEDS, lambda i, j, completion: seen.append((i, j, completion)))
    assert [len(row) for row in out] == [len(row) for row in SEEDS]
    assert sorted((i, j) for i, j, _ in seen) == [(i, j) for i in range(3) for j in range(4)]
    assert all(out[i][j] is completion for i, j, completion in seen)
    raw = torch.log_softmax(table().double(), -1).numpy()
    reasons = set()
    for prompt, row in zip(PROMPTS, out, strict=True):
        for completion in row:
            drawn = completion.token_ids
            before = np.concatenate([prompt[-1:], drawn[:-1]])
            np.testing.assert_allclose(completion.logprobs, raw[before, drawn], rtol=1e-6)
            assert (completion.finish_reason == "stop") == (drawn[-1] == STOP)
            assert STOP not in drawn[:-1]
            assert completion.policy_version == 0
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}
    assert engine.stats.tokens == sum(len(c.token_ids) for row in out for c in row)
    assert engine.stats.tail_factor >= 1
    assert math.isnan(engine.stats.idle_fraction)


def test_once_it_is_enough_the_rest_is_broken_off_and_the_engine_goes_on(engine):
    engine.wake()
    whole, ended = tokens(engine.generate(PROMPTS, SAMPLING, SEEDS)), []
    cut = tokens(
        engine.generate(PROMPTS, SAMPLING, SEEDS, lambda i, j, completion: ended.append((i, j)) or len(ended) == 5)
    )
    assert len(ended) == 5
    assert all(row == whole[i][: len(row)] for i, row in enumerate(cut))
    assert sum(map(len, cut)) <= 5  # a row ends before its first completion that was broken off
    assert engine.stats.tokens == sum(len(whole[i][j]) for i, j in ended)
    assert tokens(engine.generate(PROMPTS, SAMPLING, SEEDS)) == whole


def test_a_completion_depends_on_its_seed_and_not_on_the_batch_or_the_engine(fake, engine):
    engine.wake()
    whole = tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))
    other = start(colocated=False)
    alone = tokens(other.generate(PROMPTS[1:2], SAMPLING, [SEEDS[1][2:3]]))
    assert alone == [[whole[1][2]]]
    other.close()
    assert len({tuple(row) for group in whole for row in group}) == 12


def test_freshly_started_engines_draw_differently_where_the_trainer_gives_them_the_same_prompt(fake):
    drawn = []
    for group in range(2):
        engine = start(colocated=False)
        seeds = [[stream_seed(1234, "rollout", 0, group, j) for j in range(4)]]  # as trainer._rollout names them
        drawn.append(tokens(engine.generate(PROMPTS[:1], SAMPLING, seeds))[0])
        engine.close()
    assert not {tuple(row) for row in drawn[0]} & {tuple(row) for row in drawn[1]}


def test_a_sampler_that_ignores_seeds_is_refused_at_the_start(fake):
    fake.ignore_seeds = True
    with pytest.raises(RunError, match="ignores the seeds"):
        start()
    assert fake.engines[0].closed


def test_a_library_that_can_not_be_imported_is_an_error_with_a_message(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, contract.SAMPLING_PARAMS.module, None)
    with pytest.raises(RunError, match=r"can't be imported.*trtllm\.check"):
        start()


def test_a_stop_token_at_the_length_limit_counts_as_a_stop(engine):
    engine.wake()
    drawn = engine.generate(PROMPTS[:1], SAMPLING, SEEDS[:1])[0]
    stopped = next(completion for completion in drawn if completion.finish_reason == "stop")
    j = next(j for j, completion in enumerate(drawn) if completion is stopped)
    limit = SamplingSpec(1.0, max_new_tokens=len(stopped.token_ids), stop_token_ids=(STOP,))
    [[again]] = engine.generate(PROMPTS[:1], limit, [SEEDS[0][j : j + 1]])
    assert again.token_ids.tolist() == stopped.token_ids.tolist()
    assert again.finish_reason == "stop"


def test_greedy_takes_the_likeliest(engine):
    engine.wake()
    [[greedy]] = engine.generate(PROMPTS[:1], SamplingSpec(0.0, 10, ()), [[1]])
    last, expected = int(PROMPTS[0][-1]), []
    for _ in range(10):
        last = int(table()[last].argmax())
        expected.append(last)
    assert greedy.token_ids.tolist() == expected
    assert np.isfinite(greedy.logprobs).all()


def test_another_temperature_has_the_log_probs_of_what_is_drawn_or_is_refused(fake):
    engine, sampling = start(temperatures={"rollout.temperature": 1.0}), SamplingSpec(0.7, 40, (STOP,), top_p=0.95)
    engine.wake()
    told = torch.log_softmax(table().double() / 0.7, -1).numpy()
    for prompt, row in zip(PROMPTS, engine.generate(PROMPTS, sampling, SEEDS), strict=True):
        for completion in row:
            before = np.concatenate([prompt[-1:], completion.token_ids[:-1]])
            np.testing.assert_allclose(completion.logprobs, told[before, completion.token_ids], rtol=1e-5)
    engine.close()
    fake.raw_logprobs = True
    engine = start(temperatures={"rollout.temperature": 1.0})  # raw ones would pass for those of the draw
    engine.wake()
    with pytest.raises(RequestError, match=r"temperature=0.7.*before temperature"):
        engine.generate(PROMPTS, sampling, SEEDS)
    [[greedy]] = engine.generate(PROMPTS[:1], SamplingSpec(0.0, 10, ()), [[1]])
    assert np.isfinite(greedy.logprobs).all()
    engine.close()
    for name in ("rollout.temperature", "validation.temperature"):
        with pytest.raises(RunError, match=rf"{name}=0.7.*before temperature"):
            start(temperatures={name: 0.7})


@pytest.mark.parametrize(
    ("prompts", "sampling", "seeds", "message"),
    [
        ([np.array([], dtype=np.int32)], SAMPLING, [[1]], "no tokens"),
        (PROMPTS, SAMPLING, [[1]], "seeds for 1"),
        (PROMPTS[:1], SamplingSpec(1.0, 40, (STOP,), min_new_tokens=2), [[1]], "min_new_tokens"),
        ([np.ones(2001, dtype=np.int32)], SAMPLING, [[1]], "prompts of 2000"),
        (PROMPTS[:1], SamplingSpec(1.0, 41, (STOP,)), [[1]], "completions of 40"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_asked(engine, fake, prompts, sampling, seeds, message):
    engine.wake()
    asked = fake.requests
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, sampling, seeds)
    assert fake.requests == asked
    engine.generate(PROMPTS[:1], SAMPLING, [[1]])  # and it goes on


# ---------------------------------------------------------------- what surrounds it


def test_the_engines_processes_see_nothing_of_slurm_mpi_and_torchrun_and_the_learner_keeps_all(fake, monkeypatch):
    job = {
        "SLURM_PROCID": "3",
        "PMI_RANK": "3",
        "PMIX_RANK": "3",
        "OMPI_COMM_WORLD_RANK": "3",
        "MASTER_PORT": "1",
        "RANK": "3",
        "TORCHELASTIC_RUN_ID": "x",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5",
        "PATH": "/usr/bin",
    }
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    for name in contract.ENVIRONMENT:
        monkeypatch.setenv(name, "unset")
    engine = start()
    [seen] = fake.environments
    assert not [name for name in seen if name.startswith(("SLURM", "PMI", "OMPI", "TORCHELASTIC"))]
    assert not {"MASTER_PORT", "RANK", "CUDA_DEVICE_MAX_CONNECTIONS"} & seen.keys()
    assert seen["TLLM_NUMA_AWARE_WORKER_AFFINITY"] == seen["RAY_memory_monitor_refresh_ms"] == "0"
    assert int(seen["RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"]) < 1 << 30
    assert seen["CUDA_VISIBLE_DEVICES"] == "5"
    assert seen["PATH"] == f"{os.path.dirname(sys.executable)}:/usr/bin"  # the library asks ``pip`` where it is
    assert seen.items() >= contract.ENVIRONMENT.items()
    assert os.environ.items() >= job.items()
    assert os.environ.items() >= contract.ENVIRONMENT.items()  # the library goes on reading them
    engine.close()


def test_the_engine_is_made_for_prompts_longer_than_the_librarys_default(fake):
    engine = start(max_prompt_tokens=9000)
    arguments = fake.engines[0].args
    assert (arguments.max_input_len, arguments.max_seq_len, arguments.max_num_tokens) == (9000, 9040, 9000)
    assert arguments.max_batch_size == 1  # one of the longest fits into the KV cache
    assert vars(arguments.kv_cache_config)["max_tokens"] == SETTINGS.max_concurrent_tokens
    engine.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"finish_reason": "timeout"}, "finish_reason='timeout'"),
        ({"finish_reason": "cancelled"}, "finish_reason='cancelled'"),
        ({"finish_reason": "not_finished"}, "finish_reason='not_finished'"),
        ({"cut_at": 2}, "cut a completion at 2 of 40"),
        ({"drop_stop_token": True}, "last token is none of"),
        ({"drop_logprobs": True}, "log-probs for 0 of"),
        ({"fail_request": 20}, "generate_async: RuntimeError: CUDA error"),
        ({"hang": True}, "no completion within 1 s"),
    ],
)
def test_a_completion_that_is_none_ends_the_engine_with_a_message(fake, fault, message):
    engine = start(timeout_s=1.0 if "hang" in fault else 60.0)
    engine.wake()
    vars(fake).update(fault)
    with pytest.raises(RunError, match=message):
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    for call in (
        lambda: engine.generate(PROMPTS, SAMPLING, SEEDS),
        lambda: engine.update_weights([], 1),
        engine.sleep,
    ):
        with pytest.raises(RunError, match=rf"can't go on.*{message}"):
            call()
    engine.close()
    engine.close()
    assert fake.engines[0].closed
    assert not [thread for thread in threading.enumerate() if thread.name == "trtllm"]


def test_a_reward_that_raises_is_not_hidden_and_an_export_that_breaks_off_leaves_no_mixed_weights_in_use(fake):
    engine = start(colocated=False)

    def reward(i, j, completion):
        raise ZeroDivisionError("reward")

    with pytest.raises(ZeroDivisionError, match="reward"):
        engine.generate(PROMPTS, SAMPLING, SEEDS, reward)
    engine.close()

    def export():
        yield TABLE, table(1)
        yield "more", table(1)
        raise OSError("lost")

    engine = start(colocated=False, refit_bucket_bytes=1)
    with pytest.raises(OSError, match="lost"):
        engine.update_weights(export(), 1)
    with pytest.raises(RunError, match="weights are mixed"):
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    engine.close()


def test_gpus_that_one_engine_can_not_run_on_are_refused():
    def gpu(host, number):
        return Gpu(host, number, f"GPU-{host}{number}", 0)

    trtllm_placement.check_gpus([gpu("a", 0), gpu("a", 1)], 2)
    for gpus, message in (
        ([gpu("a", 0), gpu("b", 1)], "spans the nodes a, b"),
        ([gpu("a", 0), gpu("a", 0)], "under one numbering"),
        ([gpu("a", 0)], "tensor_parallel_size=2 was given 1"),
    ):
        with pytest.raises(RunError, match=message):
            trtllm_placement.check_gpus(gpus, 2)


def test_weights_that_lie_on_other_gpus_than_the_workers_are_refused(fake):
    fake.device_ids = ["GPU-7"]
    with pytest.raises(RunError, match=r"workers run on the GPUs \['GPU-7'\].*\['GPU-0'\]"):
        start()


# ---------------------------------------------------------------- configuration


def test_a_machine_without_the_library_is_told_what_is_missing_and_what_to_use():
    config = make_config("/m", rollout__engine="trtllm")
    with pytest.raises(ConfigError, match=r"needs the package tensorrt_llm .* and a CUDA GPU.*rollout.engine=megatron"):
        trtllm_settings.check(config)
    with pytest.raises(ConfigError, match="tensorrt_llm"):
        TrtllmEngine.from_config(config)


def test_code_of_the_models_directory_runs_only_if_the_settings_say_so(fake, monkeypatch):
    pretend_gpus(monkeypatch)
    for trusted in (False, True):
        config = make_config("/m", rollout__engine="trtllm", precision__name="bf16", model__trust_remote_code=trusted)
        TrtllmEngine.from_config(config).close()
        assert fake.engines[-1].args.trust_remote_code is trusted


def test_an_engine_by_the_configuration(fake, monkeypatch):
    pretend_gpus(monkeypatch, count=2)
    config = make_config(
        "/m", rollout__engine="trtllm", rollout__trtllm__tensor_parallel_size=1, precision__name="fp32"
    )
    with pytest.raises(ConfigError, match="precision=bf16"):
        TrtllmEngine.from_config(config)
    config = make_config("/m", rollout__engine="trtllm", precision__name="bf16", trainer__devices=2)
    engine = TrtllmEngine.from_config(config)
    assert fake.engines[0].args.dtype == "bfloat16"
    assert not fake.engines[0].args.enable_sleep
    assert len(engine.generate(PROMPTS[:1], SamplingSpec(1.0, 16, (STOP,)), [[1, 2]])[0]) == 2
    engine.close()
    wide = make_config(
        "/m",
        rollout__engine="trtllm",
        precision__name="bf16",
        trainer__devices=4,
        model__tensor_model_parallel_size=4,
    )
    with pytest.raises(ConfigError, match="sees 2 GPUs"):
        TrtllmEngine.from_config(wide)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout__trtllm__kv_cache_fraction": 1.0}, "kv_cache_fraction"),
        ({"rollout__trtllm__tensor_parallel_size": 2}, "tensor 1 x pipeline 1"),
        ({"rollout__trtllm__refit_bucket_bytes": 0}, "refit_bucket_bytes"),
        ({"model__pipeline_model_parallel_size": 2, "trainer__num_nodes": 2}, "several nodes"),
        ({"model__tensor_model_parallel_size": 4, "trainer__devices": 2}, "several nodes"),
    ],
)
def test_settings_that_can_not_work_with_it_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config("/m", rollout__engine="trtllm", **settings)


def test_how_the_engine_is_cut_up_does_not_decide_a_result():
    plain = make_config("/m")
    assert digest(make_config("/m", rollout__trtllm__refit_bucket_bytes=5)) == digest(plain)
