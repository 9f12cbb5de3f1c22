"""Whose turn it is at each rollout server, where several calls are under way at a time.

A server works for one call at a time, and takes new weights when all that it generates for the call before has ended:
each server by itself, while the others go on. Earlier calls go first, so that none waits for the tail of a later one.
Requests of different calls are never put together there, so that what a completion is batched with does not depend on
who was fast.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

from nemo_aapo.engines.weights import WeightsId


@dataclass(eq=False)
class Ticket:
    """One request's place in the queue of a server."""

    server: str
    """The server's instance."""
    call: int
    """Number of the call that it is part of; earlier calls have lower ones."""
    tokens: int
    """The most that it can cost."""
    running: bool = False
    """Whether its turn has come."""


class Queues:
    """The queues of all servers, for this process; any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._calls: dict[int, WeightsId] = {}
        self._tickets: list[Ticket] = []

    def enter(self, weights: WeightsId) -> int:
        """Begin a call; its number."""
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = weights
            return number

    def leave(self, call: int) -> None:
        """A call has ended, and all its requests with it."""
        with self._lock:
            del self._calls[call]

    def alone(self, weights: WeightsId) -> bool:
        """Whether no call with other weights is under way."""
        with self._lock:
            return all(others == weights for others in self._calls.values())

    def put(self, ticket: Ticket) -> Ticket:
        """Queue a request."""
        with self._lock:
            self._tickets.append(ticket)
        return ticket

    def tokens(self, server: str) -> int:
        """What its requests can cost, waiting ones included."""
        with self._lock:
            return sum(ticket.tokens for ticket in self._tickets if ticket.server == server)

    def run(self, mine: Ticket) -> bool:
        """Whether a request's turn has come: none of another call runs there, and none of an earlier one waits."""
        with self._lock:
            mine.running = mine.running or not any(
                ticket.server == mine.server
                and ticket.call != mine.call
                and (ticket.running or ticket.call < mine.call)
                for ticket in self._tickets
            )
            return mine.running

    def done(self, ticket: Ticket) -> None:
        """A request has ended, in whatever way."""
        with self._lock:
            self._tickets.remove(ticket)
