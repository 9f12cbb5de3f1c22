"""Calls with different weights at a time: each with its own, at servers that take new ones one by one."""

from __future__ import annotations

import random
import threading

from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.dispatch import Call, Fleet
from nemo_aapo.engines.remote.queues import Queues, Ticket
from tests.engines.remote.scripted_server import WEIGHTS, always, make_call, wait_for

LATER = wire.Weights(wire.WeightsId(6, "6" * 64), "weights/v6-66666666/manifest.json")


def in_background(fleet: Fleet, call: Call) -> threading.Thread:
    number = fleet.queues.enter(call.weights.id)
    thread = threading.Thread(target=lambda: fleet.generate(call, number), daemon=True)
    thread.start()
    return thread


def later(call: Call) -> Call:
    return Call(LATER, call.prompts, call.sampling, call.seeds, call.on_finish)


def half_done(start, fleet):
    """Two servers in a call, of which the quick one has ended its part; what is told of it, and what should be."""
    slow, quick = start(always("until 0"), always("well"))
    both = fleet(2, timeout_s=30)
    both.prepare(WEIGHTS)
    first, told, wanted = make_call([2] * 4)
    earlier = in_background(both, first)
    wait_for(lambda: slow.asked and len(told) == 4)
    return slow, quick, both, earlier, told, wanted


def test_a_server_takes_new_weights_when_it_has_ended_its_part_and_another_goes_on_with_the_old(start, fleet):
    """The later call is over while the earlier one still waits for its slowest server, whose part of it others took."""
    slow, quick, both, earlier, told, wanted = half_done(start, fleet)
    second, told_later, _ = make_call([2] * 4)
    in_background(both, later(second)).join(20)
    assert len(told_later) == 8
    assert (slow.weights, quick.weights) == (WEIGHTS.id, LATER.id)
    assert earlier.is_alive()
    slow.released.set()
    earlier.join(20)
    assert sorted(told) == sorted(wanted)
    assert slow.refits == [WEIGHTS]


def test_what_a_dead_server_leaves_of_an_earlier_call_is_drawn_with_its_weights_by_one_that_has_later_ones(
    start, fleet
):
    slow, quick, both, earlier, told, wanted = half_done(start, fleet)
    second, told_later, _ = make_call([2] * 4)
    in_background(both, later(second)).join(20)
    slow.close()
    earlier.join(20)
    assert sorted(told) == sorted(wanted)
    assert len(told_later) == 8
    assert quick.refits == [WEIGHTS, LATER, WEIGHTS]


def test_a_server_that_always_has_other_weights_than_it_says_is_left_out(start, fleet):
    start(always("other"), always("well"))
    call, told, wanted = make_call([2] * 4)
    said = []
    fleet(2, log=said.append).generate(call)
    assert sorted(told) == sorted(wanted)
    assert len(said) == 1
    assert "10 times: HTTP 409: other weights" in said[0]


def test_a_server_in_the_midst_of_a_refit_is_asked_again_and_not_left_out(start, fleet):
    start(iter(["loading", "loading", "well"]).__next__)
    call, told, wanted = make_call([2] * 4)
    said = []
    fleet(1, log=said.append).generate(call)
    assert sorted(told) == sorted(wanted)
    assert not said


def test_requests_of_earlier_calls_go_first_and_calls_never_mix_at_a_server():
    """A thousand random schedules: every request gets its turn, and none waits for a later call."""
    for seed in range(1000):
        rng, queues = random.Random(seed), Queues()
        calls = [queues.enter(wire.WeightsId(version, "")) for version in (0, 0, 1, 2)]
        tickets = [queues.put(Ticket(rng.choice("ab"), rng.choice(calls), 1)) for _ in range(6)]
        ended: list[Ticket] = []
        while len(ended) < len(tickets):
            waiting = [ticket for ticket in tickets if ticket not in ended]
            rng.shuffle(waiting)
            running = [ticket for ticket in waiting if queues.run(ticket)]
            assert min(waiting, key=lambda ticket: ticket.call) in running
            for server in "ab":
                assert len({ticket.call for ticket in running if ticket.server == server}) <= 1
            ended.append(rng.choice(running))
            queues.done(ended[-1])


def test_what_is_batched_with_what_does_not_depend_on_who_is_busy(start, fleet):
    """The parts of a call are the same whether its servers are free or not; only who draws which part differs."""
    slow, quick = start(always("until 0"), always("well"))
    both = fleet(2, timeout_s=30)
    both.prepare(WEIGHTS)
    alone, busy = (make_call([2, 1, 3, 1])[0] for _ in range(2))
    earlier = in_background(both, alone)
    wait_for(lambda: slow.asked and quick.asked)
    later_one = in_background(both, later(busy))
    later_one.join(20)
    slow.released.set()
    earlier.join(20)

    def parts(version: int) -> list[list[list[int]]]:
        asked = [request for server in (slow, quick) for request in server.asked]
        return sorted(request.seeds for request in asked if request.weights.policy_version == version)

    assert parts(5) == parts(6)
