"""Evaluations on disk, every item of them, so that others can analyse them again."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import replacing


@dataclass
class Evaluation:
    """Per-item results of one model on one fixed set of problems.

    All lists have one entry per problem and the same order, so that two
    evaluations of the same set are paired. ``step_score`` lies in [0, 1].
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evaluation:
        return cls(**data)


def save_evaluation(evaluation: Evaluation, path: str | Path) -> Path:
    """Write every item as compressed JSON, so that others can re-analyse it."""
    with replacing(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        json.dump(evaluation.to_json(), file)
    return Path(path)


def evaluation_path(run: Path, label: str) -> Path:
    """Where the run in the folder ``run`` keeps the evaluation ``label``."""
    return run / "evaluations" / f"{label.replace(' ', '_').replace(',', '')}.json.gz"


def load_evaluation(path: str | Path) -> Evaluation:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return Evaluation.from_json(json.load(file))
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        raise UserError(
            f"cannot read an evaluation from {path}: {error}; "
            "give a file that cpugrpo evaluate or cpugrpo run wrote"
        ) from error
