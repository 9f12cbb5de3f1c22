"""A reward that must be killed: it hears no signal and never ends."""

from __future__ import annotations

import signal


def never_ends(prompt: str, completion: str, answer: str, **info: object) -> float:
    """Never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass
