"""Several completions of each problem: pass@k and the majority vote, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cpugrpo_edu.record.evaluations import SampledEvaluation
from cpugrpo_edu.record.stats import difficulty_order, wilson_interval


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k completions is right, when ``correct`` of n were.

    1 - C(n - c, k) / C(n, k): the share of the k-subsets of the sample that hold a right one. It is
    unbiased for any k up to n, where 1 - (1 - c/n)^k is too low (Chen et al. 2021,
    arXiv:2107.03374, eq. 1). Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} of {correct} right in {n}: the right ones must lie in 0..n, k in 1..n"
        )
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """1, 2, 4 ... and n: the k that tables show."""
    return sorted({n, *(2**i for i in range(n.bit_length()))})


def sampled_table(evaluation: SampledEvaluation, confidence: float = 0.95) -> dict[str, Any]:
    """pass@k for the k of ``ks`` and the accuracy of the majority vote, overall and by difficulty.

    Returns ``{"label", "seed", "temperature", "seconds", "confidence", "samples", "overall": part,
    "by_difficulty": {difficulty: part}}`` with ``part = {"n": problems, "pass_at_k": {"1": row,
    ...}, "majority": row}`` and ``row = {"estimate", "low", "high"}``. The completions of a problem
    are not independent, so intervals count problems: Wilson's, of the mean over problems.
    """
    level = np.array(evaluation.difficulties)
    right = [sum(correct) for correct in evaluation.correct]

    def row(values: Sequence[float]) -> dict[str, float]:
        return asdict(wilson_interval(math.fsum(values), len(values), confidence))

    def part(items: Sequence[int]) -> dict[str, Any]:
        n = evaluation.n
        passes = {str(k): row([pass_at_k(n, right[i], k) for i in items]) for k in ks(n)}
        vote = row([evaluation.majority_correct[i] for i in items])
        return {"n": len(items), "pass_at_k": passes, "majority": vote}

    return {
        "label": evaluation.label,
        "seed": evaluation.seed,
        "temperature": evaluation.temperature,
        "seconds": evaluation.seconds,
        "confidence": confidence,
        "samples": evaluation.n,
        "overall": part(range(len(level))),
        "by_difficulty": {
            name: part(np.flatnonzero(level == name).tolist())
            for name in difficulty_order(evaluation.difficulties)
        },
    }
