"""The page, the schema and the refusals: what a person types is either right or refused with key, reason and remedy."""

from __future__ import annotations

import functools

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_aapo.config import Config, ModelShape, check_overrides, derive, parse
from nemo_aapo.config.command_line import config_directory, read_command_line
from nemo_aapo.config.compose import compose, register_resolvers
from nemo_aapo.errors import ConfigError

GIVEN = ("model.path=/m", "data.train=/t", "data.validation=/v")
IN_FLIGHT = ("rollout.engine=remote", "rollout.max_lag=2", "algorithm.importance_weight_cap=2.0")
GROUPS = read_command_line([]).groups()
SHAPE = ModelShape("Qwen2ForCausalLM", 6, 48, 96, 12, 4, 4, 1000, False, 4096)


@functools.cache
def composed(*choices: str) -> DictConfig:
    """The page with choices of groups, not resolved. Hydra takes a while: once for each set of choices."""
    with hydra.initialize_config_dir(str(config_directory()), version_base=None):
        return hydra.compose("train_aapo", overrides=[*GIVEN, *choices])


def config_of(*words: str) -> Config:
    choices = [word for word in words if word.partition("=")[0] in GROUPS or word.startswith(("+", "~"))]
    register_resolvers()
    rest = OmegaConf.from_dotlist([word for word in words if word not in choices])
    return parse(OmegaConf.to_container(OmegaConf.merge(composed(*choices), rest), resolve=True))


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_choice_composes_with_the_page_into_a_valid_configuration(group):
    assert GROUPS[group]
    for choice in GROUPS[group]:
        config = config_of(f"{group}={choice}")
        if group == "algorithm":
            assert config.algorithm.name in (choice, "aapo")


def test_choices_of_algorithm_say_what_their_sources_say():
    gpg, grpo, paper = (config_of(f"algorithm={name}").algorithm for name in ("gpg", "grpo", "aapo_paper"))
    assert (gpg.margin, gpg.reference, gpg.scale_rewards, gpg.rescale_dead_groups) == (None, None, False, True)
    assert grpo.clip is not None
    assert (grpo.loss, grpo.margin, grpo.loss_aggregation) == ("ratio_clip", None, "sequence")
    assert paper.margin is not None
    assert (paper.reference, paper.margin.estimator, paper.margin.low, paper.margin.high) == (
        "online",
        "sampled",
        -0.2,
        0.28,
    )


def test_run_directory_follows_the_name_and_logs_follow_the_run_directory():
    assert config_of("run.name=mine").exp_manager.explicit_log_dir == "results/mine"
    moved = config_of("run.dir=/elsewhere")
    assert (moved.run.dir, moved.exp_manager.explicit_log_dir) == ("/elsewhere", "/elsewhere")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("traner.devices=2", "did you mean 'trainer.devices'"),
        ("lr=1", "did you mean 'model.optim.lr'"),
        ("+group_sise=2", "did you mean 'group_size'"),
        ("model.tensor_parallel_size=2", "did you mean 'model.tensor_model_parallel_size'"),
        ("algorithm=grop", "did you mean 'grpo'"),
        ("precision=fp8", "no such choice"),
        ("cluster=slurn", "no such choice"),
        ("trainer.devices", "KEY=VALUE"),
        ("zzzzz=1", "known are"),
    ],
)
def test_mistyped_words_are_refused_with_the_nearest_known_one(word, said):
    with pytest.raises(ConfigError, match=said) as refusal:
        check_overrides([word], GROUPS)
    assert word.lstrip("+").partition("=")[0] in str(refusal.value)


def test_words_that_are_right_pass():
    check_overrides(
        ["seed=1", "+seed=1", "~algorithm.margin", "algorithm=gpg", "algorithm.margin=null", "hydra.verbose=true"],
        GROUPS,
    )


@pytest.mark.parametrize(
    ("words", "key", "reason"),
    [
        (["group_size=two"], "group_size", "type int"),
        (["group_size=2.5"], "group_size", "type int"),
        (["model.optim.lr=true"], "model.optim.lr", "type float"),
        (["model.optim.lr=.inf"], "model.optim.lr", "type float"),
        (["model.optim.lr=0"], "model.optim.lr", "above 0"),
        (["data.train=null"], "data.train", "type str"),
        (["model.optim.betas=[0.9]"], "model.optim.betas", "two numbers"),
        (["model.optim.betas=[0.9,x]"], "model.optim.betas[1]", "type float"),
        (["prompts_per_step=0"], "prompts_per_step", "at least 1"),
        (["trainer.max_steps=-1"], "trainer.max_steps", "at least 0"),
        (["rollout.engine=vllm"], "rollout.engine", "known values are megatron"),
        (["model.lora={rank: 0, alpha: 1, target_modules: [linear_qkv]}"], "model.lora", "at least 1"),
        (["model.lora={rank: 4, alpha: 1, target_modules: [q_proj]}"], "model.lora.target_modules", "linear_qkv"),
        (["model.lora={rank: 4, alpha: 1, target_modules: []}"], "model.lora.target_modules", "linear_qkv"),
        (
            ["model.lora={rank: 3, alpha: 1, target_modules: [linear_fc1]}", "model.tensor_model_parallel_size=2"],
            "model.lora.rank",
            "not divisible",
        ),
        (
            ["model.lora={rank: 4, alpha: 4, target_modules: [linear_fc1]}", "rollout.offload_learner=true"],
            "model.lora",
            "never trained so",
        ),
        (["++model.nope=1"], "model.nope", "unknown setting"),
        (["++algorithm.margin.hihg=1"], "algorithm.margin.hihg", "did you mean 'algorithm.margin.high'"),
        (["~seed"], "seed", "must be set"),
        (["rollout.temperature=0"], "rollout.temperature", "above 0"),
        (["rollout.top_p=0.9"], "rollout.top_p=0.9", "Keep top_p=1"),
        (["rollout.top_k=50"], "rollout.top_k=50", "top_k=0"),
        (["validation.top_p=0"], "validation.top_p", "(0, 1]"),
        (["rollout.stop_strings=['END','']"], "rollout.stop_strings", "empty string"),
        (["validation.min_new_tokens=-1"], "validation.min_new_tokens", "at least 0"),
        (["validation.min_new_tokens=1025"], "validation.min_new_tokens=1025", "rollout.max_new_tokens=1024"),
        (
            ["rollout.engine=trtllm", "rollout.stop_strings=[END]"],
            "rollout.stop_strings=['END']",
            "without a tokenizer",
        ),
        (["algorithm.reference=null"], "algorithm.reference", "go together"),
        (["algorithm=gpg", "algorithm.reference_samples=8"], "algorithm.reference_samples", "set it to null"),
        (["algorithm=gpg", "algorithm.reference_store=s"], "algorithm.reference_store", "set it to null"),
        (["algorithm=aapo_paper", "algorithm.reference_fill_steps=8"], "algorithm.reference_fill_steps", "online"),
        (["algorithm.reference_fill_steps=0"], "algorithm.reference_fill_steps", "at least 1"),
        (["algorithm.reference_store=null"], "algorithm.reference_store", "must name a file"),
        (["algorithm.reference_samples=4"], "algorithm.reference_samples=4", "at least group_size=8"),
        (["algorithm=aapo_paper", "algorithm.reference_samples=9"], "algorithm.reference_samples=9", "at a time"),
        (["algorithm.margin.low=0.1"], "algorithm.margin", "low <= 0 <= high"),
        (["algorithm.kl_coefficient=0.1"], "algorithm.kl_coefficient", "algorithm.loss=cross_entropy"),
        (["algorithm.loss=ratio_clip"], "algorithm.clip", "ratio_clip"),
        (["algorithm=grpo", "algorithm.clip.low=1.5"], "algorithm.clip.low", "(0, 1]"),
        (["algorithm.importance_weight_cap=0.5"], "algorithm.importance_weight_cap", "at least 1"),
        (["rewards=[]"], "rewards", "name at least one"),
        (["rewards=[{weight: 1}]"], "rewards[0]", "needs a name"),
        (["rewards=[{name: accuracy, weight: heavy}]"], "rewards[0].weight", "number"),
        (["rewards=[{name: accuracy},{name: accuracy}]"], "rewards", "twice"),
        (["data.train=reasoning_gym:chain_sum"], "accuracy can't judge the answers of reasoning_gym:chain_sum", "name"),
        (
            ["checkpoint.keep_best=validation/accuracy_greedy", "trainer.val_check_interval=0"],
            "checkpoint.keep_best",
            "never validates",
        ),
        (
            ["checkpoint.keep_best=validation/accuracy_sampled", "validation.samples=0"],
            "checkpoint.keep_best",
            "the greedy accuracy alone",
        ),
        (["model.sequence_parallel=true"], "model.sequence_parallel", "tensor_model_parallel_size > 1"),
        (["model.optim.sched.min_lr=1e-7"], "model.optim.sched.min_lr", "set it to 0"),
        (
            ["max_tokens_per_microbatch=1535"],
            "max_tokens_per_microbatch=1535",
            "512 + rollout.max_new_tokens=1024 = 1536",
        ),
        (["rollout.max_concurrent_tokens=99"], "rollout.max_concurrent_tokens=99", "can't hold one sequence"),
        (["rollout.refit=copy"], "rollout.refit", "files"),
        (["rollout.refit=collective", "rollout.server.engine=trtllm"], "rollout.refit=collective", "files or delta"),
        (["rollout.refit=ipc", "trainer.num_nodes=2"], "trainer.num_nodes=2", "on one machine"),
        (
            ["rollout.refit=ipc", "rollout.async_depth=1", "algorithm.importance_weight_cap=2.0"],
            "rollout.async_depth=1",
            "while it waits",
        ),
        (["rollout.max_lag=0"], "rollout.max_lag", "at least 1"),
        (["rollout.recompute_kv=true"], "rollout.recompute_kv=true", "rollout.max_lag=null"),
        ([*IN_FLIGHT, "rollout.async_depth=1"], "rollout.async_depth=1", "in flight or in order"),
        ([*IN_FLIGHT, "rollout.engine=megatron"], "rollout.max_lag=2", "rollout.engine=remote"),
        ([*IN_FLIGHT, "rollout.engine=trtllm"], "rollout.max_lag=2", "rollout.engine=remote"),
        ([*IN_FLIGHT, "rollout.speculation=true"], "rollout.max_lag=2", "rollout.speculation=true has no effect"),
        ([*IN_FLIGHT, "rollout.server.engine=trtllm"], "rollout.server.engine=trtllm", "Megatron's engine"),
        ([*IN_FLIGHT, "rollout.refit=collective"], "rollout.refit=collective", "files or delta"),
        ([*IN_FLIGHT, "rollout.refit=ipc"], "rollout.refit=ipc", "files or delta"),
        ([*IN_FLIGHT, "data.sampling=hard"], "data.sampling=hard", "data.sampling=uniform"),
        ([*IN_FLIGHT, "algorithm=aapo_paper"], "algorithm.reference=online", "reference=cached"),
        ([*IN_FLIGHT, "algorithm.importance_weight_cap=null"], "rollout.max_lag=2", "importance_weight_cap"),
        ([*IN_FLIGHT, "rollout.replay=/r", "trainer.val_check_interval=0"], "rollout.", "no effect"),
        (["rollout.refit=ipc", "cluster=slurm_servers"], "cluster.servers.nodes", "on its node by scripts/serve.py"),
        (
            ["cluster=slurm_servers", "cluster.servers.gpus_per_node=4", "rollout.server.tensor_parallel_size=8"],
            "cluster.servers.gpus_per_node=4",
            "spread a server over nodes",
        ),
    ],
)
def test_what_can_not_work_is_refused_with_key_and_reason(words, key, reason):
    with pytest.raises(ConfigError) as refusal:
        config_of(*words)
    assert key in str(refusal.value)
    assert reason in str(refusal.value)


def test_settings_without_a_default_must_be_given():
    with pytest.raises(ConfigError, match=r"model\.path must be set: model\.path=VALUE"):
        parse(compose(read_command_line([])))


@pytest.mark.parametrize(
    ("words", "world_size", "said"),
    [
        (
            ["model.tensor_model_parallel_size=5", "trainer.devices=5"],
            5,
            "tensor_model_parallel_size=5 .* 12 attention",
        ),
        (["model.tensor_model_parallel_size=3", "trainer.devices=3"], 3, "tensor_model_parallel_size=3 .* 4 key-value"),
        (
            ["model.pipeline_model_parallel_size=4", "trainer.devices=4"],
            4,
            "pipeline_model_parallel_size=4 .* 6 layers",
        ),
        (["trainer.devices=4"], 1, r"= 4 ranks, but 1 were started.*scripts/launch\.py"),
        (["model.tensor_model_parallel_size=2", "trainer.devices=3"], 3, "3 ranks .* tensor 2 x pipeline 1.*change"),
        (["prompts_per_step=9", "trainer.devices=2"], 2, "prompts_per_step=9 .* data-parallel size 2"),
        (
            [
                "rollout.engine=trtllm",
                "model.tensor_model_parallel_size=4",
                "model.pipeline_model_parallel_size=2",
                "trainer.devices=8",
            ],
            8,
            "tensor_parallel_size=8 .*null: tensor 4 x pipeline 2.* 12 attention",
        ),
        (["model.context_parallel_size=2", "trainer.devices=3"], 3, "tensor 1 x pipeline 1 x context 2 = 2"),
        (
            ["model.context_parallel_size=2", "trainer.devices=4", "prompts_per_step=6"],
            4,
            "=6 is not divisible by the data-parallel size 2 x model.context_parallel_size 2 = 4 copies of the model",
        ),
        (["data.max_prompt_tokens=3073"], 1, r"= 4097 exceeds the 4096 positions"),
    ],
)
def test_layouts_that_do_not_fit_model_and_ranks_are_refused(words, world_size, said):
    words = [*words, "max_tokens_per_microbatch=8192"]
    with pytest.raises(ConfigError, match=said):
        derive(config_of(*words), SHAPE, world_size)


def test_derived_sizes_multiply_out():
    for tp, pp, cp, dp in ((1, 1, 1, 1), (2, 1, 1, 2), (2, 3, 1, 1), (4, 2, 1, 4), (2, 1, 2, 4)):
        world = tp * pp * cp * dp
        config = config_of(
            f"model.tensor_model_parallel_size={tp}",
            f"model.pipeline_model_parallel_size={pp}",
            f"model.context_parallel_size={cp}",
            f"trainer.devices={world}",
        )
        sizes = derive(config, SHAPE, world)
        copies = cp * dp  # each generates and judges its share of the prompts, whoever shares a sequence in training
        assert (sizes.data_parallel_size, sizes.prompts_per_rank * copies) == (copies, config.prompts_per_step)
        assert any(f"context {cp} = {copies}: each generates" in line for line in sizes.arithmetic) == (cp > 1)
        assert sizes.completions_per_step == config.prompts_per_step * config.group_size
