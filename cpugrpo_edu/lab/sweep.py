"""The measurements behind the cost model: GRPO steps over group size, length, layers and models.

Each point is a few GRPO steps in a process of its own, so that its peak memory is its own.
Points that are done are kept beside the record, so that an interrupted sweep goes on.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cpugrpo_edu.engine.memory import Architecture, PeakMemory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.cost import CostModel, Fit, Step, fit_points
from cpugrpo_edu.record.files import write_text
from cpugrpo_edu.record.run_record import RunRecord

BUNDLED_PROMPTS = 8


@dataclass(frozen=True)
class Shape:
    """A random model of Qwen2's build."""

    layers: int
    hidden: int = 512
    ffn: int = 2048
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 16_384


@dataclass(frozen=True)
class Point:
    """A few GRPO steps to measure; ``shape`` None is the bundled model, all weights trained,
    with the settings of the default run."""

    shape: Shape | None
    group: int
    tokens: int
    frozen: bool = True
    """LoRA on a frozen INT8 base; else LoRA on a float32 one."""
    compiled: bool = False
    """INT8 products by the compiled kernel."""
    prompts: int = 1
    steps: int = 4

    @property
    def name(self) -> str:
        if self.shape is None:
            model = "bundled model"
        else:
            base = ("compiled INT8" if self.compiled else "INT8") if self.frozen else "float32"
            model = f"{self.shape.layers} layers of {self.shape.hidden}, {base}"
        return f"{model}, {self.prompts} x G {self.group}, {self.tokens} tokens"


LARGE = Shape(24, 896, 4864, 14, 2, 151_936)
"""The 494M-parameter workload's."""

POINTS = (
    *(Point(Shape(8), group, 32) for group in (2, 4, 8, 16)),
    *(Point(Shape(8), 4, tokens) for tokens in (16, 64, 128)),
    *(Point(Shape(layers), 4, 32) for layers in (4, 16)),
    *(Point(Shape(8), group, 32, frozen=False) for group in (2, 8)),
    Point(Shape(4), 4, 64, frozen=False),
    *(Point(None, group, 32, prompts=BUNDLED_PROMPTS) for group in (4, 8, 16)),
    *(Point(None, 8, tokens, prompts=BUNDLED_PROMPTS) for tokens in (16, 64)),
    Point(None, 8, 32, prompts=2 * BUNDLED_PROMPTS),
    Point(LARGE, 2, 64),
    Point(LARGE, 8, 32),
    *(Point(Shape(8), group, 32, compiled=True) for group in (2, 8)),
    *(Point(Shape(8), 4, tokens, compiled=True) for tokens in (16, 128)),
    *(Point(Shape(layers), 4, 32, compiled=True) for layers in (4, 16)),
    Point(LARGE, 2, 64, compiled=True),
    Point(LARGE, 8, 32, compiled=True),
)


def measure_point(point: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of a step and of its rollouts: the shortest after the first step, which warms up.

    The shortest, not the mean: what else the machine does can only make a step longer.
    """
    started = time.perf_counter()
    shape = point.pop("shape")
    chosen = Point(shape=None if shape is None else Shape(**shape), **point)
    with PeakMemory() as peak:
        results = _measure_point(chosen, Path(folder), started)
    return {**results, "peak_rss_bytes": peak.peak_rss_bytes}


def _measure_point(point: Point, folder: Path, started: float) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from cpugrpo_edu.engine.int8_base import load_frozen, spares_memory
    from cpugrpo_edu.engine.options import EngineOptions
    from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
    from cpugrpo_edu.lab.bench import LORA_RANK, even_ids, step_callback
    from cpugrpo_edu.models.load import Policy, add_lora, load_policy
    from cpugrpo_edu.run.pipeline import RunConfig

    bundled = point.shape is None
    if bundled:
        policy = load_policy("bundled")
    else:
        source = folder / ("bf16" if point.frozen else "fp32")
        if point.frozen:
            kernel = "compiled" if point.compiled else "packed"
            model = load_frozen(str(source), AutoConfig.from_pretrained(source), kernel)
        else:
            model = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        policy = Policy(add_lora(model, LORA_RANK), tokenizer, str(source))
    # by its own name: the configuration has the folder's
    architecture = replace(Architecture.from_config(policy.model.config), name=point.name)
    loaded = time.perf_counter()
    data = sweep_prompts(policy, point)
    default = RunConfig()
    with tempfile.TemporaryDirectory() as out:
        config = cpu_config(
            out,
            prompts_per_step=point.prompts,
            num_generations=point.group,
            max_completion_length=point.tokens,
            max_steps=point.steps,
            beta=0.0 if bundled else 0.1,
            gradient_checkpointing=bundled and default.checkpointing == "on",
        )
        options = EngineOptions(
            stop_at_eos=False,
            int8_rollouts=bundled and default.int8_rollouts,
            share_prefix=point.frozen and not bundled,
            recompute=spares_memory(policy.model),
            skip_zero_advantage=False,
            patience=0,
        )
        trainer = CPUGRPOTrainer(
            policy, config, [even_ids], Dataset.from_list(data), options=options
        )
        times: list[float] = []
        rollouts: list[float] = []
        trainer.add_callback(
            step_callback(times, lambda: rollouts.append(trainer.tally.seconds - sum(rollouts)))
        )
        trainer.train()
    lengths = [len(group.prompt_ids) for group in trainer.last_groups]
    planned = trainer.tally.micro_batches[-1] if trainer.tally.micro_batches else point.group
    frozen = point.frozen and not bundled
    step = Step(
        architecture,
        prompts=point.prompts,
        group=point.group,
        prompt_tokens=fmean(lengths),
        tokens=point.tokens,
        frozen=frozen,
        lora_rank=0 if bundled else LORA_RANK,
        int8_rollouts=options.int8_rollouts,
        compiled=point.compiled,
        reference=config.beta > 0,
        checkpointing=bool(config.gradient_checkpointing),
        micro_batches=-(-point.prompts * point.group // planned),
    )
    return {
        "name": point.name,
        "step": asdict(step),
        "step_seconds": min(rollouts[1:]) + min(t - r for t, r in zip(times[1:], rollouts[1:])),
        "rollout_seconds": min(rollouts[1:]),
        "all_step_seconds": times,
        "load_seconds": loaded - started,
    }


def sweep_prompts(policy: Any, point: Point) -> list[dict[str, Any]]:
    """Prompts of about 64 tokens, or the bundled model's own problems."""
    count = point.prompts * point.steps
    if point.shape is not None:
        from cpugrpo_edu.lab.bench import Workload

        vocabulary = point.shape.vocabulary
        words = Workload(
            steps=count, stages=1, shortest_prompt=64, longest_prompt=64, vocabulary=vocabulary
        )
        return [{"prompt": prompt} for prompt in words.prompts()]
    from cpugrpo_edu.curriculum import stage_problems
    from cpugrpo_edu.engine.trl_data import to_dataset
    from cpugrpo_edu.run.pipeline import RunConfig

    run = RunConfig()
    problems = stage_problems(run.stages[0], run.domains, count, seed=0)
    return [dict(row) for row in to_dataset(problems, policy.system)]


def measure_evaluation(per_cell: int = 100) -> dict[str, Any]:
    """Seconds of an evaluation of the bundled model, and the work in it."""
    from cpugrpo_edu.evaluate import evaluate
    from cpugrpo_edu.models.load import load_policy
    from cpugrpo_edu.run.pipeline import RunConfig, load_data
    from cpugrpo_edu.sample import Sampling

    policy = load_policy("bundled")
    _, problems = load_data(RunConfig(per_cell=per_cell))
    evaluate(policy, problems[:8], "warm-up", Sampling(8, temperature=0.0))
    result = evaluate(
        policy, problems, "sweep", Sampling(RunConfig().max_completion, temperature=0.0)
    )
    lengths = [len(policy.encode_problem(problem)) for problem in problems]
    step = Step(
        replace(Architecture.from_config(policy.model.config), name="bundled"),
        prompts=len(problems),
        group=1,
        prompt_tokens=fmean(lengths),
        tokens=fmean(result.tokens),
        longest=max(result.tokens),
        frozen=False,
        lora_rank=0,
    )
    return {"step": asdict(step), "seconds": result.seconds}


def bench_sweep(
    points: tuple[Point, ...] = POINTS,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    partial: Path | None = None,
) -> RunRecord:
    """Measure the points, fit the model, and keep both. ``partial`` is where points that are
    done wait for the others."""
    from cpugrpo_edu.engine import c_kernel
    from cpugrpo_edu.engine.hardware import new_record
    from cpugrpo_edu.lab.bench import Workload, run_worker, workload_model

    record = new_record("bench-sweep", {"points": [asdict(point) for point in points]}, {})
    done: dict[str, Any] = {}
    if partial is not None and partial.exists():
        try:
            kept = json.loads(partial.read_text(encoding="utf-8"))
            if kept["cpu"] == record.machine["cpu"]:
                done = kept["done"]
        except (ValueError, KeyError, TypeError):
            say(f"{partial} cannot be read; the sweep begins again")

    def once(name: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in done:
            done[name] = call()
            if partial is not None:
                kept = {"cpu": record.machine["cpu"], "done": done}
                partial.parent.mkdir(parents=True, exist_ok=True)
                write_text(partial, json.dumps(kept))
        return dict(done[name])

    say("the machine's floors")
    floors = once("floors", lambda: run_worker("calibrate"))
    measured, skipped = [], {}
    for number, point in enumerate(points, 1):
        say(f"{number}/{len(points)} {point.name}")

        def call(point: Point = point) -> dict[str, Any]:
            if point.compiled and not c_kernel.available():
                raise UserError(f"no compiled kernel: {c_kernel.library()[1]}")
            place = ""
            if point.shape is not None:
                place = str(workload_model(Workload(**asdict(point.shape)), folder))
            return run_worker("sweep", point=asdict(point), folder=place)

        try:
            measured.append(once(point.name, call))
        except UserError as error:
            skipped[point.name] = str(error)
            say(f"skipped: {error}")
    say("an evaluation of the bundled model")
    evaluation = once("evaluation", lambda: run_worker("evaluation"))
    cpu, cores = record.machine["cpu"], record.machine["usable_cores"]
    model = replace(
        fit_points(measured, evaluation, floors), machine=f"{cpu}, {cores} usable cores"
    )
    record.results = {
        "points": measured,
        "skipped": skipped,
        "evaluation": evaluation,
        "model": model.to_json(),
    }
    if partial is not None:
        partial.unlink(missing_ok=True)
    return record


SWEEP_HEADER = ["Point", "s a step", "predicted", "error", "peak GB", "predicted ", "error "]


def sweep_rows(record: RunRecord) -> list[list[str]]:
    """One row a point: measured, predicted by the fit that left it out, and the error."""
    model = record.results["model"]
    rows = []
    for point, error, memory_error in zip(
        record.results["points"], model["steps"]["errors"], model["memory"]["errors"]
    ):
        seconds, peak = point["step_seconds"], point["peak_rss_bytes"] / 1e9
        rows.append(
            [
                point["name"],
                f"{seconds:.3f}",
                f"{seconds * (1 + error):.3f}",
                f"{error:+.0%}",
                f"{peak:.2f}",
                f"{peak * (1 + memory_error):.2f}",
                f"{memory_error:+.0%}",
            ]
        )
    return rows


COEFFICIENT_HEADER = ["Time of", "Kind of work", "x the floor"]


def coefficient_rows(record: RunRecord) -> list[list[str]]:
    """The fitted coefficients: how many times its floor each kind of work takes."""
    return [
        [name, kind, f"{value:.2f}"]
        for name in ("rollout", "training", "load", "memory")
        for kind, value in record.results["model"][name]["coefficients"].items()
    ]


def sweep_summary(record: RunRecord) -> str:
    """The errors of the fit in one sentence."""
    model = CostModel.from_json(record.results["model"])

    def say(errors: list[float]) -> str:
        sizes = sorted(map(abs, errors))
        return (
            f"mean {fmean(sizes):.0%}, nine in ten below {Fit({}, errors).error:.0%}, "
            f"worst {sizes[-1]:.0%}"
        )

    return (
        f"Error of points left out of the fit, {len(model.steps.errors)} points: "
        f"time {say(model.steps.errors)}; memory {say(model.memory.errors)}."
    )
