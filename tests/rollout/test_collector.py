"""The collector lets the longest expected prompts enter first, and what comes out is the same in the same order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nemo_aapo.engines.base import RolloutStats
from nemo_aapo.rollout.scored import engine_metrics
from nemo_aapo.types import Prompt
from tests.engines.megatron.generation import SEEDS, SPEC, TIGHT, VOCAB_SIZE, build, prompts

pytestmark = pytest.mark.exact


class Scores:
    """The sum of the tokens; remembers which prompt each item was handed in with."""

    def __init__(self) -> None:
        self.items: dict = {}

    def submit(self, index, prompt, text, completion):
        assert text == str(completion.token_ids.tolist())
        self.items[index] = prompt.id, float(completion.token_ids.sum())

    def collect(self, indices):
        items = {index: self.items.pop(index) for index in indices}
        return {
            index: SimpleNamespace(score=score, parts={"sum": score}, failure=None)
            for index, (_, score) in items.items()
        }


def _collect_twice(path):
    """With nothing known, then with lengths that turn the order around. Groups as plain data, and the orders."""
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.rollout.collector import Collector

    engine, entered = MegatronEngine(build(path), VOCAB_SIZE, TIGHT), []
    generate = engine.generate

    def record(ids, *arguments):
        entered.append([len(prompt) for prompt in ids])
        return generate(ids, *arguments)

    engine.generate = record
    questions = [Prompt(str(i), ids, "", "", "") for i, ids in enumerate(prompts())]
    collector = Collector(engine, Scores(), lambda ids: str(ids.tolist()))
    results = []
    for expected in ([], [(question.id, 10.0 - len(question.token_ids)) for question in questions]):
        collector.length_predictor.load_state_dict({})
        collector.length_predictor.observe(expected)
        groups = collector.collect(questions, SPEC, SEEDS, observe_lengths=not expected)
        results.append(
            [
                (g.prompt.id, [c.token_ids.tolist() for c in g.completions], list(g.texts), g.rewards.tolist())
                for g in groups
            ]
        )
        if not expected:
            learned = collector.length_predictor.state_dict()
    return results, entered, learned, collector.length_predictor.state_dict(), collector.metrics


def test_the_order_of_entering_changes_no_token_and_no_place(ranks, tiny_models):
    answers = ranks.run(_collect_twice, tiny_models["qwen2"], world=2)  # two data-parallel ranks
    everything: dict[str, float] = {}
    for (first, second), (by_prompt, by_memory), learned, untouched, metrics in answers:
        assert first == second
        assert by_prompt == sorted(by_prompt, reverse=True)
        assert by_memory == sorted(by_prompt)
        lengths = {
            name: float(np.mean([len(ids) for ids in completions])) for name, completions, *_ in first if completions
        }
        everything |= lengths
        assert untouched == {str(i): 10.0 - len(ids) for i, ids in enumerate(prompts())}
        assert learned == answers[0][2]  # all ranks know the same
        np.testing.assert_equal(metrics, answers[0][4])
    assert [name for (first, _), *_ in answers for name, *_ in first] == [str(i) for i in range(6)]
    assert answers[0][2] == everything  # the prompt without completions isn't in it


def test_engine_metrics_count_all_ranks():
    stats = [RolloutStats(30, 2.0, 10, 1.5, 0.2, drafted=8, accepted=6), RolloutStats(10, 1.0, 30, 1.0, 0.6)]
    assert engine_metrics(stats) == {
        "rollout/idle_fraction": pytest.approx(0.5),
        "rollout/tokens_per_second": pytest.approx(20.0),
        "rollout/acceptance_rate": 0.75,
        "rollout/accepted_fraction": 0.15,
    }
    assert np.isnan(engine_metrics([RolloutStats(30, 2.0, 0, 1.5, float("nan"))])["rollout/idle_fraction"])


def _broken_off(where):
    """What a rank raises if a stop breaks off the waiting of rank 1."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.errors import Interrupted
    from nemo_aapo.rollout.collector import Collector

    def stopped(outcome):
        if parallel.rank() == 1:
            raise Interrupted("SIGTERM came")
        return outcome

    nothing = SimpleNamespace(wake=lambda: None, sleep=lambda: None, shares_weights=False, stats=None)
    waits = {"servers": lambda outcome: outcome, "rewards": lambda outcome: outcome, where: stopped}
    engine = SimpleNamespace(generate=lambda ids, *_: waits["servers"]([[] for _ in ids]), **vars(nothing))
    rewards = SimpleNamespace(submit=None, collect=lambda indices: waits["rewards"]({}))
    collector = Collector(engine, rewards, str)
    with pytest.raises(Interrupted) as broken:
        collector.collect([Prompt(str(i), ids, "", "", "") for i, ids in enumerate(prompts())], SPEC, SEEDS)
    return str(broken.value)


@pytest.mark.parametrize("where", ["servers", "rewards"])
def test_a_stop_that_one_rank_learns_of_as_it_waits_breaks_off_the_rollout_of_all(ranks, where):
    assert ranks.run(_broken_off, where, world=2) == ["SIGTERM came"] * 2
