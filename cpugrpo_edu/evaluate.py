"""Measure a policy on held-out problems: exact match and step validity, item by item.

The same problems in the same order for every model, so that two evaluations are
paired. Intervals and tests are in ``statistics``.
"""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES, Evaluation, Problem
from cpugrpo_edu.engine.decode import Sampling, rollout
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import Policy
from cpugrpo_edu.record.files import replacing
from cpugrpo_edu.tasks import DOMAINS, get_task, make_problems

EVALUATION_SEED = 2026
"""The held-out problems are the same in every run; a run's own seed varies the training."""


def held_out_problems(
    per_cell: int, domains: Sequence[str] = DOMAINS, seed: int = EVALUATION_SEED
) -> list[Problem]:
    """``per_cell`` problems of the evaluation split for each domain and difficulty."""
    if per_cell < 1:
        raise UserError(f"per_cell is {per_cell}; give at least 1 problem a cell")
    return [
        problem
        for domain in domains
        for difficulty in DIFFICULTIES
        for problem in make_problems(domain, difficulty, "eval", per_cell, seed)
    ]


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    label: str,
    *,
    model: Any = None,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    engine: str = "fast",
    memory_limit: int | None = None,
    on_done: Callable[[int], None] = lambda problems: None,
) -> Evaluation:
    """One completion a problem, verified. ``model`` stands in for the policy's, e.g. INT8.

    Temperature 0 is greedy. Raises UserError without problems.
    """
    if not problems:
        raise UserError("there are no problems to evaluate on; give at least one")
    start = time.perf_counter()
    prompts = [policy.encode_problem(problem) for problem in problems]
    groups = rollout(
        policy.model if model is None else model,
        prompts,
        1,
        Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed),
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        engine=engine,
        memory_limit=memory_limit,
        on_done=on_done,
    )
    episodes = [group.episodes[0] for group in groups]
    texts = policy.tokenizer.batch_decode(
        [episode.completion_ids for episode in episodes], skip_special_tokens=True
    )
    tasks = [get_task(problem.domain) for problem in problems]
    checked = list(zip(tasks, problems, texts, strict=True))
    return Evaluation(
        label=label,
        seed=seed,
        temperature=temperature,
        item_ids=[problem.id for problem in problems],
        domains=[problem.domain for problem in problems],
        difficulties=[problem.difficulty for problem in problems],
        correct=[task.verify(problem, text) for task, problem, text in checked],
        step_score=[task.check_steps(problem, text).score for task, problem, text in checked],
        tokens=[len(episode.completion_ids) for episode in episodes],
        finished=[episode.finished for episode in episodes],
        completions=texts,
        seconds=time.perf_counter() - start,
    )


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
