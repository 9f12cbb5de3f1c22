"""Checks the GPUs, their FP8 formats, and the libraries that compute on them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass

from nemo_aapo import lines
from nemo_aapo.config import PRECISIONS, Config, PrecisionKind
from nemo_aapo.doctor.checks.sizes import on_this_machine
from nemo_aapo.doctor.checks.versions import cuda_of_torch, has_gpu, installed_version
from nemo_aapo.doctor.finding import Context, Finding, Level
from nemo_aapo.engines.trtllm import check as trtllm_check
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.engines.trtllm.package_source import Package

DRIVER_TIMEOUT_S = 20.0
"""nvidia-smi is given up after so long."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as torch sees it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of this machine."""

    devices: tuple[Gpu, ...]
    cuda: str | None
    """The CUDA version that torch is built for; None: a CPU build."""
    listed: int | None
    """GPUs that nvidia-smi lists; None: there is no nvidia-smi, or it fails."""


def find_gpus() -> Gpus:
    """The GPUs of this machine; takes no memory on any of them."""
    devices: tuple[Gpu, ...] = ()
    if has_gpu():
        import torch

        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices = tuple(Gpu(p.name, (p.major, p.minor), p.total_memory) for p in properties)
    return Gpus(devices, cuda_of_torch(), _listed())


def _listed() -> int | None:
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else None


def gpu(context: Context) -> Finding:
    """Check that each rank of this machine has a GPU, or that none needs one."""
    return judge_gpus(find_gpus(), context.config, context.place.local_world_size)


def judge_gpus(gpus: Gpus, config: Config | None, local_ranks: int) -> Finding:
    """Judge these GPUs as ``gpu`` does. Args: local_ranks: ranks of this machine, each of which takes one GPU."""
    count = len(gpus.devices)
    if count == 0 and gpus.listed:
        why = "torch is a CPU build" if gpus.cuda is None else f"torch is built for CUDA {gpus.cuda}"
        remedy = "install torch for the driver's CUDA; look at CUDA_VISIBLE_DEVICES and the container's --gpus"
        return Finding("gpu", "failure", f"nvidia-smi lists {gpus.listed}, torch sees none ({why})", remedy)
    if count == 0:
        if config is not None and (reason := _needs_gpu(config)):
            remedy = "run on a machine with GPUs, or set precision=fp32 and rollout.engine=megatron"
            return Finding("gpu", "failure", f"none here, but {reason} needs one", remedy)
        if gpus.cuda is not None:
            remedy = "none on a login node; elsewhere look at the container's --gpus and the job's --gpus-per-node"
            return Finding("gpu", "warning", f"none here, though torch is built for CUDA {gpus.cuda}", remedy)
        return Finding("gpu", "ok", "none: everything runs on the CPU")
    kinds = {device: gpus.devices.count(device) for device in gpus.devices}
    text = ", ".join(f"{n} x {d.name} ({d.memory_bytes / 2**30:.0f} GiB)" for d, n in kinds.items())
    if local_ranks > count:
        remedy = "start as many ranks as there are GPUs (trainer.devices, --gpus-per-node, CUDA_VISIBLE_DEVICES)"
        return Finding("gpu", "failure", f"{local_ranks} ranks on this machine, but only {text}", remedy)
    if len(kinds) > 1:
        return Finding("gpu", "warning", f"{text}: the slowest sets the pace", "take GPUs of one kind")
    return Finding("gpu", "ok", f"{text}, CUDA {gpus.cuda}")


def _needs_gpu(config: Config) -> str:
    if config.precision.name not in ("fp32", "auto"):
        return f"precision={config.precision.name}"
    return "rollout.engine=trtllm" if config.rollout.engine == "trtllm" else ""


def fp8(context: Context) -> Finding:
    """Check that the GPUs can compute in the chosen FP8 recipe, and list those that they can."""
    return judge_fp8(find_gpus(), context.config)


def judge_fp8(gpus: Gpus, config: Config | None) -> Finding:
    """Judge these GPUs as ``fp8`` does."""
    reasons = {name: fp8_refusal(kind, gpus) for name, kind in PRECISIONS.items() if kind.fp8}
    chosen = config.precision.name if config is not None else ""
    if reason := reasons.get(chosen):
        instead = "bf16" if gpus.devices else "fp32"
        return Finding(
            "fp8", "failure", f"precision={chosen}: {reason}", f"use precision={instead}, or another machine"
        )
    if not gpus.devices:
        return Finding("fp8", "ok", "no GPU, no FP8")
    able = ", ".join(name for name, reason in reasons.items() if not reason) or "no FP8 precision"
    unable = [f"{name} {reason}" for name, reason in reasons.items() if reason]
    return Finding("fp8", "ok", f"{able} can be used" + (f" ({'; '.join(unable)})" if unable else ""))


def fp8_refusal(kind: PrecisionKind, gpus: Gpus) -> str:
    """Why these GPUs can't compute in this precision; empty if they can."""
    if not gpus.devices:
        return "needs a GPU"
    weakest = min(gpus.devices, key=lambda device: device.capability)
    if weakest.capability < kind.min_capability:
        wanted, has = _dotted(kind.min_capability), _dotted(weakest.capability)
        return f"needs compute capability {wanted}, {weakest.name} has {has}"
    newest = max(gpus.devices, key=lambda device: device.capability)
    if kind.below_capability and newest.capability >= kind.below_capability:
        return f"is for compute capability below {_dotted(kind.below_capability)}, {newest.name} has newer formats"
    if _numbers(gpus.cuda or "0") < kind.min_cuda:
        return f"needs CUDA {_dotted(kind.min_cuda)}, torch is built for {gpus.cuda}"
    return ""


def transformer_engine(context: Context) -> Finding:
    """Check the version, and import the package, as a build for another torch fails only then."""
    name, version = "transformer_engine", installed_version("transformer_engine")
    remedy = "use the Dockerfile's image, or pip install transformer_engine[pytorch] built against this torch"
    if version is None:
        return _absent(name, context, remedy)
    bounds = lines.installed().transformer_engine
    low, high = (_dotted(bound) for bound in bounds)
    if not bounds[0] <= _numbers(version)[:2] < bounds[1]:
        return Finding(name, "failure", f"version {version}; megatron-core and -bridge take >= {low}, < {high}", remedy)
    return _imported(name, f"{name}.pytorch", version, remedy)


def apex(context: Context) -> Finding:
    """Check that it imports if it is installed; it is an extra, as TransformerEngine has the same kernels."""
    version, remedy = installed_version("apex"), "build it for this torch with --cpp_ext --cuda_ext, or uninstall it"
    if version is None:
        return Finding("apex", "ok", "not installed; TransformerEngine has all that it would be used for")
    return _imported("apex", "apex.optimizers", version, remedy)


def _absent(name: str, context: Context, remedy: str) -> Finding:
    config = context.config
    if config is not None and config.precision.name not in ("fp32", "auto"):
        return Finding(name, "failure", f"not installed; precision={config.precision.name} needs it", remedy)
    if find_gpus().devices:
        level: Level = "warning" if config is None else "failure"
        return Finding(name, level, "not installed, and every policy on a GPU needs its layers", remedy)
    return Finding(name, "ok", "not installed; on the CPU nothing needs it")


def _imported(name: str, module: str, version: str, remedy: str) -> Finding:
    import torch  # noqa: F401  (loads libraries that the module needs)

    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken build raises
        first = (str(error).splitlines() or [""])[0]
        return Finding(name, "failure", f"{version} is installed but {module} does not import: {first}", remedy)
    return Finding(name, "ok", f"{version} imports")


def tensorrt_llm(context: Context) -> Finding:
    """Compare the installed package with the adapter's contract, without importing it."""
    name, wanted = "tensorrt_llm", _wants_trtllm(context)
    path = trtllm_check.installed()
    if path is None:
        if wanted:
            remedy = "use the Dockerfile's image, or rollout.engine=megatron"
            return Finding(name, "failure", "not installed; the chosen rollout engine is trtllm", remedy)
        return Finding(name, "ok", "not installed; only rollout.engine=trtllm, and servers that host it, need it")
    package = Package(path, trtllm_check.PACKAGE)
    agreed, version = trtllm_check.contract_with(package), trtllm_check.version(package)
    if differences := trtllm_check.compare(package, agreed):
        text = (
            f"version {version} differs from the contract with {agreed.version} in {len(differences)} places, first "
            f"{differences[0]}"
        )
        remedy = f"install {trtllm_check.contract.VERSION}; python -m nemo_aapo.engines.trtllm.check lists all"
        return Finding(name, "failure" if wanted else "warning", text, remedy)
    return Finding(name, "ok", f"version {version} is as the contract with {agreed.version} says")


def ray(context: Context) -> Finding:
    """Check that Ray has what TensorRT-LLM imports of it, without importing it."""
    return judge_ray(trtllm_check.ray_difference(), installed_version("ray"), _wants_trtllm(context))


def judge_ray(difference: str, version: str | None, wanted: bool) -> Finding:
    """Judge as ``ray`` does. Args: difference: what it lacks; wanted: the chosen rollout engine needs it."""
    if difference and (wanted or version is not None):
        text = f"{difference}; AsyncLLM of TensorRT-LLM starts its workers by it"
        remedy = f"pip install --no-deps ray=={trtllm_check.contract.RAY_VERSION} msgpack"
        return Finding("ray", "failure" if wanted else "warning", text, remedy)
    if difference:
        return Finding("ray", "ok", "not installed; only rollout.engine=trtllm needs it")
    return Finding("ray", "ok", f"version {version} has what TensorRT-LLM imports of it")


def allocator(context: Context) -> Finding:
    """Check that torch's allocator can share memory with TensorRT-LLM's workers, or with servers on the same GPUs."""
    rollout = context.config.rollout if context.config is not None else None
    by_handles = rollout is not None and (rollout.engine, rollout.refit) == ("remote", "ipc") and has_gpu()
    return judge_allocator(trtllm_settings.expandable_segments(os.environ), _wants_trtllm(context) or by_handles)


def judge_allocator(variable: str, wanted: bool) -> Finding:
    """Judge as ``allocator`` does. Args: variable: the one that asks for expandable segments, or empty."""
    if not variable:
        return Finding("allocator", "ok", "torch's own segments")
    level: Level = "failure" if wanted else "ok"
    remedy = f"take expandable_segments out of {variable}" if wanted else ""
    return Finding(
        "allocator",
        level,
        f"{variable} asks for expandable segments, unfit for rollout.engine=trtllm and rollout.refit=ipc",
        remedy,
    )


def _wants_trtllm(context: Context) -> bool:
    config = context.config
    return config is not None and config.rollout.engine == "trtllm"  # servers may have an environment of their own


def kernels(context: Context) -> list[Finding]:
    """Report each fused kernel: whether it is in use, and why not."""
    from nemo_aapo.mcore import precision
    from nemo_aapo.mcore.kernels import fused_kernels, libraries

    config, there = on_this_machine(context.run_config), libraries()
    offloaded = config.model.optim.cpu_offload_fraction
    return [
        Finding(
            f"kernel {kernel.name}",
            "warning" if kernel.remedy else "ok",
            f"{'fused' if kernel.in_use else 'not fused'}: {kernel.text}",
            kernel.remedy,
        )
        for kernel in fused_kernels(precision.model_fields(config), there, offloaded=offloaded)
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)
