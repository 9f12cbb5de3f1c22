"""What one rank does, or all, ends well on every rank or in the same error on every rank."""

from __future__ import annotations

import json
import os

import pytest


def outcomes(failing: int | None, kind: str) -> dict[str, object]:
    """On each rank, by function: the result, or class and message of the error."""
    from nemo_aapo import errors
    from nemo_aapo.distributed.agreement import agree, on_all_ranks, on_first_rank

    rank = int(os.environ["RANK"])

    def act() -> int:
        if rank == failing and kind == "JSONDecodeError":
            json.loads("{")
        if rank == failing and kind == "UnicodeDecodeError":
            b"caf\xe9".decode()
        if rank == failing:
            raise {"ConfigError": errors.ConfigError, "OSError": OSError}[kind](f"of {rank}")
        return 10 + rank

    def outcome(run):
        try:
            return run()
        except Exception as error:
            return type(error).__name__, str(error)

    return {
        "agree": outcome(lambda: agree(act)),
        "first": outcome(lambda: on_first_rank(act)),
        "first, as": outcome(lambda: on_first_rank(act, failure=errors.CheckpointError)),
        "all, as": outcome(lambda: on_all_ranks(act, failure=errors.CheckpointError)),
    }


def test_where_it_goes_well_every_rank_has_its_result(ranks):
    for rank, found in enumerate(ranks.run(outcomes, None, "OSError", world=3)):
        assert found == {"agree": 10 + rank, "first": 10, "first, as": 10, "all, as": [10, 11, 12]}


def test_an_error_of_rank_0_is_every_ranks_error(ranks):
    own, *others = ranks.run(outcomes, 0, "ConfigError", world=3)
    assert set(own.values()) == {("ConfigError", "of 0")}
    assert others == [own, own]


def test_an_error_of_another_kind_becomes_the_callers_own_class_or_one_that_crosses(ranks):
    own, *others = ranks.run(outcomes, 0, "OSError", world=3)
    assert own["agree"] == own["first"] == ("OSError", "of 0")
    wrapped = ("CheckpointError", "OSError: of 0")
    assert own["first, as"] == wrapped
    assert own["all, as"] == (wrapped[0], f"rank 0: {wrapped[1]}")
    for found in others:
        assert found == {**own, "agree": ("RuntimeError", "of 0"), "first": ("RuntimeError", "of 0")}


def test_an_error_of_a_later_rank_is_told_by_its_rank(ranks):
    for rank, found in enumerate(ranks.run(outcomes, 2, "OSError", world=3)):
        assert found["first"] == found["first, as"] == 10
        assert found["agree"] == (("OSError" if rank == 2 else "RuntimeError"), "of 2")
        assert found["all, as"] == ("CheckpointError", "rank 2: OSError: of 2")


@pytest.mark.parametrize("kind", ["JSONDecodeError", "UnicodeDecodeError"])
def test_an_error_that_is_made_of_more_than_a_message_crosses_with_the_name_of_its_class(ranks, kind):
    own, *others = ranks.run(outcomes, 0, kind, world=2)
    assert own["agree"] == own["first"]
    assert own["agree"][0] == kind
    for found in others:
        assert found["agree"] == found["first"] == ("RuntimeError", f"{kind}: {own['agree'][1]}")
        assert found["all, as"] == own["all, as"]
