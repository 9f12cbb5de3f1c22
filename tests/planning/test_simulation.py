"""A simulated run is what can be worked out by hand where lengths are constant, and bounded and monotone elsewhere."""

from __future__ import annotations

import json
import random

import pytest

from nemo_aapo.errors import ConfigError
from nemo_aapo.planning import compute, plan, report
from nemo_aapo.planning.hardware import KNOWN
from nemo_aapo.planning.simulation.decoding import Engine, engine_of
from nemo_aapo.planning.simulation.in_flight import in_flight
from nemo_aapo.planning.simulation.lengths import LogNormal, kept_lengths
from nemo_aapo.planning.simulation.schedule import Seconds, schedule
from nemo_aapo.planning.simulation.splits import DEPTHS, simulate
from nemo_aapo.prepare.plan import prepare_plan
from nemo_aapo.utils.files import to_json
from tests.planning.planned import made_inputs

WORDS = [
    "model=Qwen2.5-7B", "prompts_per_step=32", "group_size=8", "rollout.max_new_tokens=4096",
    "rollout.max_concurrent_tokens=300000", "max_tokens_per_microbatch=8192", "mean_completion_tokens=600",
]  # fmt: skip


def constant(generate: float, train: float, engines: int = 3, steps: int = 40, send=0.0, load=0.0) -> Seconds:
    return Seconds([[generate] * engines] * steps, [train] * steps, send, load)


def drawn(seed: int, engines: int = 4, steps: int = 60) -> Seconds:
    source = random.Random(seed)
    generate = [[source.lognormvariate(0, 0.8) for _ in range(engines)] for _ in range(steps)]
    return Seconds(generate, [source.lognormvariate(0.5, 0.2) for _ in range(steps)], send=0.1, load=0.2)


# ---------------------------------------------------------------- who waits for whom


@pytest.mark.parametrize(("generate", "train"), [(2.0, 5.0), (5.0, 2.0), (3.0, 3.0)])
def test_with_constant_seconds_a_step_is_the_sum_at_depth_0_and_the_longer_side_ahead(generate, train):
    apart = schedule(constant(generate, train, send=0.25, load=0.5), 0)
    assert apart.step_s == pytest.approx(generate + train + 0.75)
    assert apart.trainer_busy == pytest.approx(train / apart.step_s)
    assert apart.engines_busy == pytest.approx(generate / apart.step_s)
    for depth in (1, 2, 4):
        ahead = schedule(constant(generate, train, steps=2000, send=0.25, load=0.5), depth)
        assert ahead.step_s == pytest.approx(max(generate + 0.5, train + 0.25), rel=2e-3)
    assert [schedule(constant(generate, train), depth).lag for depth in (0, 1)] == [0, 1]


def test_with_random_seconds_a_step_lies_between_the_busier_side_and_the_sum_and_more_depth_is_never_slower():
    for seed in range(50):
        seconds = drawn(seed)
        found = [schedule(seconds, depth).step_s for depth in (0, 1, 2, 4, 8, 100)]
        assert found == sorted(found, reverse=True)
        steps = len(seconds.train) - 1
        longest = sum(max(row) for row in seconds.generate[1:]) / steps
        trained = sum(seconds.train[1:]) / steps
        assert found[0] == pytest.approx(longest + trained + seconds.send + seconds.load)
        assert all(step_s >= trained + seconds.send * (1 - 1e-9) for step_s in found)


def test_with_one_engine_and_no_bound_a_run_is_a_queue_and_more_engines_help_one_another():
    gained = 0.0
    for seed in range(50):
        for engines in (1, 4):
            seconds = drawn(seed, engines)
            steps, own = len(seconds.train) - 1, range(engines)
            # The trainer waits for nothing but groups: the last time that it did decides.
            arrived = [max(sum(row[s] for row in seconds.generate[: k + 1]) for s in own) for k in range(steps + 1)]
            ends = [arrived[k] + sum(seconds.train[k:]) + (steps - k) * seconds.send for k in range(steps + 1)]
            alone = (max(ends) - arrived[0] - seconds.train[0]) / steps
            found = schedule(seconds, 100).step_s
            assert found == pytest.approx(alone, rel=1e-9 if engines == 1 else 0.1)
            gained += alone - found
    assert gained > 0


def test_an_engine_that_has_ended_its_part_takes_over_what_another_has_not_begun():
    """At depth 1 the first engine is at step 1's long part when the second one has done its own and the first's."""
    generate = [[1.0, 1.0], [9.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    ends = [1 + 1, 9 + 1 + 1, 11 + 1, 12 + 1]
    assert schedule(Seconds(generate, [1.0] * 4), 1).step_s == (ends[3] - ends[0]) / 3


# ---------------------------------------------------------------- in flight


def plain_engine(rows: int = 1000, token_s: float = 1.0) -> Engine:
    return Engine(rows, lambda rows, context: token_s, prompt_tokens=0)


@pytest.mark.parametrize(("token_s", "train_s"), [(1.0, 5.0), (1.0, 40.0)])
def test_in_flight_with_constant_lengths_a_step_takes_what_the_learner_or_the_engines_need(token_s, train_s):
    """Rows for half of what is under way: an engine ends 2 x 4 sequences of 10 tokens in every 10 steps."""
    engine, lengths = plain_engine(8, token_s), [[[10] * 4] * 4] * 60
    found = in_flight(engine, 2, lengths, train_s / 160, depth=2, after=10)
    assert found.step_s == pytest.approx(max(train_s, 10 * token_s), rel=0.02)
    assert 0 < found.lag <= 2


def test_in_flight_is_never_slower_than_in_order_at_the_same_bound_and_keeps_both_sides_as_busy_as_they_can_be():
    for seed in range(5):
        draw = LogNormal(30, 5, 64, 10_000).draw
        lengths = [[draw(4, f"{seed}/{k}/{i}") for i in range(16)] for k in range(40)]
        engine = plain_engine()
        parts = [[engine.seconds(of_step[s::4]) for s in range(4)] for of_step in lengths]
        train = [sum(map(sum, of_step)) / 64 for of_step in lengths]
        for depth in (1, 2, 4):
            ordered = schedule(Seconds(parts, train), depth, after=8)
            found = in_flight(engine, 4, lengths, 1 / 64, depth, after=8)
            assert found.step_s < 1.02 * ordered.step_s
            assert found.step_s >= 0.9 * sum(train[8:]) / 32  # which steps have which groups is another matter
            assert found.lag <= depth


def test_no_version_is_used_before_it_is_there():
    """At depth 2 one engine that is slow once keeps the trainer waiting once, and the others only for its version."""
    generate = [[1.0, 1.0] for _ in range(12)]
    generate[4] = [7.0, 1.0]
    delayed, smooth = (Seconds(rows, [1.0] * 12) for rows in (generate, [[1.0, 1.0]] * 12))
    assert schedule(smooth, 0).step_s == 2
    assert schedule(smooth, 2).step_s == 1
    assert schedule(delayed, 0).step_s == pytest.approx(2 + 6 / 11)
    assert 1 < schedule(delayed, 2).step_s <= 1 + 6 / 11


# ---------------------------------------------------------------- one engine


def test_an_engine_with_constant_lengths_takes_full_waves_of_steps():
    engine = Engine(rows=4, step_s=lambda rows, context: 1.0 + rows, prompt_tokens=10, prefill_s=0.5)
    assert engine.seconds([[6, 6]] * 4) == pytest.approx(4 * 0.5 + 2 * 6 * (1 + 4))
    assert engine.seconds([[6]]) == pytest.approx(0.5 + 6 * 2)
    assert engine.seconds([]) == 0
    of_context = Engine(rows=2, step_s=lambda rows, context: context, prompt_tokens=10)
    assert of_context.seconds([[4, 4]]) == pytest.approx(4 * (10 + 4 / 2))  # the mean over a sequence's life


def test_an_engine_steps_no_less_than_its_longest_sequence_and_its_rows_need_and_no_more_than_one_by_one():
    engine = Engine(rows=8, step_s=lambda rows, context: 1.0, prompt_tokens=0)
    for seed in range(30):
        lengths = LogNormal(50, 5, 64, 10_000).draw(64, str(seed))
        steps = engine.seconds([lengths])
        assert max(max(lengths), sum(lengths) / 8) <= steps <= sum(lengths) / 8 + max(lengths)


def test_a_planned_engine_takes_what_the_plans_decode_phase_says_for_full_rows():
    inputs = made_inputs(*WORDS)
    rates = KNOWN["h100"].peak
    engine = engine_of(inputs, rates)
    count, length = engine.rows, round(inputs.work.completion_tokens)
    context = inputs.work.prompt_tokens + length / 2
    assert engine.step_s(count, context) == pytest.approx(compute.decode_step_seconds(inputs, rates, count, context))
    assert engine.seconds([[length] * count]) - engine.prefill_s == pytest.approx(
        length * engine.step_s(count, context)
    )


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(("completions", "tail"), [(32, 4), (512, 5), (4096, 8), (64, 1)])
def test_lengths_have_the_mean_and_the_tail_that_were_asked_for(completions, tail):
    lengths = LogNormal(1000, tail, completions, 10**6)
    steps = [lengths.draw(completions, str(k)) for k in range(4000 // completions + 100)]
    mean = sum(map(sum, steps)) / len(steps) / completions
    assert mean == pytest.approx(1000, rel=0.05)
    assert sum(map(max, steps)) / len(steps) / mean == pytest.approx(tail, rel=0.15)
    assert steps[0] == LogNormal(1000, tail, completions, 10**6).draw(completions, "0") != steps[1] or tail == 1
    assert max(LogNormal(1000, tail, completions, 1500).draw(completions, "0")) <= 1500


def test_kept_completions_of_a_run_are_its_lengths(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    ends = "\u2028\u2029\u0085"  # of lines, to str.splitlines; to_json writes them as they are
    lines = [to_json({"tokens": 10 + n % 3, "completion": f"a{ends}b"}) for n in range(150)]
    (folder / "train_000001.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "step_000000.jsonl").write_text(json.dumps({"tokens": 9999}) + "\n")  # of a validation
    assert set(kept_lengths(tmp_path).draw(500, "0")) == {10, 11, 12}


# ---------------------------------------------------------------- splits


def test_splits_of_more_gpus_are_never_slower_and_a_seed_decides_all():
    config, question = prepare_plan(WORDS)
    lengths = LogNormal(600, 5, 256, 4096)
    found = {gpus: simulate(config, question, lengths, gpus) for gpus in (8, 16, 32)}
    for depth in DEPTHS:
        best = [found[gpus].best(depth).outcomes[depth].step_s for gpus in found]
        assert best == sorted(best, reverse=True)
    again = simulate(config, question, lengths, 16)
    assert again == found[16]
    for split in found[32].splits:
        assert split.layout.ranks + split.servers * split.server_gpus == 32
        assert set(split.outcomes) == (set(DEPTHS) if split.servers else {0})
    files, delta, collective = found[32].refits
    assert files.outcomes[0].step_s > delta.outcomes[0].step_s
    assert (files.kind, collective.kind) == ("files", "collective")


def test_the_plan_shows_what_it_was_asked_to_simulate_and_programs_get_all_of_it():
    made = plan.make(*prepare_plan([*WORDS, "tail_factor=5", "gpus=16"]))
    shown, tree = report.text(made), json.loads(json.dumps(report.tree(made)))
    assert max(map(len, shown.splitlines())) <= 120
    assert "24 steps simulated on 16 GPUs" in shown
    assert "best on policy: " in shown
    assert tree["simulation"]["splits"][0]["outcomes"]["0"]["step_s"] > 0
    assert tree["simulation"]["best"]["1"] in shown
    assert plan.make(*prepare_plan(WORDS)).simulation is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=8"], "tail_factor= or lengths= asks for one"),
        (["tail_factor=4", "gpus=1"], "neither side fits"),
        (["tail_factor=4", "algorithm.reference=online", "algorithm.reference_store=null"], "stored reference rewards"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=message):
        plan.make(*prepare_plan([*WORDS, *words]))


def test_lengths_that_nobody_can_have_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"tail_factor=500: .* lies between 1 and 58"):
        LogNormal(600, 500, 256, 4096)
    with pytest.raises(ConfigError, match=r"kept 0 completions.* metrics.jsonl of a run has them"):
        kept_lengths(tmp_path)
    with pytest.raises(ConfigError, match="leave mean_completion_tokens and tail_factor out"):
        prepare_plan([*WORDS, "tail_factor=2", f"lengths={tmp_path}"])
