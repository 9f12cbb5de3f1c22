"""The recipes of conf/experiment: each composes, says what was published or planned, and fits its model on its GPUs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from nemo_aapo.cli import launch
from nemo_aapo.config import Config, derive
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import load_config
from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.planning import layouts
from nemo_aapo.planning.inputs import layout_of
from nemo_aapo.prepare.plan import prepare_plan
from nemo_aapo.rewards import build_reward
from tests.tiny_models import save_empty_input, save_empty_model

MODELS = {  # config.json: layers, hidden, feed-forward, heads, key-value groups, head size, vocabulary, positions
    "r1_distill_qwen_1_5b": ("Qwen2ForCausalLM", 28, 1536, 8960, 12, 2, 128, 151936, 131072),
    "qwen2_5_math_7b": ("Qwen2ForCausalLM", 28, 3584, 18944, 28, 4, 128, 152064, 4096),
    "llama3_2_1b": ("LlamaForCausalLM", 16, 2048, 8192, 32, 8, 64, 128256, 131072),
    "llama3_2_3b": ("LlamaForCausalLM", 28, 3072, 8192, 24, 8, 128, 128256, 131072),
}
PARTS = ("paper_common", "paper_level3to5")
"""Pages that others build on; they name no model."""
ALGORITHMS = {"": "aapo", "_grpo": "grpo", "_gpg": "gpg"}


@functools.cache
def recipe(name: str) -> Config:
    return load_config([f"experiment=paper_{name}"])


def model_directory(model: str, path: Path) -> str:
    """What the planner of a layout reads of a model: its config.json, beside weights without tensors."""
    architecture, layers, hidden, feed_forward, heads, groups, head, vocabulary, positions = MODELS[model]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": feed_forward, "head_dim": head}
    attention = {"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": positions}
    return str(save_empty_model(path, architectures=[architecture], vocab_size=vocabulary, **sizes, **attention))


def test_there_is_a_page_for_each_model_and_algorithm_and_no_other():
    pages = {page for page in read_command_line([]).groups()["experiment"] if page.startswith("paper_")}
    assert pages == {*PARTS, *(f"paper_{model}{suffix}" for model in MODELS for suffix in ALGORITHMS)}


@pytest.mark.parametrize("model", MODELS)
def test_a_baseline_differs_from_aapo_in_the_algorithm_and_the_name_alone(model):
    aapo = recipe(model)
    for suffix, algorithm in ALGORITHMS.items():
        config = recipe(model + suffix)
        given = ("group_size=6", "model.path=m", "data.train=t", "data.validation=v")
        page = load_config([f"algorithm={algorithm if suffix else 'aapo_paper'}", *given])
        assert (config.run.name, config.algorithm.name) == (f"paper_{model}{suffix}", algorithm)
        assert config.algorithm == page.algorithm
        same = dataclasses.replace(config, algorithm=aapo.algorithm)
        assert repr(same).replace(config.run.name, aapo.run.name) == repr(aapo)  # names of files follow the run's


def test_r1_distill_has_the_published_values():
    config = recipe("r1_distill_qwen_1_5b")
    optim = config.model.optim
    assert (config.group_size, config.prompts_per_step, config.trainer.max_steps) == (6, 4, 100)
    assert (optim.lr, optim.sched.name, optim.sched.min_lr) == (1e-6, "cosine", 1e-7)
    assert optim.sched.warmup_steps == 0.1 * config.trainer.max_steps
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (512, 3584)
    assert (config.rollout.temperature, config.rollout.top_p) == (0.7, 1.0)
    assert {entry["name"]: entry["weight"] for entry in config.rewards} == {
        "format": 1.0,
        "cosine": 2.0,
        "accuracy": 0.0,
    }
    assert "open-rs" in str(config.data.train)
    assert "<think>" in config.data.system_prompt


@pytest.mark.parametrize(
    ("model", "data"), [("qwen2_5_math_7b", "qwen"), ("llama3_2_1b", "abel"), ("llama3_2_3b", "abel")]
)
def test_the_runs_on_math_levels_3_to_5_have_the_published_values(model, data):
    config = recipe(model)
    optim = config.model.optim
    assert (config.group_size, config.prompts_per_step) == (6, 16)
    assert (optim.lr, optim.sched.name) == (1e-6, "constant")
    assert optim.sched.warmup_steps == 0.03 * config.trainer.max_steps
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (1024, 3072)
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert [(entry["name"], entry["weight"]) for entry in config.rewards] == [("accuracy", 1.0)]
    assert f"simplelr_{data}_level3to5" in str(config.data.train)
    assert config.data.system_prompt is None
    assert config.data.chat_template == "none"


@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_has_the_papers_algorithm_and_precision_and_fits_its_model_on_eight_gpus(model, tmp_path):
    config = recipe(model)
    algorithm = config.algorithm
    assert (algorithm.reference, algorithm.reference_samples, algorithm.scale_rewards) == ("online", 6, True)
    assert dataclasses.astuple(algorithm.margin) == (-0.2, 0.28, "sampled")
    assert config.precision.name == "bf16"
    sizes = derive(config, read_model_dir(model_directory(model, tmp_path)), world_size=8)
    assert config.trainer.num_nodes * config.trainer.devices == 8
    rollout = sizes.prompts_per_rank * config.group_size * sizes.max_sequence_tokens
    assert config.rollout.max_concurrent_tokens == rollout  # all of a step's completions at once, and no more
    for entry in config.rewards:
        build_reward({key: value for key, value in entry.items() if key != "weight"})


EXPERTS_RECIPE = "experiment=aapo_qwen3_30b_a3b"
EXPERTS_MODEL = {  # config.json of Qwen3-30B-A3B-Base
    "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_position_embeddings": 32768,
}  # fmt: skip


def test_the_recipe_with_experts_dry_runs_as_a_job_of_two_nodes(tmp_path, capsys):
    """As it stands, but for the places of model, data and run."""
    _, *places = save_empty_input(tmp_path)
    model = save_empty_model(tmp_path / "experts", **EXPERTS_MODEL)
    words = [EXPERTS_RECIPE, f"model.path={model}", *places, "cluster=slurm", "dry_run=true"]
    assert launch.main(words) == 0
    assert "#SBATCH --nodes=2" in capsys.readouterr().out


def test_the_recipe_with_experts_has_the_quickest_layout_that_is_planned_to_fit():
    config, question = prepare_plan([EXPERTS_RECIPE, "model=Qwen3-30B-A3B"])
    best, *others = [verdict for verdict in layouts.judge_all(config, question) if verdict.fits]
    assert best.layout == layout_of(config)
    assert others
