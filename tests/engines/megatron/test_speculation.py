"""Speculation: the tokens of decoding one by one, from fewer passes; and no drafts where they don't pay."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest

from nemo_aapo.engines.megatron import speculation
from nemo_aapo.engines.megatron.scheduler import Scheduler
from nemo_aapo.engines.megatron.speculation import MAX_DRAFTS, MAX_PAUSE, Feed, Speculation, plain
from tests.engines.megatron.generation import GREEDY, SEEDS, SNUG, SPEC, TIGHT, VOCAB_SIZE, build, flat, prompts
from tests.engines.megatron.test_engine import STRINGS, text
from tests.marks import exact_for

COLD = dataclasses.replace(SPEC, temperature=0.3)
"""Cold enough for some guesses to be right, and warm enough for many to be wrong."""
SAYING = dataclasses.replace(GREEDY, stop_strings=STRINGS)
SPECS = (SPEC, COLD, GREEDY, SAYING)
LAYOUTS = {  # model, ranks, TP, PP, EP
    "1x1": ("qwen2", 1, 1, 1, 1),
    "TP2": ("qwen2", 2, 2, 1, 1),
    "PP2": ("qwen2", 2, 1, 2, 1),
    "TP2 PP2": ("qwen2", 4, 2, 2, 1),
    "TP2 EP2": ("qwen3_moe", 2, 2, 1, 2),
    "PP2 DP2 EP2": ("qwen3_moe", 4, 1, 2, 2),
}


def with_and_without(path, tp, pp, experts, specs, budget):
    """On each rank, for each spec: the completions without and with drafts, every guess being fed that can be right."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    model = build(path, tp, pp, tp > 1 and experts)
    mine = range(parallel.data_parallel_rank(), len(SEEDS), parallel.data_parallel_size())
    texts, seeds = [prompts()[i] for i in mine], [SEEDS[i] for i in mine]
    answers = []
    for spec in specs:
        engines = [
            MegatronEngine(model, VOCAB_SIZE, budget, decode=text, record_routes=experts, speculation=on)
            for on in (False, True)
        ]
        with mock.patch.multiple(speculation, PASS_TOKENS=1e6, DRAFTING_TOKENS=0, MAX_LEAD=1000, MAX_PAUSE=1):
            outs = [engine.generate(texts, spec, seeds) for engine in engines]
        answers.append((*outs, *(engine.stats for engine in engines)))
    return answers


@pytest.mark.parametrize("layout", exact_for(LAYOUTS, "1x1", "TP2"))
def test_not_a_token_changes_whatever_is_accepted_or_rejected(ranks, tiny_models, layout):
    """Stop tokens and strings within accepted drafts, the limit, refilled rows and rejected tokens' keys among it."""
    name, world, tp, pp, ep = LAYOUTS[layout]
    specs = SPECS if world == 1 else (COLD, SAYING)
    arguments = (tiny_models[name], tp, pp, name == "qwen3_moe", specs, TIGHT if world == 1 else SNUG)
    for answers in ranks.run(with_and_without, *arguments, world=world, tp=tp, pp=pp, ep=ep):
        for spec, (expected, out, before, after) in zip(specs, answers, strict=True):
            rounding = 1e-5 / min(spec.temperature or 1.0, 0.8)
            assert flat(out) == flat(expected)
            assert before.drafted == 0
            assert before.tokens == after.tokens
            for row, expected_row in zip(out, expected, strict=True):
                for completion, reference in zip(row, expected_row, strict=True):
                    assert completion.finish_reason == reference.finish_reason
                    np.testing.assert_allclose(completion.logprobs, reference.logprobs, atol=rounding)
                    if reference.routes is not None:
                        np.testing.assert_array_equal(completion.routes.prompt, reference.routes.prompt)
                        np.testing.assert_array_equal(completion.routes.completion, reference.routes.completion)
        assert sum(after.drafted - after.accepted for *_, after in answers) > 20
        assert sum(after.accepted for *_, after in answers) > 20
        if world == 1:
            assert sum(after.steps for *_, after in answers) < 0.9 * sum(before.steps for _, _, before, _ in answers)


def test_a_row_gets_the_tokens_up_to_the_first_that_differs_from_its_draft():
    """On random passes, as a loop over the rows says."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        decoding, prefilled = generator.integers(1, 6), generator.integers(0, 3)
        scheduler = Scheduler([np.zeros(1, np.int32)], [list(range(decoding + prefilled))], 9, decoding + prefilled)
        scheduler.admit()
        scheduler.token[:] = generator.integers(0, 2, scheduler.rows)
        counts = generator.integers(0, 4, decoding)
        drafts = [generator.integers(0, 2, count) for count in counts]
        feed = Feed.of(scheduler, counts, np.concatenate(drafts))
        sampled = generator.integers(0, 2, len(feed.rows))
        expected = []
        for row in range(scheduler.rows):
            own = sampled[feed.rows == row]  # in the order of their offsets
            assert feed.offsets[feed.rows == row].tolist() == list(range(len(own)))
            right = drafts[row] == own[:-1] if row < decoding else []
            expected.append(1 + [*right, False].index(False))
            np.testing.assert_array_equal(own, sampled[[int(feed.at(np.array([row]), n)[0]) for n in range(len(own))]])
        assert feed.accepted(sampled).tolist() == expected


def run(rows: int, next_token, waves: int = 1, limit: int = 40) -> list[tuple[Feed, Scheduler]]:
    """The passes of rows that sample ``next_token(seed, position)`` after a prompt that says 0, 1, ..., 15 twice."""
    prompt = np.tile(np.arange(16, dtype=np.int32), 2)
    scheduler = Scheduler([prompt], [list(range(rows * waves))], limit, rows)
    drafts, passes = Speculation(scheduler, [prompt], [rows * waves], vocab_size=64), []
    while True:
        admitted = scheduler.admit()
        if not scheduler.running:
            return passes
        prefilled = [admission for admission in admitted if admission.prefill]
        feed = drafts.feed(prefilled[0].start if prefilled else scheduler.running)
        assert (scheduler.sampled[: len(feed.drafts)] + feed.drafts < limit).all()  # no token beyond the limit
        assert feed.drafts.max(initial=0) <= MAX_DRAFTS
        passes.append(feed)
        sampled = np.array(
            [
                next_token(int(scheduler.seed[r]), int(scheduler.sampled[r] + n))
                for r, n in zip(feed.rows, feed.offsets, strict=True)
            ]
        )
        counts = feed.accepted(sampled)
        for taken in range(counts.max()):
            going = np.flatnonzero(counts > taken)
            tokens = sampled[feed.at(going, taken)]
            scheduler.record(going, tokens, np.zeros(len(going)), len(feed.drafts))
        done = np.flatnonzero(scheduler.sampled[: scheduler.running] == limit)
        drafts.learn(done)
        assert (drafts._seen[scheduler.completion[done]] == limit).all()  # the others may say it again
        scheduler.retire(done)


def sometimes(seed: int, position: int) -> int:
    """Half of the guesses are right: a draft may pay, but they are too few to pay for a pass that has drafts."""
    other = never(seed, position)
    return position % 16 if other % 2 else other


def never(seed: int, position: int) -> int:
    """Nothing that anybody said before."""
    return int(np.random.default_rng((seed, position)).integers(64))


def test_what_the_prompt_said_is_guessed_and_saves_most_passes():
    passes = run(4, lambda seed, position: position % 16)
    assert len(passes) < 20  # of 40
    assert max(feed.drafts.max(initial=0) for feed in passes) > 4


def test_nothing_is_fed_where_guesses_are_wrong_or_the_batch_is_large():
    assert not sum(feed.drafts.sum() for feed in run(4, never))
    assert not sum(feed.drafts.sum() for feed in run(64, lambda seed, position: position % 16, waves=2, limit=20))


@pytest.mark.parametrize("token", [sometimes, never])
def test_while_nothing_is_fed_it_looks_at_the_tokens_every_few_steps_only(token):
    with mock.patch.object(Speculation, "_learn", autospec=True, side_effect=Speculation._learn) as looks:
        passes = run(8, token, limit=400)
    assert not sum(feed.drafts.sum() for feed in passes)
    assert len(passes) == 400
    assert 400 / MAX_PAUSE <= looks.call_count < 1.2 * 400 / MAX_PAUSE + 5


def test_rows_that_lead_do_not_run_further_ahead_when_none_waits_for_their_place():
    """Three rows repeat the prompt, the fourth says what nobody said: its passes can't be saved."""

    def token(seed: int, position: int) -> int:
        return never(seed, position) if seed == 3 else position % 16

    drafted = sum(feed.drafts.sum() for feed in run(4, token, limit=60))
    with mock.patch.object(speculation, "MAX_LEAD", 1000):
        anyway = sum(feed.drafts.sum() for feed in run(4, token, limit=60))
    assert 0 < drafted < 0.7 * anyway


def test_a_plain_pass_feeds_each_row_its_token():
    scheduler = Scheduler([np.array([5, 6])], [[1, 2, 3]], 4, 3)
    scheduler.admit()
    feed = plain(scheduler, 2)
    assert feed.tokens.tolist() == [6, 6]
    assert feed.rows.tolist() == [0, 1, 2]
    assert feed.accepted(np.array([1, 2, 3])).tolist() == [1, 1, 1]
