"""Prompts of a reasoning-gym task, made when they are asked for and without end.

They come from a process of their own: its imports take seconds, its hash seed is fixed so that all ranks and a resumed
run get the same items, and a generator that hangs ends at a deadline.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nemo_aapo.config.sources import Source
from nemo_aapo.data.prompts import PromptSet, digest_of, prompt_digest
from nemo_aapo.data.sampler import PromptLayout
from nemo_aapo.errors import DataError
from nemo_aapo.types import Prompt

Render = Callable[[Sequence[str]], tuple[list[str], list[np.ndarray]]]
"""``tokenizer.render_prompts`` with a run's settings: questions -> texts and token ids, int32 [P_i] each."""

_BLOCK = 16
"""Number of prompts made at a time."""
_DEADLINE_S = 600.0
"""Seconds to wait for one block of items."""
_ATTEMPTS = 20
"""Number of items that are tried for a prompt, where they are too long."""
_NEXT_ATTEMPT = 1 << 40
"""Distance from an item that is too long to the one that is tried in its place: no run gets there by itself."""


class GymPrompts:
    """Prompt n of a task, for any n."""

    def __init__(self, source: Source, render: Render, max_prompt_tokens: int, drop_long: bool) -> None:
        """Start the process that makes items, and make the first block.

        Args:
            source: names a task.
            drop_long: take another item in place of one that is over the limit, which is an error otherwise.

        Raises:
            DataError: reasoning-gym is not there or has no such task.
        """
        self.source, self._render = source, render
        self._limit, self._drop_long = max_prompt_tokens, drop_long
        self.dropped_long = 0
        self._process = GymProcess(source.task or "", source.parameters, source.seed)
        self._block = functools.lru_cache(maxsize=256)(self._make_block)
        self._block(0)  # what can't work is refused now

    def __getitem__(self, n: int) -> Prompt:
        return self._block(n // _BLOCK)[n % _BLOCK]

    @property
    def digest(self) -> str:
        """A digest of all that decides which items there are: task, parameters and seed."""
        source = self.source
        return digest_of([source.path, str(source.seed), json.dumps(source.parameters, sort_keys=True)])

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _make_block(self, block: int) -> list[Prompt]:
        made: dict[int, Prompt] = {}
        wanted = {n: n for n in range(block * _BLOCK, (block + 1) * _BLOCK)}  # n -> the item it gets
        for _ in range(_ATTEMPTS):
            items = self._process.items(list(wanted.values()))
            texts, ids = self._render([question for question, _ in items])
            for (n, item), (_, gold), text, tokens in zip(wanted.items(), items, texts, ids, strict=True):
                if len(tokens) <= self._limit:
                    where = f"{self.source.path}:{self.source.seed}:{item}"
                    made[n] = Prompt(prompt_digest(tokens, gold), tokens, text, gold, where)
            wanted = {n: item + _NEXT_ATTEMPT for n, item in wanted.items() if n not in made}
            if not wanted:
                return [made[n] for n in sorted(made)]
            if not self._drop_long:
                break
            self.dropped_long += len(wanted)
        others = f", as have {_ATTEMPTS - 1} in its place" if self._drop_long else ""
        remedy = "" if self._drop_long else ", or set data.on_long_prompt=drop"
        raise DataError(
            f"{self.source.path}: prompt {min(wanted)} has more than {self._limit} tokens{others}; raise "
            f"data.max_prompt_tokens, or make the task's parameters smaller{remedy}"
        )


class GymProcess:
    """Makes a task's items in a process of its own (``gym_items``)."""

    def __init__(self, task: str, parameters: dict[str, Any], seed: int) -> None:
        self._request = {"task": task, "parameters": parameters, "seed": seed}
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "nemo_aapo.data.gym_items"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is the trainer's; it ends with its input
        )
        assert process.stdin is not None  # both are pipes
        assert process.stdout is not None
        self._process, self._requests, self._replies = process, process.stdin, process.stdout

    def items(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        """(question, gold answer) of each item.

        Raises:
            DataError: the task is unknown or can't be had, or the process died or took too long.
        """
        try:
            self._requests.write(json.dumps({**self._request, "indices": list(indices)}).encode() + b"\n")
            self._requests.flush()
            reply = json.loads(self._read_line(time.monotonic() + _DEADLINE_S))
        except (OSError, ValueError) as error:
            self.close()
            raise DataError(
                f"reasoning_gym:{self._request['task']}: the process that makes items failed: {error}"
            ) from None
        if "error" in reply:
            raise DataError(reply["error"])
        return [(question, gold) for question, gold in reply["items"]]

    def _read_line(self, deadline: float) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._replies], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise OSError(f"no answer after {_DEADLINE_S:.0f} s")
            part = os.read(self._replies.fileno(), 1 << 20)
            if not part:
                raise OSError(f"it ended with exit status {self._process.wait(10)}; its log is above")
            line += part
        return line

    def close(self) -> None:
        """End the process; may be called again."""
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._requests, self._replies):
            pipe.close()


class PromptsWithoutEnd(Sequence[Prompt]):
    """The prompts of sources with and without end, numbered as ``PromptLayout`` does."""

    def __init__(self, finite: Sequence[Prompt], endless: dict[int, GymPrompts], sizes: Sequence[int | None]) -> None:
        """Join them.

        Args:
            finite: the prompts of all sources that have an end, one source after the other.
            endless: the sources without end, by their place in ``sizes``.
            sizes: number of prompts of each source; None for one without end.
        """
        self._finite, self._endless, self._layout = finite, endless, PromptLayout(sizes)

    def __len__(self) -> int:
        """Number of the prompts that are there already: those of the sources that have an end."""
        return len(self._finite)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]  # what has no end has no slices
        if 0 <= index < len(self._finite):
            return self._finite[index]
        k, n = self._layout.place(index)
        return self._endless[k][n]


def take_all(prompts: GymPrompts, size: int) -> PromptSet:
    """The first ``size`` prompts of a task. Those that a small task makes again are dropped and counted."""
    unique = {prompt.id: prompt for prompt in (prompts[n] for n in range(size))}
    return PromptSet(
        tuple(unique.values()),
        prompts.source.path,
        bad_lines=0,
        dropped_long=prompts.dropped_long,
        duplicates=size - len(unique),
        digest=digest_of(unique),
        questions=tuple(prompt.text for prompt in unique.values()),
    )
