"""The child side of ``RewardRunner``: ``python -m nemo_aapo.rewards.workers.worker``, its standard input a socket.

It imports rewards and nothing of torch. It lives as long as its parent: the parent's end of the socket closes when
the parent goes, however it goes, and a worker that is busy just then is ended by its own timer.

Each reply repeats the number of its request. A process that a reward forks loses the socket at its birth, so that
nobody but the worker answers.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from typing import Any

from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.base import Reward, describe_error, score_parts
from nemo_aapo.rewards.workers.channel import Channel, decode_item

_GRACE_S = 1.0
"""How long behind the item's limit the worker's own timer waits for the parent's kill."""
_SCHEDULERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Read the set-up, answer ready, then answer each request until the parent is gone."""
    channel = _take_channel()
    _ignore_signals()
    _prepare_forks(channel)
    try:
        setup = channel.receive()
        _limit_resources(setup["memory_gib"])
        _set_timer(setup["start_timeout_s"] + _GRACE_S)
        rewards = _load_rewards(setup["rewards"], channel)
        _set_timer(0)
        while rewards:
            request = channel.receive()
            _set_timer(setup["timeout_s"] + _GRACE_S)
            reply = _answer(rewards, request)
            _set_timer(0)
            channel.send({"number": request["number"], **reply})
    except (EOFError, OSError):
        pass  # the parent is gone, and so is the reason to live
    sys.stderr.flush()
    os._exit(0)  # threads that a custom reward started must not keep the process


def _take_channel() -> Channel:
    """The socket, moved to where neither ``print`` nor ``input`` of a reward can reach it."""
    channel = Channel(socket.socket(fileno=os.dup(0)))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _ignore_signals() -> None:
    """A scheduler's warning goes to all processes of a job, and the trainer still needs scores to end its step.

    By a handler: to ignore a signal would be handed down to programs that a custom reward starts.
    """
    for number in _SCHEDULERS_SIGNALS:
        signal.signal(number, lambda *_: None)


def _prepare_forks(channel: Channel) -> None:
    """A process that a reward forks has no channel, and dies of the signals by which ``multiprocessing`` ends it.

    They are held back until it does: one that came while the worker's handlers still stand would be lost, and who sent
    it would wait for ever.
    """

    def become_a_child() -> None:
        channel.close()
        for number in _SCHEDULERS_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        hold(signal.SIG_UNBLOCK)

    def hold(how: int) -> None:
        signal.pthread_sigmask(how, _SCHEDULERS_SIGNALS)

    os.register_at_fork(
        before=lambda: hold(signal.SIG_BLOCK),
        after_in_parent=lambda: hold(signal.SIG_UNBLOCK),
        after_in_child=become_a_child,
    )


def _limit_resources(memory_gib: float) -> None:
    """An item that asks for more memory gets MemoryError, instead of the machine's out-of-memory killer."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS does not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_gib * 2**30),) * 2)


def _load_rewards(configs: list[dict[str, Any]], channel: Channel) -> list[Reward]:
    """The rewards, ready to score; none of them if one can't be loaded, which the parent is told."""
    try:
        rewards = [build_reward(config) for config in configs]
        for reward in rewards:
            reward.load()
    except BaseException as error:  # a custom module may raise anything, SystemExit too
        channel.send({"error": describe_error(error)})
        return []
    channel.send({"ready": True})
    return rewards


def _set_timer(seconds: float) -> None:
    """Let the kernel end this process after a while (0: no more), whatever it is doing then."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _answer(rewards: list[Reward], request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "check_answer" in request:
            for reward in rewards:
                reward.check_answer(request["check_answer"])
            return {"parts": [], "detail": ""}
        parts, detail = score_parts(rewards, *decode_item(request))
        return {"parts": parts, "detail": detail}
    except BaseException as error:  # a custom reward may raise anything, SystemExit too
        return {"error": describe_error(error)}


if __name__ == "__main__":
    main()
