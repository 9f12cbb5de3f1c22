"""Which cases of a test are run again where ``scripts/test.sh`` repeats tests."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet


def exact_for(cases: Iterable[str], *again: str) -> list[ParameterSet]:
    """Parameters of which some are tests of numbers that the second instruction set is tried with, too."""
    assert set(again) <= {*cases}
    return [pytest.param(case, marks=[pytest.mark.exact] if case in again else ()) for case in cases]
