"""Evaluations on disk, every item of them, so that others can analyse them again."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import replacing

Kind = TypeVar("Kind")


@dataclass
class Evaluation:
    """Per-item results of one model on one fixed set of problems.

    All lists have one entry per problem and the same order, so that two
    evaluations of the same set are paired. ``step_score`` and ``grade`` lie in [0, 1]; ``correct``
    is whether the grade is full. Where only that was noted, the grades are 0 and 1.
    """

    label: str
    seed: int
    temperature: float
    item_ids: list[str]
    domains: list[str]
    difficulties: list[str]
    correct: list[bool]
    step_score: list[float]
    tokens: list[int]
    finished: list[bool]
    completions: list[str]
    seconds: float
    grade: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grade = self.grade or [float(right) for right in self.correct]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evaluation:
        return cls(**data)


@dataclass
class SampledEvaluation:
    """What a model answered when it was asked each problem n times.

    All lists have one entry per problem and the same order; those of completions have n entries
    in it. ``majority`` is the place, from 0, of a completion that states the most frequent answer,
    or None where no completion states one.
    """

    label: str
    seed: int
    temperature: float
    item_ids: list[str]
    domains: list[str]
    difficulties: list[str]
    correct: list[list[bool]]
    majority: list[int | None]
    tokens: list[list[int]]
    finished: list[list[bool]]
    completions: list[list[str]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def n(self) -> int:
        """Completions of each problem."""
        return len(self.correct[0])

    @property
    def majority_correct(self) -> list[bool]:
        """Whether the most frequent answer to each problem is right; no answer is wrong."""
        pairs = zip(self.majority, self.correct, strict=True)
        return [place is not None and right[place] for place, right in pairs]


def save_evaluation(evaluation: Evaluation | SampledEvaluation, path: str | Path) -> Path:
    """Write every item as compressed JSON, so that others can re-analyse it."""
    with replacing(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        json.dump(evaluation.to_json(), file)
    return Path(path)


def evaluation_path(run: Path, label: str) -> Path:
    """Where the run in the folder ``run`` keeps the evaluation ``label``."""
    return run / "evaluations" / f"{label.replace(' ', '_').replace(',', '')}.json.gz"


def load_evaluation(path: str | Path) -> Evaluation:
    """An evaluation with one completion of each problem. UserError if it cannot be read."""
    return _load(path, Evaluation)


def load_sampled_evaluation(path: str | Path) -> SampledEvaluation:
    """An evaluation with several completions of each problem. UserError if it cannot be read."""
    return _load(path, SampledEvaluation)


def _load(path: str | Path, kind: type[Kind]) -> Kind:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return kind(**json.load(file))
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise UserError(
            f"cannot read an evaluation from {path}: {error}; "
            "give a file that cpugrpo evaluate or cpugrpo run wrote"
        ) from error
