"""The batch scripts: as they were read and approved (slurm/scripts/), clean, and quoted right whatever the names.

After a change that is meant: ``WRITE_SCRIPTS=1 pytest tests/launch/test_script.py``, then read the difference.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo.config import Config, parse, without_secrets
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.slurm.paths import RunPaths
from nemo_aapo.launch.slurm.script import (
    Site,
    directives,
    environment_file,
    render_fill,
    render_merge,
    render_training,
    split_roles,
    supervisor_words,
    training_roles,
)

APPROVED = Path(__file__).parent / "slurm" / "scripts"
SITE = Site("/venv/bin/python", Path("/checkout"), Path("/work"))
CLUSTER = ("cluster=slurm", "cluster.account=lab", "cluster.partition=gpu", "trainer.num_nodes=2", "trainer.devices=8")
CONTAINER = (
    "cluster.container.image=/images/nemo_aapo.sqsh",
    "cluster.container.mounts=[/models:/models:ro]",
    "cluster.container.workdir=/opt/nemo_aapo",
)
SPREAD = ("cluster.servers.nodes_per_server=2",)
NO_NAMES = ("cluster.account=null", "cluster.partition=null")
SCRIPTS = {
    "single": (),
    "het": (
        "cluster.servers.nodes=2",
        "cluster.servers.per_node=2",
        "cluster.servers.gpus_per_node=4",
        "cluster.cpus_per_task=6",
        "rollout.server.tensor_parallel_size=2",
        "rollout.remote.servers=4",
        "rollout.remote.min_servers=3",
    ),
    "container": (*CONTAINER, "cluster.cpus_per_task=12", 'cluster.srun_args=["--cpu-bind=none"]'),
    "chain": ("cluster.chain=3", '+cluster.sbatch_args={mail-type: END, constraint: "h100|h200"}', "cluster.qos=long"),
    "setup": ("cluster.setup=[module load cuda]", "+cluster.env.WANDB_API_KEY=secret", "cluster.exclusive=true"),
    "fill": ("cluster.fill_jobs=16",),
    "merge": (),
}


def config_of(*words: str) -> Config:
    given = ("run.name=math7b", "run.dir=/runs/math7b", "model.path=/models/m", "data.train=/t", "data.validation=/v")
    return parse(compose(read_command_line([*given, *CLUSTER, *words])))


def script_of(name: str) -> str:
    config = config_of(*SCRIPTS[name])
    if name == "fill":
        return render_fill(config, SITE)
    return render_merge(config, SITE, after="41") if name == "merge" else render_training(config, SITE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_the_approved_one_and_shellcheck_finds_nothing(name):
    path, script = APPROVED / f"{name}.sbatch", script_of(name)
    if os.environ.get("WRITE_SCRIPTS"):
        path.write_text(script)
    assert script == path.read_text()
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck); the script is the approved one")
    found = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, timeout=30)
    assert found.returncode == 0, found.stdout


def test_the_script_of_an_installed_package_names_no_checkout():
    installed = dataclasses.replace(SITE, checkout=None)
    script = render_training(config_of(), installed)
    assert "PYTHONPATH" not in script
    assert "/checkout" not in script
    assert Site.here().checkout == Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_shell_scripts_of_the_slurm_tests_are_clean_too():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    found = subprocess.run(
        ["shellcheck", APPROVED.parent / "start_slurm.sh"], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stdout


NAMES = ("a b", "it's", 'say "hi"', "$(touch pwned)", "back\\slash", "100%", "ünï;&|*")


def test_sbatch_takes_every_value_as_it_is_whatever_the_names():
    for value in (*NAMES, "\\\\two", "end\\", "a #b", "  ", "\\'\"\\ "):
        (line,) = directives({"comment": value})
        assert as_sbatch_reads(line.removeprefix("#SBATCH --comment=")) == value


def as_sbatch_reads(text: str) -> str:
    """The first word, by Slurm's own rules (``_get_argument`` in src/sbatch/opt.c): unlike in bash, a backslash is an
    escape everywhere, and a hash that nothing protects begins a comment."""
    word, quote, letters = "", "", iter(text)
    for letter in letters:
        if letter == "\\":
            word += next(letters)
        elif quote:
            quote, word = ("", word) if letter == quote else (quote, word + letter)
        elif letter in "\"'":
            quote = letter
        elif letter.isspace() or letter == "#":
            break
        else:
            word += letter
    return word


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bash_hands_on_every_word_as_it_is_whatever_the_names(name, tmp_path):
    directory = name.replace("\\", "")  # a backslash in run.dir is refused
    recorder = tmp_path / name
    recorder.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.environ['PYTHONPATH'], *sys.argv[1:]]))\n"
    )
    recorder.chmod(0o755)
    site = Site(str(recorder), Path("/check out"), tmp_path)
    tree = compose(read_command_line(["model.path=/m", "data.train=/t", "data.validation=/v", *CLUSTER]))
    tree["run"] |= {"name": name, "dir": f"runs/{directory}"}
    tree["cluster"] |= {
        "env": {"TOKEN": f"{name}\n2", "PYTHONPATH": f"/{name}"},
        "servers": {**tree["cluster"]["servers"], "nodes": 1},
    }
    config = parse(tree)
    paths = RunPaths(tmp_path / "runs" / directory)
    paths.make()
    paths.environment.write_text(environment_file(config.cluster.env))
    script = render_training(config, site)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    words = supervisor_words(config, site, training_roles(config, site), ["job", "--max-requeues=20"])
    path, *handed_on = json.loads(done.stdout)
    assert path == f"/check out:/{name}"
    assert handed_on == words[1:]
    options, commands = split_roles(handed_on)
    assert options[-1] == str(paths.run_dir)
    assert list(commands) == ["train", "servers"]
    shown = subprocess.run(
        ["bash", "-c", f"source {paths.environment.name}; printf %s \"$TOKEN\""],
        cwd=paths.folder, capture_output=True, text=True, timeout=10,
    )  # fmt: skip
    assert shown.stdout == f"{name}\n2"
    assert not (tmp_path / "pwned").exists()


def test_jobs_of_different_runs_never_share_a_name_and_roles_of_one_job_neither():
    def names(*words):
        lines = render_training(config_of(*words), SITE).splitlines()
        return [line.partition("--job-name=")[2] for line in lines if "--job-name" in line]

    assert names() == names("trainer.max_steps=7")
    assert names() != names("run.dir=/runs/other")
    assert len(set(names("cluster.servers.nodes=1"))) == 2


@pytest.mark.parametrize(
    ("words", "key", "reason"),
    [
        (["cluster.time=14400"], "cluster.time=14400", "in quotes"),
        (['cluster.time="30:00"'], "cluster.time=30:00", "HH:MM:SS"),
        (["cluster.signal_s=14311"], "cluster.signal_s=14311", "before the job is up"),
        (['run.name="a\nb"'], "run.name", "line breaks"),
        (["run.dir='/runs/back\\slash'"], "run.dir=/runs/back\\slash", "Slurm takes the backslashes out"),
        (["cluster.container.workdir=/w"], "cluster.container", "without cluster.container.image"),
        ([*CONTAINER, "run.dir=results/x"], "run.dir=results/x", "absolute"),
        (["+cluster.sbatch_args.nodes=3"], "cluster.sbatch_args.nodes", "trainer.num_nodes"),
        (["+cluster.sbatch_args.MEM=0"], "cluster.sbatch_args", "without dashes"),
        (["+cluster.env.a-b=0"], "cluster.env", "no name of a variable"),
        (["cluster.env={A: 1}"], "cluster.env", "+cluster.env.NAME=VALUE"),
        (["cluster.launcher=nemo_run", "cluster.servers.nodes=1"], "cluster.launcher=nemo_run", "without servers"),
        ([*SPREAD, "cluster.servers.nodes=3"], "cluster.servers.nodes_per_server=2", "divisible"),
        ([*SPREAD, "cluster.servers.nodes=2"], "cluster.servers.nodes_per_server=2: the 1 ranks", "divisible"),
        ([*SPREAD, "cluster.servers.nodes=2", "cluster.servers.per_node=2"], "cluster.servers.per_node=2", "must be 1"),
        (
            ["cluster.servers.nodes=2", "cluster.servers.gpus_per_node=2", "rollout.server.pipeline_parallel_size=4"],
            "cluster.servers.gpus_per_node=2",
            "need 4 GPUs on a node",
        ),
    ],
)
def test_what_slurm_would_misread_is_refused_with_key_and_reason(words, key, reason):
    with pytest.raises(ConfigError) as refusal:
        config_of(*words)
    assert key in str(refusal.value)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("word", "kinds"),
    [
        ("launcher=nemo_run", ("local", "interactive")),
        ("account=lab", ("local", "interactive")),
        ("partition=gpu", ("local", "interactive")),
        ("qos=long", ("local", "interactive")),
        ('time="01:00:00"', ("local", "interactive")),
        ("exclusive=true", ("local", "interactive")),
        ("dependency=null", ("local", "interactive")),
        ("chain=3", ("local", "interactive")),
        ("max_requeues=1", ("local", "interactive")),
        ("fill_jobs=3", ("local", "interactive")),
        ("setup=[module load cuda]", ("local", "interactive")),
        ("sbatch_args={mem: 0}", ("local", "interactive")),
        ("servers.nodes=1", ("local", "interactive")),
        ("cpus_per_task=2", ("local",)),
        ("python=/bin/python", ("local",)),
        ("srun_args=[-l]", ("local",)),
        ("env={A: 1}", ("local",)),
        ("container.image=/i.sqsh", ("local",)),
        ("container.mounts=[/a:/b]", ("local",)),
        ("container.workdir=/w", ("local",)),
        ("servers.per_node=2", ("local", "interactive", "slurm")),
        ("servers.nodes_per_server=2", ("local", "interactive", "slurm")),
    ],
)
def test_a_setting_without_effect_where_the_ranks_are_started_is_refused(word, kinds):
    key, _, value = word.partition("=")
    new = "+" if key in ("env", "sbatch_args") else ""
    for kind in kinds:
        with pytest.raises(ConfigError, match=rf"cluster\.{key}\S* has no effect"):
            config_of(f"cluster={kind}", *NO_NAMES, f"{new}cluster.{key}={value}")


@pytest.mark.parametrize("kind", ["local", "interactive"])
def test_the_patience_with_servers_after_a_stop_is_a_setting_without_slurm_too(kind):
    words = (f"cluster={kind}", *NO_NAMES, "rollout.engine=remote", "cluster.signal_s=14400")
    assert config_of(*words).cluster.signal_s == 14400  # as long as cluster.time, which says nothing of such a run


def test_what_a_sites_own_files_say_of_jobs_hinders_no_run_without_them(tmp_path):
    """And what is typed is refused there too."""
    shutil.copytree(Path(__file__).parents[2] / "conf", tmp_path / "conf")
    page = tmp_path / "conf" / "train_aapo.yaml"
    of_jobs = {"launcher": "nemo_run", "account": "lab", "time": '"1-00:00:00"', "python": "/venv/bin/python"}
    text = page.read_text()
    for key, value in of_jobs.items():
        text, changed = re.subn(rf"^  {key}: +\S+", f"  {key}: {value}", text, flags=re.MULTILINE)
        assert changed == 1
    page.write_text(text.replace("    per_node: 1 ", "    per_node: 4 "))
    given = ["--config-path", str(tmp_path / "conf"), "model.path=/m", "data.train=/t", "data.validation=/v"]
    for kind in ("local", "interactive", "slurm"):
        words = [*given, f"cluster={kind}"]
        assert parse(compose(read_command_line(words))).cluster.servers.per_node == 4
        with pytest.raises(ConfigError, match=r"cluster\.servers\.per_node has no effect"):
            compose(read_command_line([*words, "cluster.servers={per_node: 2}"]))
        if kind != "slurm":
            with pytest.raises(ConfigError, match=r"cluster\.account has no effect"):
                compose(read_command_line([*words, "cluster.account=other"]))


def test_a_bare_time_in_a_file_is_refused(tmp_path):
    """YAML 1.1 has numbers to the base of 60: this is where they come from."""
    shutil.copytree(Path(__file__).parents[2] / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "cluster" / "mine.yaml").write_text("kind: slurm\ntime: 4:00:00\n")
    words = ["--config-path", str(tmp_path / "conf"), "cluster=mine", "model.path=/m", "data.train=/t"]
    with pytest.raises(ConfigError, match=r"cluster\.time=14400: write HH:MM:SS"):
        parse(compose(read_command_line([*words, "data.validation=/v"])))
    assert config_of("cluster.time=4:00:00").cluster.time == "4:00:00"  # Hydra reads words in its own way


def test_secrets_are_in_no_script_and_in_no_tree_that_is_written():
    words = ("+cluster.env.WANDB_API_KEY=s3cret",)
    tree = compose(read_command_line(["model.path=/m", "data.train=/t", "data.validation=/v", *CLUSTER, *words]))
    assert "s3cret" in str(tree)
    assert "s3cret" not in str(without_secrets(tree))
    assert without_secrets(tree)["cluster"]["env"] == {"WANDB_API_KEY": "<hidden>"}
    assert "s3cret" not in render_training(parse(tree), SITE)
