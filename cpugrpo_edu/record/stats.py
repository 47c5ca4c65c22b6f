"""How sure are we? Intervals and paired tests for exact-match accuracies.

Two questions, two tools. "How accurate is this model?" has an interval of its
own (Wilson). "Did training change it?" is asked of the *same* problems before
and after, so it is answered item by item: an interval for the difference (a
bootstrap, or Tango's score interval where the bootstrap fails), and McNemar's
exact test on the items that changed sides. Both look at the sampling of problems
only; how much a different training seed would change the answer is a third
question, see :func:`over_seeds`.

Accuracies and their differences are fractions in [0, 1] and [-1, 1]; only keys
named ``points`` are percentage points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.evaluations import Evaluation

Bools = NDArray[np.bool_]

LEAST_STRATUM, LEAST_VARIED = 20, 10
"""Where the bootstrap begins to hold: items in a stratum, and items that vary within strata.
Found by simulation, see the tests of coverage."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedSummary:
    """Mean and spread over independent runs; ``sd`` divides by n - 1 (ddof = 1)."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


def _check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence is {confidence}, but must lie between 0 and 1; use 0.95 for 95 %"
        )
    return confidence


def wilson_interval(k: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson (1927) score interval for ``k`` successes in ``n`` independent trials.

    It solves (p_hat - p)^2 = z^2 p (1 - p) / n for p, so unlike p_hat +- z*se it stays in
    [0, 1] and does not collapse to a point at k = 0 or k = n. Without continuity correction:
    coverage is the stated one on average over p. ``k`` may be the sum of n values in [0, 1]: they
    vary by at most p (1 - p), so the interval is then on the safe side. Raises ValueError if k of
    n is not a count.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} right of {n} is not a count: k must lie in 0..n, and n above 0")
    z = float(stats.norm.ppf(0.5 + _check_confidence(confidence) / 2))
    p, share = k / n, z * z / n
    centre, half = p + share / 2, (share * (p * (1 - p) + share / 4)) ** 0.5
    low, high = (centre - half) / (1 + share), (centre + half) / (1 + share)
    return Interval(p, low if k else 0.0, high if k < n else 1.0)


def _outcomes(before: ArrayLike, after: ArrayLike) -> tuple[Bools, Bools]:
    was, now = np.asarray(before), np.asarray(after)
    if was.ndim != 1 or was.shape != now.shape or was.size == 0:
        raise ValueError(
            f"paired outcomes have shapes {was.shape} and {now.shape}; "
            "give two equally long, non-empty lists about the same items in the same order"
        )
    if not (np.isin(was, (0, 1)).all() and np.isin(now, (0, 1)).all()):
        raise ValueError("paired outcomes must be right or wrong (True/False or 1/0) for each item")
    return was.astype(bool), now.astype(bool)


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    *,
    samples: int = 10_000,
    seed: int,
    confidence: float = 0.95,
    strata: ArrayLike | None = None,
) -> Interval:
    """Percentile bootstrap interval of accuracy(after) - accuracy(before) on the same items.

    A resample of n items with replacement only matters through how many of them were gained
    (wrong, then right), lost (right, then wrong) or unchanged. These three counts are
    multinomial, so a resample is one multinomial draw, however large n is (Efron & Tibshirani
    1993, ch. 13). With ``strata`` (one label an item) items are redrawn within their stratum,
    which fits a test set whose cells have fixed sizes.

    The bootstrap cannot see beyond its sample. Where all items of each stratum did the same,
    every resample is equal and the interval is a point; with few items in a stratum it is too
    narrow, by (n - 1) / n in variance (:func:`compare` takes :func:`score_interval` in both
    cases). Raises ValueError if the outcomes are not two equally long lists of right or wrong.
    """
    was, now = _outcomes(before, after)
    if samples < 1:
        raise ValueError(f"samples is {samples}, but at least 1 resample is needed; use 10000")
    tail = (1 - _check_confidence(confidence)) / 2
    labels = np.zeros(was.shape, dtype=int) if strata is None else np.asarray(strata)
    if labels.shape != was.shape:
        raise ValueError(f"strata has shape {labels.shape}, but needs one label for each item")
    rng = np.random.default_rng(seed)
    net = np.zeros(samples)
    for label in np.unique(labels):
        inside = labels == label
        n = int(inside.sum())
        gained, lost = int((now & ~was)[inside].sum()), int((was & ~now)[inside].sum())
        draws = rng.multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], size=samples)
        net += draws[:, 0] - draws[:, 1]
    low, high = np.quantile(net / was.size, [tail, 1 - tail])
    return Interval(float(now.mean() - was.mean()), float(low), float(high))


def score_interval(before: ArrayLike, after: ArrayLike, confidence: float = 0.95) -> Interval:
    """Tango's (1998) score interval of accuracy(after) - accuracy(before) on the same items.

    Wilson's interval for paired data: the differences d that a score test would not reject, with
    the variance that outcomes would have if d were true. It never collapses to a point and holds
    its coverage for a handful of items (Fagerland, Lydersen & Laake 2014). It pools the strata,
    so it is on the safe side where they differ. Raises ValueError as :func:`paired_bootstrap`
    does.
    """
    was, now = _outcomes(before, after)
    z = float(stats.norm.ppf(0.5 + _check_confidence(confidence) / 2))
    n, gained, lost = was.size, int((now & ~was).sum()), int((was & ~now).sum())
    estimate = (gained - lost) / n

    def score(d: float) -> float:
        """How many standard errors the estimate lies above a true difference d."""
        # The share of lost items that is most likely given d, the root of 2 n q^2 + b q + c
        b, c = (2 * n - gained + lost) * d - gained - lost, -lost * d * (1 - d)
        share = (max(b * b - 8 * n * c, 0.0) ** 0.5 - b) / (4 * n)
        variance = max(2 * share + d * (1 - d), 1e-30) / n
        return (estimate - d) / variance**0.5

    edge = 1 - 1e-9  # at -1 and 1 themselves the variance is 0
    low = optimize.brentq(lambda d: score(d) - z, -edge, estimate) if score(-edge) > z else -1.0
    high = optimize.brentq(lambda d: score(d) + z, estimate, edge) if score(edge) < -z else 1.0
    return Interval(estimate, float(low), float(high))


def bootstrap_holds(before: ArrayLike, after: ArrayLike, strata: ArrayLike) -> bool:
    """Whether :func:`paired_bootstrap` can be trusted: no stratum (a label an item) is smaller than
    ``LEAST_STRATUM``, and at least ``LEAST_VARIED`` items differ from what most of their stratum
    did (gained, lost, or unchanged)."""
    was, now = _outcomes(before, after)
    labels, change = np.asarray(strata), now.astype(int) - was
    counts = [np.unique(change[labels == x], return_counts=True)[1] for x in np.unique(labels)]
    varied = sum(int(count.sum() - count.max()) for count in counts)
    return min(count.sum() for count in counts) >= LEAST_STRATUM and varied >= LEAST_VARIED


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar 1947).

    Under "training changed nothing", each item that changed sides was as likely
    gained as lost: gained ~ Binomial(gained + lost, 1/2). No change at all: p = 1.
    """
    was, now = _outcomes(before, after)
    gained, lost = int((now & ~was).sum()), int((was & ~now).sum())
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> SeedSummary:
    """Mean over runs with different seeds, sd (ddof = 1), and Student's t interval."""
    if len(values) < 2:
        raise ValueError(f"a spread over seeds needs at least 2 runs, not {len(values)}")
    n, mean, sd = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.5 + _check_confidence(confidence) / 2, df=n - 1)) * sd / n**0.5
    return SeedSummary(n, mean, sd, mean - half, mean + half)


def difficulty_order(names: Iterable[str]) -> list[str]:
    """The distinct difficulties, easy to hard; unknown ones after them, by name."""
    rank: dict[str, int] = {name: i for i, name in enumerate(DIFFICULTIES)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def _breakdown(evaluation: Evaluation, row: Callable[[Bools], dict[str, Any]]) -> dict[str, Any]:
    """Apply ``row`` to the mask of all items, of each margin, and of each domain x difficulty."""
    domain, level = np.array(evaluation.domains), np.array(evaluation.difficulties)
    domains, levels = sorted(set(evaluation.domains)), difficulty_order(evaluation.difficulties)
    return {
        "overall": row(np.ones(domain.shape, dtype=bool)),
        "by_domain": {d: row(domain == d) for d in domains},
        "by_difficulty": {x: row(level == x) for x in levels},
        "cells": {
            d: {x: row(mask) for x in levels if (mask := (domain == d) & (level == x)).any()}
            for d in domains
        },
    }


def _check_evaluation(evaluation: Evaluation) -> None:
    n = len(evaluation.item_ids)
    per_item = ("domains", "difficulties", "correct", "grade", "step_score", "tokens", "finished")
    wrong = [name for name in per_item if len(getattr(evaluation, name)) != n]
    if n == 0 or wrong:
        raise UserError(
            f"evaluation {evaluation.label!r} has {n} items"
            + (f" but another number of {', '.join(wrong)}" if wrong else "")
            + "; evaluate at least one problem and keep one entry for each"
        )


def accuracy_table(evaluation: Evaluation, confidence: float = 0.95) -> dict[str, Any]:
    """Accuracy with its Wilson interval: overall, by margin, by domain x difficulty cell.

    Returns ``{"label", "seed", "temperature", "seconds", "confidence", "overall": row,
    "by_domain": {domain: row}, "by_difficulty": {difficulty: row},
    "cells": {domain: {difficulty: row}}}`` with ``row = {"n", "correct", "accuracy",
    "low", "high", "grade", "step_score", "tokens", "finished"}``: accuracy is the share
    with full marks, grade the mean grade, the same unless a verifier gives parts; step_score is the
    mean in
    [0, 1], tokens the mean per completion, finished the share that ended by itself.
    """
    _check_evaluation(evaluation)
    correct = np.array(evaluation.correct, dtype=bool)
    means = {
        name: np.array(getattr(evaluation, name), dtype=float)
        for name in ("grade", "step_score", "tokens", "finished")
    }

    def row(mask: Bools) -> dict[str, Any]:
        n, k = int(mask.sum()), int(correct[mask].sum())
        wilson = wilson_interval(k, n, confidence)
        return {
            "n": n,
            "correct": k,
            "accuracy": wilson.estimate,
            "low": wilson.low,
            "high": wilson.high,
            **{name: float(values[mask].mean()) for name, values in means.items()},
        }

    return {
        "label": evaluation.label,
        "seed": evaluation.seed,
        "temperature": evaluation.temperature,
        "seconds": evaluation.seconds,
        "confidence": confidence,
        **_breakdown(evaluation, row),
    }


def is_graded(row: dict[str, Any]) -> bool:
    """Whether the verifier gave grades between 0 and 1: a row of `accuracy_table`."""
    return bool(abs(row.get("grade", row["accuracy"]) - row["accuracy"]) > 1e-9)


def _check_same_items(evaluations: Sequence[Evaluation]) -> None:
    first = evaluations[0]
    for other in evaluations:
        _check_evaluation(other)
        if other.item_ids != first.item_ids:
            shared = len(set(first.item_ids) & set(other.item_ids))
            raise UserError(
                f"{first.label!r} and {other.label!r} are not the same problems in the same order "
                f"({len(first.item_ids)} and {len(other.item_ids)} items, {shared} shared); "
                "evaluate both on one problem set"
            )


def _difference(
    was: Bools, now: Bools, strata: NDArray[Any], samples: int, seed: int, confidence: float
) -> dict[str, Any]:
    """One row of :func:`compare`, of outcomes and strata of shape (items,)."""
    gained, lost, n = int((now & ~was).sum()), int((was & ~now).sum()), was.size
    if bootstrap_holds(was, now, strata):
        interval = paired_bootstrap(
            was, now, samples=samples, seed=seed, confidence=confidence, strata=strata
        )
    else:
        interval = score_interval(was, now, confidence)
    p_value = mcnemar(was, now)
    return {
        "n": n,
        "before": float(was.mean()),
        "after": float(now.mean()),
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "gained": gained,
        "lost": lost,
        "p_value": p_value,
        # Both must agree: an exact test in small cells, and one that knows the strata.
        "significant": p_value < 1 - confidence and not interval.low <= 0 <= interval.high,
    }


def compare(
    before: Evaluation,
    after: Evaluation,
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Paired comparison of two evaluations of the same problems.

    Returns ``{"before": label, "after": label, "confidence", "samples", "overall",
    "by_domain", "by_difficulty", "cells"}``, shaped as in :func:`accuracy_table`, with
    ``row = {"n", "before", "after", "difference", "low", "high", "gained", "lost",
    "p_value", "significant"}``. The interval is :func:`paired_bootstrap` stratified by
    cell where it holds, else :func:`score_interval`; p is :func:`mcnemar`; ``significant``
    asks that both exclude "no change". Rows are not corrected for looking at many of them.

    Raises UserError if the two do not hold the same items in the same order.
    """
    _check_same_items([before, after])
    _check_confidence(confidence)
    was, now = _outcomes(before.correct, after.correct)
    pairs = list(zip(before.domains, before.difficulties, strict=True))
    number = {pair: i for i, pair in enumerate(sorted(set(pairs)))}
    strata = np.array([number[pair] for pair in pairs])
    return {
        "before": before.label,
        "after": after.label,
        "confidence": confidence,
        "samples": samples,
        **_breakdown(
            before,
            lambda mask: _difference(was[mask], now[mask], strata[mask], samples, seed, confidence),
        ),
    }


def _stages_from_labels(labels: Sequence[str], columns: Sequence[str]) -> list[set[str]]:
    named = [{x for x in columns if x in label.split()} for label in labels]
    return named if any(named) else [set(), *(set(columns) for _ in labels[1:])]


def _forgotten(
    right: Bools,
    taught: int,
    labels: Sequence[str],
    strata: NDArray[Any],
    samples: int,
    seed: int,
    confidence: float,
) -> dict[str, Any] | None:
    """One difficulty of :func:`forgetting_matrix`: ``right`` is (evaluations, items), ``taught``
    the first evaluation after its training."""
    if taught >= len(labels) - 1:
        return None
    best = taught + int(right[taught:-1].mean(axis=1).argmax())
    # Backwards in time, the last as "before" and the best as "after": a loss counts as positive.
    row = _difference(right[-1], right[best], strata, samples, seed, confidence)
    return {
        "points": 100 * row["difference"],
        "points_low": 100 * row["low"],
        "points_high": 100 * row["high"],
        "p_value": row["p_value"],
        "significant": row["significant"],
        "best": labels[best],
    }


def forgetting_matrix(
    evaluations: Sequence[Evaluation],
    trained: Sequence[Iterable[str]] | None = None,
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Accuracy after each stage by difficulty, and how much of it was lost by the end.

    ``evaluations`` are in the order of training, the first one before it, all of the same
    items. ``trained[i]`` holds the difficulties trained between evaluations i - 1 and i; without
    it they are read from labels such as "after basic", and labels that name no difficulty at all
    mean that every stage trained all of them. (Runs pass it, since with replay every stage
    trains every difficulty.)

    Forgetting of difficulty j follows Chaudhry et al. 2018 (Riemannian Walk, eq. 3),
    f_j = max_l a[l, j] - a[last, j], with l from the stage that trained j up to the last but
    one: what was not yet taught cannot be forgotten. It is negative if later stages helped, and
    None for what only the last stage trained. The paired interval takes the best l as given,
    which makes forgetting look slightly too certain.

    Returns ``{"rows": labels, "columns": difficulties, "accuracy": [row][column],
    "n": {difficulty: items}, "forgetting": {difficulty: None or {"points", "points_low",
    "points_high", "p_value", "significant", "best": label}}, "mean_points": their mean
    or None, "confidence"}``. Points are percentage points.
    """
    if not evaluations:
        raise ValueError("a forgetting matrix needs at least one evaluation; none was given")
    _check_same_items(evaluations)
    _check_confidence(confidence)
    labels = [evaluation.label for evaluation in evaluations]
    columns = difficulty_order(evaluations[0].difficulties)
    stages = _stages_from_labels(labels, columns) if trained is None else list(map(set, trained))
    if len(stages) != len(labels):
        raise ValueError(
            f"trained has {len(stages)} entries for {len(labels)} evaluations; give one for each"
        )
    correct = np.array([evaluation.correct for evaluation in evaluations], dtype=bool)
    level, domain = np.array(evaluations[0].difficulties), np.array(evaluations[0].domains)
    accuracy, forgetting = [], {}
    for x in columns:
        right = correct[:, level == x]
        accuracy.append(right.mean(axis=1))
        taught = next((i for i, names in enumerate(stages) if x in names), len(labels))
        settings = (samples, seed, confidence)
        forgetting[x] = _forgotten(right, taught, labels, domain[level == x], *settings)
    known = [cell["points"] for cell in forgetting.values() if cell]
    return {
        "rows": labels,
        "columns": columns,
        "accuracy": np.stack(accuracy, axis=1).tolist(),
        "n": {x: int((level == x).sum()) for x in columns},
        "forgetting": forgetting,
        "mean_points": float(np.mean(known)) if known else None,
        "confidence": confidence,
    }


def working_share(evaluation: Evaluation) -> dict[str, float | int | None]:
    """How often the model shows its working, and how right it is with and without.

    Tells a change of habit (working instead of a bare answer) from a change of skill.
    """
    worked = [
        len([line for line in text.splitlines() if line.strip()]) > 1
        for text in evaluation.completions
    ]

    def accuracy(which: bool) -> float | None:
        chosen = [c for c, w in zip(evaluation.correct, worked, strict=True) if w is which]
        return sum(chosen) / len(chosen) if chosen else None

    return {
        "n": len(worked),
        "share_with_working": sum(worked) / len(worked),
        "accuracy_with_working": accuracy(True),
        "accuracy_bare": accuracy(False),
    }
