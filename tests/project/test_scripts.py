"""The shell scripts make the environment once, repair it, and start what the user asked for.

They run on a copy of the checkout, with a Python that only writes down what it is asked to do.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_aapo import lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120
"""For a machine that is busy with other things."""


@pytest.mark.parametrize("script", [*sorted(p.name for p in (ROOT / "scripts").glob("*.sh")), "../.ci/run"])
def test_shell_scripts_parse_and_stop_at_the_first_error(script):
    path = ROOT / "scripts" / script
    subprocess.run(["bash", "-n", path], check=True, timeout=10)
    assert "\nset -euo pipefail\n" in path.read_text()


FAKE_PYTHON = """#!/usr/bin/env bash
call=$(printf ' %q' "$@")
echo "${PYTHONDONTWRITEBYTECODE:+without bytecode: }${call:1}" >>"$CALLS"
[[ -n ${CHECKS_BY:-} && $1 == -c ]] && cd "$CHECKED_IN" && exec "$CHECKS_BY" "$@"
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
        for name in ("python3.11", "python3.12", "python3", "python"):
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, self.root / name)
        (self.root / "nemo_aapo").mkdir()
        for name in ("nemo_aapo/lines.py", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)

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
        output = process.communicate(timeout=WAIT_S)[0]
        return process.returncode, output, self.calls()[before:]

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def wait_for(self, call: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not any(call in line for line in self.calls()):
            assert time.monotonic() < deadline, f"no call {call!r} within {WAIT_S} s: {self.calls()}"
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


@pytest.fixture
def tested(checkout) -> Checkout:
    """A checkout with its environment, and stand-ins of what test.sh runs in it."""
    checkout.run("environment.sh")
    for name in ("ruff", "mypy", "python"):
        path = checkout.root / ".venv" / "bin" / name
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)
    return checkout


def test_peers_that_cannot_be_installed_are_named_and_do_not_stop_the_tests(tested):
    status, output, _ = tested.run("test.sh", REFUSE="requirements/peers.txt")
    assert status == 0, output
    assert "pip could not install requirements/peers.txt" in output
    assert "going on without .venv-peers" in output
    assert not (tested.root / ".venv-peers").exists()
    assert tested.run("peers.sh", REFUSE="requirements/peers.txt")[0] != 0


def test_every_test_runs_once_in_one_of_the_lanes_and_numbers_and_ranks_once_more(tested):
    status, output, calls = tested.run("test.sh")
    assert status == 0, output
    chosen = [call.partition("--durations-min=1 ")[2].replace("\\", "") for call in calls if "-m pytest" in call]
    rest = "-m not slurm and not unit and not peers "
    [main] = [text for text in chosen if text.startswith(rest) and "--ignore" in text]
    left_out = re.findall(r"--ignore=(\S+)", main)
    others = ["-m slurm", "-m peers", "-m unit", "-m exact and not slow", rest + " ".join(left_out[:-1]), left_out[-1]]
    [both_lines] = [text for text in chosen if text.startswith("-m ranks and not once ")]
    assert sorted(chosen) == sorted([main, *others, both_lines])
    assert all((ROOT / path).exists() for path in (*left_out, *both_lines.split()[5:]))


@pytest.mark.parametrize(
    "refused", ["-m unit", "-m slurm", "-m peers", "tests/training", "exact and", "tests/lines", "-m ranks"]
)
def test_what_fails_in_any_lane_fails_the_tests(tested, refused):
    assert tested.run("test.sh", REFUSE=refused)[0] != 0


def test_a_second_line_that_cannot_be_made_fails_the_tests_unless_there_is_no_python_for_it(tested):
    status, output, calls = tested.run("test.sh", REFUSE="-m venv .venv-newest")
    assert status != 0
    assert any("-m slurm" in call for call in calls)
    for name in ("python3.12", "python3", "python"):
        (tested.bin / name).write_text("#!/usr/bin/env bash\nexit 127\n")
    shutil.rmtree(tested.root / ".venv-newest", ignore_errors=True)
    status, output, calls = tested.run("test.sh")
    assert status == 0, output
    assert "going on without .venv-newest" in output
    assert not any("tests/lines" in call and "--ignore" not in call for call in calls)


def test_ctrl_c_ends_all_lanes(tested):
    process = tested.start("test.sh", SLOW="pytest", SECONDS_SLOW="60")
    tested.wait_for("-m unit")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=10)
    with contextlib.suppress(ProcessLookupError):  # of a group that is gone
        for _ in range(500):
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        pytest.fail("processes of test.sh go on")
    assert not any("exact and" in call for call in tested.calls())


def test_the_quick_tests_install_nothing_else_and_style_and_tests_can_each_fail(tested):
    status, output, calls = tested.run("test.sh", "--quick", "-x")
    assert status == 0, output
    [pytest_call] = [call for call in calls if "-m pytest" in call]
    assert pytest_call.endswith("-m unit --numprocesses 2 -x")
    assert {*calls} - {pytest_call} == {"check .", "format --check ."}
    for refused in ("check .", "-m pytest"):
        assert tested.run("test.sh", "--quick", REFUSE=refused)[0] != 0


def test_a_wrong_type_fails_the_tests_and_is_shown(tested):
    (tested.root / ".venv" / "bin" / "mypy").write_text("#!/usr/bin/env bash\necho 'error: a type'; exit 1\n")
    status, output, _ = tested.run("test.sh", "-x")
    assert status == 1
    assert "error: a type" in output
