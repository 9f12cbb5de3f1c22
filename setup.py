"""Packaging of nemo_aapo. The exact versions that were seen working are in requirements/; here are the ranges."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """``__version__`` of the package, read without importing it."""
    text = (ROOT / "nemo_aapo" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


def readme() -> str:
    """The project page; empty in a checkout or image without it."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


CONF = {
    ".".join(["nemo_aapo", *folder.relative_to(ROOT).parts]): str(folder.relative_to(ROOT))
    for folder in (ROOT / "conf", *sorted(path for path in (ROOT / "conf").rglob("*") if path.is_dir()))
}
"""Package -> folder of pages. An editable install finds them where they are, beside the package."""
LINES = runpy.run_path(str(ROOT / "nemo_aapo" / "lines.py"))["LINES"]
"""The two lines of Megatron; each is an extra, and without one pip takes the newest that this Python has."""
NEMO = ["nemo-toolkit[core]>=2.7.3,<2.8", "lightning>=2.4,<2.5", "tensorboard"]
SERVERS = ["aiohttp>=3.10,<4", "prometheus_client>=0.20"]
DATA = ["datasets>=4.4,<6", "pyarrow>=21"]
MATH = ["math-verify[antlr4_9_3]>=0.9,<0.10", "latex2sympy2_extended>=1.11,<2", "sympy>=1.13,<2"]

setup(
    name="nemo_aapo",
    version=version(),
    description="AAPO (arXiv 2505.14264), reinforcement learning for reasoning, on Megatron-core policies",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    # The pages of conf/ go into the wheel as nemo_aapo/conf; scripts/ are entries to nemo_aapo.cli and stay behind.
    packages=[*find_packages(include=["nemo_aapo", "nemo_aapo.*"]), *CONF],
    package_dir=CONF,
    package_data={
        "nemo_aapo": ["py.typed"],
        "nemo_aapo.report": ["assets/*"],
        **{package: ["*.yaml"] for package in CONF},
    },
    entry_points={"console_scripts": ["nemo-aapo = nemo_aapo.cli.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,!=0.17.*,!=0.18.*,<0.20",  # mcore/replaced.py lists what is replaced in it
        "transformers>=4.57,<=5.12.1; python_version >= '3.12'",
        "transformers>=4.57,<5; python_version < '3.12'",  # the line trtllm: megatron-core 0.19 asks for Python 3.12
        "tokenizers",
        "safetensors>=0.4.3",
        "jinja2",  # transformers renders chat templates with it without declaring it
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "pyyaml",
        "numpy>=1.26",
        "psutil",  # mcore's checkpoint writer imports it without declaring it
        "tqdm",
        "typing_extensions",  # Python 3.10's typing lacks Unpack and NotRequired
    ],
    extras_require={
        **{name: list(line.ranges) for name, line in LINES.items()},
        # All that training imports but Megatron-Bridge: what it declares can't be had without CUDA's toolchain, and an
        # extra can't say --no-deps. docs/guide/install.md has the two commands.
        "cpu": [*NEMO, *SERVERS, *DATA, *MATH, "einops", "rich"],  # the last two are imported by the bridge
        "gpu": [
            *NEMO,
            *SERVERS,
            *DATA,
            *MATH,
            "megatron-bridge>=0.3.1,!=0.4.*,!=0.5.*,<0.7",
            "transformer-engine[pytorch]>=2.10,<2.12",
            "torch>=2.8",  # float32 products of bfloat16 inputs: torch.mm(..., out_dtype=...)
            "triton>=3.4",  # comes with torch's CUDA builds
        ],
        "reasoning_gym": ["reasoning-gym==0.1.25", "six", "matplotlib"],  # what it imports without declaring it
        "wandb": ["wandb>=0.25"],
        "mlflow": ["mlflow-skinny>=3.1"],
        "nemo_run": ["nemo-run==0.11.1", "leptonai==0.26.6"],  # with a later leptonai nemo-run does not import
        "dev": ["mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "types-PyYAML"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
