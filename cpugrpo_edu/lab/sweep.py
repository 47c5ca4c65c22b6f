"""The measurements behind the cost model: GRPO steps over group size, length, layers and models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import CATALOGUE, Architecture
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.contestants import Variant, bundled, ours
from cpugrpo_edu.lab.cost import StepSpec, fit_sweep
from cpugrpo_edu.lab.estimate import run_step
from cpugrpo_edu.lab.floors import calibrate
from cpugrpo_edu.lab.pieces import Pieces
from cpugrpo_edu.lab.worker import run_worker, silent
from cpugrpo_edu.lab.workload import QWEN, Workload, workload_model
from cpugrpo_edu.record.files import cache_folder
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run.config import RunConfig

STEPS = 4
"""Measured at each point; the first warms up."""

SHAPE = Architecture("random", 8, 512, 2048, 8, 2, 16_384, tied=True, qkv_bias=True)
CHAT = replace(CATALOGUE[0], name="random")
"""The chat model's shape, for groups as large as the batches of its runs."""
GRID = (
    *((8, group, 32) for group in (2, 4, 8, 16)),
    *((8, 4, tokens) for tokens in (16, 64, 128)),
    *((layers, 4, 32) for layers in (4, 16)),
)
"""Layers, completions of a prompt, tokens of a completion."""


def sweep_points() -> list[StepSpec]:
    """LoRA on random models, INT8 (torch's kernel, and in C) and float32; and the bundled model,
    all weights trained, with the settings of the default run."""
    grid = [(replace(SHAPE, layers=layers), group, tokens) for layers, group, tokens in GRID]
    grid += [(QWEN, 2, 64), (QWEN, 8, 32), *((CHAT, group, 32) for group in (8, 32, 64))]
    int8 = [StepSpec(a, group=group, tokens=tokens, reference=True) for a, group, tokens in grid]
    whole = replace(run_step(RunConfig(), 32), prompts=8, longest=0)
    return [
        *int8,
        *(replace(step, compiled=True) for step in int8),
        *(replace(step, frozen=False) for step in int8[: len(GRID) : 3]),
        *(replace(whole, group=group) for group in (4, 8, 16)),
        *(replace(whole, tokens=tokens) for tokens in (16, 64)),
        replace(whole, prompts=16),
    ]


def name_of(step: StepSpec) -> str:
    a, model = step.architecture, "bundled model"
    if step.lora_rank:
        base = ("compiled INT8" if step.compiled else "INT8") if step.frozen else "float32"
        model = f"{a.layers} layers of {a.hidden}, {base}"
    return f"{model}, {step.prompts} x G {step.group}, {step.tokens} tokens"


def measure(step: StepSpec, folder: Path) -> dict[str, Any]:
    """Seconds of a step and of its rollouts: the shortest after the first.

    The shortest, not the mean: whatever else the machine does can only make a step longer.
    """
    if step.compiled and not c_kernel.available():
        raise UserError(f"no compiled kernel: {c_kernel.library()[1]}")
    if step.lora_rank:
        length = int(step.prompt_tokens)
        workload = Workload(
            "sweep", STEPS, step.group, int(step.tokens), length, length, 1, step.architecture
        )
        kernel = "compiled" if step.compiled else "packed"
        variant = Variant(frozen_int8=step.frozen, share_prefix=step.frozen, kernel=kernel)
        model = workload_model(step.architecture, folder)
        found = run_worker(ours, workload, model, variant)
    else:
        config = RunConfig(
            steps=(STEPS, 0, 0),
            prompts_per_step=step.prompts,
            num_generations=step.group,
            max_completion=int(step.tokens),
        )
        options = EngineOptions(stop_at_eos=False, skip_zero_advantage=False, patience=0)
        options = replace(options, int8_rollouts=config.int8_rollouts)
        found = run_worker(bundled, config, options)
        step = replace(step, prompt_tokens=found["prompt_tokens"])
    times = list(zip(found["step_seconds"], found["rollout_seconds"]))[1:]
    rollout = min(rollout for _, rollout in times)
    return {
        "name": name_of(step),
        "step": asdict(step),
        "step_seconds": rollout + min(whole - rollout for whole, rollout in times),
        "rollout_seconds": rollout,
        "all_step_seconds": found["step_seconds"],
        "load_seconds": found["seconds"]["import"] + found["seconds"]["load"],
        "peak_rss_bytes": found["peak_rss_bytes"],
    }


def bench_sweep(
    points: Sequence[StepSpec] | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = silent,
) -> RunRecord:
    """Measure the points and fit the model. ``folder`` keeps the random models, and the finished
    points until all are done, so that an interrupted sweep continues."""
    points, folder = sweep_points() if points is None else points, folder or cache_folder()
    record = new_record("bench-sweep", {"points": [asdict(point) for point in points]}, {})
    pieces = Pieces(folder, "sweep", {"cpu": record.machine["cpu"]})
    say("the machine's floors")
    floors = pieces.once("floors", lambda: run_worker(calibrate))
    measured, skipped = [], {}
    for number, point in enumerate(points, 1):
        name = name_of(point)
        say(f"{number}/{len(points)} {name}")
        try:
            measured.append(pieces.once(name, partial(measure, point, folder)))
        except UserError as error:
            skipped[name] = str(error)
            say(f"skipped: {error}")
    record.results = {"points": measured, "skipped": skipped, "model": {"floors": floors}}
    record.results["model"] = asdict(fit_sweep(record.results))  # for readers of the file
    shutil.rmtree(pieces.folder)
    return record
