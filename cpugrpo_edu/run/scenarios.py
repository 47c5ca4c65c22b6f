"""Small experiments with settings of their own: ``cpugrpo run --scenario``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """Settings in place of the defaults, what the difficulties are called, and the model."""

    settings: dict[str, Any]
    levels: dict[str, str]
    model: str = "bundled"


SCENARIOS = {
    # Training on five letters alone erases three and four; EWC is there to keep them.
    "letters": Scenario(
        {
            "domains": ("letters",),
            "order": "reversed",
            "steps": (12, 0, 0),
            "replay": 0.0,
            "prompts_per_step": 4,
            "max_completion": 40,
            "rewards": "correct_answer=1",
            "checkpointing": "off",
            "int8_rollouts": False,
            "int8_evaluation": False,
            "fisher_examples": 192,
            "ewc_strength": 1.0,  # chosen by the study "letters", on seeds of its own
            "protect": ("basic", "intermediate"),
            "per_cell": 100,
        },
        {"basic": "three letters", "intermediate": "four letters", "advanced": "five letters"},
    ),
    # A real chat model learns to add, in about a minute.
    "sums": Scenario(
        {
            "domains": ("sums",),
            "answer_format": "last-number",
            "steps": (8, 0, 0),
            "learning_rates": (5e-4, 5e-4, 5e-4),
            "replay": 0.0,
            "max_completion": 24,
            "per_cell": 50,
        },
        {
            "basic": "numbers up to 20",
            "intermediate": "up to 50, not trained",
            "advanced": "up to 100, not trained",
        },
        model="smollm2",
    ),
}
