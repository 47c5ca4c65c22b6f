"""What must be the same after ``--resume`` as before: the data, the prompts, and the verifier.

If one of them changed, the evaluations before and after would not be of the same thing, and what
looks like progress would be the change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import SHORT, default_answer_format
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.evaluations import load_evaluation, save_evaluation
from cpugrpo_edu.run.state import Session
from cpugrpo_edu.tasks.verifiers import source_files

VERIFIER, DATA, PROMPT = "verifier", "data", "prompt"
CHANGED = {
    VERIFIER: "the verifier {verifier} is not as it was when the run in {output} was begun: put it "
    "back, begin again with another --output, or add --rejudge, which judges all evaluations "
    "so far by the verifier as it is now",
    DATA: "the data of {data} are not those with which the run in {output} was begun: put them "
    "back, or begin again with another --output",
    PROMPT: "the model {model} is not prompted as when the run in {output} was begun (its chat "
    "template, system prompt or answer format): put that back, or begin again with another "
    "--output",
}


def digest(value: Any) -> str:
    """SHA-256 of anything that JSON can hold; of other values what ``repr`` shows."""
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()


def data_digest(problems: Iterable[Problem]) -> str:
    """Of everything that a problem holds but its task."""
    return digest([asdict(replace(problem, task=None)) for problem in problems])


def prompt_digest(policy: Policy) -> str:
    """Of how this policy is asked, and how its answers are read."""
    return digest([policy.encode_problem(SHORT), default_answer_format(policy.model.config)])


def verifier_digests(spec: str, known: Iterable[str] = ()) -> dict[str, str]:
    """Of a verifier's file and of the modules beside it, or of the files ``known`` by name."""
    folder = Path(spec.rpartition(":")[0]).resolve().parent
    files = [folder / name for name in known] or source_files(spec)
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "gone"
        for file in files
    }


def check_inputs(session: Session, rejudge: bool) -> None:
    """Note the data and the verifier, or compare them with those of the run that is resumed.

    UserError if they changed, unless the evaluations may be judged again.
    """
    spec, known = session.config.verifier, session.state.inputs
    problems = [p for part in (*session.problems, session.held_out) for p in part]
    compare(session, {DATA: data_digest(problems)})
    if spec is None:
        return
    now = verifier_digests(spec, known.get(VERIFIER, {}))
    session.rejudge = rejudge and known.get(VERIFIER, now) != now
    if session.rejudge:
        known[VERIFIER] = verifier_digests(spec)
    compare(session, {VERIFIER: known[VERIFIER] if session.rejudge else now})


def check_prompt(session: Session, policy: Policy) -> None:
    """The same for the prompt."""
    compare(session, {PROMPT: prompt_digest(policy)})


def compare(session: Session, found: Mapping[str, Any]) -> None:
    for kind, value in found.items():
        if session.state.inputs.setdefault(kind, value) != value:
            config = session.config
            raise UserError(
                CHANGED[kind].format(
                    output=session.output,
                    verifier=config.verifier,
                    data=config.data,
                    model=config.model,
                )
            )


def judge_again(session: Session) -> None:
    """Judge the evaluations so far by the verifier as it is now; what trained by the old one is for
    the record."""
    for path in sorted((session.output / "evaluations").glob("*.json.gz")):
        old = load_evaluation(path)
        judged = list(zip(session.held_out, old.completions, strict=True))
        grades = [problem.grade(text) for problem, text in judged]
        correct = [grade == 1 for grade in grades]
        steps = [problem.check_steps(text).score for problem, text in judged]
        save_evaluation(replace(old, correct=correct, grade=grades, step_score=steps), path)
    done = [stage["name"] for stage in session.state.stages]
    session.state.signals = {n: s for n, s in session.state.signals.items() if n in done}
    session.state.rejudged.append(f"after {done[-1]}" if done else "before the first stage ended")
    session.display.message("the verifier changed: all evaluations so far were judged again")
