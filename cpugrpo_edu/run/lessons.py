"""What a warm start imitates: worked solutions, or the model's own right answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cpugrpo_edu.data import ANSWER_MARK, Episode, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.fisher import Example
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.files import write_text
from cpugrpo_edu.run.consolidate import solution_ids
from cpugrpo_edu.run.warmstart_config import WarmstartConfig
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.show.progress import ProgressDisplay

ENDINGS = {"hash": f"{ANSWER_MARK} {{}}", "boxed": r"\boxed{{{}}}"}
"""How a worked solution states its answer, by answer format; a sentence serves all others."""

Lessons = list[tuple[Problem, Example]]
"""Prompts and completions in tokens, each with its problem."""


def find_lessons(
    policy: Policy, problems: Sequence[Problem], config: WarmstartConfig, display: ProgressDisplay
) -> tuple[Lessons, dict[str, int]]:
    """What to imitate, and counts for the record: problems asked, and "taught", which have a
    lesson. UserError if there is none."""
    counts: dict[str, int] = {}
    if config.method == "sft":
        lessons = worked_lessons(policy, problems)
    else:
        lessons, counts = own_lessons(policy, problems, config, display)
    taught = len({problem.id for problem, _ in lessons})
    return lessons, {"problems": len(problems), "taught": taught, **counts}


def worked_lessons(policy: Policy, problems: Sequence[Problem]) -> Lessons:
    """The worked solutions of the problems whose verifier accepts theirs."""
    solved = [replace(problem, solution=worked_solution(problem)) for problem in problems]
    usable = [p for p in solved if p.solution and p.verify(p.solution)]
    if not usable:
        raise UserError(
            f"none of {len(problems)} problems has a worked solution that its verifier accepts; "
            "choose --method rft, or data with worked solutions"
        )
    return [(p, Example(policy.encode_problem(p), solution_ids(policy, p))) for p in usable]


def worked_solution(problem: Problem) -> str:
    """The worked solution, its answer stated as the problem's answer format asks."""
    steps, mark, _ = problem.solution.rpartition(ANSWER_MARK)
    ending = ENDINGS.get(problem.answer_format, "The answer is {}.")
    return steps + ending.format(problem.answer) if mark else problem.solution


def own_lessons(
    policy: Policy, problems: Sequence[Problem], config: WarmstartConfig, display: ProgressDisplay
) -> tuple[Lessons, dict[str, int]]:
    """The policy's own right answers, complete ones, at most ``config.keep`` different texts of a
    problem, in the order drawn. Also how many completions were sampled, and how many right."""
    sampling = Sampling(config.max_completion, config.temperature, seed=config.seed)
    bar = display.counter("sample", len(problems))
    groups = rollout(policy, problems, config.samples, sampling, on_done=bar)
    lessons: Lessons = []
    right = 0
    for problem, group in zip(problems, groups, strict=True):
        good = [e for e in group.episodes if e.finished and problem.verify(e.text)]
        different: dict[str, Episode] = {}
        for episode in good:
            different.setdefault(episode.text.strip(), episode)
        kept = list(different.values())[: config.keep]
        lessons += [(problem, Example(group.prompt_ids, e.completion_ids)) for e in kept]
        right += len(good)
    if not lessons:
        raise UserError(
            f"of {config.samples} answers to each of {len(problems)} problems none was complete "
            "and right, so there is nothing to imitate; choose easier problems, more --samples, "
            "a longer --max-completion, or --method sft"
        )
    return lessons, {"sampled": len(problems) * config.samples, "right": right}


def write_lessons(policy: Policy, lessons: Lessons, path: Path) -> None:
    """One line of JSON for each: the problem's id, the question, and the completion."""
    texts = policy.tokenizer.batch_decode(
        [lesson.completion_ids for _, lesson in lessons], skip_special_tokens=True
    )
    rows = [
        {"id": problem.id, "question": problem.question, "completion": text}
        for (problem, _), text in zip(lessons, texts, strict=True)
    ]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
