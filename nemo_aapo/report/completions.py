"""The completions that the page shows: of training steps spread over the run, and how each held-out prompt fared.

A completion is hostile input. Here it is only cut to a length; what makes it inert stands in ``inert.py`` and in the
page's script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from safetensors.numpy import load

from nemo_aapo.errors import RunError
from nemo_aapo.report.inert import inert_json
from nemo_aapo.run.names import ROLLOUTS, kept_name, step_name, step_of
from nemo_aapo.types import RIGHT
from nemo_aapo.utils.files import fitting

COMPLETIONS = 2_000
"""At most so many completions of training are on a page."""
TEXT_BYTES = 1_400_000
"""They take at most so many bytes of it, and their tokens so many:"""
TOKEN_BYTES = 500_000
HISTORY_BYTES = 800_000
"""What the history of held-out prompts takes at most."""
HEAD, TAIL = 2_500, 1_500
"""A longer completion is shown by so many characters of its start and its end."""
NAME = (150, 50)
"""The same of names: places in the data, and rewards."""
PROMPTS = 500
"""Held-out prompts whose history is shown."""
TOLD = 100
"""So many of them with the end of their greedy completions."""
VALIDATIONS = 20
"""Of at most so many validations."""
COUNTS_BYTES = 12
"""What the counts of a prompt take of the page for each validation."""
ANSWER_TAIL = 120
"""Characters of the end of a greedy completion in a prompt's history."""

Row = dict[str, Any]


def read_groups(directory: Path, budget: float = 1.0) -> list[dict[str, Any]]:
    """Kept groups of training, by step: all of them, or of steps spread evenly over the run.

    Args:
        budget: this run's part of a page, in (0, 1].

    Returns:
        One dict a group; ``completions`` are lists [text, reward, A, delta, A*, tokens, finish reason, failed, parts,
        figures of tokens or None], in the order that the page's script reads.

    Raises:
        RunError: a file is damaged.
    """
    folder, found = directory / ROLLOUTS, []
    count, size, token_bytes = COMPLETIONS * budget, TEXT_BYTES * budget, TOKEN_BYTES * budget
    for step in spread(_steps_in(folder, "train")):
        if count <= 0:
            break
        path = folder / f"{kept_name(step)}.jsonl"
        rows = _rows(path)
        figures = _figures(path.with_suffix(".safetensors"), rows)
        for group in _by_group(rows, figures):
            taken, tokens = _size(group)
            if tokens > token_bytes:
                for completion in group["completions"]:
                    completion[-1] = None
                tokens = 0
            if taken > size or len(group["completions"]) > count:
                continue
            count, size, token_bytes = count - len(group["completions"]), size - taken, token_bytes - tokens
            found.append(group)
    return sorted(found, key=lambda group: (group["step"], group["index"]))


def read_history(directory: Path, verdict: str, budget: float = 1.0) -> dict[str, Any]:
    """How held-out prompts fared from validation to validation.

    Args:
        verdict: name of the reward that tells right from wrong.
        budget: this run's part of a page, in (0, 1].

    Returns:
        ``steps`` of the validations; the ``count`` of their prompts; and ``prompts``, of each that is shown its text,
        answer and place in the data, and for each validation [completions that were right, completions, the end of the
        first one, which is the greedy one, or None], or None.

    Raises:
        RunError: a file is damaged.
    """
    folder, room = directory / ROLLOUTS, HISTORY_BYTES * budget
    steps = sorted(spread(validated_steps(directory))[:VALIDATIONS])
    prompts: dict[str, dict[str, Any]] = {}
    told: set[str] = set()
    sources: set[str] = set()
    for place, step in enumerate(steps):
        for row in _rows(folder / f"{step_name(step)}.jsonl"):
            sources.add(row["source"])
            if row["source"] not in prompts:
                shown = {"prompt": clipped(row["prompt"], 200, 200), "answer": clipped(row["answer"], 100, 50)}
                prompt = {**shown, "source": row["source"], "at": [None] * len(steps)}
                size = len(inert_json(prompt).encode()) + COUNTS_BYTES * len(steps)
                if len(prompts) >= PROMPTS * budget or size > room:
                    continue
                if len(prompts) < TOLD * budget:
                    told.add(row["source"])
                prompts[row["source"]], room = prompt, room - size
            at = prompts[row["source"]]["at"]
            if at[place] is None:
                end = row["completion"][-ANSWER_TAIL:] if row["source"] in told else None
                size = len(inert_json(end).encode())
                at[place], room = [0, 0, end if size <= room else None], room - min(size, room)
            at[place][0] += _is_right(row, verdict)
            at[place][1] += 1
    return {"steps": steps, "count": len(sources), "prompts": list(prompts.values())}


def validated_steps(directory: Path) -> list[int]:
    """Steps whose validation left its completions, in order."""
    return _steps_in(directory / ROLLOUTS, "step")


def read_verdicts(directory: Path, step: int, verdict: str) -> dict[str, list[bool]]:
    """Place of a held-out prompt in the data -> which of its completions were right; the greedy one comes first.

    Args:
        verdict: see ``read_history``.

    Raises:
        RunError: the file is damaged.
    """
    found: dict[str, list[bool]] = {}
    for row in _rows(directory / ROLLOUTS / f"{step_name(step)}.jsonl"):
        found.setdefault(row["source"], []).append(_is_right(row, verdict))
    return found


def _is_right(row: Row, verdict: str) -> bool:
    value = row["reward_parts"].get(verdict)
    return value is not None and value >= RIGHT


def spread(steps: Sequence[int]) -> list[int]:
    """The same steps in an order of which every beginning is spread over the run; the newest comes first.

    >>> spread([1, 2, 3, 4, 5])
    [5, 1, 3, 4, 2]
    """
    newest_first = sorted(steps, reverse=True)
    stride = 1 << max(0, (len(newest_first) - 1).bit_length() - 1)
    found: dict[int, None] = {}
    while stride:
        found.update(dict.fromkeys(newest_first[::stride]))
        stride //= 2
    return list(found)


def clipped(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """The start and the end of a long text."""
    if len(text) <= head + tail:
        return text
    return f"{text[:head]}\n[... {len(text) - head - tail:,} characters left out ...]\n{text[len(text) - tail :]}"


# ---------------------------------------------------------------- files


def _steps_in(folder: Path, kind: str) -> list[int]:
    found = [step_of(path.stem, kind) for path in folder.glob(f"{kind}_*.jsonl")]
    return sorted(step for step in found if step is not None)


def _rows(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [_row(json.loads(line)) for line in lines if line]
    except FileNotFoundError:  # thinned just now
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise RunError(f"{path}: no rollouts ({type(error).__name__}). Remove it: it is only for people") from None


def _row(row: Any) -> Row:
    """A line as the page takes it: texts are texts, and numbers finite or None. Raises on what no run writes."""
    numbers = ("reward", "group_advantage", "margin", "advantage", "tokens", "policy_version")
    parts = fitting(row["reward_parts"], dict, NoneType) or {}
    return {
        **{name: str(row[name]) for name in ("prompt", "completion", "answer")},
        **{name: _finite(row.get(name)) for name in numbers},
        **{name: fitting(row.get(name), str, NoneType) for name in ("finish_reason", "time")},
        **{name: fitting(row.get(name, 0), int) for name in ("step", "group")},  # of training steps
        "source": clipped(str(row["source"]), *NAME),
        "failed": bool(row.get("failed")),
        "reward_parts": {clipped(name, *NAME): _finite(value) for name, value in parts.items()},
        "reference_rewards": [_finite(value) for value in fitting(row.get("reference_rewards"), list, NoneType) or []],
    }


def _finite(value: Any) -> float | None:
    number: float | None = fitting(value, int, float, NoneType)
    return number if number is not None and math.isfinite(number) else None


def _figures(path: Path, rows: Sequence[Row]) -> list[list[Any] | None]:
    """Of each completion, if its tokens were kept: characters of each token, and in hundredths its engine log-prob and
    entropy, in ten-thousandths the learner's log-prob less the engine's."""
    nothing: list[list[Any] | None] = [None] * len(rows)
    try:
        of = load(path.read_bytes())
        bounds = np.cumsum(of["lengths"])[:-1]
        names = ("text_ends", "logprobs", "learner_logprobs", "entropy")
        parts = zip(*(np.split(of[name], bounds) for name in names), strict=True)
        found = [
            [np.diff(ends, prepend=0), 100 * own, 10_000 * (learner - own), 100 * entropy]
            for ends, own, learner, entropy in parts
        ]
    except FileNotFoundError:  # not kept, or thinned just now
        return nothing
    except Exception as error:  # the library raises its own, and what it reads may be anything
        raise RunError(f"{path}: no tokens ({type(error).__name__}). Remove it: it is only for people") from None
    shown = [len(row["completion"]) <= HEAD + TAIL for row in rows]
    if len(found) != len(rows):
        return nothing
    return [
        [np.rint(np.nan_to_num(column)).astype(int).tolist() for column in columns] if fits else None
        for columns, fits in zip(found, shown, strict=True)
    ]


def _by_group(rows: Sequence[Row], figures: Sequence[list[Any] | None]) -> Iterator[dict[str, Any]]:
    groups: dict[int, dict[str, Any]] = {}
    for row, of_tokens in zip(rows, figures, strict=True):
        group = groups.setdefault(
            row["group"],
            {
                "step": row["step"],
                "index": row["group"],
                "prompt": clipped(row["prompt"]),
                "answer": clipped(row["answer"], 300, 100),
                "source": row["source"],
                "references": row["reference_rewards"],
                "version": row["policy_version"],
                "time": row["time"],
                "completions": [],
            },
        )
        names = ("reward", "group_advantage", "margin", "advantage")
        numbers = [None if row[name] is None else round(row[name], 4) for name in names]
        more = [row["tokens"], row["finish_reason"], row["failed"], row["reward_parts"]]
        group["completions"].append([clipped(row["completion"]), *numbers, *more, of_tokens])
    return iter(groups.values())


def _size(group: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes on the page of its texts and numbers, and of its tokens' figures."""
    tokens = sum(len(json.dumps(c[-1], separators=(",", ":"))) for c in group["completions"] if c[-1] is not None)
    plain = {**group, "completions": [c[:-1] for c in group["completions"]]}
    return len(inert_json(plain).encode()), tokens
