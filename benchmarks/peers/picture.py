"""The ratios as a PNG picture: a group of bars for each comparison, and the targets.

matplotlib lies beside TRL, outside the product's environment, so a process of its own draws:
``python -m benchmarks.peers.picture FILE.png``, ratios as JSON on standard input.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.errors import RunError

TIMEOUT_S = 120
SUBJECTS = {
    ("ours", "trl"): "GRPO's loss,\nlike for like",
    ("ours_stored", "trl"): "AAPO, stored reference\nrewards, beside GRPO",
    ("ours_stored", "trl_twice"): "AAPO, stored reference\nrewards, beside TRL\ngenerating twice",
    ("ours_fresh", "trl_twice"): "AAPO, fresh reference\nrewards, beside TRL\ngenerating twice",
}
"""What is compared, by contestants, in words that need no text beside the picture."""
LENGTHS = {"fixed": "all completions\nequally long", "variable": "lengths vary"}


def draw(ratios: Sequence[Any], path: Path) -> None:
    """Write the picture.

    Args:
        ratios: ``report.Ratio``; at least one.

    Raises:
        RunError: it could not be drawn; says why.
    """
    from benchmarks.peers.compare import environment

    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.picture", str(partial)],
        input=json.dumps([dataclasses.asdict(ratio) for ratio in ratios]),
        env=environment(peers=True),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RunError(f"benchmark.py peers: the picture {path} could not be drawn:\n{done.stderr[-2000:]}")
    partial.replace(path)


def bars(ratios: Sequence[dict[str, Any]]) -> Any:
    """matplotlib's figure of ratios, each as ``dataclasses.asdict`` gives it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    arms = {r["comparison"]["arm"]: r["comparison"] for r in ratios}
    kinds = list(dict.fromkeys((r["model"], r["threads"]) for r in ratios))
    width = 0.8 / len(kinds)
    for k, (model, threads) in enumerate(kinds):
        of_kind = {r["comparison"]["arm"]: r for r in ratios if (r["model"], r["threads"]) == (model, threads)}
        places = [i - 0.4 + (k + 0.5) * width for i, arm in enumerate(arms) if arm in of_kind]
        found = [of_kind[arm] for arm in arms if arm in of_kind]
        spread = [
            [r["cpu"] - min(r["low"], r["cpu"]) for r in found],
            [max(r["high"], r["cpu"]) - r["cpu"] for r in found],
        ]
        label = f"{model}, {threads} thread{'' if threads == 1 else 's'}"
        group = axes.bar(
            places, [r["cpu"] for r in found], 0.92 * width, yerr=spread, label=label, error_kw={"lw": 0.8}
        )
        axes.bar_label(group, fmt="%.2f", label_type="center", rotation=90, fontsize=8, color="white")
    for i, comparison in enumerate(arms.values()):
        if comparison["target"] is not None:
            axes.hlines(comparison["target"], i - 0.45, i + 0.45, colors="black", linestyles="dashed")
    axes.axhline(1.0, color="grey", lw=0.8)
    axes.set_xticks(range(len(arms)), [_label(comparison) for comparison in arms.values()], fontsize=9)
    axes.set_ylabel("CPU seconds of a step: nemo_aapo / TRL")
    axes.set_title("A training step on a CPU beside TRL's GRPOTrainer: 1 is as fast, less is faster")
    axes.text(0.99, 0.85, "thin lines: range of single steps; dashed: target", transform=axes.transAxes, ha="right")
    axes.set_ylim(top=1.15 * max(1.0, axes.get_ylim()[1]))
    axes.legend(ncols=len(kinds), fontsize=8, loc="upper right")
    return figure


def _label(comparison: dict[str, Any]) -> str:
    return f"{SUBJECTS[comparison['ours'], comparison['theirs']]}\n({LENGTHS[comparison['lengths']]})"


if __name__ == "__main__":
    bars(json.load(sys.stdin)).savefig(sys.argv[1], dpi=110)
