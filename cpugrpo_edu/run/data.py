"""The problems of a run, generated or from a file; some are held out for evaluation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from cpugrpo_edu.curriculum import Stage
from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.tasks import (
    EVALUATION_SEED,
    TASKS,
    held_out_problems,
    question_hash,
    split_of,
)
from cpugrpo_edu.tasks.custom import load_custom, try_verifier
from cpugrpo_edu.tasks.gsm8k import is_gsm8k, load_gsm8k
from cpugrpo_edu.tasks.reasoning_gym import PREFIX, load_reasoning_gym
from cpugrpo_edu.tasks.rows import HELD_OUT, splits
from cpugrpo_edu.tasks.verifiers import load_verifier

MAX_DRAWN = 5000
"""Most training problems of each Reasoning Gym task and difficulty; a longer run repeats them."""


def load_data(
    config: RunConfig, to_train: bool = True
) -> tuple[list[Problem] | None, list[Problem]]:
    """Problems to train on (None: generate them) and held-out problems to evaluate on.

    The user's own data is split by the hash of the question, so that no problem is on both
    sides, unless it has a split of its own to evaluate on. ``to_train=False`` spares the time
    to draw training problems. Raises UserError for data that cannot be read, or has too few
    problems.
    """
    per_cell = max(1, config.per_cell)
    if config.data == "generated":
        unknown = sorted(set(config.domains) - set(TASKS))
        if unknown or not config.domains:
            raise UserError(
                f"unknown domains {', '.join(unknown) or '(none given)'}; "
                f"allowed are {', '.join(TASKS)}"
            )
        if config.verifier is not None:
            raise UserError(
                f"the verifier {config.verifier!r} needs prompts to judge; "
                "give them with --data prompts.jsonl"
            )
        return None, held_out_problems(per_cell, config.domains)
    if config.data.startswith(PREFIX):
        return draw_reasoning_gym(config, per_cell, to_train)
    if not config.data.strip():
        raise UserError("--data is empty; give a file, a folder or a hub id, or generated")
    columns = (config.prompt_column, config.answer_column)
    if config.verifier is None and columns == (None, None) and is_gsm8k(config.data):
        if Path(config.data).is_file():
            return divide(load_gsm8k(config.data), per_cell)
        return load_gsm8k(config.data, "train"), load_gsm8k(config.data, "test", 3 * per_cell)
    training, held_out = load_own(config, per_cell)
    if config.verifier is not None:
        try_verifier(held_out)
    return training, held_out


def load_own(config: RunConfig, per_cell: int) -> tuple[list[Problem], list[Problem]]:
    """The user's own problems; a split to evaluate on is left whole, else some are held out."""
    names = splits(config.data)
    verifier = None if config.verifier is None else load_verifier(config.verifier)

    def load(split: str | None) -> list[Problem]:
        return load_custom(
            config.data,
            verifier,
            split=split,
            prompt_column=config.prompt_column,
            answer_column=config.answer_column,
        )

    to_train = [name for name in names if name not in HELD_OUT]
    test = next((name for name in HELD_OUT if name in names), None)
    if test is None or not to_train:
        return divide(load(next(iter([*to_train, *names]), None)), per_cell)
    training = load("train" if "train" in to_train else to_train[0])
    return training, load(test)[: 3 * per_cell]


def draw_reasoning_gym(
    config: RunConfig, per_cell: int, to_train: bool
) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems from other seeds; the hash of a question decides its side."""
    if config.verifier is not None:
        raise UserError(
            f"the tasks of {config.data} have scorers of their own; leave out the verifier"
        )

    def held_out(question: str) -> bool:
        return int(question_hash(question)[:8], 16) % 2 == 0

    evaluation = load_reasoning_gym(config.data, per_cell, EVALUATION_SEED, held_out)
    count = min(MAX_DRAWN, sum(config.steps) * config.prompts_per_step) if to_train else 0
    if not count:
        return [], evaluation
    training = load_reasoning_gym(config.data, count, config.seed, lambda q: not held_out(q))
    return training, evaluation


def divide(problems: list[Problem], per_cell: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, by the hash of the question."""
    held_out = [p for p in problems if split_of(p.question) == "eval"]
    training = [p for p in problems if split_of(p.question) != "eval"]
    if not held_out or not training:
        raise UserError(
            f"{len(problems)} problems are too few to hold some out for evaluation; "
            "give at least a dozen"
        )
    return training, held_out[: 3 * per_cell]


def select_problems(
    stage: Stage, problems: Sequence[Problem], count: int, offset: int = 0
) -> list[Problem]:
    """``count`` problems of a fixed set such as GSM8K in the stage's mixture; it is cycled through
    if it is too small.

    Difficulties that the set lacks give their share to the others. Another ``offset`` takes
    others of the set, in another order.
    """
    if not problems:
        raise UserError("the training data is empty; give at least one problem")
    pools = {
        difficulty: pool
        for difficulty in stage.mixture
        if (pool := [problem for problem in problems if problem.difficulty == difficulty])
    }
    total = sum(stage.mixture[difficulty] for difficulty in pools)
    if not total:  # difficulties of another kind, or none that this stage asks for
        pools, shares = {"any": list(problems)}, {"any": 1.0}
    else:
        shares = {difficulty: stage.mixture[difficulty] / total for difficulty in pools}
    take = {difficulty: math.floor(share * count) for difficulty, share in shares.items()}
    by_remainder = sorted(
        take, key=lambda difficulty: take[difficulty] - shares[difficulty] * count
    )
    for difficulty in by_remainder[: count - sum(take.values())]:
        take[difficulty] += 1
    chosen = [
        pool[(offset + i) % len(pool)]
        for difficulty, pool in pools.items()
        for i in range(take[difficulty])
    ]
    random.Random(offset).shuffle(chosen)  # else a "mixed" stage would go from easy to hard
    return chosen
