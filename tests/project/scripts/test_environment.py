"""scripts/environment.sh makes an environment once and repairs it.

It runs on a copy of the checkout, with a Python that only writes down what it is asked to do.
"""

from __future__ import annotations

import os
import signal

import pytest

from nemo_aapo import lines
from tests.project.scripts.conftest import FAKE_PYTHON, WAIT_S

pytestmark = pytest.mark.slow


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


def test_what_a_run_imports_is_compiled_once_even_where_python_is_told_to_keep_no_bytecode(checkout):
    calls = checkout.run("environment.sh", PYTHONDONTWRITEBYTECODE="1")[2]
    assert [call for call in calls if not call.startswith("without bytecode: ")] == ["-W ignore -"]


def test_an_environment_whose_making_was_killed_is_made_anew(checkout):
    process = checkout.start("environment.sh", SLOW="-r .venv/pins.txt", SECONDS_SLOW="600")
    checkout.wait_for("-r .venv/pins.txt")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=WAIT_S)
    left_over = checkout.root / ".venv" / "left_over"
    left_over.touch()
    status, output, calls = checkout.run("environment.sh")
    assert (status, made(calls), left_over.exists()) == (0, True, False), output
    assert checkout.run("environment.sh") == (0, "", [])


def test_a_failing_step_fails_the_script_and_is_not_taken_for_done(checkout):
    assert checkout.run("environment.sh", REFUSE="--editable")[0] != 0
    assert made(checkout.run("environment.sh")[2])


def test_each_line_of_megatron_has_an_environment_of_its_own(checkout):
    for line in lines.LINES.values():
        status, output, calls = checkout.run("environment.sh", "--line", line.name)
        assert status == 0, output
        assert f"-m venv {line.environment}" in calls
        assert checkout.run("environment.sh", "--line", line.name) == (0, "", [])
        listed = (checkout.root / line.environment / "pins.txt").read_text().split()
        assert {f"{name}=={version}" for name, version in line.pins.items()} <= set(listed)
        assert len({pin.partition("==")[0] for pin in listed}) == len(listed)
    assert checkout.run("environment.sh") == (0, "", [])


@pytest.mark.parametrize("words", [("--line", "nwest"), ("--line",), ("newest",), ("--line", "newest", "now")])
def test_a_line_that_there_is_not_is_refused(checkout, words):
    status, output, calls = checkout.run("environment.sh", *words)
    assert (status, calls) == (1, [])
    assert "trtllm" in output
    assert "newest" in output


@pytest.mark.parametrize("folder", ["pyenv/versions/3.12.9/bin", "conda/bin"])
def test_a_python_is_found_where_pyenv_and_conda_keep_it(checkout, folder):
    there = checkout.root.parent / folder
    there.mkdir(parents=True)
    (there / "python").write_text(FAKE_PYTHON)
    (there / "python").chmod(0o755)
    for name in ("python3.12", "python3", "python"):  # as pyenv's own stand-ins, and another version
        (checkout.bin / name).write_text("#!/usr/bin/env bash\nexit 127\n")
    home = checkout.root.parent / "home"
    (home / ".conda").mkdir(parents=True)
    (home / ".conda" / "environments.txt").write_text(f"/no/such\n{checkout.root.parent / 'conda'}\n")
    places = {"HOME": str(home), "PYENV_ROOT": str(checkout.root.parent / "pyenv")}
    status, output, calls = checkout.run("environment.sh", "--line", "newest", **places)
    assert status == 0, output
    assert "-m venv .venv-newest" in calls


@pytest.mark.parametrize(
    "name", ["requirements/cpu.txt", "requirements/bridge.txt", "scripts/environment.sh", "setup.py"]
)
def test_a_changed_requirement_makes_the_environment_anew(checkout, name):
    checkout.run("environment.sh")
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert made(checkout.run("environment.sh")[2])


def test_another_python_makes_the_environment_anew(checkout):
    checkout.run("environment.sh")
    file = checkout.root / "nemo_aapo" / "lines.py"
    file.write_text(file.read_text().replace('python=("3.11", ', 'python=("3.12", '))
    assert made(checkout.run("environment.sh")[2])


def test_a_moved_checkout_makes_the_environment_anew(checkout):
    checkout.run("environment.sh")
    checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
    assert made(checkout.run("environment.sh")[2])


def test_two_runs_at_once_make_one_environment(checkout):
    slow = {"SLOW": "-m venv", "SECONDS_SLOW": "0.5"}
    runs = [checkout.start("environment.sh", **slow) for _ in range(2)]
    outputs = [run.communicate(timeout=WAIT_S)[0] for run in runs]
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
    ("line", "refuse", "hint"),
    [
        ("trtllm", "version_info", "needs Python 3.11"),
        ("trtllm", "ensurepip", "apt-get install python3.11-venv"),
        ("newest", "version_info", "needs Python 3.12"),
    ],
)
def test_a_missing_python_or_venv_module_is_named_with_the_way_to_get_it(checkout, line, refuse, hint):
    status, output, calls = checkout.run("environment.sh", "--line", line, REFUSE=refuse)
    assert status == 3
    assert hint in output
    assert not made(calls)


def test_torch_is_a_cpu_build_wherever_there_is_one(checkout):
    without_index = "--no-deps torch=="
    calls = checkout.run("environment.sh", REFUSE=without_index)[2]
    torch = [call for call in calls if "torch==" in call]
    assert len(torch) == 2  # pip's own configuration has none; then PyTorch's index
    assert "whl/cpu" in torch[1]
    assert all(call.endswith("+cpu") for call in torch)


def test_without_a_cpu_build_torch_is_the_default_one_with_its_own_dependencies(checkout):
    status, output, calls = checkout.run("environment.sh", REFUSE="+cpu")
    torch = [call for call in calls if "torch==" in call]
    assert (status, len(torch)) == (0, 3)
    assert "--no-deps" not in torch[2]
    assert "with CUDA (4.7 GB)" in output


def test_the_index_of_torch_can_be_chosen(checkout):
    calls = checkout.run("environment.sh", NEMO_AAPO_TORCH_INDEX="https://mirror.example/simple")[2]
    (torch,) = [call for call in calls if "torch==" in call]
    assert "--index-url https://mirror.example/simple" in torch
    assert "+cpu" not in torch
