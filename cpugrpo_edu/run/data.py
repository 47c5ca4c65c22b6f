"""The problems of a run, generated or from a file; some are held out for evaluation."""

from __future__ import annotations

from pathlib import Path

from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.evaluate import held_out_problems
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.tasks import DOMAINS, split_of
from cpugrpo_edu.tasks.custom import load_custom
from cpugrpo_edu.tasks.gsm8k import load_gsm8k


def load_data(config: RunConfig) -> tuple[list[Problem] | None, list[Problem]]:
    """Problems to train on (None: generate them) and held-out problems to evaluate on.

    The user's own data is split by the hash of the question, so that no problem is on both
    sides; GSM8K-format folders and hub ids have a test split. Raises UserError for data that
    cannot be read, or has too few problems.
    """
    per_cell = max(1, config.per_cell)
    if config.data == "generated":
        unknown = sorted(set(config.domains) - set(DOMAINS))
        if unknown or not config.domains:
            raise UserError(
                f"unknown domains {', '.join(unknown) or '(none given)'}; "
                f"allowed are {', '.join(DOMAINS)}"
            )
        if config.verifier is not None:
            raise UserError(
                f"the verifier {config.verifier!r} needs prompts to judge; "
                "give them with --data prompts.jsonl"
            )
        return None, held_out_problems(per_cell, config.domains)
    if config.verifier is not None:
        return divide(load_custom(config.data, config.verifier), per_cell)
    if Path(config.data).is_file():
        return divide(load_local_file(Path(config.data)), per_cell)
    return load_gsm8k(config.data, "train"), load_gsm8k(config.data, "test", 3 * per_cell)


def load_local_file(path: Path) -> list[Problem]:
    """A GSM8K-format file, or prompts with answers, judged by the first line."""
    if path.suffix == ".parquet":
        return load_gsm8k(path)
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    return load_gsm8k(path) if '"question"' in first and "####" in first else load_custom(path)


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
