"""What a Hugging Face directory, a checkpoint or a run holds, said without loading it: headers and manifests only."""

from __future__ import annotations

from math import prod
from pathlib import Path

from nemo_aapo.checkpoint import manifest
from nemo_aapo.checkpoint.manifest import Manifest
from nemo_aapo.config import ModelShape
from nemo_aapo.conversion.source import ModelSource, lora_of, run_settings, shown_setting
from nemo_aapo.errors import ConfigError, RunError, first_line
from nemo_aapo.models import directory as model_dir
from nemo_aapo.models import writer as hf_directory
from nemo_aapo.run.metrics_file import number
from nemo_aapo.run.state import read_state
from nemo_aapo.utils.safetensors import tensor_headers


def describe(source: ModelSource) -> list[str]:
    """What a model source holds, as lines for people.

    Raises:
        ConfigError, RunError: a file is damaged; the message names it.
    """
    if source.kind == "hf":
        return _hf(source.path)
    if source.kind == "run":
        return _run(source)
    return _checkpoint(source.path, source)


def _hf(path: Path) -> list[str]:
    lines = [f"Hugging Face model   {path}", *_architecture(path), *_weights(path), *_companions(path)]
    try:
        model_dir.read_model_dir(str(path))
    except ConfigError as error:
        return [*lines, f"REFUSED              {error}"]
    return lines


def _architecture(path: Path) -> list[str]:
    config = model_dir.read_config_json(path)
    architecture = model_dir.first_architecture(config)
    is_known = architecture in model_dir.ARCHITECTURES
    lines = [f"architecture         {architecture} ({'trains and converts' if is_known else 'refused'})"]
    if is_known:
        shape = model_dir.shape_of(config)
        tied = "tied" if shape.tied_embeddings else "own"
        lines.append(
            f"shape                {shape.num_layers} layers, hidden {shape.hidden_size}, feed-forward "
            f"{_feed_forward(shape)}, {shape.num_attention_heads} heads ({shape.num_query_groups} key-value), "
            f"vocabulary {shape.vocab_size}, {tied} output layer, {shape.max_position_embeddings} positions"
        )
    return lines


def _feed_forward(shape: ModelShape) -> str:
    if (experts := shape.experts) is None:
        return str(shape.ffn_hidden_size)
    return f"{experts.per_token} of {experts.count} experts of {experts.ffn_hidden_size}"


def _weights(path: Path) -> list[str]:
    headers = tensor_headers(path)
    parameters = sum(prod(header.shape) for header in headers.values())
    dtypes = {header.dtype for header in headers.values()}
    files = {header.file for header in headers.values()}
    size = sum((path / name).stat().st_size for name in files)
    return [
        f"weights              {parameters:,} in {len(headers)} tensors of {', '.join(sorted(dtypes))}; "
        f"{len(files)} file(s), {_bytes(size)}"
    ]


def _companions(path: Path) -> list[str]:
    names = [str(file.relative_to(path)) for file in hf_directory.companions(path)]
    return [f"beside them          {', '.join(names)}"]


def _checkpoint(path: Path, source: ModelSource) -> list[str]:
    content = manifest.read(path)
    what = "Megatron model       " if source.kind == "megatron" else "Megatron checkpoint  "
    layout = content.layout
    names = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "data_parallel")
    sizes = {name.partition("_")[0]: layout.get(f"{name}_size", 1) for name in names}
    expert = layout.get("expert_model_parallel_size", 1)
    experts = f", experts over {expert}" if expert > 1 else ""
    lines = [
        f"{what}{path}",
        f"step                 {content.step}",
        f"written by           {layout['world_size']} rank(s), "
        f"{' x '.join(f'{name} {size}' for name, size in sizes.items())}{experts}; any layout loads it",
        f"versions             {', '.join(f'{name} {version}' for name, version in content.versions.items())}",
    ]
    if source.kind == "megatron":
        lines += [f"{key:20} {value}" for key, value in content.trainer_state.items()]
    else:
        lines.append(f"configuration        digest {content.config_digest}")
    return [*lines, f"files                {_files(path, content)}", *_tensors(path), *_base(source)]


def _tensors(path: Path) -> list[str]:
    from nemo_aapo.checkpoint import format as torch_dist

    try:
        header = torch_dist.read_header(path)
    except Exception as error:  # damaged in whatever way: the line before it has the files' names
        return [f"header               can't be read ({type(error).__name__}: {first_line(error)})"]
    lines = []
    for title, tensors in (("model", torch_dist.weights(header)), ("optimizer", torch_dist.optimizer_tensors(header))):
        if tensors:
            count = sum(prod(entry.size) for entry in tensors.values())
            dtypes = {hf_directory.dtype_name(entry.properties.dtype) for entry in tensors.values()}
            lines.append(f"{title:20} {count:,} numbers in {len(tensors)} tensors of {', '.join(sorted(dtypes))}")
    return lines


def _base(source: ModelSource) -> list[str]:
    try:
        return [f"base model           {source.base}", *_architecture(source.base)]
    except ConfigError:
        return [f"base model           {source.named_base or 'unknown'} (not there)"]


def _files(path: Path, content: Manifest) -> str:
    """Sizes are compared with the manifest; checksums would mean reading all of it, as loading does."""
    wrong = []
    for name, record in content.files.items():
        file = path / name
        if not file.exists() or file.stat().st_size != record.bytes:
            wrong.append(name)
    total = sum(record.bytes for record in content.files.values())
    state = f"DAMAGED: {', '.join(wrong)}" if wrong else "all there, with the sizes of the manifest"
    return f"{len(content.files)}, {_bytes(total)}; {state}"


def _run(source: ModelSource) -> list[str]:
    settings = run_settings(source.run)
    try:
        state = read_state(source.path)
    except RunError as error:
        raise ConfigError(str(error)) from None
    lines = [
        f"run                  {source.path}",
        f"state                {'finished' if state.finished else 'not finished'}, {state.step} steps in metrics.jsonl",
    ]
    if settings:
        lines += [
            f"algorithm            {shown_setting(settings, 'algorithm.name')}",
            f"training data        {shown_setting(settings, 'data.train')}",
        ]
        if lora := lora_of(source):
            targets = ", ".join(lora.target_modules)
            lines.append(f"LoRA adapters        rank {lora.rank}, alpha {lora.alpha}, on {targets}")
    if state.validation is not None:
        accuracy = number(state.validation, "validation/accuracy_greedy")
        lines.append(f"last validation      step {state.validation['step']}: accuracy {accuracy:.3f} greedy")
    exported = source.path / "hf_model"
    lines.append(f"exported model       {exported if exported.is_dir() else 'none'}")
    try:
        candidates = source.candidates()
    except ConfigError:
        return [*lines, "checkpoints          none", *_base(source)]
    lines.append(f"checkpoints          {', '.join(path.name for path in reversed(candidates))}")
    return [*lines, "", *_checkpoint(candidates[0], source)]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
