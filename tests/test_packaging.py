"""The requirement files agree with each other and with what is installed; the scripts make, reuse and repair."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]

NEVER_IMPORTED = {
    "lightning": {"pytorch-lightning"},
    "nemo-toolkit": {"cuda-bindings", "numexpr", "ruamel-yaml", "scikit-learn", "text-unidecode"},
    "megatron-bridge": {
        "accelerate",
        "causal-conv1d",
        "datasets",
        "flash-linear-attention",
        "mamba-ssm",
        "mlflow",
        "nvidia-resiliency-ext",
        "open-clip-torch",
        "qwen-vl-utils",
        "six",
        "timm",
        "transformer-engine",
        "wandb",
    },
}
"""Distribution -> declared dependencies that the environment leaves out."""


def read_pins(name: str) -> dict[str, Version]:
    """Canonical package name -> version of a requirement file; every line must be an exact pin, named once."""
    pins: dict[str, Version] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line:
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^*\s]+)", line)
            assert match, f"{name}: {line!r} is not an exact pin"
            package = canonicalize_name(match[1])
            assert package not in pins, f"{name}: {package} is there twice"
            pins[package] = Version(match[2])
    return pins


def declared_by(package: str) -> list[Requirement]:
    """The dependencies that an installed package declares for this machine, extras left out."""
    requirements = [Requirement(text) for text in importlib.metadata.requires(package) or []]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    return {**read_pins("cpu.txt"), **read_pins("bridge.txt")}


def test_installed_versions_are_the_pinned_ones(pins):
    installed = {name: Version(importlib.metadata.version(name)).public for name in pins}
    assert installed == {name: version.public for name, version in pins.items()}


def test_the_pins_are_whole_and_agree_with_what_each_package_declares(pins):
    """--no-deps asks nothing of pip's resolver, so this is where conflicts and gaps show."""
    for package in pins:
        declared = declared_by(package)
        missing = {canonicalize_name(r.name) for r in declared} - set(pins)
        assert missing == NEVER_IMPORTED.get(package, set()), package
        for requirement in declared:
            version = pins.get(canonicalize_name(requirement.name))
            assert version is None or requirement.specifier.contains(version, prereleases=True), (package, requirement)


def test_no_pin_is_left_over(pins):
    listed = (ROOT / "requirements" / "cpu.txt").read_text().split("# Needed by the above\n")[1].splitlines()
    indirect = {canonicalize_name(line.partition("==")[0]) for line in listed}
    assert indirect <= {canonicalize_name(r.name) for package in pins for r in declared_by(package)}


def test_setup_py_accepts_the_pins_of_both_environments(pins):
    from distutils.core import run_setup  # setuptools' own, as pip runs it

    import nemo_aapo

    distribution = run_setup(str(ROOT / "setup.py"), stop_after="init")
    assert distribution.get_version() == nemo_aapo.__version__
    extras = [text for texts in distribution.extras_require.values() for text in texts]
    gpu = read_pins("gpu.txt")
    for requirement in map(Requirement, [*distribution.install_requires, *extras]):
        name = canonicalize_name(requirement.name)
        for version in (pins.get(name), gpu.get(name)):
            assert version is None or requirement.specifier.contains(version), requirement
    core = {canonicalize_name(Requirement(text).name) for text in distribution.install_requires}
    assert core <= set(pins)


def test_the_gpu_pins_differ_only_in_transformers_and_leave_the_images_torch_alone(pins):
    gpu = read_pins("gpu.txt")
    assert not gpu.keys() & {"torch", "transformer-engine", "tensorrt-llm", "numpy", "protobuf"}
    assert {name for name in gpu if gpu[name] != pins[name]} == {"transformers"}


def test_the_dockerfile_is_built_on_the_matching_image_without_root_or_missing_files():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert steps[0] == ["FROM", "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"]
    for words in (arguments.split() for step, arguments in steps if step == "COPY"):
        assert all((ROOT / source).exists() for source in words[:-1])
    for command in (arguments for step, arguments in steps if step == "RUN" and "pip install" in arguments):
        assert all("--no-deps" in part for part in command.split("pip install")[1:]), command
    names = [step for step, _ in steps]
    users = [arguments for step, arguments in steps if step == "USER"]
    assert len(users) == 1
    assert users[0] not in ("root", "0")
    assert "RUN" not in names[names.index("USER") :]
    assert names.count("ENTRYPOINT") == 1
    assert {".git", ".venv", "results"} <= set((ROOT / ".dockerignore").read_text().split())


@pytest.mark.parametrize("script", [*sorted(p.name for p in (ROOT / "scripts").glob("*.sh")), "../.ci/run"])
def test_shell_scripts_parse_and_stop_at_the_first_error(script):
    path = ROOT / "scripts" / script
    subprocess.run(["bash", "-n", path], check=True, timeout=10)
    assert "set -euo pipefail" in path.read_text() or path.name == "run"


# ---- The scripts, on a copy of the checkout and with a Python that only writes down what it is asked ----

FAKE_PYTHON = """#!/usr/bin/env bash
call=$(printf ' %q' "$@")
echo "${call:1}" >>"$CALLS"
[[ -n ${REFUSE:-} && "$*" == *$REFUSE* ]] && exit 1
[[ "$1 $2" == "-m venv" ]] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
[[ -n ${SLOW:-} && "$*" == *$SLOW* ]] && sleep "$SECONDS_SLOW"
exit 0
"""


class Checkout:
    """A copy of scripts and requirements, whose ``python`` records its arguments."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout"
        self.bin = root / "bin"
        self.calls_file = root / "calls"
        self.bin.mkdir()
        for name in ("python3.11", "python3", "python"):
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, self.root / name)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", self.root / "scripts" / script, *arguments],
            cwd=self.bin,
            env={"PATH": path, "CALLS": str(self.calls_file), **environment},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
        """Exit status, output, and the calls of Python that this run made."""
        before = len(self.calls())
        process = self.start(script, *arguments, **environment)
        output = process.communicate(timeout=20)[0]
        return process.returncode, output, self.calls()[before:]

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def wait_for(self, call: str) -> None:
        deadline = time.monotonic() + 10
        while not any(call in line for line in self.calls()):
            assert time.monotonic() < deadline, f"no call {call!r} within 10 s: {self.calls()}"
            time.sleep(0.02)


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def made(calls: list[str]) -> bool:
    return "-m venv .venv" in calls


def test_the_environment_is_made_once_and_a_second_run_does_nothing(checkout):
    status, output, calls = checkout.run("environment.sh")
    assert status == 0, output
    assert made(calls)
    installs = [call for call in calls if " install " in call]
    assert "torch==" in installs[0]
    assert all("--no-deps" in call for call in installs)
    assert checkout.run("environment.sh") == (0, "", [])


def test_an_environment_whose_making_was_killed_is_made_anew(checkout):
    process = checkout.start("environment.sh", SLOW="-r requirements/cpu.txt", SECONDS_SLOW="60")
    checkout.wait_for("-r requirements/cpu.txt")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    left_over = checkout.root / ".venv" / "left_over"
    left_over.touch()
    status, output, calls = checkout.run("environment.sh")
    assert (status, made(calls), left_over.exists()) == (0, True, False), output
    assert checkout.run("environment.sh") == (0, "", [])


def test_a_failing_step_fails_the_script_and_is_not_taken_for_done(checkout):
    assert checkout.run("environment.sh", REFUSE="--editable")[0] != 0
    assert made(checkout.run("environment.sh")[2])


@pytest.mark.parametrize("name", ["requirements/cpu.txt", "requirements/bridge.txt", "scripts/environment.sh"])
def test_a_changed_requirement_makes_the_environment_anew(checkout, name):
    checkout.run("environment.sh")
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert made(checkout.run("environment.sh")[2])


def test_a_moved_checkout_makes_the_environment_anew(checkout):
    checkout.run("environment.sh")
    checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
    assert made(checkout.run("environment.sh")[2])


def test_two_runs_at_once_make_one_environment(checkout):
    slow = {"SLOW": "-m venv", "SECONDS_SLOW": "0.5"}
    runs = [checkout.start("environment.sh", **slow) for _ in range(2)]
    outputs = [run.communicate(timeout=20)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert checkout.calls().count("-m venv .venv") == 1


def test_a_virtual_environment_of_the_users_own_is_left_alone(checkout):
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "precious").touch()
    status, output, calls = checkout.run("environment.sh")
    assert status != 0
    assert "did not make" in output
    assert calls == []
    assert (checkout.root / ".venv" / "precious").exists()


@pytest.mark.parametrize(
    ("refuse", "hint"), [("version_info", "needs Python 3.11"), ("ensurepip", "apt-get install python3.11-venv")]
)
def test_a_missing_python_or_venv_module_is_named_with_the_way_to_get_it(checkout, refuse, hint):
    status, output, calls = checkout.run("environment.sh", REFUSE=refuse)
    assert status != 0
    assert hint in output
    assert not made(calls)


def test_torch_is_never_taken_as_a_cuda_build(checkout):
    without_index = "--disable-pip-version-check torch=="
    calls = checkout.run("environment.sh", REFUSE=without_index)[2]
    torch = [call for call in calls if "torch==" in call]
    assert len(torch) == 2  # pip's own configuration has none; then PyTorch's index
    assert "whl/cpu" in torch[1]
    assert all(call.endswith("+cpu") for call in torch)


def test_the_index_of_torch_can_be_chosen(checkout):
    calls = checkout.run("environment.sh", NEMO_AAPO_TORCH_INDEX="https://mirror.example/simple")[2]
    (torch,) = [call for call in calls if "torch==" in call]
    assert "--index-url https://mirror.example/simple" in torch
    assert "+cpu" not in torch


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
