"""How long a GRPO step takes and how much memory: the work counted, times what it costs.

The *work* of a step is a handful of counts: layer calls, bytes of weights read, multiply-adds.
Each is expressed in the seconds that a machine needs at its best (its *floors*,
:mod:`cpugrpo_edu.lab.floors`), so the coefficients in

    seconds = c_calls * calls + c_weights * weights + c_operations * operations + ...

are pure numbers, at least 0: how many times slower than the floor that kind of work is. They are
fitted by non-negative least squares on relative errors to the recorded sweep
(:mod:`cpugrpo_edu.lab.sweep`); another machine needs only its floors. Every error stated is that
of points left out of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import numpy as np
from scipy.optimize import nnls

from cpugrpo_edu.engine.c_kernel import BLOCK
from cpugrpo_edu.engine.micro_batches import CACHE_BYTES
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import Architecture
from cpugrpo_edu.errors import UserError

Work = dict[str, float]
"""Kind of work -> seconds it takes at a machine's floors; of memory, bytes."""

RATES = {"float32": "float32_gflops", "int8": "int8_gops", "compiled": "compiled_gops"}
"""Kernel -> the floor of its products; "int8" is torch's, "compiled" INT8 in C."""


@dataclass(frozen=True)
class StepSpec:
    """One GRPO step: ``prompts`` groups of ``group`` completions of ``tokens`` tokens."""

    architecture: Architecture
    prompts: int = 1
    group: int = 8
    prompt_tokens: float = 64
    tokens: float = 64  # mean length of a completion
    longest: float = 0  # length of the longest, so decode steps; 0: as long as the others
    frozen: bool = True  # LoRA on a frozen INT8 base, prompts shared within a group
    lora_rank: int = 16  # 0 trains all weights
    int8_rollouts: bool = False
    compiled: bool = False  # INT8 products by the compiled kernel
    reference: bool = False
    checkpointing: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepSpec:
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        return cls(**{**known, "architecture": Architecture(**data["architecture"])})

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def sampling_kernel(self) -> str:
        int8 = "compiled" if self.compiled else "int8"
        return int8 if self.frozen or self.int8_rollouts else "float32"

    @property
    def training_kernel(self) -> str:
        return self.sampling_kernel if self.frozen else "float32"


def rollout_work(step: StepSpec, floors: Mapping[str, float]) -> Work:
    """What sampling the completions asks of the machine."""
    a, kernel = step.architecture, step.sampling_kernel
    read, call = floors["read_gb_per_second"] * 1e9, floors["call_seconds"]
    int8_read = read if kernel == "compiled" else floors["int8_weight_gb_per_second"] * 1e9
    kind, each = ("float32", 4 / read) if kernel == "float32" else ("int8", 1 / int8_read)
    decoded, weights = step.rows * step.tokens, a.linear_parameters + a.vocab * a.hidden
    products = decoded * weights + step.prompts * step.prompt_tokens * a.linear_parameters
    passes = -(-step.rows // EngineOptions.max_rows) * (step.longest or step.tokens)
    calls = 1 if kernel == "compiled" else a.layers  # it decodes a token in a single call
    context = step.prompt_tokens + step.tokens / 2
    name = "compiled operations" if kernel == "compiled" else "operations"
    return {
        "calls": passes * calls * call,
        f"{kind} weights": passes * weights * each,
        name: 2 * products / (floors[RATES[kernel]] * 1e9),
        # Logits of every token; keys and values of every position before it
        "traffic": 4 * decoded * (a.vocab + 2 * a.layers * a.kv * context) / read,
        # Text to tokens and back, and its verdict
        "prompts": step.prompts * call,
    }


def training_work(step: StepSpec, floors: Mapping[str, float]) -> Work:
    """What the loss, its gradient and the optimizer ask of the machine."""
    a, kernel = step.architecture, step.training_kernel
    sequences, length = step.rows, step.prompt_tokens + step.tokens
    if step.frozen:  # the completions of a group lie behind one copy of their prompt
        sequences, length = step.prompts, step.prompt_tokens + step.group * step.tokens
    # Forward; backward to the inputs, and to the weights if those are trained
    passes = 2 + (not step.lora_rank) + step.reference + step.checkpointing
    products = 2 * passes * sequences * length * a.linear_parameters
    attention = 4 * passes * sequences * length**2 * a.layers * a.attention
    seconds = products / floors[RATES[kernel]] + attention / floors["float32_gflops"]
    return {
        "step": 1000 * floors["call_seconds"],
        "calls": passes * a.layers * floors["call_seconds"],
        f"{kernel} operations": seconds / 1e9,
    }


def memory_work(step: StepSpec) -> Work:
    """Bytes by kind: the libraries (1 GB, for the fit to scale), what stays, what a micro-batch
    keeps for its backward pass, keys and values of the rollouts."""
    a = step.architecture
    if step.frozen:
        size = 1 + 4 / BLOCK  # a scale and an offset of two bytes each for a block
        # The inside of the MLPs is computed again, and the head works in tiles.
        kept = a.layers * (a.layer_activations - 4 * a.ffn)
        batch = 4 * kept * (step.prompt_tokens + step.group * step.tokens)
    else:
        size, kept = 4, a.layers * a.layer_activations
        if step.checkpointing:
            kept = a.layers * a.hidden + a.layer_activations
        each = 4 * (kept * (step.prompt_tokens + step.tokens) + 3 * a.vocab * step.tokens)
        batch = min(step.rows * each, max(CACHE_BYTES, each))  # as the trainer plans
    trained = a.lora_parameters(step.lora_rank) if step.lora_rank else a.parameters
    models = 2 if step.reference and not step.lora_rank else 1
    positions = step.prompt_tokens + (step.longest or step.tokens)
    return {
        "libraries": 1e9,
        # Weights; gradients and two moments of what is trained; adapters lie beside the weights
        "state": models * size * a.parameters + (16 if step.lora_rank else 12) * trained,
        "micro-batch": batch,
        "cache": 8 * a.layers * a.kv * min(step.rows, EngineOptions.max_rows) * positions,
    }


# The fit


@dataclass(frozen=True)
class Fit:
    """Coefficients of a time or of memory; relative errors of points that the fit left out."""

    coefficients: dict[str, float]
    errors: list[float]

    def __call__(self, work: Work) -> float:
        """Seconds, or bytes."""
        return sum(self.coefficients.get(kind, 0.0) * amount for kind, amount in work.items())

    @property
    def error(self) -> float:
        """What nine in ten of the errors stay below, whatever their sign."""
        return sorted(map(abs, self.errors))[min(len(self.errors) - 1, int(0.9 * len(self.errors)))]


def solve(works: Sequence[Work], measured: Sequence[float]) -> dict[str, float]:
    """Coefficients >= 0 with the least sum of squared relative errors."""
    kinds = sorted(set().union(*works))
    matrix = np.array([[w.get(kind, 0.0) / m for kind in kinds] for w, m in zip(works, measured)])
    scale = np.maximum(matrix.max(axis=0), 1e-300)
    found, _ = nnls(matrix / scale, np.ones(len(works)))
    return dict(zip(kinds, (found / scale).tolist()))


def fit(works: Sequence[Work], measured: Sequence[float]) -> Fit:
    """Fit to all points; errors are predicted / measured - 1 of each point, fitted without it.

    UserError for fewer than 2 points, or a measurement that is not above 0.
    """
    if len(works) < 2 or min(measured) <= 0:
        raise UserError(f"cannot fit a cost model to {len(works)} points; measure at least 2")
    errors = []
    for i, (work, value) in enumerate(zip(works, measured)):
        rest = solve([*works[:i], *works[i + 1 :]], [*measured[:i], *measured[i + 1 :]])
        errors.append(Fit(rest, [])(work) / value - 1)
    return Fit(solve(works, measured), errors)


@dataclass(frozen=True)
class CostModel:
    """The fits, and the floors that predictions are made with."""

    rollout: Fit
    training: Fit
    steps: Fit  # whole steps: no coefficients of its own, only errors
    memory: Fit
    load_seconds: float  # mean of the sweep
    floors: dict[str, float]

    def step_seconds(self, step: StepSpec) -> float:
        sampling = self.rollout(rollout_work(step, self.floors))
        return sampling + self.training(training_work(step, self.floors))

    def peak_bytes(self, step: StepSpec) -> float:
        return self.memory(memory_work(step))


def fit_sweep(results: Mapping[str, Any]) -> CostModel:
    """The model from the ``results`` of a sweep's record, on the floors of its machine.

    Each of the ``points`` has ``step`` (of :class:`StepSpec`), ``rollout_seconds`` and
    ``step_seconds`` of one step, ``load_seconds`` and ``peak_rss_bytes``. The fit is made whenever
    a record is read, so the coefficients always belong to the counts above. UserError for a
    record without these.
    """
    try:
        points, floors = results["points"], results["model"]["floors"]
        steps = [StepSpec.from_json(point["step"]) for point in points]
        rollouts = [point["rollout_seconds"] for point in points]
        trainings = [point["step_seconds"] - point["rollout_seconds"] for point in points]
        loads, peaks = ([p[k] for p in points] for k in ("load_seconds", "peak_rss_bytes"))
    except (KeyError, TypeError) as error:
        raise UserError(f"the sweep's record has no {error}; measure it again") from error
    rollout = fit([rollout_work(step, floors) for step in steps], rollouts)
    training = fit([training_work(step, floors) for step in steps], trainings)
    memory = fit([memory_work(step) for step in steps], peaks)
    both = zip(rollouts, trainings, rollout.errors, training.errors)
    steps_fit = Fit({}, [(r * a + t * b) / (r + t) for r, t, a, b in both])
    return CostModel(rollout, training, steps_fit, memory, fmean(loads), floors)
