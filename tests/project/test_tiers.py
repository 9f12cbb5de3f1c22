"""Tests are cut into tiers, so that the quick ones can be run alone."""

from __future__ import annotations

import multiprocessing
import os
import subprocess

import pytest
import torch

from tests.conftest import TIERS_OF_TESTS


def test_every_test_has_exactly_one_tier(request):
    tiers = request.config.stash[TIERS_OF_TESTS]
    assert {test: found for test, found in tiers.items() if len(found) != 1} == {}


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"]),
        lambda: os.system("true"),
        lambda: os.fork(),
        lambda: multiprocessing.get_context("spawn").Process().start(),
    ],
)
def test_a_unit_test_that_starts_a_process_fails(start):
    with pytest.raises(pytest.fail.Exception, match="a unit test started a process"):
        start()


@pytest.mark.exact
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" not in os.environ, reason="the pass by narrower instructions sets it")
def test_the_pass_by_narrower_instructions_computes_by_them():
    assert torch.backends.cpu.get_cpu_capability() == os.environ["ATEN_CPU_CAPABILITY"].upper()
