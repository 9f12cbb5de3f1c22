"""GPUs by their datasheets, as data."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aapo.errors import ConfigError

RUNTIME_BYTES = 2 * 2**30
"""CUDA context, communicators, cuBLAS and cuDNN workspaces of one process: an assumption, not a measurement."""


@dataclass(frozen=True)
class Rates:
    """The most that a GPU does in a second."""

    memory: float
    """Bytes that its memory moves."""
    fp32: float
    """FLOPs in float32, outside the tensor cores: torch multiplies float32 there unless TF32 is allowed."""
    bf16: float
    """FLOPs in bfloat16, dense."""
    fp8: float
    """FLOPs in FP8, dense."""


@dataclass(frozen=True)
class Hardware:
    """One GPU of a node of eight, and its links."""

    name: str
    capability: tuple[int, int]
    """CUDA compute capability."""
    memory_bytes: float
    peak: Rates
    nvlink: float
    """bytes/s in one direction, to GPUs of the same node"""
    network: float
    """bytes/s in one direction, to other nodes, with one adapter to each GPU"""
    pcie: float
    """bytes/s in one direction, to the host"""
    source: str
    measured: Rates | None = None
    """Measured rates; None: not measured. Of the H200, fp8 and fp32 are scaled by the ratio that bf16 reached."""


H100_PEAK = Rates(memory=3.35e12, fp32=67e12, bf16=989e12, fp8=1979e12)
KNOWN = {
    "h100": Hardware(
        name="NVIDIA H100 SXM",
        capability=(9, 0),
        memory_bytes=80e9,
        peak=H100_PEAK,
        nvlink=450e9,
        network=50e9,
        pcie=64e9,
        source="NVIDIA H100 Tensor Core GPU datasheet (tensor rates there are with sparsity: halved); "
        "DGX H100 datasheet: one 400 Gb/s adapter to each GPU",
    ),
    "h200": Hardware(
        name="NVIDIA H200 SXM",
        capability=(9, 0),
        memory_bytes=141e9,
        peak=Rates(memory=4.8e12, fp32=H100_PEAK.fp32, bf16=H100_PEAK.bf16, fp8=H100_PEAK.fp8),
        nvlink=450e9,
        network=50e9,
        pcie=64e9,
        source="NVIDIA H200 Tensor Core GPU datasheet (tensor rates there are with sparsity: halved)",
        measured=Rates(memory=4.3e12, fp32=67e12 * 790 / 989, bf16=790e12, fp8=1979e12 * 790 / 989),
    ),
    "b200": Hardware(
        name="NVIDIA B200 SXM",
        capability=(10, 0),
        memory_bytes=180e9,
        peak=Rates(memory=8.0e12, fp32=80e12, bf16=2250e12, fp8=4500e12),
        nvlink=900e9,
        network=50e9,
        pcie=64e9,
        source="NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W; DGX B200 datasheet: 1,440 GB and 64 TB/s for "
        "eight GPUs, one 400 Gb/s adapter to each",
    ),
}


def find(name: str) -> Hardware:
    """The GPU of this name.

    Raises:
        ConfigError: it is not known; names those that are.
    """
    if name.lower() not in KNOWN:
        raise ConfigError(f"hardware={name}: known are {', '.join(KNOWN)}")
    return KNOWN[name.lower()]
