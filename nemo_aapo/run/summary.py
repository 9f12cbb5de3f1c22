"""The table that is shown at the end of a run, computed from its ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.run.metrics_file import is_validation, number, read_metrics

PHASES = ("rollout", "reward", "reference", "train", "refit")


def summary_table(config: Config) -> str:
    """Accuracy of base and trained model, steps, speed, time per phase, and the paths of the run's files."""
    directory = Path(config.run.dir)
    records = read_metrics(directory / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if is_validation(record)]
    lines = ["", f"{'':24}{'base model':>18}{'trained':>18}"]
    if len(validations) > 1:
        base, trained = validations[0], validations[-1]
        key = "validation/accuracy_greedy"
        lines.append(f"{'accuracy, greedy':24}{number(base, key):>18.3f}{number(trained, key):>18.3f}")
        if "validation/accuracy_sampled" in base and "validation/accuracy_sampled" in trained:
            lines.append(f"{'accuracy, sampled':24}{_with_error(base):>18}{_with_error(trained):>18}")
    if steps:
        tokens = sum(number(record, "tokens_per_second") * number(record, "time/step") for record in steps)
        seconds = sum(number(record, "time/step") for record in steps) or 1.0
        phases = "  ".join(
            f"{name} {fmean(number(record, f'time/{name}') for record in steps):.2f}"
            for name in PHASES
            if any(record.get(f"time/{name}") for record in steps)
        )
        lines += [
            f"{'steps':24}{steps[-1]['step']:>18}",
            f"{'completion tokens/s':24}{tokens / seconds:>18,.0f}",
            f"{'seconds a step':24}{seconds / len(steps):>18.2f}   {phases}",
        ]
    lines += ["", f"run directory     {directory}", f"metrics           {directory / 'metrics.jsonl'}"]
    if (directory / "hf_model").is_dir():
        lines.append(f"trained model     {directory / 'hf_model'}   (Hugging Face format)")
    return "\n".join(lines)


def _with_error(record: dict[str, Any]) -> str:
    error = record.get("validation/accuracy_sampled_stderr")
    return f"{number(record, 'validation/accuracy_sampled'):.3f}" + (f" ± {error:.3f}" if error is not None else "")
