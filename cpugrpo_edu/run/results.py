"""What a run found: evaluations, tables, comparisons, and which components were active."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.architectures import supports
from cpugrpo_edu.engine.int8 import quantization_report, quantize_for_rollout
from cpugrpo_edu.engine.int8_matrix import usable
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.models.load import relative_change
from cpugrpo_edu.record.evaluations import (
    Evaluation,
    evaluation_path,
    load_evaluation,
    save_evaluation,
)
from cpugrpo_edu.record.metrics import read_metrics
from cpugrpo_edu.record.stats import accuracy_table, compare, forgetting_matrix, working_share
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.pause import Interrupted
from cpugrpo_edu.run.scenarios import SCENARIOS
from cpugrpo_edu.run.state import Learner, Session
from cpugrpo_edu.sample import Sampling

CURVE = (
    *("stage", "step", "reward", "reward_std", "accuracy", "grade"),
    *("completion_length", "entropy"),
)
"""What a record keeps of every step; ``metrics.jsonl`` has all of it."""
SHOWN = 5
"""Problems whose completions the report shows."""


def measure(session: Session, learner: Learner, label: str) -> None:
    """Evaluate on the held-out problems, on rank 0 while the others wait."""
    ranks.on_main(lambda: evaluation(session, learner, label) and None)


def evaluation(
    session: Session, learner: Learner, label: str, model: Any = None
) -> Evaluation | None:
    """The greedy evaluation ``label``, read if it was already made; None if all are switched off.

    ``model`` replaces the policy's, such as an INT8 copy. Raises Interrupted when asked to stop.
    """
    if session.config.per_cell == 0:
        return None
    path = evaluation_path(session.output, label)
    if path.exists():  # the run was interrupted later
        return load_evaluation(path)
    bar = session.display.counter(f"evaluate {label}", len(session.held_out))

    def on_done(more: int) -> None:
        bar(more)
        if session.control.should_stop():
            raise Interrupted(f"stopped while evaluating {label!r}")

    policy = learner.policy if model is None else replace(learner.policy, model=model)
    greedy = Sampling(session.config.max_completion, temperature=0.0)
    with session.phase("evaluate"):
        found = evaluate(policy, session.held_out, label, greedy, on_done)
        save_evaluation(found, path)
    return found


def results_of(session: Session, learner: Learner) -> dict[str, Any]:
    """Everything for the record that one process knows, with an evaluation of an INT8 copy."""
    config, state, model = session.config, session.state, learner.policy.model
    labels = ["before", *(f"after {stage.name}" for stage in config.stages if stage.steps)]
    evaluations = [e for e in (evaluation(session, learner, label) for label in labels) if e]
    int8 = None
    quantization: dict[str, Any] = {}
    unable = supports(model.config, "INT8 copy")
    if config.int8_evaluation and unable:
        session.display.message(f"no evaluation of an INT8 copy: {unable}")
    elif config.int8_evaluation and not config.frozen:
        served = quantize_for_rollout(model)
        ids = torch.tensor([learner.policy.encode_problem(session.held_out[0])])
        quantization = quantization_report(model, served, ids)
        quantization.pop("layer_error")
        int8 = evaluation(session, learner, "after, INT8", model=served)
    tokens = sum(stage["tokens_generated"] for stage in state.stages)
    seconds = sum(stage["rollout_seconds"] for stage in state.stages)
    results: dict[str, Any] = {
        "stages": state.stages,
        "steps": curve(read_metrics(session.output / "metrics.jsonl")),
        "seconds": state.seconds,
        "weights_changed": {
            "changed": state.fingerprint != state.fingerprint_first,
            "relative_l2": relative_change(model, learner.first),
        },
        "components": components(session, learner, quantization),
        "tokens_per_second": {"rollout": tokens / seconds if seconds else 0.0},
    }
    if config.scenario:
        results["levels"] = SCENARIOS[config.scenario].levels
    if state.rejudged:
        results["verifier_changed"] = state.rejudged
    if evaluations:
        results |= comparisons(config, session.held_out, evaluations, int8)
    return results


def curve(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The learning curve for the record: a few numbers a step, to five digits."""
    return [
        {
            key: float(f"{row[key]:.5g}") if isinstance(row[key], float) else row[key]
            for key in CURVE
            if key in row
        }
        for row in steps
    ]


def comparisons(
    config: RunConfig,
    problems: Sequence[Problem],
    evaluations: Sequence[Evaluation],
    int8: Evaluation | None,
) -> dict[str, Any]:
    """Tables of all evaluations, and the last one compared with the first and with INT8."""
    before, after = evaluations[0], evaluations[-1]
    # What is to be protected could be done before: it can be forgotten from the start.
    trained = [config.protect, *(stage.trained for stage in config.stages if stage.steps)]
    compared = {"after vs before": compare(before, after)}
    if int8 is not None:
        compared["INT8 vs fp32"] = compare(after, int8)
    shown = evaluations if int8 is None else [*evaluations, int8]
    return {
        "evaluations": [{"label": e.label, "table": accuracy_table(e)} for e in shown],
        "comparisons": compared,
        "forgetting": forgetting_matrix(evaluations, trained),
        "working": {"before": working_share(before), "after": working_share(after)},
        "samples": samples(problems, before, after),
    }


def samples(
    problems: Sequence[Problem], before: Evaluation, after: Evaluation
) -> list[dict[str, Any]]:
    """A few problems with their completions before and after."""
    return [
        {
            "question": problems[i].question,
            "answer": problems[i].answer,
            "domain": problems[i].domain,
            "difficulty": problems[i].difficulty,
            "before": before.completions[i],
            "after": after.completions[i],
            "before_correct": before.correct[i],
            "after_correct": after.correct[i],
        }
        for i in problems_to_show(problems)
    ]


def problems_to_show(problems: Sequence[Problem]) -> list[int]:
    """Numbers of ``SHOWN`` problems, from all difficulties in turn and there from all domains.

    Their places alone decide, no completion does: nobody can pick the ones that improved.
    """
    drawn: Counter[tuple[str, str]] = Counter()
    levels: dict[str, list[tuple[int, int]]] = {}
    for i, problem in enumerate(problems):
        cell = (problem.domain, problem.difficulty)
        levels.setdefault(problem.difficulty, []).append((drawn[cell], i))
        drawn[cell] += 1
    turns = zip_longest(*map(sorted, levels.values()))
    return [entry[1] for turn in turns for entry in turn if entry][:SHOWN]


def components(
    session: Session, learner: Learner, quantization: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Which components were active in this run, each with the evidence."""
    config, stages = session.config, session.state.stages
    penalties = [s["ewc_penalty_last"] for s in stages if s["ewc_penalty_last"] is not None]
    sizes = [s["micro_batch_smallest"] for s in stages if s["micro_batch_smallest"]]
    sampled_from = [stage.get("rollouts_from", usable(config.kernel)) for stage in stages]
    int8_detail = {
        "importance_correction": config.importance_correction,
        "kernel": usable(config.kernel),
        "rollouts_from": sampled_from,
        "drift": [stage.get("rollout_drift") for stage in stages],
    }
    found = {
        "curriculum": (config.order != "mixed", {"order": config.order}),
        "ewc": (
            bool(config.ewc_strength and penalties),
            {"strength": config.ewc_strength, "penalty_last": penalties},
        ),
        "fisher": (
            config.consolidates,
            {
                "variant": config.fisher,
                "examples": config.fisher_examples,
                "protects from the start": list(config.protect),
            },
        ),
        "int8_rollouts": (
            config.frozen or (config.int8_rollouts and usable(config.kernel) in sampled_from),
            int8_detail,
        ),
        "int8_evaluation": (
            config.int8_evaluation or config.frozen,
            quantization or {"base": "int8"},
        ),
        "gradient_checkpointing": (learner.checkpointing, {"asked": config.checkpointing}),
        "adaptive_micro_batch": (
            config.micro_batch is None,
            {"sizes": sizes, "available_bytes": learner.available},
        ),
        "memory_cleanup": (config.cleanup, {"bytes_released": learner.released}),
        "memory_efficient_loading": (
            True,
            {"format": "safetensors, memory-mapped", "dtype": dtype_of(config, learner)},
        ),
        "threads": (True, session.threads),
    }
    return {name: {"on": on, "detail": detail} for name, (on, detail) in found.items()}


def dtype_of(config: RunConfig, learner: Learner) -> str:
    """The type of the weights in memory, whoever chose it."""
    return "int8" if config.frozen else str(learner.policy.model.dtype).removeprefix("torch.")


def processes(session: Session) -> dict[str, Any]:
    """How many processes shared the work, and what they sent each other. Called on all ranks."""
    # Stages that one process did alone, before several resumed the run, have no such entries.
    stages = [stage for stage in session.state.stages if "same_weights" in stage]
    count = ranks.size()
    gradient = max((stage["gradient_bytes_per_step"] for stage in stages), default=0.0)
    return {
        "processes": count,
        "hosts": ranks.hosts(),
        "gradient_bytes_per_step": gradient,
        "ring_bytes_per_process": ranks.ring_bytes(gradient, count),
        "same_weights": all(stage["same_weights"] for stage in stages),
        "peak_rss_bytes": ranks.gather(session.peak_rss_bytes()),
    }
