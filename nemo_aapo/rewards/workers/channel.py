"""Messages between ``RewardRunner`` and its workers: JSON, one a line, over a socket, each with a deadline.

JSON and not pickle: a worker runs code that may do anything, so nothing it sends is unpickled.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import numpy as np

from nemo_aapo.types import Completion, Prompt

_READ_BYTES = 1 << 20


class Channel:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()

    def send(self, message: dict[str, Any], timeout_s: float | None = None) -> None:
        """Raises TimeoutError if the other side doesn't read it in time, OSError if it is gone."""
        self._socket.settimeout(timeout_s)
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: none is complete in time.
            EOFError, OSError: the other side is gone.
            ValueError: a line that is no message.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._received:
            # The kernel measures the wait, so a message that came in time counts even if this thread, kept off the
            # CPU by a busy trainer, looks late. Hence at least 1 ms: 0 would mean non-blocking.
            self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise EOFError("the other side closed the channel")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"not a message: {bytes(line[:80])!r}")
        return message

    def close(self) -> None:
        """The other side reads the end of the channel."""
        self._socket.close()


def encode_item(prompt: Prompt, text: str, completion: Completion) -> dict[str, Any]:
    """What a reward is called with, as plain values."""
    return {
        "prompt": [prompt.id, prompt.token_ids.tolist(), prompt.text, prompt.answer, prompt.source],
        "text": text,
        "completion": [
            completion.token_ids.tolist(),
            completion.logprobs.tolist(),
            completion.finish_reason,
            completion.policy_version,
        ],
    }


def decode_item(item: dict[str, Any]) -> tuple[Prompt, str, Completion]:
    """The inverse of ``encode_item``."""
    prompt_id, prompt_ids, prompt_text, answer, source = item["prompt"]
    token_ids, logprobs, finish_reason, policy_version = item["completion"]
    prompt = Prompt(prompt_id, np.asarray(prompt_ids, np.int32), prompt_text, answer, source)
    completion = Completion(
        np.asarray(token_ids, np.int32), np.asarray(logprobs, np.float32), finish_reason, policy_version
    )
    return prompt, item["text"], completion
