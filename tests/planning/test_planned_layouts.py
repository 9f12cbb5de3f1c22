"""Experts and context parallelism in a plan: who holds and sends what, and which layouts there are."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.planning import collectives, compute, hardware, layouts, memory, parameters
from nemo_aapo.planning.inputs import Inputs, Layout
from nemo_aapo.prepare.plan import prepare_plan
from tests.planning.planned import made_inputs

MODEL = "model=Qwen3-30B-A3B"
LAYOUTS = [
    Layout(data=8, expert=8),
    Layout(tensor=2, data=4, expert=4, sequence_parallel=True),
    Layout(tensor=4, pipeline=2, data=2, context=2, expert=16, sequence_parallel=True),
    Layout(tensor=2, data=2, context=4, expert=1, sequence_parallel=True),
]


def laid_out(layout: Layout, *words: str) -> Inputs:
    """A plan's inputs with a layout put in; an engine on each model-parallel group."""
    inputs = made_inputs(MODEL, *words)
    engine = dataclasses.replace(inputs.engine, engines=layout.copies, gpus=layout.tensor * layout.pipeline)
    return dataclasses.replace(inputs, layout=layout, engine=engine)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_distributed_optimizer_updates_each_parameter_once(layout):
    """Experts over the ranks that hold the same ones, all else over data- and context-parallel ranks."""
    inputs = laid_out(layout)
    counts = [parameters.rank_parameters(inputs.model, layout, stage) for stage in range(layout.pipeline)]
    ranks = layout.tensor * layout.copies
    updated = ranks * sum(memory.updated(count, inputs.learner, layout) for count in counts)
    replicated = (layout.tensor - 1) * sum(count.small for count in counts)  # norms and routers, on each tensor rank
    assert updated == pytest.approx(parameters.whole(inputs.model).total + replicated, rel=1e-12)


def test_context_ranks_halve_activations_and_share_the_rollout():
    """Two context-parallel ranks keep half each, and draw as two data-parallel ranks do."""
    one, two = (laid_out(Layout(data=2 // context, context=context)) for context in (1, 2))
    kept = [memory.rank_memory(inputs).phases["train"]["activations"] for inputs in (one, two)]
    assert kept[1] == kept[0] / 2
    assert one.engine.engines == two.engine.engines == 2


def test_each_gpu_reads_its_share_of_the_experts():
    """All rows wake all experts: an eighth is read on each of eight ranks, whether of one engine or of eight in step."""
    reads = [
        compute.decode_weight_bytes(laid_out(layout), 4096.0)
        for layout in (Layout(), Layout(data=8, expert=8), Layout(tensor=4, data=2, expert=8, sequence_parallel=True))
    ]
    count = parameters.whole(made_inputs(MODEL).model)
    every = count.total - count.embedding
    assert reads[0] == pytest.approx(2 * every)
    assert reads[1] == pytest.approx(2 * (every - count.experts + count.experts / 8))
    assert reads[2] == pytest.approx(2 * ((every - count.experts) / 4 + count.experts / 8))


def test_the_all_to_all_of_experts_is_its_bytes_over_the_slowest_link():
    """A token is sent to eight experts and back: 2 x 8 x 2,048 bf16 numbers in each of 48 layers, of 1,000 tokens."""
    gpu = hardware.KNOWN["h100"]
    for layout, share, link in (
        (Layout(data=8, expert=8), 7 / 8, gpu.nvlink),
        (Layout(data=16, expert=16), 8 / 16, gpu.network),  # the other half stays within a node of eight
    ):
        inputs = laid_out(layout)
        tokens = inputs.work.tokens / layout.data
        sent = tokens * 48 * 2 * 8 * 2048 * 2
        assert collectives.pass_seconds(inputs, 1)["experts' all-to-all"] == pytest.approx(sent * share / link)
    half = laid_out(Layout(tensor=2, data=4, expert=8, sequence_parallel=True))
    assert collectives.pass_seconds(half, 1)["experts' all-to-all"] == pytest.approx(
        half.work.tokens / 4 / 2 * 48 * 2 * 8 * 2048 * 2 * 7 / 8 / gpu.nvlink
    )


def test_keys_and_values_go_round_a_context_parallel_group_behind_attention():
    """Each of eight ranks gets the others' parts; attention within short sequences does not take as long."""
    inputs, gpu = laid_out(Layout(context=8)), hardware.KNOWN["h100"]
    ring = collectives.ring_seconds(inputs)
    assert ring == pytest.approx(inputs.work.tokens / 8 * 7 * 48 * 2 * 4 * 128 * 2 / gpu.nvlink)
    waits = []
    for length in (64, 4096):
        words = ("mean_prompt_tokens=1", f"mean_completion_tokens={length}", "rollout.max_new_tokens=4096")
        inputs = laid_out(Layout(context=8), *words, "max_tokens_per_microbatch=8192")
        parts = compute.learner_seconds(inputs, gpu.peak, compute.train_flops(inputs), 2)
        waits.append(parts["keys and values over CP"])
    assert waits[0] > waits[1] == 0


def test_every_layout_of_experts_and_context_is_judged_once():
    config, question = prepare_plan([MODEL, "trainer.devices=8"])
    found = layouts.candidates(config, question.model.experts)
    assert len(set(found)) == len(found)
    assert all(layout.ranks == 8 and layout.tensor * layout.copies % layout.expert == 0 for layout in found)
    assert {layout.expert for layout in found} == {layout.context for layout in found} == {1, 2, 4, 8}
    assert {layout.expert for layout in layouts.candidates(config, 0)} == {1}
