"""The quickstart and what makes things beside the environment start what the user asked for, and help is only said.

They run on a copy of the checkout, with a Python that only writes down what it is asked to do.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.project.scripts.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", [*sorted(p.name for p in (ROOT / "scripts").glob("*.sh")), "../.ci/run"])
def test_shell_scripts_parse_and_stop_at_the_first_error(script):
    path = ROOT / "scripts" / script
    subprocess.run(["bash", "-n", path], check=True, timeout=10)
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_a_script_that_is_asked_for_help_says_what_it_does_and_makes_nothing(checkout, asked):
    before = sorted(checkout.root.rglob("*"))
    for script in sorted((checkout.root / "scripts").glob("*.sh")):
        status, output, calls = checkout.run(script.name, asked)
        assert (status, calls) == (0, []), f"{script.name}: {output}"
        assert output.strip(), script.name
        said = "".join(f"# {line}".rstrip() + "\n" for line in output.splitlines())
        assert f"{said}set -euo pipefail\n" in script.read_text()
    assert sorted(checkout.root.rglob("*")) == before


def test_quickstart_makes_the_base_model_and_trains_with_the_users_settings(checkout):
    calls = checkout.run("quickstart.sh", "trainer.max_steps=3", "run.name=a b")[2]
    assert calls[-2:] == [
        "scripts/make_base_model.py --out results/quickstart_base",
        r"scripts/train.py experiment=quickstart trainer.max_steps=3 run.name=a\ b",
    ]
    assert checkout.run("quickstart.sh", REFUSE="train.py")[0] != 0


@pytest.mark.parametrize(
    ("finished", "arguments", "moved"),
    [(True, [], True), (False, [], False), (True, ["run.dir=elsewhere"], False), (True, ["--help"], False)],
)
def test_quickstart_moves_only_its_own_finished_run_aside(checkout, finished, arguments, moved):
    run = checkout.root / "results" / "quickstart"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    if finished:
        (run / "finished").touch()
    status, output, _ = checkout.run("quickstart.sh", *arguments)
    assert status == 0, output
    assert (run.with_name("quickstart.previous") / "metrics.jsonl").exists() == moved
    assert (run / "metrics.jsonl").exists() != moved
    assert ("quickstart.previous" in output) == moved


def test_quickstart_leaves_what_is_there_alone_where_its_arguments_are_refused(checkout):
    """The check is the real one, of this checkout."""
    runs = [checkout.root / "results" / name for name in ("quickstart", "quickstart.previous")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "finished").touch()
    before = sorted(checkout.root.glob("results/**"))
    for words in (["trainer.max_step=20"], ["seed=x"], ["dry_run=true"]):
        status, output, calls = checkout.run("quickstart.sh", *words, CHECKS_BY=sys.executable, CHECKED_IN=str(ROOT))
        assert status == 2, output
        assert words[0].partition("=")[0] in output
        assert not [call for call in calls if "train.py" in call]
        assert sorted(checkout.root.glob("results/**")) == before


def test_the_peers_are_installed_beside_the_environment_once(checkout):
    checkout.run("environment.sh")
    status, output, calls = checkout.run("peers.sh")
    assert status == 0, output
    for install, name in zip(calls, ("peers", "reasoning_gym"), strict=True):
        assert "--no-deps" in install
        assert f"--target .venv-peers.new -r requirements/{name}.txt" in install
    assert checkout.run("peers.sh") == (0, "", [])
    with (checkout.root / "requirements" / "peers.txt").open("a") as file:
        file.write("# changed\n")
    assert len(checkout.run("peers.sh")[2]) == 2


def test_the_real_models_packages_are_fetched_once_and_only_its_parts_are_asked_for(checkout):
    checkout.run("environment.sh")
    status, output, calls = checkout.run("real_model.sh", "model", "data")
    assert status == 0, output
    assert "--target .venv-gguf.new -r requirements/gguf.txt" in calls[0]
    assert calls[1:] == ["-m examples.real_model model data"]
    assert checkout.run("real_model.sh")[2] == ["-m examples.real_model"]
