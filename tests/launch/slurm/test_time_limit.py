"""The last of these tests, as its run (``conftest.limited``) waits for Slurm's clock while the others work."""

from __future__ import annotations

import pytest

from tests.launch.slurm.cluster import assert_equal

pytestmark = pytest.mark.timeout(900)


def test_a_time_limit_that_is_hit_twice_leaves_no_trace(limited, uninterrupted):
    limited.wait_until(limited.job, "COMPLETED")
    ends = [(attempt.end, attempt.checkpoint_after, attempt.why) for attempt in limited.attempts()]
    expected = [("saved", 1, "SIGUSR1"), ("saved", 2, "SIGUSR1"), ("finished", 3, "the run is complete")]
    assert ends == expected, limited.log()
    assert_equal(limited, uninterrupted)
    assert "finished    yes" in limited.say("status")
