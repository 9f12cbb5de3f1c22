"""The requirement files agree with each other, with setup.py, with the code, and with what is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import nemo_aapo
from nemo_aapo import lines
from nemo_aapo.engines.trtllm import contract

ROOT = Path(__file__).resolve().parents[2]

NEVER_IMPORTED = {
    "lightning": {"pytorch-lightning"},
    "nemo-toolkit": {"cuda-bindings", "numexpr", "ruamel-yaml", "scikit-learn", "text-unidecode"},
    "megatron-bridge": {
        "accelerate",
        "causal-conv1d",
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


def read_image() -> dict[str, Version | None]:
    """Canonical package name -> version, or None where only its presence is known, of ``requirements/image.txt``."""
    lines = (ROOT / "requirements" / "image.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next((Version(s.version) for s in r.specifier), None) for r in pins}


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


def test_the_lines_differ_in_nothing_that_does_not_need_it(pins):
    newest = read_pins("newest.txt")
    assert newest.keys() & pins.keys() == lines.NEWEST.pins.keys() | {"huggingface-hub"}


@pytest.mark.parametrize(("older", "newer"), [("0.16rc1", "0.19rc1"), ("0.16.0.dev3", "1"), ("0.15", "0.18.0+cu130")])
def test_any_form_of_a_version_tells_its_line(older, newer):
    assert lines.line_of("megatron-core", older) is lines.TRTLLM
    assert lines.line_of("megatron-core", newer) is lines.NEWEST


def test_no_pin_is_left_over(pins):
    listed = (ROOT / "requirements" / "cpu.txt").read_text().split("# Needed by the above\n")[1].splitlines()
    indirect = {canonicalize_name(line.partition("==")[0]) for line in listed}
    assert indirect <= {canonicalize_name(r.name) for package in pins for r in declared_by(package)}


def test_the_peers_bring_nothing_that_the_environment_has(pins):
    """A second torch or transformers on the PYTHONPATH would be compared in place of ours."""
    for name in ("peers.txt", "reasoning_gym.txt", "wandb.txt", "mlflow.txt"):
        assert not read_pins(name).keys() & pins.keys(), name


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_loggers_resolve_against_the_pins_as_they_are(pins, name):
    """By what the packages declare (``requires_of_loggers.json`` keeps it, as the environment does without them)."""
    declared = json.loads((ROOT / "tests" / "project" / "requires_of_loggers.json").read_text())
    versions = read_pins(f"{name}.txt")
    for package, version in versions.items():
        for requirement in map(Requirement, declared[f"{package}=={version}"]):
            there = {**pins, **versions}.get(canonicalize_name(requirement.name))
            assert there is not None, f"{package} needs {requirement.name}"
            assert requirement.specifier.contains(there, prereleases=True), (package, requirement, there)


def setup_py() -> setuptools.Distribution:
    """What setup.py declares."""
    from distutils.core import run_setup  # setuptools brings it; the standard library has it no longer

    return run_setup(str(ROOT / "setup.py"), stop_after="init")


def declared_in_setup_py(line: lines.Line = lines.TRTLLM) -> list[Requirement]:
    """What pip is told, without the extra of the other line of Megatron."""
    others = lines.LINES.keys() - {line.name}
    extras = [text for name, texts in setup_py().extras_require.items() if name not in others for text in texts]
    declared = [Requirement(text) for text in [*setup_py().install_requires, *extras]]
    here = {"python_version": line.python[0]}
    return [requirement for requirement in declared if requirement.marker is None or requirement.marker.evaluate(here)]


@pytest.mark.parametrize("line", lines.LINES.values(), ids=lines.LINES)
def test_setup_py_accepts_the_pins_of_each_lines_environments(pins, line):
    assert setup_py().get_version() == nemo_aapo.__version__
    for files in (line.requirements, line.image_requirements):
        listed = {name: version for file in files for name, version in read_pins(file).items()}
        for requirement in declared_in_setup_py(line):
            version = listed.get(canonicalize_name(requirement.name))
            assert version is None or requirement.specifier.contains(version), requirement
        if line is lines.TRTLLM and files is line.image_requirements:
            continue  # TensorRT-LLM pins an older transformers
        assert {name: str(listed[name]) for name in line.pins} == line.pins
    assert {canonicalize_name(Requirement(text).name) for text in setup_py().install_requires} <= set(pins)


def test_every_library_that_the_code_imports_is_declared():
    declared = {canonicalize_name(r.name) for r in declared_in_setup_py()} | {
        "tensorrt-llm",
        "mlflow",
    }  # the base image, mlflow-skinny
    distributions = importlib.metadata.packages_distributions()
    beside = {  # runs with these requirements on its path
        ROOT / "benchmarks" / "peers": read_pins("peers.txt").keys(),
        ROOT / "examples" / "real_model": read_pins("gguf.txt").keys(),
    }
    folders = ("nemo_aapo", "scripts", "benchmarks", "examples")
    own = {*folders, "tests"}
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        for module in imported_modules(path) - own - sys.stdlib_module_names:
            names = {canonicalize_name(name) for name in distributions.get(module, [module])}
            if any(path.is_relative_to(folder) and names & pins for folder, pins in beside.items()):
                continue
            assert names & declared, f"{path.relative_to(ROOT)} imports {module}: declare one of {names} in setup.py"


def test_the_extra_for_a_cpu_brings_all_that_was_seen_training_but_the_bridge(pins):
    """What the bridge imports has to come by other ways, as it is installed without its dependencies."""
    found: set[tuple[str, frozenset[str]]] = set()
    for text in [*setup_py().install_requires, *setup_py().extras_require["cpu"]]:
        add_needed(Requirement(text), found)
    tools = {"ruff", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "setuptools", "types-pyyaml"}
    for tool in tools - {"setuptools"}:
        add_needed(Requirement(tool), found)
    assert set(pins) - {name for name, _ in found} == {"megatron-bridge"}


def add_needed(requirement: Requirement, found: set[tuple[str, frozenset[str]]]) -> None:
    """The package and all that it needs, as far as installed packages tell."""
    name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
    if (name, extras) in found:
        return
    found.add((name, extras))
    try:
        needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    except importlib.metadata.PackageNotFoundError:  # which a pip would install, and nothing of ours imports
        return
    for below in needed:
        if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            add_needed(below, found)


def imported_modules(path: Path) -> set[str]:
    """Top-level names of all absolute imports in a file, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


ONLY_ON_GPUS = {"ray", "msgpack"}
"""TensorRT-LLM's workers are started by Ray, which nothing here installs."""


def test_the_gpu_pins_differ_only_in_transformers_and_leave_the_images_torch_alone(pins):
    gpu = read_pins("gpu.txt")
    assert not gpu.keys() & {"torch", "transformer-engine", "tensorrt-llm", "numpy", "protobuf"}
    assert {name for name in gpu.keys() - ONLY_ON_GPUS if gpu[name] != pins[name]} == {"transformers"}


def test_a_package_that_several_environments_have_is_pinned_alike(pins):
    """A server of TensorRT-LLM talks to a learner of the CPU's list or the image's; one Ray is tested and shipped."""
    server, gpu, peers = (read_pins(f"{name}.txt") for name in ("trtllm_server", "gpu", "peers"))
    assert server["ray"] == gpu["ray"] == peers["ray"] == Version(contract.RAY_VERSION)
    for mine, others in ((server, gpu), (server, pins), (peers, gpu)):
        assert {name: mine[name] for name in mine.keys() & others.keys()} == {
            name: others[name] for name in mine.keys() & others.keys()
        }


FOR_PYTHON_312 = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}


def test_the_gpu_pins_resolve_against_each_other_and_the_image(pins):
    """By what the installed packages declare: the versions are the same but for transformers, which the image pins."""
    gpu, image = read_pins("gpu.txt"), read_image()
    versions = {**{name: version for name, version in image.items() if version}, **gpu}
    for package in gpu.keys() - ONLY_ON_GPUS:
        for text in importlib.metadata.requires(package) or []:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if requirement.marker is not None and not requirement.marker.evaluate(FOR_PYTHON_312):
                continue
            if name in NEVER_IMPORTED.get(package, set()):
                continue
            assert name in versions or name in image, f"{package} needs {name}"
            if name in versions:
                assert requirement.specifier.contains(versions[name], prereleases=True), (package, requirement)


def test_the_dockerfile_is_built_on_the_matching_images_without_root_or_missing_files():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert steps[0] == ["ARG", f"LINE={lines.TRTLLM.name}"]
    images = [arguments.split() for step, arguments in steps if step == "FROM"]
    assert [image[2] for image in images[:-1]] == [*lines.LINES]
    assert images[0][0] == f"nvcr.io/nvidia/tensorrt-llm/release:{contract.VERSION}"
    assert images[-1] == ["${LINE}"]
    starts = [number for number, (step, _) in enumerate(steps) if step == "FROM"]
    for line, start, stop in zip(lines.LINES.values(), starts, starts[1:], strict=False):
        installed = " ".join(arguments for step, arguments in steps[start:stop] if step == "RUN")
        assert re.findall(r"-r /tmp/(\S+)", installed) == [*line.image_requirements]
    for words in (arguments.split() for step, arguments in steps if step == "COPY"):
        assert all((ROOT / source).exists() for source in words[:-1])
    for command in (arguments for step, arguments in steps if step == "RUN" and "pip install" in arguments):
        assert all("--no-deps" in part for part in command.split("pip install")[1:]), command
    transformer_engine = SpecifierSet(re.search(r"SpecifierSet\('(.+?)'", text)[1])
    assert transformer_engine in [r.specifier for r in declared_in_setup_py() if r.name == "transformer-engine"]
    assert re.search(r"^ARG TRANSFORMER_ENGINE=(.+)$", text, re.MULTILINE)[1] in transformer_engine
    names = [step for step, _ in steps]
    users = [arguments for step, arguments in steps if step == "USER"]
    assert len(users) == 1
    assert users[0] not in ("root", "0")
    (made,) = [arguments for step, arguments in steps if step == "RUN" and "useradd" in arguments]
    assert {"--non-unique", "--uid", "${UID}"} <= set(made.split())  # a mounted results/ belongs to the host's user
    assert any(step == "ARG" and arguments.startswith("UID=") for step, arguments in steps)
    assert "RUN" not in names[names.index("USER") :]
    assert names.count("ENTRYPOINT") == 1
    (health,) = [arguments for step, arguments in steps if step == "HEALTHCHECK"]
    assert "scripts/doctor.py" in health
    assert "--quick" in health
    assert {".git", ".venv", "results"} <= set((ROOT / ".dockerignore").read_text().split())
