"""The pins of the newest line are whole and agree with what each package declares."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_aapo import lines
from tests.lines.test_lines import ROOT, python_of
from tests.project.test_packaging import FOR_PYTHON_312, NEVER_IMPORTED, read_pins

pytestmark = pytest.mark.slow

OF_THE_NEWEST_BRIDGE = {"comet-ml", "diffusers", "fast-hadamard-transform", "flashinfer-cubin", "flashinfer-python"} | {
    "mistral-common",
    "peft",
}
"""What Megatron-Bridge 0.6 declares besides, and nothing that is used here imports."""
HYDRA = "hydra-core"
"""The Bridge wants >= 1.3.4, NeMo <= 1.3.2."""


def test_what_the_newest_lines_packages_declare_is_there_in_versions_that_they_take():
    python_of(lines.NEWEST)
    site = next((ROOT / lines.NEWEST.environment / "lib").glob("python*/site-packages"))
    pins = {name: version for file in lines.NEWEST.requirements for name, version in read_pins(file).items()}
    found = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions(path=[str(site)])}
    for name, version in pins.items():
        assert found[name].version.partition("+")[0] == version.public, name
        left_out = NEVER_IMPORTED.get(name, set()) | (OF_THE_NEWEST_BRIDGE if name == "megatron-bridge" else set())
        if name == "torch":  # a CUDA build, where there is no other, brings what it needs itself
            continue
        for requirement in map(Requirement, found[name].requires or []):
            needed = canonicalize_name(requirement.name)
            if (requirement.marker is None or requirement.marker.evaluate(FOR_PYTHON_312)) and needed not in left_out:
                assert needed in pins, f"{name} needs {needed}"
                there = requirement.specifier.contains(pins[needed], prereleases=True)
                assert there or (name, needed) == ("megatron-bridge", HYDRA), (name, requirement)
