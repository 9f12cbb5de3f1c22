"""Tests are cut into tiers, so that the quick ones can be run alone."""

from __future__ import annotations

from tests.conftest import TIERS_OF_TESTS


def test_every_test_has_exactly_one_tier(request):
    tiers = request.config.stash[TIERS_OF_TESTS]
    assert {test: found for test, found in tiers.items() if len(found) != 1} == {}
