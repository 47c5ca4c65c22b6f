"""What a run will take on this machine: the fitted cost model, this machine's floors, a run's
settings.

The model comes from the sweep's record, see :mod:`cpugrpo_edu.lab.cost`; floors are measured once
and kept in the user's cache folder. What only a run can tell, such as how long the bundled
model's completions are, comes from the recorded runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import StatisticsError, fmean, median
from types import SimpleNamespace
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.engine.hardware import BUNDLED_MODEL, GIB, describe_machine
from cpugrpo_edu.engine.memory import CATALOGUE, Architecture, estimate_training_memory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.cost import (
    FLOORS,
    CostModel,
    Step,
    calibrate,
    load_work,
    rollout_work,
    training_work,
)
from cpugrpo_edu.record.files import cache_folder, remembered
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.text import records_folder

SWEEP = "bench-sweep"
"""Stem of the record with the fitted model."""


# The model for this machine


def calibration(folder: Path | None = None) -> dict[str, float]:
    """This machine's floors, measured once for each processor, thread count and torch."""
    import torch

    machine = describe_machine()
    key = f"{machine.cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = (folder or cache_folder()) / "calibration.json"

    def usable(floors: Any) -> bool:
        return set(floors) == set(FLOORS) and all(value > 0 for value in floors.values())

    return dict(remembered(path, key, usable, calibrate))


def recorded_model(path: Path | None = None) -> CostModel:
    """The fitted model, for the machine that made the record. UserError where there is none."""
    path = path or records_folder() / f"{SWEEP}.json"
    if not path.exists():
        raise UserError(
            "no cost model is recorded here; measure one with "
            f"`cpugrpo bench sweep --output records/{SWEEP}.json`"
        )
    try:
        model = CostModel.from_json(RunRecord.load(path).results["model"])
        model.step_seconds(Step(CATALOGUE[0]))  # an older version counted other kinds of work
        return model
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds no fitted cost model; measure it again") from error


def cost_model(path: Path | None = None) -> CostModel:
    """The fitted model for this machine; with the record's own floors, and a wider error,
    where this machine's cannot be measured."""
    recorded = recorded_model(path)
    try:
        return replace(recorded, floors=calibration())
    except (RuntimeError, OSError, ImportError):
        return replace(recorded, calibrated=False)


# A run

FISHER_BATCH = 8
"""Scores that ``fisher.fisher_diagonal`` takes together where the base is not frozen."""


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take."""

    seconds: float
    error: float
    peak_bytes: float
    parts: dict[str, float]
    """Seconds by part."""
    assumption: str = ""

    def text(self) -> str:
        """``about 40 s (± 15 %) and 1.1 GiB expected``"""
        if self.seconds < 90:
            took = f"{self.seconds:.0f} s"
        elif self.seconds < 5400:
            took = f"{self.seconds / 60:.0f} min"
        else:
            took = f"{self.seconds / 3600:.1f} h"
        end = f", {self.assumption}" if self.assumption else ""
        memory = self.peak_bytes / GIB
        return f"about {took} (± {self.error:.0%}) and {memory:.1f} GiB expected{end}"


@dataclass(frozen=True)
class Recorded:
    """What the recorded runs of the bundled model tell of the next one."""

    sampled: float
    """Mean tokens of a completion in training."""
    evaluated: float
    """Mean tokens of a completion in an evaluation."""
    peak_ratio: float
    """Median of measured over predicted peak: evaluations and the report come on top."""
    time_ratio: float = 1.0
    """Median of measured over predicted seconds, where the sweep ran on the same machine."""
    spread: float = 0.0
    """Largest relative distance of a run from that median."""


def machine_name(machine: Mapping[str, Any]) -> str:
    """Of a record: processor and cores."""
    return f"{machine['cpu']}, {machine['usable_cores']} usable cores"


def recorded_runs(model: CostModel) -> Recorded | None:
    """Compare the recorded runs with what the model says of them; None without a record."""
    there = replace(model, floors=model.sweep_floors)
    sampled, evaluated, peaks, times = [], [], [], []
    for path in sorted(records_folder().glob("run-seed*.json")):
        try:
            record = RunRecord.load(path)
            results, config = record.results, SimpleNamespace(**record.config)
            lengths = [row["completion_length"] for row in results["steps"]]
            tables = [evaluation["table"] for evaluation in results["evaluations"]]
            tokens = [row["tokens"] for table in tables for row in table["by_difficulty"].values()]
            step, parts = run_parts(config, there, fmean(lengths), fmean(tokens))
            peaks.append(results["peak_rss_bytes"] / there.peak_bytes(step))
            if machine_name(record.machine) == model.machine:
                times.append(results["seconds"]["total"] / sum(parts.values()))
            sampled += lengths
            evaluated += tokens
        except (UserError, KeyError, TypeError, AttributeError, StatisticsError):
            continue
    if not peaks:
        return None
    ratio = median(times) if times else 1.0
    spread = max((abs(time / ratio - 1) for time in times), default=0.0)
    return Recorded(fmean(sampled), fmean(evaluated), median(peaks), ratio, spread)


def architecture_of(model: str) -> Architecture:
    """Of the bundled model, a local folder, or a hub id that was downloaded before."""
    if model == "bundled":
        return Architecture.from_config(BUNDLED_MODEL.parent)
    return Architecture.from_config(str(model))


def run_step(config: Any, tokens: float, prompt_tokens: float = Step.prompt_tokens) -> Step:
    """The mean GRPO step of a run (its ``pipeline.RunConfig``)."""
    from cpugrpo_edu.engine.int8 import usable_kernel
    from cpugrpo_edu.engine.trl_trainer import CACHE_BYTES, MIN_TOKENS

    frozen = config.dtype == "int8"
    step = Step(
        architecture_of(config.model),
        prompts=config.prompts_per_step,
        group=config.num_generations,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        longest=config.max_completion,
        frozen=frozen,
        lora_rank=config.lora_rank,
        int8_rollouts=config.int8_rollouts and not frozen,
        compiled=usable_kernel(config.kernel) == "compiled",
        reference=config.beta > 0,
        checkpointing=config.checkpointing == "on",
    )
    size = config.micro_batch
    if size is None and not frozen:  # as the trainer plans where memory abounds
        length = round(step.prompt_tokens + tokens)
        parts = estimate_training_memory(
            step.architecture, tokens_per_sequence=length, checkpointing=step.checkpointing
        )
        bytes_each = parts["activations"] + parts["logits"]
        size = max(1, CACHE_BYTES // bytes_each, MIN_TOKENS // length)
    batches = step.prompts if size is None else -(-step.rows // size)
    return replace(step, micro_batches=batches)


def is_usual(config: Any) -> bool:
    """Whether a run is of the kind that is recorded: the bundled model on its own problems."""
    return bool(config.model == "bundled" and config.data == "generated")


def run_parts(
    config: Any, model: CostModel, sampled: float, evaluated: float
) -> tuple[Step, dict[str, float]]:
    """The mean step of a run, and its seconds by part, if completions have so many tokens."""
    prompt = model.bundled_prompt if is_usual(config) else Step.prompt_tokens
    step = run_step(config, sampled, prompt)
    floors = model.floors
    count, stages = sum(config.steps), len(config.steps)
    parts = {
        "load": model.load(load_work(step, floors)),
        "rollouts": count * model.rollout(rollout_work(step, floors)),
        "training": count * model.training(training_work(step, floors)),
    }
    if config.fisher_examples:
        each = replace(
            step,
            prompts=config.fisher_examples,
            group=1,
            int8_rollouts=False,
            reference=False,
            micro_batches=-(-config.fisher_examples // (1 if step.frozen else FISHER_BATCH)),
        )
        work = {**training_work(each, floors), "optimizer": 0.0, "step": 0.0}
        scored = model.training(work) + model.rollout(rollout_work(each, floors))
        parts["fisher"] = stages * scored
    if config.per_cell and config.data == "generated":
        problems = config.per_cell * len(config.domains) * len(DIFFICULTIES)
        batch = replace(step, prompts=problems, group=1, tokens=evaluated, int8_rollouts=False)
        one = model.rollout(rollout_work(batch, floors))
        parts["evaluate"] = (stages + 1 + config.int8_evaluation) * one
    return step, parts


def estimate_run(config: Any, model: CostModel | None = None) -> Estimate:
    """Seconds and peak memory of a whole run, ``pipeline.RunConfig``, before it starts.

    Raises UserError, in one sentence, where no sensible estimate is possible.
    """
    model = model or cost_model()
    longest = config.max_completion
    known = recorded_runs(model) if is_usual(config) else None
    if known is None:
        step, parts = run_parts(config, model, longest, longest)
        told = "if every completion runs to its limit"
        if config.per_cell and config.data != "generated":
            told += "; evaluations come on top"
        return Estimate(sum(parts.values()), model.error, model.peak_bytes(step), parts, told)
    sampled, evaluated = min(known.sampled, longest), min(known.evaluated, longest)
    step, parts = run_parts(config, model, sampled, evaluated)
    parts = {name: known.time_ratio * seconds for name, seconds in parts.items()}
    error = max(model.error, known.spread)
    return Estimate(sum(parts.values()), error, known.peak_ratio * model.peak_bytes(step), parts)


def catalogue_steps() -> tuple[dict[str, dict[str, float]], str]:
    """For each model of ``memory.CATALOGUE`` and the bundled one, the expected seconds and peak
    bytes of one step with LoRA on INT8, and a sentence on what that is; or why there is none."""
    try:
        model = cost_model()
    except UserError as error:
        return {}, f"No estimate of time: {error}."
    bundled = replace(architecture_of("bundled"), name="bundled")
    found = {}
    for architecture in (*CATALOGUE, bundled):
        step = Step(architecture)
        found[architecture.name] = {
            "int8_step_seconds": model.step_seconds(step),
            "int8_step_error": model.error,
            "int8_peak_bytes": model.peak_bytes(step),
        }
    step = Step(bundled)
    where = "on this machine" if model.calibrated else "on the machine of the record"
    return found, (
        f"LoRA on INT8: one GRPO step {where}, {step.prompts} prompt of {step.prompt_tokens:.0f} "
        f"tokens with {step.group} completions of {step.tokens:.0f}; "
        f"nine in ten such predictions were within {model.error:.0%}."
    )


def estimate_text(config: Any) -> str:
    """One line for the user before a run: the estimate, or why there is none. Never raises."""
    try:
        return estimate_run(config).text()
    except UserError as error:
        return f"no estimate of time and memory: {error}"
    except Exception as error:  # an estimate must never keep a run from starting
        return f"no estimate of time and memory: {type(error).__name__}: {error}"
