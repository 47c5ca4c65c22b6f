"""The half of chapter 17's rubric that a program can check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import Problem
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.tasks.verifiers import load_verifier

CARD_FIELDS = (
    "Claim",
    "Quantity",
    "Comparison",
    "Sample",
    "Seeds",
    "Result",
    "Budget",
    "Damage",
    "Also looked at",
    "Nulls",
    "Threats",
    "Repeat it",
)
NONSENSE = ("", "####", "#### ", "#" * 5000, "#### 1e999", "\x00\ufeff")

Finding = tuple[str, bool]
"""What was checked, and whether it holds."""


def check_submission(folder: Path) -> Iterator[Finding]:
    """Findings on a folder with judge.py, prompts.jsonl, plan.json, runs/ and card.md."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["prompt"] for line in lines]
    yield "at least 100 prompts", len(questions) >= 100
    yield "no prompt twice", len(set(questions)) == len(questions)
    for judge in plan["arms"]:
        yield f"judge {judge} gives nonsense nothing", resists(folder, judge, questions[0])
    yield from check_runs(folder, plan)
    card = (folder / "card.md").read_text(encoding="utf-8")
    yield "the card has all fields", all(f"**{field}.** " in card for field in CARD_FIELDS)
    yield "the card fits on a page", len(card.split()) <= 400


def resists(folder: Path, judge: str, question: str) -> bool:
    """Whether the judge survives nonsense without an error or a reward."""
    function = load_verifier(f"{folder / 'judge.py'}:{judge}")
    problem = Problem("check", "custom", "basic", question, "")
    return all(float(function(problem, text)) == 0 for text in NONSENSE)


def check_runs(folder: Path, plan: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings on the planned runs."""
    names = [f"{arm}-{seed}" for arm in plan["arms"] for seed in plan["seeds"]]
    paths = [folder / "runs" / name / "record.json" for name in names]
    yield "a record for every planned run", all(path.exists() for path in paths)
    runs = [RunRecord.load(path) for path in paths if path.exists()]
    yield "two arms, two seeds at least", len(plan["arms"]) > 1 and len(plan["seeds"]) > 1
    yield "plan older than every run", all(plan["written"] <= run.created for run in runs)
    yield "arms differ in judge and seed only", differing(runs) <= {"verifier", "seed"}
    changed = [run.results["weights_changed"]["changed"] for run in runs]
    yield "weights changed in every run", all(changed)
    yield "same code in every run", len({run.commit for run in runs}) == 1


def differing(runs: Sequence[RunRecord]) -> set[str]:
    """Settings that are not the same in all runs."""
    configs = [run.config for run in runs]
    return {key for key in configs[0] if len({str(c[key]) for c in configs}) > 1} if runs else set()
