"""Statistics against enumeration, closed forms and hand-made cases."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.evaluations import Evaluation
from cpugrpo_edu.record.stats import (
    _difference,
    accuracy_table,
    compare,
    difficulty_order,
    forgetting_matrix,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    score_interval,
    wilson_interval,
)

bools = st.lists(st.booleans(), min_size=1, max_size=40)


def evaluation(correct, label="before", domains=None, difficulties=None, **changes):
    n = len(correct)
    fields = dict(
        label=label,
        seed=0,
        temperature=0.0,
        item_ids=[f"item-{i}" for i in range(n)],
        domains=domains or ["arithmetic"] * n,
        difficulties=difficulties or ["basic"] * n,
        correct=list(correct),
        step_score=[0.5] * n,
        tokens=[10 + i for i in range(n)],
        finished=[True] * n,
        completions=[""] * n,
        seconds=1.0,
    )
    return Evaluation(**(fields | changes))


# Wilson


def test_wilson_equals_scipy_and_the_hand_value():
    for k, n in [(0, 10), (1, 10), (7, 10), (10, 10), (300, 3600)]:
        ours = wilson_interval(k, n)
        theirs = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    # p_hat = 1/2, n = 100, z = 1.96: centre 1/2, half = z sqrt(1/400 + z^2/40000) / (1 + z^2/100)
    assert wilson_interval(50, 100).low == pytest.approx(0.40383, abs=1e-5)


def test_wilson_coverage_by_enumeration():
    """Exact coverage = sum of the binomial probabilities of the k whose interval holds p."""
    for n in (20, 100):
        intervals = [wilson_interval(k, n) for k in range(n + 1)]
        coverage = []
        for p in np.linspace(0.02, 0.98, 97):
            pmf = stats.binom.pmf(np.arange(n + 1), n, p)
            coverage.append(
                sum(m for m, i in zip(pmf, intervals, strict=True) if i.low <= p <= i.high)
            )
        assert 0.94 < np.mean(coverage) < 0.97
        assert min(coverage) > 0.83
        # The textbook p_hat +- z*se covers far less: the test can tell the two apart.
        se = [np.sqrt(k / n * (1 - k / n) / n) for k in range(n + 1)]
        wald = sum(
            stats.binom.pmf(k, n, 0.02) for k in range(n + 1) if abs(k / n - 0.02) <= 1.96 * se[k]
        )
        assert wald < 0.9


@given(n=st.integers(1, 500), data=st.data(), confidence=st.floats(0.5, 0.999))
def test_wilson_is_ordered_in_bounds_and_symmetric(n, data, confidence):
    k = data.draw(st.integers(0, n))
    i, mirror = wilson_interval(k, n, confidence), wilson_interval(n - k, n, confidence)
    assert 0 <= i.low <= i.estimate <= i.high <= 1 and i.low < i.high
    assert (mirror.low, mirror.high) == pytest.approx((1 - i.high, 1 - i.low), abs=1e-9)


@pytest.mark.parametrize("k,n", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="not a count"):
        wilson_interval(k, n)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_must_be_a_probability(confidence):
    with pytest.raises(ValueError, match="0.95"):
        wilson_interval(1, 2, confidence)


# Paired bootstrap


def pairs(gained, lost, both, neither):
    was = [False] * gained + [True] * lost + [True] * both + [False] * neither
    now = [True] * gained + [False] * lost + [True] * both + [False] * neither
    return was, now


def test_bootstrap_agrees_with_the_normal_interval():
    was, now = pairs(500, 300, 1500, 1300)
    n, d = 3600, 200 / 3600
    se = np.sqrt((800 / n - d * d) / n)
    ours = paired_bootstrap(was, now, seed=1)
    assert ours.estimate == pytest.approx(d)
    assert ours.low == pytest.approx(d - 1.96 * se, abs=0.05 * se)
    assert ours.high == pytest.approx(d + 1.96 * se, abs=0.05 * se)
    narrow = paired_bootstrap(was, now, seed=1, confidence=0.5)
    assert narrow.low == pytest.approx(d - 0.6745 * se, abs=0.05 * se)


def test_bootstrap_equals_resampling_the_items():
    """The multinomial shortcut has the distribution of the literal resampling."""
    was, now = pairs(6, 2, 10, 7)
    change = np.array(now, int) - np.array(was, int)
    draws = np.random.default_rng(0).integers(0, len(change), size=(40_000, len(change)))
    literal = np.quantile(change[draws].mean(axis=1), [0.025, 0.975])
    ours = paired_bootstrap(was, now, samples=40_000, seed=3)
    assert (ours.low, ours.high) == pytest.approx(tuple(literal), abs=1 / len(change))


def test_bootstrap_coverage_by_simulation():
    rng = np.random.default_rng(0)
    truth, hits, runs = 0.10 - 0.06, 0, 300
    for run in range(runs):
        outcome = rng.choice(3, size=200, p=[0.10, 0.06, 0.84])
        i = paired_bootstrap(outcome == 1, outcome == 0, samples=500, seed=run)
        hits += i.low <= truth <= i.high
    assert 0.90 < hits / runs <= 0.99


# Tango's score interval, and when it replaces the bootstrap


def score_statistic(gained, lost, n, d):
    """Standard errors from d to the estimate, by maximizing the likelihood numerically."""

    def minus_log_likelihood(share_lost):
        shares = share_lost + d, share_lost, 1 - d - 2 * share_lost
        counts = gained, lost, n - gained - lost
        return -sum(k * np.log(max(p, 1e-300)) for k, p in zip(counts, shares, strict=True) if k)

    ends = max(0.0, -d), (1 - d) / 2
    share = optimize.minimize_scalar(
        minus_log_likelihood, bounds=ends, method="bounded", options={"xatol": 1e-12}
    ).x
    return ((gained - lost) / n - d) / np.sqrt((2 * share + d - d * d) / n)


@pytest.mark.parametrize("gained,lost,n", [(4, 1, 6), (0, 3, 20), (7, 7, 14), (90, 5, 300)])
def test_score_interval_is_what_the_score_test_does_not_reject(gained, lost, n):
    i = score_interval(*pairs(gained, lost, 0, n - gained - lost))
    assert i.low < i.estimate < i.high
    assert score_statistic(gained, lost, n, i.low) == pytest.approx(1.959964, abs=1e-4)
    assert score_statistic(gained, lost, n, i.high) == pytest.approx(-1.959964, abs=1e-4)
    mirrored = score_interval(*pairs(lost, gained, 0, n - gained - lost))
    assert (mirrored.low, mirrored.high) == pytest.approx((-i.high, -i.low))


@pytest.mark.parametrize("n", [1, 2, 12, 3600])
def test_score_interval_where_every_item_did_the_same(n):
    """(1 - d)^2 = z^2 (1 - d^2) / n: Wilson's interval for n of n, stretched from [0, 1] to
    [-1, 1], and never a point."""
    gained, lost = score_interval(*pairs(n, 0, 0, 0)), score_interval(*pairs(0, n, 0, 0))
    assert gained.high == 1 and lost.low == -1
    low = 2 * wilson_interval(n, n).low - 1
    assert (gained.low, lost.high) == pytest.approx((low, -low), abs=1e-6)


CELLS = {  # shares gained and lost in each of twelve cells
    "alike": [(0.3, 0.05)] * 12,
    "balanced": [(0.2, 0.2)] * 12,
    "rare": [(0.03, 0.01)] * 12,
    "different": [(0.02 + 0.05 * i, 0.05) for i in range(12)],
    "all or nothing": [(0.0, 0.0)] * 6 + [(0.95, 0.0)] * 6,
}


@pytest.mark.parametrize("per_cell", [1, 2, 3, 5, 20, 100])
@pytest.mark.parametrize("shares", CELLS)
def test_compare_covers_the_truth_in_small_cells(per_cell, shares):
    """At least 95 % of 600 test sets, up to three standard errors of that share (0.027)."""
    rng = np.random.default_rng(11)
    truth = np.mean([gained - lost for gained, lost in CELLS[shares]])
    cell = np.repeat(np.arange(12), per_cell)
    runs, hits = 600, 0
    for run in range(runs):
        counts = [rng.multinomial(per_cell, [g, x, 1 - g - x]) for g, x in CELLS[shares]]
        change = np.concatenate([np.repeat([1, -1, 0], count) for count in counts])
        row = _difference(change < 0, change > 0, cell, 500, run, 0.95)
        hits += row["low"] - 1e-9 <= truth <= row["high"] + 1e-9
    assert hits / runs >= 0.95 - 0.027


@pytest.mark.parametrize("gained", [0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 20, 100])
def test_compare_covers_the_truth_in_one_cell(gained, n):
    """Exactly, by adding up the probabilities of all counts; a score interval may fall short of
    the nominal coverage at single values, Wilson's too."""
    covered = 0.0
    for k in range(n + 1):
        row = _difference(*map(np.array, pairs(k, 0, 0, n - k)), np.zeros(n), 500, 0, 0.95)
        if row["low"] <= gained <= row["high"]:
            covered += stats.binom.pmf(k, n, gained)
    assert covered >= 0.89


def test_large_changing_cells_keep_their_stratified_bootstrap():
    cells = np.repeat([0, 1], 40)
    was, now = (np.array(side) for side in pairs(30, 10, 20, 20))
    row = _difference(was, now, cells, 2000, 3, 0.95)
    ours = paired_bootstrap(was, now, samples=2000, seed=3, strata=cells)
    assert (row["low"], row["high"]) == (ours.low, ours.high)


def test_cells_that_moved_as_one_are_no_proof():
    """One cell all gained, one all lost: the stratified bootstrap says [0, 0]."""
    was, now = (np.array(side) for side in pairs(30, 30, 0, 0))
    row = _difference(was, now, np.repeat([0, 1], 30), 500, 0, 0.95)
    assert row["low"] < -0.1 and row["high"] > 0.1


def test_pairing_narrows_the_interval():
    """Same two accuracies; few items change sides against many."""
    few = paired_bootstrap(*pairs(20, 0, 500, 480), seed=0)
    many = paired_bootstrap(*pairs(260, 240, 260, 240), seed=0)
    assert few.estimate == pytest.approx(many.estimate)
    assert few.high - few.low < 0.5 * (many.high - many.low)


def test_strata_remove_the_variance_between_them():
    """One cell all gained, one all lost: within cells nothing is left to vary."""
    was, now = [False] * 10 + [True] * 10, [True] * 10 + [False] * 10
    cells = ["a"] * 10 + ["b"] * 10
    stratified = paired_bootstrap(was, now, seed=0, strata=cells)
    assert (stratified.low, stratified.high) == (0, 0)
    assert paired_bootstrap(was, now, seed=0).low < -0.2


@given(outcomes=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=50)
def test_bootstrap_properties(outcomes):
    was, now = [list(side) for side in zip(*outcomes, strict=True)]
    i = paired_bootstrap(was, now, samples=200, seed=7)
    assert -1 <= i.low <= i.high <= 1
    assert i.estimate == pytest.approx(np.mean(now) - np.mean(was))
    assert i == paired_bootstrap(np.array(was), np.array(now), samples=200, seed=7)
    assert mcnemar(was, now) == mcnemar(now, was)


@pytest.mark.parametrize(
    "was,now,kwargs,message",
    [
        ([True], [True, False], {}, "shapes"),
        ([], [], {}, "non-empty"),
        ([0.3], [1.0], {}, "right or wrong"),
        ([True], [True], {"samples": 0}, "samples is 0"),
        ([True], [True], {"confidence": 2}, "confidence"),
        ([True], [True], {"strata": ["a", "b"]}, "strata"),
    ],
)
def test_bootstrap_refuses_bad_input(was, now, kwargs, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(was, now, **({"seed": 0} | kwargs))


# McNemar


def test_mcnemar_hand_values():
    assert mcnemar(*pairs(0, 0, 3, 3)) == 1.0
    assert mcnemar(*pairs(5, 0, 3, 3)) == pytest.approx(2 / 32)  # 2 * (1/2)^5
    assert mcnemar(*pairs(3, 1, 0, 0)) == pytest.approx(10 / 16)  # 2 * (1 + 4) / 2^4
    assert mcnemar(*pairs(2, 2, 9, 9)) == 1.0


@given(gained=st.integers(0, 30), lost=st.integers(0, 30), same=st.integers(0, 30))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(gained, lost, same):
    if gained + lost == 0:
        return
    enumerated = min(
        1.0, 2 * sum(stats.binom.pmf(range(min(gained, lost) + 1), gained + lost, 0.5))
    )
    assert mcnemar(*pairs(gained, lost, same, same)) == pytest.approx(enumerated)


# Seeds


def test_over_seeds_hand_values():
    s = over_seeds([1.0, 2.0, 3.0])
    assert (s.n, s.mean, s.sd) == (3, 2.0, 1.0)  # ddof = 0 would give 0.816
    assert s.high - s.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-5)  # t(0.975; 2)
    with pytest.raises(ValueError, match="at least 2 runs"):
        over_seeds([1.0])


# Tables


def test_accuracy_table_counts_each_cell():
    e = evaluation(
        [True, False, True, True],
        domains=["b", "a", "a", "a"],
        difficulties=["advanced", "basic", "basic", "advanced"],
        step_score=[1.0, 0.0, 0.5, 1.0],
        finished=[True, False, True, True],
    )
    table = accuracy_table(e)
    assert table["overall"]["n"] == 4 and table["overall"]["accuracy"] == 0.75
    cell = table["cells"]["a"]["basic"]
    assert (cell["n"], cell["correct"], cell["accuracy"]) == (2, 1, 0.5)
    assert (cell["step_score"], cell["tokens"], cell["finished"]) == (0.25, 11.5, 0.5)
    assert cell["low"] == wilson_interval(1, 2).low
    assert list(table["by_difficulty"]) == ["basic", "advanced"]
    assert table["cells"]["b"].keys() == {"advanced"}  # an empty cell is left out
    assert sum(row["n"] for row in table["by_domain"].values()) == 4
    assert json.loads(json.dumps(table)) == table


def test_tables_refuse_ragged_or_empty_evaluations():
    with pytest.raises(UserError, match="tokens"):
        accuracy_table(evaluation([True, False], tokens=[1]))
    with pytest.raises(UserError, match="0 items"):
        accuracy_table(evaluation([]))


def test_difficulties_run_from_easy_to_hard():
    assert difficulty_order(["zeta", "advanced", "basic", "alpha", "basic"]) == [
        "basic",
        "advanced",
        "alpha",
        "zeta",
    ]


# Compare


def test_compare_reports_each_margin():
    was, now = pairs(12, 2, 3, 3)
    level = ["basic"] * 10 + ["advanced"] * 10
    before, after = (
        evaluation(was, difficulties=level),
        evaluation(now, "after", difficulties=level),
    )
    result = compare(before, after)
    assert (result["before"], result["after"]) == ("before", "after")
    overall = result["overall"]
    assert (overall["gained"], overall["lost"], overall["n"]) == (12, 2, 20)
    assert overall["difference"] == pytest.approx(0.5)
    assert overall["p_value"] == pytest.approx(mcnemar(was, now))
    assert overall["significant"] and overall["low"] > 0
    assert result["by_difficulty"]["basic"]["gained"] == 10
    assert result["cells"]["arithmetic"]["advanced"]["gained"] == 2
    assert not result["cells"]["arithmetic"]["advanced"]["significant"]
    assert json.loads(json.dumps(result)) == result
    back = compare(after, before)["overall"]
    assert back["difference"] == pytest.approx(-0.5) and back["significant"]


def test_compare_asks_both_tests_before_it_says_significant():
    """4 of 20 gained, none lost: the bootstrap excludes 0, the exact test (p = 1/8) does not."""
    row = compare(*(evaluation(side) for side in pairs(4, 0, 8, 8)))["overall"]
    assert row["low"] > 0 and row["p_value"] == pytest.approx(1 / 8)
    assert not row["significant"]


def test_no_change_is_not_proof_of_equality():
    same = evaluation([True] * 30)
    row = compare(same, same)["overall"]
    assert row["difference"] == 0 and not row["significant"]
    z2 = 1.959964**2  # d^2 = z^2 d (1 - d) / n, if all who change change the same way
    assert row["high"] == pytest.approx(z2 / (30 + z2), abs=1e-6)
    assert row["low"] == pytest.approx(-row["high"])


@pytest.mark.parametrize(
    "ids", [["item-1", "item-0"], ["item-0", "other"], ["item-0", "item-1", "item-2"]]
)
def test_compare_refuses_other_problems(ids):
    with pytest.raises(UserError, match="not the same problems"):
        compare(evaluation([True, False]), evaluation([True] * len(ids), "after", item_ids=ids))


# Forgetting


LEVELS = ["basic"] * 10 + ["intermediate"] * 10 + ["advanced"] * 10


def stage(label, basic, intermediate, advanced):
    correct = [i < k for k in (basic, intermediate, advanced) for i in range(10)]
    return evaluation(correct, label, difficulties=LEVELS)


def test_forgetting_matrix_by_hand():
    rows = [
        stage("before", 9, 5, 0),
        stage("after basic", 7, 6, 1),
        stage("after intermediate", 8, 4, 2),
        stage("after advanced", 3, 6, 4),
    ]
    matrix = forgetting_matrix(rows)
    assert matrix["columns"] == ["basic", "intermediate", "advanced"]
    assert matrix["accuracy"][2] == pytest.approx([0.8, 0.4, 0.2])
    lost = matrix["forgetting"]
    # Basic was 9/10 before its own training: that does not count; the best from then on is 8/10.
    assert lost["basic"]["points"] == pytest.approx(50) and (
        lost["basic"]["best"] == "after intermediate"
    )
    # Its 6/10 came before its training; it was trained to 4/10 and later helped: negative.
    assert lost["intermediate"]["points"] == pytest.approx(-20)
    assert lost["advanced"] is None
    assert matrix["mean_points"] == pytest.approx(15)
    assert lost["basic"]["points_low"] <= 50 <= lost["basic"]["points_high"]
    assert json.loads(json.dumps(matrix)) == matrix


def test_forgetting_in_other_orders():
    rows = [
        stage("before", 5, 5, 5),
        stage("after advanced", 5, 5, 9),
        stage("after basic", 9, 5, 4),
    ]
    lost = forgetting_matrix(rows)["forgetting"]
    assert lost["advanced"]["points"] == pytest.approx(50)
    assert lost["basic"] is None and lost["intermediate"] is None  # last, and never, trained
    mixed = [stage("before", 9, 9, 9), stage("stage 1", 8, 5, 5), stage("stage 2", 6, 5, 5)]
    assert forgetting_matrix(mixed)["forgetting"]["basic"]["points"] == pytest.approx(20)
    told = forgetting_matrix(mixed, [[], ["advanced"], ["basic"]])["forgetting"]
    assert told["basic"] is None and told["advanced"]["points"] == 0


def test_forgetting_of_an_unfinished_run_and_of_none():
    only = forgetting_matrix([stage("before", 1, 1, 1)])
    assert only["mean_points"] is None and set(only["forgetting"].values()) == {None}
    with pytest.raises(ValueError, match="at least one"):
        forgetting_matrix([])
    with pytest.raises(ValueError, match="one for each"):
        forgetting_matrix([stage("before", 1, 1, 1)], [])
