"""Estimators against brute force and closed forms: avg@k, pass@k, maj@k, their errors, paired tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nemo_aapo.evaluation.estimators import (
    average,
    macro_difference,
    majority,
    over_problems,
    paired_difference,
    pass_at,
    sampling_error,
    student_t_quantile,
)


@pytest.fixture
def correct() -> np.ndarray:
    """Verdicts of 12 problems of all difficulties, 6 completions each."""
    generator = np.random.default_rng(5)
    return generator.random((12, 6)) < np.linspace(0, 1, 12)[:, None]


def test_pass_at_k_is_the_mean_over_all_subsets_of_k(correct):
    for k in range(1, 7):
        subsets = list(itertools.combinations(range(6), k))
        each = np.array([[row[list(subset)].any() for subset in subsets] for row in correct]).mean(axis=1)
        estimate = pass_at(correct, k)
        assert estimate.value == pytest.approx(each.mean())
        assert estimate.stderr == pytest.approx(each.std(ddof=1) / math.sqrt(12))
    assert pass_at(correct, 1) == pytest.approx(average(correct))
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            pass_at(correct, k)


def test_the_standard_errors_are_those_that_repetition_shows():
    """Over problems: problems and completions drawn anew. Of sampling: completions of the same problems drawn anew."""
    generator = np.random.default_rng(3)
    difficulty = generator.random(40)
    same = [average(generator.random((40, 8)) < difficulty[:, None]).value for _ in range(2000)]
    new = [average(generator.random((40, 8)) < generator.random((40, 1))).value for _ in range(2000)]
    draws = [generator.random((40, 8)) < difficulty[:, None] for _ in range(200)]
    assert np.mean([sampling_error(draw) for draw in draws]) == pytest.approx(np.std(same), rel=0.05)
    problems = [average(generator.random((40, 8)) < generator.random((40, 1))).stderr for _ in range(200)]
    assert np.mean(problems) == pytest.approx(np.std(new), rel=0.05)


def test_a_single_problem_or_sample_has_no_error():
    assert math.isnan(over_problems(np.array([0.5])).stderr)
    assert math.isnan(sampling_error(np.array([[True], [False]])))


def test_the_majority_is_what_most_completions_say_with_ties_shared_and_silence_without_a_vote():
    answers = [["7", "7", "8"], ["1", "2", None], ["a", "a", "b"], [None, None, None], ["3", "3", "3"]]
    correct = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1], [1, 0, 1]], dtype=bool)
    #         right     a tie of one right    wrong     nobody votes  one answer, judged 2 : 1
    assert majority(answers, correct).value == pytest.approx((1 + 0.5 + 0 + 0 + 2 / 3) / 5)


def test_a_completion_that_could_not_be_judged_is_neither_right_nor_wrong(correct):
    """Every figure is that of the other completions; a problem with too few of them is left out."""
    generator = np.random.default_rng(8)
    seen = np.where(generator.random(correct.shape) < 0.3, np.nan, correct)
    seen[3], seen[4, 1:] = np.nan, np.nan
    rows = [row[~np.isnan(row)].astype(bool) for row in seen]
    assert average(seen).value == pytest.approx(np.mean([row.mean() for row in rows if len(row)]))
    for k in range(1, 7):
        each = [pass_at(row[None], k).value for row in rows if len(row) >= k]
        assert pass_at(seen, k).value == pytest.approx(np.mean(each), nan_ok=True)
    spread = [row.var(ddof=1) / len(row) for row in rows if len(row) > 1]
    assert sampling_error(seen) == pytest.approx(math.sqrt(sum(spread)) / len(spread))
    answers = [["7", "7", "8"], ["1", "1", "2"], ["1", "2", None]]
    verdicts = np.array([[math.nan, math.nan, 1.0], [math.nan, 1.0, 0.0], [math.nan] * 3])
    assert majority(answers, verdicts).value == pytest.approx((1 + 0.5) / 2)
    assert math.isnan(average(np.full((2, 2), math.nan)).value)


def test_a_paired_difference_is_seeded_and_its_interval_covers_the_truth():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        a = generator.random(60)
        d = paired_difference(a, a + generator.normal(0.1, 0.3, 60), seed=4, resamples=400)
        covered += d.low <= 0.1 <= d.high
    assert 0.88 <= covered / 150 <= 1.0
    b = generator.random(60)
    assert paired_difference(a, b, seed=4) == paired_difference(a, b, seed=4)
    assert paired_difference(a, b, seed=4).stderr == pytest.approx((b - a).std(ddof=1) / math.sqrt(60))


def test_the_sign_flip_test_is_exact_for_few_problems_and_agrees_for_many():
    a, b = np.zeros(5), np.array([1, 1, 1, 1, 0.0])
    assert paired_difference(a, b, seed=0).p_value == pytest.approx(2 / 16)  # of 2**4 patterns two are as extreme
    assert paired_difference(a, a, seed=0).p_value == 1.0
    generator = np.random.default_rng(2)
    p = [
        paired_difference(np.zeros(40), generator.choice([-1.0, 1.0], 40), seed=9, resamples=500).p_value
        for _ in range(300)
    ]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.06)  # no difference: p is as rare as it says


def test_the_mean_over_benchmarks_weighs_them_alike():
    generator = np.random.default_rng(6)
    strata = [(generator.random(n), generator.random(n)) for n in (3, 7)]
    d = macro_difference(strata, seed=0, resamples=200)
    differences = [b - a for a, b in strata]
    assert (d.value, d.problems) == (pytest.approx(np.mean([x.mean() for x in differences])), 10)
    flipped = [
        abs(np.mean([(x * signs[part]).mean() for x, part in zip(differences, (slice(3), slice(3, 10)), strict=True)]))
        for signs in (np.array(pattern) for pattern in itertools.product((-1, 1), repeat=10))
    ]
    assert d.p_value == pytest.approx(np.mean(np.array(flipped) >= abs(d.value) - 1e-12))


def test_students_quantiles_are_those_of_the_tables():
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 30: 2.04227}
    for df, quantile in table.items():
        assert student_t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-5)
    assert student_t_quantile(0.5, 4) == pytest.approx(0, abs=1e-9)
