"""Compares installed versions with those that were tested together (requirements/)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

from nemo_aapo import lines
from nemo_aapo.doctor.finding import Context, Finding

REQUIREMENTS = Path(__file__).resolve().parents[3] / "requirements"
PYTHON_OF_IMAGES = "3.12"
SHOWN = 6
"""Number of packages that a finding names."""


def versions(context: Context) -> Finding:
    """Report the line of Megatron, what does not belong to it, and what is missing or not as it was tested."""
    line = lines.installed()
    if strangers := [*lines.strangers()]:
        remedy = f"install one line whole: bash scripts/environment.sh --line {' or '.join(lines.LINES)}"
        return Finding("versions", "failure", f"line {line.name} by its megatron-core, but {_some(strangers)}", remedy)
    if not REQUIREMENTS.is_dir():
        text = f"line {line.name}; {REQUIREMENTS} is not there: versions are not compared"
        return Finding("versions", "warning", text, "run it from a checkout to have them compared")
    on_gpu = has_gpu() or installed_version("transformer_engine") is not None
    files = line.image_requirements if on_gpu else line.requirements
    tested_python = PYTHON_OF_IMAGES if on_gpu else line.python[0]
    names = f"line {line.name}, {', '.join(f'requirements/{name}' for name in files)}"
    pins = {name: version for file in files for name, version in read_pins(REQUIREMENTS / file).items()}
    installed = {name: installed_version(name) for name in pins}
    missing = [name for name in pins if installed[name] is None]
    different = [
        f"{name} {installed[name]} (tested: {pins[name]})" for name in pins if installed[name] not in (None, pins[name])
    ]
    python = ".".join(platform.python_version_tuple()[:2])
    if python != tested_python:
        different.append(f"Python {python} (tested: {tested_python})")
    remedy = " && ".join(f"pip install --no-deps -r requirements/{name}" for name in files)
    if missing:
        return Finding("versions", "failure", f"of {names} are missing: {_some(missing)}", remedy)
    if different:
        return Finding("versions", "warning", f"not as in {names}: {_some(different)}", remedy)
    return Finding("versions", "ok", f"Python {python} and {len(pins)} packages are as tested ({names})")


def read_pins(path: Path) -> dict[str, str]:
    """Package -> version in a requirement file, without packages that only tests need."""
    pins: dict[str, str] = {}
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.removeprefix("#").strip()
        elif (match := re.match(r"([\w.-]+)==(\S+)", line)) and not section.startswith("Tests"):
            pins[match[1]] = match[2]
    return pins


def installed_version(package: str) -> str | None:
    """The version without a local part such as ``+cpu``; None: not installed."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_of_torch() -> str | None:
    """The CUDA version that torch is built for, read from its files: the import takes seconds, and may fail."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    match = re.search(r"^cuda\b[^=]*= '([^']+)'", version_file.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def has_gpu() -> bool:
    """Whether torch can compute on a GPU here. Imports torch only if it is built for CUDA."""
    if cuda_of_torch() is None:
        return False
    import torch

    return torch.cuda.is_available()


def _some(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
