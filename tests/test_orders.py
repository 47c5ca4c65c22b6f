"""The race of orders in chapter 12: values by seed, and forgetting by its definition."""

from __future__ import annotations

import numpy as np
import pytest

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.lab import orders
from cpugrpo_edu.record.run_record import new_record


def stage(basic, steps):
    return {
        "accuracy": dict.fromkeys(DIFFICULTIES, 0.0) | {"basic": basic},
        "overall": basic / 3,
        "working": 0.5,
        "steps": [{"tokens": 100.0 * (i + 1)} for i in range(steps)],
    }


@pytest.fixture
def record():
    runs = [
        {"arm": "mixed", "seed": 8, "stages": [stage(0.2, 4), stage(0.6, 3), stage(0.5, 2)]},
        {"arm": "reversed", "seed": 7, "stages": [stage(0.9, 1)] * 3},
        {"arm": "mixed", "seed": 7, "stages": [stage(0.4, 4), stage(0.3, 3), stage(0.6, 1)]},
    ]
    return new_record("orders", {"seeds": [7, 8]}, {"runs": runs})


def test_values_come_in_the_order_of_the_seeds(record):
    assert orders.outcome(record, "mixed", "basic").tolist() == [0.6, 0.5]
    assert orders.outcome(record, "mixed", "basic", 0).tolist() == [0.4, 0.2]
    assert orders.outcome(record, "mixed", "overall").tolist() == pytest.approx([0.2, 0.5 / 3])
    assert orders.outcome(record, "mixed", "steps").tolist() == [1, 2]
    assert orders.outcome(record, "mixed", "tokens", 1).tolist() == [300, 300]


def test_forgetting_is_the_best_earlier_accuracy_minus_the_last(record):
    lost = orders.forgotten(record, "mixed", "basic")
    assert np.allclose(lost, [-20, 10])  # 40 and 30, then 60; 20 and 60, then 50


def test_the_arms_differ_only_in_their_order_and_replay():
    for setting in orders.ARMS.values():
        assert set(setting) <= {"order", "replay"}
    assert len({tuple(s.items()) for s in orders.ARMS.values()}) == len(orders.ARMS)
