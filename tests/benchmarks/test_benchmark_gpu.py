"""The benchmark of one GPU, where there is none: its sizes, and its whole way with the CPU in the GPU's place."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import pytest
import torch

from benchmarks import gpu, gpu_models, gpu_report
from nemo_aapo.config import with_machine_defaults
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import world
from nemo_aapo.mcore import precision
from tests.gpu.learning import learn, make_model
from tests.tiny_models import save_empty_model


def of_qwen(directory, name):
    shape = gpu_models.SHAPES[name]
    sizes = {"hidden_size": shape["hidden"], "intermediate_size": shape["ffn"], "num_hidden_layers": shape["layers"]}
    heads = {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["groups"]}
    return save_empty_model(directory, **sizes, **heads, vocab_size=gpu_models.VOCABULARY, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("name", "gigabytes", "tokens"),
    [("0.5B", 141, 32_768), ("1.5B", 141, 32_768), ("0.5B", 80, 32_768), ("1.5B", 80, 16_384), ("1.5B", 1, 1024)],
)
def test_a_micro_batch_is_halved_until_it_fits_into_the_gpu(tmp_path, name, gigabytes, tokens):
    """1.5B took 90 GiB at 32,768 tokens and 58 at 16,384 on an H200."""
    assert gpu_models.fitting(of_qwen(tmp_path / "model", name), 32_768, 1024, gigabytes * 1e9) == tokens


class Event:
    """Of a device that is always done."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1.0


def on_cpu(create):
    return lambda *words, **named: create(*words, **{**named, **({"device": "cpu"} if "device" in named else {})})


def _measured(folder):
    """On a rank: what ``measure`` finds, printed as tables."""
    stand_in = types.ModuleType("torch")
    stand_in.__getattr__ = lambda name: getattr(torch, name)
    for name in ("empty", "full", "randn", "randint"):
        setattr(stand_in, name, on_cpu(getattr(torch, name)))
    stand_in.Generator = lambda device: torch.Generator()
    stand_in.cuda = types.SimpleNamespace(
        Event=Event,
        current_device=lambda: torch.device("cpu"),
        empty_cache=lambda: None,
        get_device_name=lambda: "NVIDIA H200",
        get_device_properties=lambda number: types.SimpleNamespace(total_memory=1e9),
        max_memory_allocated=lambda: 2**30,
        memory_allocated=lambda: 0,
        reset_peak_memory_stats=lambda: None,
        synchronize=lambda: None,
    )
    vocabulary = 160
    tiny = {"hidden": 64, "ffn": 128, "layers": 2, "heads": 4, "groups": 2}
    machine = world.Machine("NVIDIA L40", (8, 9), (12, 8), transformer_engine=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (gpu, gpu_models):
            patch.setattr(module, "torch", stand_in)
            patch.setattr(module, "VOCABULARY", vocabulary)
        patch.setitem(gpu_models.SHAPES, "tiny", tiny)
        patch.setattr(gpu, "ceilings", lambda: {"bytes_per_s": 4e12, "flops_per_s": 8e14})
        patch.setattr(world.Machine, "present", lambda: machine)
        patch.setattr(precision, "model_fields", lambda config: precision.machine_fields(torch.float32))
        patch.setattr(precision, "dtype", lambda config: torch.float32)
        patch.setattr(world, "decide", lambda config, _: _in_fp32(config))
        sizes = {"decode_rows": (4,), "decode_prompt": 16, "decode_tokens": 8, "sequence": 256}
        plan = dataclasses.replace(gpu.QUICK, shapes=("tiny",), micro_batch_tokens=512, **sizes)
        found = gpu.measure(plan, folder)
    return found, list(gpu_report.report(found))


def _in_fp32(config):
    """What the precision decides besides numbers is as asked for."""
    decided = with_machine_defaults(config, on_gpu=True)
    plain = dataclasses.replace(decided.model.optim, use_distributed_optimizer=False)
    return dataclasses.replace(
        decided,
        model=dataclasses.replace(decided.model, optim=plain),
        precision=dataclasses.replace(decided.precision, name="fp32"),
    )


def test_the_whole_benchmark_runs_and_leaves_out_what_the_gpu_cannot_do(ranks, tmp_path):
    [(found, tables)] = ranks.run(_measured, tmp_path)
    assert [row["precision"] for row in found["learner"]] == ["bf16", "fp8_tensorwise", "fp8_delayed"]
    assert [(row["model"], row["rows"]) for row in found["decode"]] == [("tiny", 4)]
    assert [row["parity/mult_prob_error"] for row in found["parity"]] == pytest.approx([1.0] * 3, abs=1e-4)
    assert found["logprobs"]["error"] < 0.05
    assert all(0 < row["mfu"] < 1 and math.isfinite(row["seconds"]) for row in found["learner"])
    json.dumps(found)
    assert [table.splitlines()[0].split()[0] for table in tables] == [
        "NVIDIA", "learner", "decoding", "parity", "log-probs",
    ]  # fmt: skip


def test_without_bf16_nothing_is_measured_in_vain(tmp_path, monkeypatch):
    monkeypatch.setattr(world.Machine, "present", lambda: world.Machine("NVIDIA H200", (9, 0), (13, 0)))
    with pytest.raises(ConfigError, match="needs TransformerEngine"):
        gpu.measure(gpu.QUICK, tmp_path)


def _learned(path, share):
    return learn(path, **{"model.share_prompts": share})


def test_what_a_gpus_learner_is_compared_with_gives_the_figures_of_the_results_on_a_cpu(ranks, tmp_path):
    """``tests/gpu`` is skipped without a GPU: here its reference is run, whole and with prompts shared."""
    path = make_model(tmp_path / "model")
    for share in (True, False):
        (found,) = ranks.run(_learned, path, share)
        assert found["loss"][0] == pytest.approx(-1.40079, abs=2e-5)
        assert found["grad_norm"][0] == pytest.approx(1.2873, rel=1e-4)
        assert found["gradient"]
