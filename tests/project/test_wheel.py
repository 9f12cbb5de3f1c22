"""What ``pip install`` brings runs outside the checkout: a wheel, in an environment of its own, in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from nemo_aapo.cli.__main__ import COMMANDS
from tests.training_runs import make_input, settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("nemo_aapo", "conf", "setup.py", "pyproject.toml", "LICENSE", "README.md")
BESIDE = ("benchmarks", "examples", "scripts", "tests", "docs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy, as a build leaves files behind; without network."""
    checkout, made = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in (*SOURCES, *BESIDE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(made), str(checkout))
    (found,) = made.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_dir(wheel, tmp_path_factory) -> Path:
    """Commands of an environment that has the wheel, and the packages of this one without the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", "--no-compile", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    return folder / "bin"


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def run(bin_dir: Path, folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(bin_dir / "nemo-aapo"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_its_pages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"nemo_aapo", f"{wheel.name.split('-py3')[0]}.dist-info"}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name.removeprefix("nemo_aapo/") for name in names if name.endswith(".yaml")} == pages
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nemo_aapo").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "nemo_aapo/py.typed" in names


def test_one_command_has_all_that_the_scripts_do(bin_dir, tmp_path):
    said = run(bin_dir, tmp_path, "--help")
    assert all(f"  {name} " in said for name in COMMANDS)
    entries = [path for path in (ROOT / "scripts").glob("*.py") if "import main\n" in path.read_text()]
    assert {*COMMANDS} == {path.stem.replace("reference_rewards", "fill").replace("_", "-") for path in entries}
    said = run(bin_dir, tmp_path, "train", "--help")
    assert said.startswith("usage: nemo-aapo train ")
    assert str(bin_dir.parent) in said.partition("(all of them: ")[2]


@pytest.mark.timeout(280)
def test_the_installed_package_trains_two_steps_in_an_empty_folder(bin_dir, tmp_path):
    given, folder = tmp_path / "given", tmp_path / "empty"
    given.mkdir()
    folder.mkdir()
    judged = ["rewards=[{name: integer}]", "validation.reward=integer"]
    words = settings(make_input(given), "run", *judged, "trainer.max_steps=2")
    run(bin_dir, folder, "train", *words)
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert (folder / "run" / "hf_model" / "model.safetensors").exists()
    command = run(bin_dir, folder, "launch", *words, "run.dir=other", "trainer.devices=2", "dry_run=true")
    assert f"2 ranks of: {bin_dir / 'python'} -m nemo_aapo.cli train " in command
    script = run(bin_dir, folder, "launch", *words, "run.dir=other", "cluster=slurm", "dry_run=true")
    assert "PYTHONPATH" not in script
    assert str(ROOT) not in script
    assert [path.name for path in folder.iterdir()] == ["run"]
