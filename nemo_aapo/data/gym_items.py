"""Items of reasoning-gym and their verifiers. An item is named by task, parameters, seed and index, and made from them.

``python -m nemo_aapo.data.gym_items`` makes items for ``gym.GymProcess``. Some tasks go through sets of strings, whose
order changes with Python's hash seed: whoever calls this runs with ``PYTHONHASHSEED=0``, or items differ between ranks.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import sys
from typing import Any

from nemo_aapo.errors import DataError

CHUNK = 4096
"""Number of items that come from one generator; some tasks make all of them at once."""


def make_item(task: str, parameters: dict[str, Any], seed: int, index: int) -> tuple[str, str]:
    """Question and gold answer of an item.

    Returns:
        The question, and as gold answer what names the item (JSON), for ``score``.

    Raises:
        DataError: reasoning-gym is not installed, has no such task, or the task can't have these parameters.
    """
    entry = _dataset(task, _key(parameters), seed, index // CHUNK)[index % CHUNK]
    gold = {"task": task, "parameters": parameters, "seed": seed, "index": index, "answer": entry["answer"]}
    return entry["question"], json.dumps(gold, sort_keys=True)


def score(gold: str, answer: str) -> float:
    """What the task's own verifier says of an answer, from 0 to 1.

    Raises:
        ValueError: the gold answer names no item.
    """
    item = parse_gold(gold)
    dataset = _dataset(item["task"], _key(item["parameters"]), item["seed"], item["index"] // CHUNK)
    return float(dataset.score_answer(answer, dataset[item["index"] % CHUNK]))


def parse_gold(gold: str) -> dict[str, Any]:
    """The item that a gold answer names.

    Raises:
        ValueError: it names none.
    """
    try:
        item = json.loads(gold)
        if item.keys() == {"task", "parameters", "seed", "index", "answer"} and item["index"] >= 0:
            return item
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError("it names no item of reasoning-gym: such prompts come from data.train=reasoning_gym:TASK")


def _key(parameters: dict[str, Any]) -> str:
    return json.dumps(parameters, sort_keys=True)


@functools.lru_cache(maxsize=64)
def _dataset(task: str, parameters: str, seed: int, chunk: int) -> Any:
    from nemo_aapo.seeds import stream_seed

    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"reasoning_gym:{task} needs the package reasoning-gym and what it imports: pip install --no-deps -r "
            f"requirements/reasoning_gym.txt ({error})"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(sorted(DATASETS))}"
        raise DataError(f"reasoning_gym:{task}: there is no such task; {hint}")
    try:
        # A generator gives item i of seed s what it gives item i + 1 of seed s - 1: chunks need seeds far apart.
        own_seed = stream_seed(seed, "reasoning_gym", task, chunk) % 2**31
        return reasoning_gym.create_dataset(
            task, **{**_tuples(json.loads(parameters)), "seed": own_seed, "size": CHUNK}
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"reasoning_gym:{task} can't have the parameters {parameters}: {error}") from error


def _tuples(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with tuples in place of lists, as the tasks' settings want them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}


def main() -> None:
    """Answer requests of JSON, one a line, until the input ends. What a task prints goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            item = (request["task"], request["parameters"], request["seed"])
            reply: dict[str, Any] = {"items": [make_item(*item, index) for index in request["indices"]]}
        except DataError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
