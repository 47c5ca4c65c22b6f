"""Supervised fine-tuning before GRPO, or instead of it: the baselines that GRPO has to beat.

* ``sft`` imitates worked solutions of the problems.
* ``rft`` imitates the model's own right answers: of several completions of each problem it keeps
  the right ones. This is rejection-sampling fine-tuning (Yuan et al. 2023, arXiv:2308.01825), and
  one round of STaR (Zelikman et al. 2022, arXiv:2203.14465) without its rationalizations.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import (
    check_policy,
    default_answer_format,
    fingerprint,
    load_policy,
    relative_change,
    save_policy,
    snapshot,
)
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.files import check_output_folder, flush, write_text
from cpugrpo_edu.record.metrics import MetricsLog
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run.config import plain
from cpugrpo_edu.run.data import load_data
from cpugrpo_edu.run.lessons import find_lessons, write_lessons
from cpugrpo_edu.run.model_card import WITH_ITS_BASE, WITH_TRANSFORMERS, model_card
from cpugrpo_edu.run.pause import Control
from cpugrpo_edu.run.pipeline import writing_to
from cpugrpo_edu.run.prepare import problems_of_stage
from cpugrpo_edu.run.sft import Reporter, plan_micro_batch, train
from cpugrpo_edu.run.warmstart_config import WarmstartConfig, check_warmstart
from cpugrpo_edu.show.progress import ProgressDisplay
from cpugrpo_edu.tasks.answers import with_answer_format


def warmstart(
    config: WarmstartConfig,
    output: str | Path,
    display: ProgressDisplay | None = None,
    control: Control | None = None,
) -> RunRecord:
    """Fine-tune a model and save it in ``output``, a plain model folder, with ``record.json``.

    ``lessons.jsonl`` there holds what was imitated, ``metrics.jsonl`` every step. After Ctrl-C, or
    a stop of ``control``, the current step ends and what was learned is saved. Raises UserError
    for bad input and a folder that is not empty, and if there is nothing to imitate.
    """
    started, output, display = time.perf_counter(), Path(output), display or ProgressDisplay(True)
    problems = draw_problems(config, output)
    policy = load(config)
    chosen = config.answer_format or default_answer_format(policy.model.config)
    problems = with_answer_format(problems, chosen)
    lessons, counts = find_lessons(policy, problems, config, display)
    display.message(
        f"{len(lessons)} lessons; {counts['taught']} of {counts['problems']} problems have any"
    )
    examples = [example for _, example in lessons]
    micro_batch = plan_micro_batch(policy, examples, config)
    first, before = snapshot(policy.model), fingerprint(policy.model)
    begun = time.perf_counter()
    with writing_to(output, "run the same command with another --output"):
        write_lessons(policy, lessons, output / "lessons.jsonl")
        with MetricsLog(output / "metrics.jsonl") as log:
            reporter = Reporter(config, log, display, control or Control())
            train(policy, examples, config, micro_batch, reporter)
        trained = time.perf_counter()
        save_into(policy, output)
        results = {
            **counts,
            "lessons": len(lessons),
            "completion_tokens": sum(len(example.completion_ids) for example in examples),
            "steps": len(reporter.losses),
            "micro_batch": micro_batch,
            "loss": {"first": reporter.losses[0], "last": reporter.losses[-1]},
            "weights_changed": {
                "changed": fingerprint(policy.model) != before,
                "relative_l2": relative_change(policy.model, first),
            },
            "seconds": {
                "prepare": begun - started,
                "train": trained - begun,
                "total": time.perf_counter() - started,
            },
        }
        record = new_record("warmstart", plain(config), results, config.seed)
        load_with = WITH_ITS_BASE if config.run.frozen else WITH_TRANSFORMERS
        write_text(output / "README.md", model_card(record, load_with))
        record.save(output / "record.json")
    return record


def draw_problems(config: WarmstartConfig, output: Path) -> list[Problem]:
    """The training problems, each once. UserError for what cannot work; nothing is written."""
    check_warmstart(config)
    check_output_folder(output)
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} already exists and is not empty; give another --output")
    training, _ = load_data(config.run)
    problems = problems_of_stage(config.run, 0, training)
    return list({problem.question: problem for problem in problems}.values())


def load(config: WarmstartConfig) -> Policy:
    """The policy to train."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    policy = load_policy(
        config.model,
        dtype=config.run.weights,
        lora_rank=config.lora_rank,
        system=config.system,
        answer_format=config.answer_format,
        seed=config.seed,
    )
    check_policy(policy)
    return policy


def save_into(policy: Policy, output: Path) -> None:
    """Put the model's files into ``output``, each complete; the config, which makes the folder a
    model, comes last."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".model-") as name:
        folder = save_policy(policy, name)
        flush(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(output / path.name)
