"""Whatever words and files tell is refused by every command before torch is imported, and leaves nothing on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nemo_aapo import lines
from nemo_aapo.config.command_line import FROZEN
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.world import Machine
from tests.doctor.contexts import distribution
from tests.prepare.conftest import Blocker, Given, command
from tests.tiny_models import save_empty_model

SLURM = ("cluster=slurm", "dry_run=true")
THERE = "algorithm.reference_store=/proc/version"
"""A file in a folder in which nobody can write."""
H200 = Machine("NVIDIA H200", (9, 0), (13, 0), transformer_engine=True)


TRAINING = [
    (["seed=x"], "seed='x'"),
    (["traner.max_steps=1"], "did you mean 'trainer.max_steps'"),
    (["algorithm=appo"], "there is no such choice"),
    (["prompts_per_step=0"], "must be at least 1"),
    (["run.name=x_${now:%S}"], "ranks would disagree"),
    (["data.train="], "data.train: the path is empty, as that of an unset shell variable is"),
    (["rollout.remote.directory="], "rollout.remote.directory: the path is empty"),
    (["rewards=[{name: acuracy}]"], "did you mean 'accuracy'"),
    (["rewards=[{name: cosine, max_token: 9}]", "validation.reward=cosine"], "did you mean 'max_tokens'"),
    (["rewards=[{name: cosine, max_tokens: 0}]", "validation.reward=cosine"], "max_tokens"),
    (["rewards=[{name: custom, function: 'gone.py:f'}]", "validation.reward=f"], "there is no file gone.py"),
    (["rewards=[{name: http, url: 'ftp://x'}]", "validation.reward=http"], "must be http://"),
    (["validation.reward=format"], "is none of rewards"),
    (["rollout.top_p=0.9"], "Keep top_p=1"),
    (["rollout.keep_groups=some"], "known values are all"),
    (["rollout.keep_groups=0", "rollout.keep_tokens=true"], "keeps no rollouts"),
    (["rollout.replay=gone"], "set trainer.val_check_interval=0"),
    (["algorithm.margin=null"], "go together"),
    (["cluster.account=lab", "cluster=local"], "no effect on this machine"),
]
"""What the words tell by themselves; of a plan and of a doctor, too."""
REMOTE = ("rollout.engine=remote",)
FILES = [
    (["model.path=FOLDER/gone"], "no such directory"),
    (["model.path=FOLDER/truncated"], "not JSON"),
    (["rollout.replay=FOLDER/gone", "trainer.val_check_interval=0"], "no rollouts with their tokens"),
    ([f"model.path=FOLDER/{'a' * 300}"], "File name too long"),
    ([f"data.train=FOLDER/{'a' * 300}"], "File name too long"),
    ([f"run.dir=FOLDER/{'a' * 300}"], "File name too long"),
    (["model.path=FOLDER/no_data"], "config.json: missing"),
    (["model.path=FOLDER/bare"], "no tokenizer here"),
    (["model.tensor_model_parallel_size=3"], "does not divide"),
    (["rollout.engine=plain", "model.context_parallel_size=2"], "would have to take every forward pass together"),
    (["rollout.replay_routes=true"], "has no effect: the model has no experts"),
    (["rollout.max_lag=2", "algorithm.importance_weight_cap=2.0"], "needs rollout servers"),
    (
        ["rollout.speculation=true", "rollout.engine=plain"],
        "rollout.speculation has no effect with the engine plain",
    ),
    ([*REMOTE, "rollout.server.tensor_parallel_size=3"], "rollout.server.tensor_parallel_size=3 does not divide"),
    ([*REMOTE, "rollout.server.pipeline_parallel_size=3"], "rollout.server.pipeline_parallel_size=3 does not divide"),
    ([*REMOTE, "rollout.server.expert_parallel_size=2"], "rollout.server.expert_parallel_size=2"),
    (
        [*REMOTE, "rollout.server.engine=trtllm", "rollout.trtllm.tensor_parallel_size=3"],
        "rollout.trtllm.tensor_parallel_size=3 (null: tensor 1 x pipeline 1): ",
    ),
    (["rollout.refit=ipc"], "rollout.refit=ipc has no effect with rollout.engine=megatron"),
    (
        [*REMOTE, "rollout.trtllm.refit_bucket_bytes=1000"],
        "refit_bucket_bytes=1000 has no effect with rollout.engine=remote, rollout.server.engine=megatron",
    ),
    (["data.max_prompt_tokens=4000", "max_tokens_per_microbatch=9000"], "exceeds the 4096 positions"),
    (["data.train=FOLDER/trian.jsonl"], "data.train: FOLDER/trian.jsonl: no such file; did you mean"),
    (["data.validation=FOLDER/no_data"], "data.validation: FOLDER/no_data: this is a directory without a data set"),
    (["data.train=[{path: FOLDER/train.jsonl, split: test}]"], "this is one file, split=test has no effect"),
    (["data.system_prompt=Think."], "which has no place for it"),
    (["data.prompt_template='{system_prompt} {question}'"], "but system_prompt is not set"),
    (["model.path="], "model.path: the path is empty"),
    (["data.train=[{path: ''}]"], "data.train[0].path: the path is empty"),
    (["run.dir="], "run.dir: the path is empty"),
    (["run.dir=FOLDER/a_file"], "FOLDER/a_file is a file, where a directory is needed"),
    (["run.dir=FOLDER/a_file/run"], "FOLDER/a_file is a file, where a directory is needed"),
    (["run.dir=FOLDER/purged"], "run.dir=FOLDER/purged: FOLDER/purged is a link to FOLDER/scratch, which is not there"),
    (["run.dir=FOLDER/purged/run"], "FOLDER/purged is a link to FOLDER/scratch, which is not there"),
    (["run.dir=FOLDER/run_begun"], "FOLDER/run_begun/checkpoints is a link to FOLDER/scratch, which is not there"),
    (["run.dir=/proc/x/y"], "run.dir=/proc/x/y: nothing can be written in /proc ("),
]
"""What files tell, of training and launching."""
CPU = [
    (["precision=bf16"], "needs a GPU"),
    (["rollout.offload_learner=true"], "there is no GPU"),
    (["rollout.engine=trtllm"], "tensorrt_llm"),
    (["trainer.devices=2"], "but 1 were started"),
    (["algorithm.reference_store=/proc/x"], "algorithm.reference_store=/proc/x: nothing can be written in /proc ("),
    (["algorithm.reference_store=FOLDER"], "algorithm.reference_store=FOLDER: is a directory; name a file"),
    (["dry_run=true"], "scripts/launch.py only"),
    (["cluster=slurm"], "cluster.kind=slurm has an effect with scripts/launch.py only"),
    (["cluster.kind=slurm"], "To start here, leave out cluster.kind=slurm"),
    (["cluster=interactive"], "cluster.kind=interactive has an effect with scripts/launch.py only"),
]
LAUNCH = [
    (["trainer.num_nodes=2"], "this machine only"),
    (["cluster=slurm"], "no `sbatch` here"),
    (["cluster=interactive"], "this is no allocation"),
    ([*SLURM, "cluster.time=14400"], "in quotes"),
]
FILL = [
    (["run.dir=/proc/x"], "run.dir=/proc/x: nothing can be written in /proc ("),
    (["algorithm.reference_store=/proc/x"], "algorithm.reference_store=/proc/x: nothing can be written in /proc ("),
    (["algorithm=gpg"], "only cached reference rewards are stored"),
    (["--shard", "1"], "go together"),
    (["--shard", "0", "--shards", "2", THERE], f"{THERE}: nothing can be written in /proc ("),
    (["--merge", THERE], f"{THERE}: nothing can be written in /proc ("),
    (["model.path=FOLDER/gone"], "no such directory"),
    (["data.train=FOLDER/gone.jsonl"], "data.train: "),
    (["precision=bf16"], "needs a GPU"),
    (["cluster=slurm"], "cluster.kind=slurm has an effect with scripts/launch.py only"),
]
SERVE = [
    (["rollout.server.prot=1"], "did you mean 'rollout.server.port'"),
    (["model.path=FOLDER/gone"], "no such directory"),
    (["precision=bf16"], "needs a GPU"),
    ([*REMOTE, "rollout.server.tensor_parallel_size=3"], "rollout.server.tensor_parallel_size=3 does not divide"),
    ([*REMOTE, "rollout.server.engine=trtllm"], "tensorrt_llm"),
    (["cluster=slurm_servers"], "cluster.kind=slurm has an effect with scripts/launch.py only"),
]
EVALUATE = [
    (["samples=0"], "must be at least 1"),
    (["model.path="], "model.path: the path is empty"),
    (["+sources.mine=''", "benchmarks=[mine]"], "has no source"),
    (["run.dir=/proc/x"], "run.dir=/proc/x: nothing can be written in /proc ("),
    (["run.dir=FOLDER/purged"], "FOLDER/purged is a link to FOLDER/scratch, which is not there"),
    (["rewards=[{name: acuracy}]"], "did you mean 'accuracy'"),
    (["rewards=[{name: exact, weigth: 1}]"], "has no parameter 'weigth'"),
    (["prompt_template=openrs"], "known are open_rs"),
    (["model.path=FOLDER/gone"], "no such directory"),
    (["+sources.mine=FOLDER/gone.jsonl", "benchmarks=[mine]"], "sources.mine: "),
    (["system_prompt=Think."], "which has no place for it"),
    (["precision=bf16"], "needs a GPU"),
]
CONVERT = [
    (["hf-to-megatron", "FOLDER/model", "--out", "FOLDER/no_data"], "exists already"),
    (["hf-to-megatron", "FOLDER/model", "--out", "FOLDER/purged"], "exists already"),
    (["hf-to-megatron", "FOLDER/model", "--out", "FOLDER/purged/out"], "FOLDER/purged is a link to FOLDER/scratch"),
    (["hf-to-megatron", "FOLDER/model", "--out", "FOLDER/out", "--tensor-model-parallel-size", "3"], "does not divide"),
    (["megatron-to-hf", "FOLDER/model", "--out", "FOLDER/out"], "is a Hugging Face model already"),
    (["verify", "FOLDER/gone"], "no such directory"),
    (["inspect", "FOLDER/no_data"], "neither a Hugging Face model"),
]
CASES = [
    *(("train", [], *case) for case in [*TRAINING, *FILES, *CPU]),
    *(("launch", SLURM, *case) for case in [*TRAINING[:-1], *FILES]),
    *(("launch", [], *case) for case in LAUNCH),
    *(("doctor", [], *case) for case in TRAINING),
    *(("plan", ["model=Qwen2.5-7B"], *case) for case in TRAINING),
    ("plan", ["model=Qwen2.5-7B"], ["rollout.engine=plain"], "a plan knows engines that keep keys and values"),
    ("plan", ["model=Qwen2.5-7B"], ["rollout.engine=remote", "rollout.refit=ipc"], "those of TensorRT-LLM only"),
    *(("fill", [], *case) for case in [*TRAINING, *FILL]),
    *(("serve", [], *case) for case in SERVE),
]


@pytest.mark.parametrize(("name", "more", "words", "said"), CASES, ids=lambda value: str(value)[:60])
def test_settings_that_cannot_work_are_refused_before_torch_is_imported(
    given, blocker, capsys, monkeypatch, name, more, words, said
):
    monkeypatch.setenv("PATH", "/nowhere")
    typed = [word for word in given.words if name != "plan" or not word.startswith("model.path")]
    before = sorted(given.folder.rglob("*"))
    assert command(name)([*typed, *more, *map(given.fill_in, words)]) == 2
    assert_refused(given, blocker, capsys.readouterr(), said, before)


@pytest.mark.parametrize(("words", "said"), EVALUATE)
def test_an_evaluation_that_cannot_work_is_refused_before_torch_is_imported(given, blocker, capsys, words, said):
    small = ["max_prompt_tokens=16", "sampling.max_new_tokens=16", f"run.dir={given.folder}/run"]
    data = [f"+sources.own={given.folder}/train.jsonl", "benchmarks=[own]"]
    before = sorted(given.folder.rglob("*"))
    assert command("evaluate")([given.words[0], *small, *data, *map(given.fill_in, words)]) == 2
    assert_refused(given, blocker, capsys.readouterr(), said, before)


@pytest.mark.parametrize(("words", "said"), CONVERT)
def test_a_conversion_that_cannot_work_is_refused_before_torch_is_imported(given, blocker, capsys, words, said):
    before = sorted(given.folder.rglob("*"))
    assert command("convert")([given.fill_in(word) for word in words]) == 2
    assert_refused(given, blocker, capsys.readouterr(), said, before)


@pytest.mark.parametrize(
    ("model", "said"), [("codes", "weights of dtype F8_E4M3"), ("two_sets", "two sets of weights")]
)
@pytest.mark.parametrize("name", ["train", "launch", "fill", "serve", "evaluate", "hf-to-megatron", "verify"])
def test_weights_that_do_not_fit_are_refused_by_every_command_alike(
    given, blocker, capsys, monkeypatch, name, model, said
):
    monkeypatch.setenv("PATH", "/nowhere")
    path = f"{given.folder}/{model}"
    before = sorted(given.folder.rglob("*"))
    if name in ("hf-to-megatron", "verify"):
        name, words = "convert", [name, path, *(["--out", f"{given.folder}/out"] if name == "hf-to-megatron" else [])]
    else:
        words = [f"model.path={path}"] if name == "evaluate" else [*given.words, f"model.path={path}"]
    assert command(name)(words) == 2
    assert_refused(given, blocker, capsys.readouterr(), said, before)


def assert_refused(given: Given, blocker: Blocker, told, said: str, before: list[Path]) -> None:
    assert given.fill_in(said) in told.err
    assert told.err.count("\n") == 1, told.err
    assert told.out == ""
    assert not blocker.asked
    assert sorted(given.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.share_prompts=true", "precision=fp32"], "kernels for shared prompts take bf16 only"),
        (["precision=fp8_blockwise"], "multiples of 128"),
        (["precision=fp32", "rollout.offload_learner=true"], "precision=bf16"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_before_torch_is_imported(given, blocker, capsys, monkeypatch, words, said):
    monkeypatch.setattr(Machine, "present", lambda: H200)
    assert command("train")([*given.words, *words]) == 2
    assert said in capsys.readouterr().err
    assert not blocker.asked


def test_a_family_that_needs_local_layers_is_refused_on_a_gpu(given, blocker, capsys, monkeypatch):
    monkeypatch.setattr(Machine, "present", lambda: H200)
    model = save_empty_model(given.folder / "gemma3", architectures=["Gemma3ForCausalLM"], head_dim=16)
    assert command("train")([*given.words, f"model.path={model}"]) == 2
    assert "which run without a GPU only" in capsys.readouterr().err
    assert not blocker.asked


def test_memory_that_a_gpu_can_not_share_is_refused_before_torch_is_imported(given, blocker, capsys, monkeypatch):
    monkeypatch.setattr(Machine, "present", lambda: H200)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert command("train")([*given.words, "rollout.engine=remote", "rollout.refit=ipc"]) == 2
    assert "Take expandable_segments out of PYTORCH_CUDA_ALLOC_CONF" in capsys.readouterr().err
    assert not blocker.asked


def test_a_package_that_was_left_out_is_named_with_the_way_to_get_it(given, blocker, capsys, monkeypatch):
    from nemo_aapo.prepare import packages

    for missing, said in (("megatron.bridge", "--no-deps megatron-bridge"), ("math_verify", "nemo_aapo[cpu]")):
        monkeypatch.setattr(packages, "is_installed", lambda package, missing=missing: package.module != missing)
        assert command("train")(given.words) == 2
        assert said in capsys.readouterr().err


def test_a_mixture_of_both_lines_of_megatron_is_refused(given, blocker, capsys, monkeypatch, tmp_path):
    other = next(line for line in lines.LINES.values() if line is not lines.installed())
    distribution(tmp_path, "transformers", other.pins["transformers"])
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("train", "fill"):
        assert command(name)(given.words) == 2
        assert f"transformers {other.pins['transformers']} is of the line {other.name}" in capsys.readouterr().err
    assert not blocker.asked


def test_what_can_work_is_prepared_without_torch_and_wholly_resolved(given, blocker):
    from nemo_aapo.prepare import prepare

    job = prepare(given.words)
    assert not blocker.asked
    assert job.config.precision.name == job.tree["precision"]["name"] == "fp32"
    assert job.config.model.share_prompts is True
    assert job.sizes.world_size == 1
    assert [(reward.name, weight) for reward, weight in job.rewards] == [("accuracy", 1.0)]


def test_what_is_only_read_need_not_be_writable(given):
    from nemo_aapo.launch.world import of_starter
    from nemo_aapo.prepare import prepare, prepare_fill

    assert prepare([*given.words, THERE])
    assert prepare_fill([*given.words, THERE], of_starter)
    assert prepare_fill([*given.words, "run.dir=/proc/x"], of_starter, "status")
    store = f"algorithm.reference_store={given.folder}/store.sqlite"
    assert prepare_fill([*given.words, "run.dir=/proc/x", store], of_starter, "merge")


def test_what_a_launcher_has_frozen_is_started_by_hand_unless_a_job_is_typed_besides(given):
    from nemo_aapo.launch.world import of_launcher, of_starter
    from nemo_aapo.prepare import prepare, prepare_fill
    from nemo_aapo.prepare.server import prepare_server

    tree = prepare([*given.words, "cluster=slurm", "cluster.account=lab"], of_launcher).tree
    (given.folder / f"{FROZEN}.yaml").write_text(yaml.safe_dump(dict(tree)))
    frozen = ["--config-path", str(given.folder), "--config-name", FROZEN]
    for start in (prepare, prepare_server, lambda words: prepare_fill(words, of_starter)):
        assert start(frozen).config.cluster.kind == "slurm"
        with pytest.raises(ConfigError, match=r"To start here, leave out cluster\.account=other"):
            start([*frozen, "cluster.account=other"])


def test_a_launcher_leaves_to_the_ranks_what_only_their_machine_knows(given):
    from nemo_aapo.launch.world import of_launcher
    from nemo_aapo.prepare import prepare, prepare_tree

    job = prepare([*given.words, "cluster=slurm", "trainer.num_nodes=2"], of_launcher)
    assert (job.machine, job.config.precision.name, job.sizes.world_size) == (None, "auto", 2)
    one = {**job.tree, "trainer": {**job.tree["trainer"], "num_nodes": 1}}
    assert prepare_tree(one).config.precision.name == "fp32"


def test_what_the_ranks_are_given_does_not_depend_on_their_home(given, monkeypatch):
    from nemo_aapo.prepare import prepare
    from nemo_aapo.run.identity import identity_of

    monkeypatch.setenv("HOME", str(given.folder))
    job = prepare([*given.words, 'model.path="~/model"', 'run.dir="~/run"'])
    assert job.config.model.path == job.tree["model"]["path"] == f"{given.folder}/model"
    assert job.config.run.dir == job.tree["run"]["dir"] == job.tree["exp_manager"]["explicit_log_dir"]
    assert "~" not in str(job.tree)
    (given.folder / "r.py").write_text("def score(prompt, completion, answer, **info):\n    return 1.0\n")
    own = ['rewards=[{name: custom, function: "~/r.py:score"}]', "validation.reward=score"]
    jobs = [
        prepare([*given.words, *own, f'data.train=[{{path: "{home}/train.jsonl"}}]']) for home in ("~", given.folder)
    ]
    assert "~" not in str(jobs[0].tree)
    assert identity_of(jobs[0].config) == identity_of(jobs[1].config)  # by what the file holds
