"""The model card (README.md) of a converted model: where it comes from, how it was trained, what it reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import nemo_aapo
from nemo_aapo.algorithms.registry import paper_of
from nemo_aapo.checkpoint.manifest import Manifest
from nemo_aapo.conversion.source import ModelSource, run_settings, shown_setting
from nemo_aapo.run.metrics_file import is_validation, read_metrics

SETTINGS = (
    "algorithm.custom",
    "algorithm.settings",
    "algorithm.loss",
    "algorithm.reference",
    "algorithm.scale_rewards",
    "algorithm.loss_aggregation",
    "algorithm.updates_per_rollout",
    "algorithm.kl_coefficient",
    "prompts_per_step",
    "group_size",
    "rollout.temperature",
    "rollout.max_new_tokens",
    "data.max_prompt_tokens",
    "model.optim.lr",
    "model.lora",
    "precision.name",
    "seed",
)
"""The settings of a run that the card shows, unless they are null."""
METRICS = {
    "validation/accuracy_greedy": "accuracy, greedy",
    "validation/accuracy_sampled": "accuracy, sampled",
    "validation/accuracy_sampled_stderr": "its standard error",
}
"""The metrics of a validation that the card shows, with their titles."""


def model_card(source: ModelSource, content: Manifest, dtype: str, adapter: bool = False) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        source: what was converted.
        content: of the checkpoint that was taken.
        dtype: of the weights, as ``config.json`` names it.
        adapter: the directory holds the LoRA adapters alone.

    Raises:
        ConfigError: the run's configuration or metrics can't be read.
    """
    settings, step = run_settings(source.run), content.step
    base = str(content.trainer_state.get("converted_from")) if source.kind == "megatron" else source.base.name
    name = _get(settings, "run.name") or source.path.name
    algorithm = shown_setting(settings, "algorithm.name")
    front = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo_aapo", *([algorithm] if settings else [])],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    version = f"nemo_aapo {nemo_aapo.__version__}"
    if not settings:
        return "\n".join([*lines, f"`{base}` in {dtype}, converted from Megatron by {version}.", ""])
    lines += [
        f"`{base}`, trained for {step} steps with {paper_of(algorithm)} by {version}; weights in {dtype}.",
        "",
        f"- base model: `{shown_setting(settings, 'model.path')}`",
        f"- training data: `{shown_setting(settings, 'data.train')}`",
        f"- validation data: `{shown_setting(settings, 'data.validation')}`",
        f"- rewards: {_rewards(settings)}",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| `{key}` | {value} |" for key in SETTINGS if (value := _get(settings, key)) is not None),
        "",
        *_figures(source.run, step),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rewards(settings: dict[str, Any]) -> str:
    given = settings.get("rewards")
    entries = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    named = (f"{entry.get('name', 'unknown')} (weight {entry.get('weight', 1.0)})" for entry in entries)
    return ", ".join(named) or "unknown"


def _get(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _figures(run: Path | None, step: int) -> list[str]:
    """The validation of base model and trained model, and the last training step, up to the checkpoint's step."""
    path = None if run is None else run / "metrics.jsonl"
    if path is None or not path.exists():
        return ["No metrics were kept.", ""]
    records = [record for record in read_metrics(path) if record["step"] <= step]
    lines = []
    validations = [record for record in records if is_validation(record)]
    if validations:
        first, last = validations[0], validations[-1]
        lines += [f"| on the validation data | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        lines += [
            f"| {title} | {_number(first.get(key))} | {_number(last[key])} |"
            for key, title in METRICS.items()
            if key in last
        ]
        lines.append("")
    steps = [record for record in records if "loss" in record]
    if steps:
        shown = (f"{key} {_number(steps[-1].get(key))}" for key in ("reward/mean", "completion_length/mean"))
        lines += [f"At step {steps[-1]['step']}, on the training data: {', '.join(shown)}.", ""]
    return lines


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
