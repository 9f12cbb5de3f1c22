"""From the command line to the run: cheap refusals first, one configuration on all ranks, NeMo's loggers in place."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from nemo_aapo.cli import main as entry
from nemo_aapo.cli.main import run_command
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import ConfigError
from nemo_aapo.prepare import settings_of
from nemo_aapo.run.metrics_file import read_metrics
from tests.scripts import exit_code_and_heavy_imports
from tests.tiny_models import save_empty_input

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "nemo", "megatron", "transformers", "lightning")


def run_script(name: str, *words: str, environment: dict[str, str] | None = None, timeout: float = 60):
    """A script as a person starts it, from a directory that is not the repository."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def given(tmp_path) -> list[str]:
    """The settings without a default."""
    return save_empty_input(tmp_path)


def run(words: list[str], task=lambda job: 1, description: str = "") -> int:
    """A command that needs no more than what the words say by themselves."""
    return run_command(settings_of, task, description=description, words=words)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "launch.py"])
def test_a_mistyped_key_is_refused_in_one_line_before_anything_heavy_is_imported(script):
    done = run_script(script, "traner.devices=4")
    assert done.returncode == 2
    assert done.stderr == "unknown setting 'traner.devices' (did you mean 'trainer.devices'?)\n"
    assert exit_code_and_heavy_imports(script.removesuffix(".py"), ["traner.devices=4"]) == "2 []"


@pytest.mark.slow
def test_nothing_heavy_is_imported_before_every_early_check_has_passed(given):
    """As far as a run directory that holds another run, the last of them."""
    code = f"""
        import json, runpy, sys
        sys.argv = ["launch.py", *{given!r}, "seed=2", "trainer.devices=2"]
        try:
            runpy.run_path({str(ROOT / "scripts" / "launch.py")!r}, run_name="__main__")
        except SystemExit as end:
            print(json.dumps([end.code, [name for name in {HEAVY!r} if name in sys.modules]]))
    """
    run_dir = Path(given[3].removeprefix("run.dir="))
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps({"id": "1", "digest": "?", "settings": {"seed": 1}, "starts": []}))
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == [2, []], done.stderr
    assert "seed: 1 there, 2 now" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.devices=2"], "without dashes"),
        (["--config-name", "nope"], "nope.yaml"),
        (["seed=[1"], "seed=[1: can't be read"),
        (["prompts_per_step=${nope}"], "Interpolation key 'nope' not found"),
        (["model.optim.lr.x=3"], "model.optim.lr.x"),
        (["rollout.top_k=5"], "Keep top_p=1"),
        (["learning_rate=1e-6"], "did you mean 'model.optim.lr'"),
        (["num_generations=4"], "did you mean 'group_size'"),
        (["~experiment"], "a choice can't be taken away. Leave it out"),
        (["precision=null"], "a choice can't be taken away. Leave it out, or choose one of auto, bf16"),
        (["seed=1,2"], "scripts/launch.py sweep seed=1,2"),
        (["seed=range(1,3)"], "scripts/launch.py sweep seed=range(1,3)"),
        (["algorithm=aapo,gpg"], "scripts/launch.py sweep algorithm=aapo,gpg"),
        (["--multirun", "seed=1,2"], "scripts/launch.py sweep"),
        (["run.name=a=b"], """quoted twice: 'run.name="a=b"'"""),
        (
            ["model.path=~/m"],
            """Text with ~, spaces, brackets, commas, = or letters beyond ASCII is quoted twice: 'mod""",
        ),
        (["data.train=[{path: ~/x}]"], """quoted twice: 'data.train=[{NAME: "TEXT"}]'"""),
        (["trainer=3"], "trainer is a section, whose settings are given one by one: trainer.NAME=VALUE"),
        (["+experiment=quickstart"], "a choice is made without the +: experiment=quickstart"),
        (["data.prompt_template={question} (x)"], """quoted twice: 'data.prompt_template="{question} (x)"'"""),
    ],
)
def test_whatever_is_wrong_with_the_words_is_one_message_and_exit_code_2(words, said, given, capsys, monkeypatch):
    def never(job):
        raise AssertionError("the task must not start")

    monkeypatch.setattr(entry, "RANK_0_SPEAKS_S", 0.0)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run([*given, *words], never) == 2
        err = capsys.readouterr().err
        assert (said in err and err.count("\n") == 1) if rank == "0" else err == ""


def test_ctrl_c_while_settings_are_read_ends_it_without_a_traceback(given, monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    assert run_command(interrupted, lambda job: 0, description="", words=given) == entry.INTERRUPTED


def test_a_refusal_that_only_this_rank_finds_is_said_by_it(given, capsys, monkeypatch):
    def task(job):
        raise ConfigError("no GPU here")

    monkeypatch.setenv("RANK", "3")
    assert run(given, task) == 2
    assert capsys.readouterr().err == "rank 3: no GPU here\n"


def test_help_shows_the_main_settings_with_the_pages_own_comments_and_where_the_page_is(capsys):
    assert run(["--help"], description="Does it.") == 0
    said = capsys.readouterr().out
    assert "Does it." in said
    assert str(ROOT / "conf" / "train_aapo.yaml") in said
    assert "  algorithm=aapo|aapo_paper|" in said
    line = next(line for line in said.splitlines() if line.startswith("  group_size=8 "))
    assert line.endswith("G: completions of each prompt")


def test_cfg_job_prints_the_composed_page(given, capsys):
    assert run([*given, "seed=5", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 5


def test_another_page_from_the_working_directory(tmp_path, monkeypatch, given):
    (tmp_path / "pages").mkdir()
    tree = compose(read_command_line([*given, "seed=77"]))
    (tmp_path / "pages" / "mine.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    command = read_command_line(["--config-path", "pages", "--config-name", "mine", "group_size=4"])
    assert compose(command) == {**tree, "group_size": 4}


@pytest.mark.slow
def test_an_installed_package_brings_its_pages_along(tmp_path):
    """setup.py puts conf/ inside the package, where a checkout has it beside."""
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nemo_aapo", tmp_path / "nemo_aapo", ignore=no_caches)
    show = [
        sys.executable,
        "-c",
        "from nemo_aapo.config.command_line import config_directory; print(config_directory())",
    ]
    done = subprocess.run(show, cwd=tmp_path, capture_output=True, text=True)
    assert "name its folder by --config-path DIR" in done.stderr
    shutil.copytree(ROOT / "conf", tmp_path / "nemo_aapo" / "conf")
    done = subprocess.run(show, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "nemo_aapo" / "conf"), done.stderr


def test_what_changes_each_time_it_is_composed_is_refused_before_ranks_disagree(given, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.name=run_\$\{now:.*ranks would disagree"):
        compose(read_command_line([*given, "run.name=run_${now:%H-%M-%S}"]))
    tree = compose(read_command_line(given))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**tree, "rewards": [{"name": "${now:%H}"}]}))
    with pytest.raises(ConfigError, match=r"rewards\.0\.name="):
        compose(read_command_line(["--config-path", str(tmp_path), "--config-name", "mine"]))


STUB = """
import json, os, sys, types

def train(job):
    from nemo_aapo.config import parse
    from nemo_aapo.run.experiment import open_experiment

    config, tree = job.config, job.tree
    assert parse(tree) == config
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    print(json.dumps({"nemo": "nemo" in sys.modules, "cwd": os.listdir("."), "tree": tree}))
    for start, end in ((0, 6), (3, 5)):  # the second part resumes from a checkpoint of step 3
        with open_experiment(config, tree, rank=rank, world_size=world_size) as run:
            run.resume_at(start or -1)
            for step in range(start + 1, end + 1):
                run.log_step(step, {"loss": float(step + 10 * start)})
            run.finish({"steps": end}) if start else None
    return 0

stub = types.ModuleType("nemo_aapo.jobs.train")
stub.train = train
sys.modules["nemo_aapo.jobs.train"] = stub
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_launched_run_has_one_configuration_on_all_ranks_and_leaves_what_it_should(given, tmp_path):
    """NeMo is imported for its loggers, on rank 0, and for nothing else: launch.py, train.py, exp_manager."""
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject" / "sitecustomize.py").write_text(STUB)
    (tmp_path / "cwd").mkdir()
    words = ["trainer.devices=2", "algorithm=gpg", "max_tokens_per_microbatch=${multiply:4,2048}", "seed=7"]
    wandb = importlib.util.find_spec("wandb") is not None  # an extra, which .venv does without
    words.append(f"exp_manager.create_wandb_logger={str(wandb).lower()}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "launch.py"), *given, *words],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path / 'inject'}:{ROOT}",
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        },
        cwd=tmp_path / "cwd",
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "run"
    said = [json.loads(line) for line in (done.stdout, (run_dir / "logs" / "rank_1.log").read_text().splitlines()[-1])]
    assert [rank["nemo"] for rank in said] == [False, False]  # when training begins
    assert said[0]["tree"] == said[1]["tree"] == yaml.safe_load((run_dir / "config.yaml").read_text())
    assert said[0]["tree"]["max_tokens_per_microbatch"] == 8192
    assert said[0]["cwd"] == []  # Hydra made no folder
    assert list((tmp_path / "cwd").iterdir()) == []
    assert all(line.startswith("wandb:") for line in done.stderr.splitlines()), done.stderr

    loss = {1: 1.0, 2: 2.0, 3: 3.0, 4: 34.0, 5: 35.0}
    assert read_metrics(run_dir / "metrics.jsonl") == [{"step": step, "loss": value} for step, value in loss.items()]
    assert tensorboard_scalars(run_dir / "tensorboard", "loss") == loss
    assert json.loads((run_dir / "finished").read_text()) == {"steps": 5}
    known = {"config.yaml", "run.json", "metrics.jsonl", "tensorboard", "logs", "finished", ".lock"}
    assert {path.name for path in run_dir.iterdir()} == known | ({"wandb"} if wandb else set())
    assert (run_dir / "logs" / "nemo" / "cmd-args.log").exists()
    run_id = json.loads((run_dir / "run.json").read_text())["id"]  # which a resumed run gives to W&B again
    assert [path.name[-8:] for path in (run_dir / "wandb").glob("offline-run-*")] == ([run_id] if wandb else [])


def tensorboard_scalars(directory: Path, tag: str) -> dict[int, float]:
    """As TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}
