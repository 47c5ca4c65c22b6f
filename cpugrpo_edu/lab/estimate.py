"""What a run will take: the cost model of the recorded sweep, this machine's floors, its settings.

How long a model's completions are, which only a run can tell, comes from recorded runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.engine.hardware import BUNDLED_MODEL
from cpugrpo_edu.engine.int8_matrix import usable
from cpugrpo_edu.engine.sizes import CATALOGUE, Architecture
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.cost import CostModel, StepSpec, fit_sweep, rollout_work
from cpugrpo_edu.lab.floors import calibration
from cpugrpo_edu.lab.recorded import completion_lengths, recorded_config, recorded_runs
from cpugrpo_edu.models.fetch import PACKAGED, fetched
from cpugrpo_edu.models.load import (
    prepare_tokenizer,
    read_config,
    read_tokenizer,
    remember_prompt,
    resolve_source,
)
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.machine import GIB, available_memory
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.data import divide
from cpugrpo_edu.show.text import records_folder
from cpugrpo_edu.tasks.custom import load_custom

PROMPTS = {"bundled": 27, "smollm2": 55}
"""Mean tokens of a prompt of a model's usual problems."""


def recorded_sweep(path: Path | None = None) -> RunRecord:
    """The sweep's record; UserError without one."""
    path = path or records_folder() / "bench-sweep.json"
    if not path.exists():
        raise UserError(
            f"no cost model is recorded; measure one: cpugrpo bench sweep --output {path}"
        )
    return RunRecord.load(path)


def model_here() -> CostModel:
    """The recorded sweep's model, on the floors of this machine."""
    return replace(fit_sweep(recorded_sweep().results), floors=calibration())


def architecture_of(model: str) -> Architecture:
    """Of the bundled model, a local folder, or a hub id or packaged model that is here already."""
    if model == "bundled":
        return Architecture.from_config(BUNDLED_MODEL.parent)
    here = fetched(model) if model in PACKAGED else None
    return Architecture.from_config(here or model)


def is_usual(config: Any) -> bool:
    """Whether a run is of a kind that is recorded: a model that comes with us, on its problems."""
    return config.model in PROMPTS and config.data == "generated"


def usual_prompt(config: Any) -> float:
    """Mean tokens of a prompt, without a look at the data."""
    return PROMPTS[config.model] if is_usual(config) else StepSpec.prompt_tokens


def prompt_lengths(config: Any) -> tuple[float, float]:
    """Mean and longest of the prompts that a run will draw from the user's own files, in tokens;
    for other data what is usual."""
    usual = usual_prompt(config)
    if config.data == "generated" or not Path(config.data).exists():
        return usual, usual
    architecture_of(config.model)  # UserError without the model: an estimate downloads none
    try:
        lengths = [*map(encoder_of(config), drawn_problems(config))]
    except UserError:  # the run itself will say what is wrong with the data
        lengths = []
    return (fmean(lengths), max(lengths)) if lengths else (usual, usual)


def drawn_problems(config: Any) -> list[Problem]:
    """What the stages of a run will draw from the user's own files. No verifier is executed."""
    from cpugrpo_edu.run.prepare import problems_of_stage  # loads TRL

    problems = load_custom(
        config.data,
        lambda problem, completion: None,
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
    )
    training, _ = divide(problems, 1)
    stages = [index for index, stage in enumerate(config.stages) if stage.steps]
    return [p for index in stages for p in problems_of_stage(config, index, training)]


def encoder_of(config: Any) -> Callable[[Problem], int]:
    """What counts the tokens of a problem's prompt, as the run's model will see it."""
    source = resolve_source(config.model)
    tokenizer = read_tokenizer(source)
    prepare_tokenizer(tokenizer)
    shape = read_config(source)
    system = remember_prompt(tokenizer, shape, config.system, config.answer_format)
    policy = Policy(None, tokenizer, source, system)
    return lambda problem: len(policy.encode_problem(problem))


def run_step(config: Any, tokens: float, prompt: float | None = None) -> StepSpec:
    """The mean GRPO step of a run (its ``RunConfig``): completions have ``tokens``, prompts
    ``prompt`` tokens, or as many as usual."""
    frozen = config.dtype == "int8"
    return StepSpec(
        architecture_of(config.model),
        prompts=config.prompts_per_step,
        group=config.num_generations,
        prompt_tokens=usual_prompt(config) if prompt is None else prompt,
        tokens=tokens,
        longest=config.max_completion,
        frozen=frozen,
        lora_rank=config.lora_rank,
        int8_rollouts=config.int8_rollouts and not frozen,
        compiled=usable(config.kernel) == "compiled",
        reference=config.beta > 0,
        checkpointing=config.checkpointing == "on",
    )


def run_parts(
    config: Any, model: CostModel, sampled: float, evaluated: float, prompt: float | None = None
) -> dict[str, float]:
    """Seconds of a run by part, given the mean tokens of its completions and its prompts."""
    step, count = run_step(config, sampled, prompt), sum(config.steps)
    whole, rollout = model.step_seconds(step), model.rollout(rollout_work(step, model.floors))
    parts = {
        "load": model.load_seconds,
        "rollouts": count * rollout,
        "training": count * (whole - rollout),
    }
    if config.consolidates:  # a score costs what a completion of a step does
        parts["fisher"] = len(config.steps) * config.fisher_examples / step.rows * whole
    if config.per_cell and config.data == "generated":
        problems = config.per_cell * len(config.domains) * len(DIFFICULTIES)
        batch = replace(step, prompts=problems, group=1, tokens=evaluated, int8_rollouts=False)
        evaluations = len(config.steps) + 1 + config.int8_evaluation
        parts["evaluate"] = evaluations * model.rollout(rollout_work(batch, model.floors))
    return parts


def estimate_run(config: Any, model: CostModel) -> tuple[float, float, str]:
    """Seconds and peak bytes of a whole run, and what they assume."""
    sampled = evaluated = float(config.max_completion)
    told = ", if every completion runs to its limit"
    runs = recorded_runs(config.model) if is_usual(config) else []
    if runs:
        sampled, evaluated = (min(n, config.max_completion) for n in completion_lengths(runs))
        told = ""
    elif config.per_cell and config.data != "generated":
        told += "; evaluations come on top"
    mean, longest = prompt_lengths(config)
    seconds = sum(run_parts(config, model, sampled, evaluated, mean).values())
    peak = model.peak_bytes(run_step(config, sampled, longest))
    if runs and config.model != "bundled":
        longer, larger = off_by(runs)
        far = max(abs(each / fmean(longer) - 1) for each in longer)
        told = f"; the {len(runs)} recorded runs that this goes by differ by up to {far:.0%}"
        seconds, peak = seconds * fmean(longer), peak * fmean(larger)
    return seconds, peak, told


def off_by(runs: Sequence[RunRecord]) -> tuple[list[float], list[float]]:
    """Measured over predicted, time and memory, of recorded runs of a model that is far larger than
    those of the sweep, whose cost model therefore says too much of it."""
    model = fit_sweep(recorded_sweep().results)
    longer, larger = [], []
    for run in runs:
        config, lengths = recorded_config(run), completion_lengths([run])
        predicted = sum(run_parts(config, model, *lengths).values())
        longer.append(run.results["seconds"]["total"] / predicted)
        peak = model.peak_bytes(run_step(config, lengths[0]))
        larger.append(run.results["peak_rss_bytes"] / peak)
    return longer, larger


def estimate_text(config: Any) -> str:
    """One line before a run, such as ``about 40 s (± 15%) and 1.1 GiB (± 10%) expected``; a warning
    if that much memory is not free; or why there is no estimate. Never raises."""
    try:
        model = model_here()
        seconds, peak, told = estimate_run(config, model)
    except Exception as error:  # an estimate must never abort a run
        why = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return f"no estimate of time and memory: {why}"
    if seconds < 90:
        took = f"{seconds:.0f} s"
    else:
        took = f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    if peak > (free := available_memory()):
        told += f"; only {free / GIB:.1f} GiB of memory are free, so it may not fit"
    return (
        f"about {took} (± {model.steps.error:.0%}) and {peak / GIB:.1f} GiB "
        f"(± {model.memory.error:.0%}) expected{told}"
    )


def catalogue_steps() -> tuple[dict[str, dict[str, float]], str]:
    """Seconds and peak bytes of one step with LoRA on INT8 for each model of ``memory.CATALOGUE``
    and the bundled one, and a sentence that explains them; or why there are none."""
    try:
        model = model_here()
    except UserError as error:
        return {}, f"No estimate of time: {error}."
    bundled = replace(architecture_of("bundled"), name="bundled")
    steps = [StepSpec(shape) for shape in (*CATALOGUE, bundled)]
    found = {
        step.architecture.name: {
            "int8_step_seconds": model.step_seconds(step),
            "int8_step_error": model.steps.error,
            "int8_peak_bytes": model.peak_bytes(step),
        }
        for step in steps
    }
    return found, (
        f"LoRA on INT8: one GRPO step on this machine, {steps[0].prompts} prompt of "
        f"{steps[0].prompt_tokens:.0f} tokens with {steps[0].group} completions of "
        f"{steps[0].tokens:.0f}; nine in ten such predictions were within "
        f"{model.steps.error:.0%} in time and {model.memory.error:.0%} in memory."
    )
