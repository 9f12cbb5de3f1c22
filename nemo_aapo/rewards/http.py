"""A reward that a server of yours works out."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import time
import urllib.parse
from dataclasses import dataclass
from typing import ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_LONGEST_ANSWER = 1 << 20
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class _TransientError(Exception):
    """The same request may be answered another time."""


@dataclass(frozen=True)
class Http(Reward):
    """POSTs each completion to ``url`` and takes ``score`` of the answer.

    The request is JSON: ``prompt``, ``completion``, ``answer``, ``num_tokens``, ``finish_reason``. The answer is a JSON
    object whose ``score`` is a finite number. Where the connection fails, or the server says that it is busy or broken
    (408, 425, 429, 5xx), it is asked again, at last ``timeout_s`` after the first time. Redirects are not followed.
    """

    url: str
    """``http://`` or ``https://``, without a password."""
    timeout_s: float = 5.0
    """Seconds for all attempts at one completion; less than ``reward_runner.timeout_s``, which kills the worker."""
    retries: int = 3
    """Attempts after the first one."""
    token_env: str | None = None
    """Name of the environment variable whose value is sent as a bearer token; it is never written anywhere."""
    version: str = ""
    """Version of what the server computes, for the store of reference rewards: change it when that changes."""

    kind: ClassVar[str] = "http"

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except (ValueError, AttributeError):
            usable = False
        if not usable:
            raise ValueError(f"reward 'http': url must be http://... or https://..., not {self.url!r}")
        if parts.username is not None or parts.password is not None:
            raise ValueError("reward 'http': url must hold no password: put a token into a variable (token_env)")
        number = isinstance(self.timeout_s, int | float) and not isinstance(self.timeout_s, bool)
        if not number or not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            raise ValueError(f"reward 'http': timeout_s must be a number above 0, not {self.timeout_s!r}")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"reward 'http': retries must be an integer of at least 0, not {self.retries!r}")
        if self.token_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.token_env):
            raise ValueError("reward 'http': token_env is the name of an environment variable, not the token itself")

    @property
    def in_process(self) -> bool:
        """False: it waits for others."""
        return False

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """Raises ValueError for an answer that is none, and TimeoutError when all attempts failed."""
        item = {
            "prompt": prompt.text,
            "completion": text,
            "answer": prompt.answer,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        body = json.dumps(item).encode()
        deadline = time.monotonic() + self.timeout_s
        pause, attempts = _FIRST_PAUSE_S, self.retries + 1
        for attempt in range(1, attempts + 1):
            try:
                return self._ask(body, deadline)
            except _TransientError as error:
                if attempt == attempts or time.monotonic() + pause >= deadline:
                    raise TimeoutError(f"{self.url}: {error}, at attempt {attempt} of {attempts}") from None
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    def load(self) -> None:
        """See that the token is there."""
        self._headers()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self.token_env is not None:
            token = os.environ.get(self.token_env, "")
            if not token or not token.isascii() or not token.isprintable():
                raise ValueError(f"reward 'http': the variable {self.token_env} is not set, or holds no token")
            headers["Authorization"] = f"Bearer {token}"
        return headers

    def _ask(self, body: bytes, deadline: float) -> float:
        """Make one attempt: the score that the server answers with."""
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_left(deadline))  # there is one: __post_init__
        try:
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("POST", target, body, self._headers())
            response = connection.getresponse()
            if response.status in _TRY_AGAIN:
                raise _TransientError(f"status {response.status}")
            if response.status != 200:
                raise ValueError(f"{self.url}: status {response.status} {response.reason[:80]}")
            content = _read(connection, response, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(f"{type(error).__name__}: {error}"[:200]) from None
        finally:
            connection.close()
        return _score(self.url, content)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _read(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The answer's content, however slowly it comes, up to the deadline."""
    content = b""
    while part := response.read1(1 << 16):
        content += part
        if len(content) > _LONGEST_ANSWER:
            raise ValueError(f"an answer of more than {_LONGEST_ANSWER} bytes")
        if time.monotonic() >= deadline:
            raise TimeoutError("the answer did not end in time")
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline))
    return content


def _score(url: str, content: bytes) -> float:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{url}: the answer is not JSON: {content[:80]!r}") from None
    score = answer.get("score") if isinstance(answer, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{url}: the answer's score is no finite number: {content[:80]!r}")
    return float(score)
