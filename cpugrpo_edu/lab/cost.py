"""How long a GRPO step will take: the work counted, times what such work costs here.

A step's *work* is a handful of counts: layer calls, bytes of weights read, multiply-adds,
numbers the optimizer updates. Each count is given in the seconds that this machine would need
at its best (its *floors*), so the coefficients in

    seconds = c_calls * calls + c_weights * weights + c_operations * operations + ...

are pure numbers, at least 0: how many times slower than the floor that kind of work is. They
are fitted once, by non-negative least squares on relative errors, to a sweep over group size,
completion length, layers and models (:mod:`cpugrpo_edu.lab.sweep`); another machine needs only
its floors, which :func:`calibrate` measures in about a second. Every error stated is that of
points left out of the fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cpugrpo_edu.engine.memory import Architecture, estimate_training_memory
from cpugrpo_edu.errors import UserError

WIDER = 0.5
"""Least relative error stated where this machine could not be calibrated."""

MAX_ROWS = 256
"""Completions decoded together, the default of ``rollout.Sampling``."""

FEW_ROWS = 16
"""As ``compiled.FEW_ROWS``."""

Work = dict[str, float]
"""Kind of work -> seconds it would take at the machine's floors."""


# The floors


def best_of(function: Callable[[], Any], repeats: int) -> float:
    """The shortest time of some calls, after half as many that warm up; seconds."""
    for _ in range(repeats // 2):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_floors(
    rows: int = 228, layers: int = 24, numbers: int = 64 * 2**20, repeats: int = 5
) -> dict[str, float]:
    """Peak rates on products of the 494M-parameter model's shape.

    ``float32_gflops`` and ``int8_gops`` count 2 operations a multiply-add;
    ``read_gb_per_second`` is what summing an array of ``numbers`` reads,
    ``int8_weight_gb_per_second`` what the INT8 kernel reads of the weights of ``layers`` (more
    than a cache holds) for two rows, as in decoding. ``compiled_gops`` is of the
    integer product that the compiled kernel uses.
    """
    import torch

    from cpugrpo_edu.engine.int8 import Int8Linear

    inner, outer = 896, 4864
    weight = torch.randn(outer, inner)
    x, few = torch.randn(rows, inner), torch.randn(2, inner)
    large = torch.ones(numbers)
    packed = [Int8Linear(weight) for _ in range(layers)]
    integers, levels = (torch.ones(n, inner, dtype=torch.int8) for n in (outer, rows))
    operations = 2.0 * rows * inner * outer
    weights = layers * inner * outer

    def decode() -> None:
        for layer in packed:
            layer(few)

    def rate(product: Callable[[], Any]) -> float:
        return operations / best_of(product, 8 * repeats) / 1e9  # milliseconds each

    with torch.inference_mode():
        return {
            "float32_gflops": rate(lambda: x @ weight.t()),
            "int8_gops": rate(lambda: packed[0](x)),
            "compiled_gops": rate(lambda: torch._int_mm(levels, integers.t())),
            "read_gb_per_second": large.nbytes / best_of(large.sum, 4 * repeats) / 1e9,
            "int8_weight_gb_per_second": weights / best_of(decode, 4 * repeats) / 1e9,
        }


def calibrate(rows: int = 228) -> dict[str, float]:
    """The floors measured in about a second, on less data, and the cost of a call.

    ``call_seconds`` is one small layer: a norm and a product of a single row.
    """
    import torch
    import torch.nn.functional as F

    small, row = torch.randn(64, 64), torch.randn(1, 64)

    def calls() -> None:
        for _ in range(100):
            F.linear(F.rms_norm(row, (64,)), small)

    floors = machine_floors(rows, layers=10, numbers=32 * 2**20, repeats=3)
    with torch.inference_mode():
        return {**floors, "call_seconds": best_of(calls, 30) / 100}


FLOORS = (
    *("float32_gflops", "int8_gops", "compiled_gops", "read_gb_per_second"),
    *("int8_weight_gb_per_second", "call_seconds"),
)


# The work


@dataclass(frozen=True)
class Step:
    """One GRPO step: ``prompts`` groups of ``group`` completions of ``tokens`` tokens."""

    architecture: Architecture
    prompts: int = 1
    group: int = 8
    prompt_tokens: float = 64
    tokens: float = 64
    """Mean length of a completion."""
    longest: float = 0
    """Tokens of the longest completion, so decode steps; 0: as long as the others."""
    frozen: bool = True
    """LoRA on a frozen INT8 base, prompts shared within a group."""
    lora_rank: int = 16
    """0 trains all weights."""
    int8_rollouts: bool = False
    compiled: bool = False
    """INT8 products by the compiled kernel."""
    reference: bool = False
    checkpointing: bool = False
    micro_batches: int = 0
    """Backward passes; 0: one a prompt."""

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def blocks(self) -> int:
        """Weights of all layers' linear maps."""
        return self.architecture.linear_parameters

    @property
    def head(self) -> int:
        return self.architecture.vocab * self.architecture.hidden

    @property
    def trained(self) -> int:
        a = self.architecture
        return a.lora_parameters(self.lora_rank) if self.lora_rank else a.parameters

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        return cls(**{**data, "architecture": Architecture(**data["architecture"])})


def rollout_work(step: Step, floors: Mapping[str, float]) -> Work:
    """What sampling the completions asks of the machine."""
    a = step.architecture
    int8 = step.frozen or step.int8_rollouts
    compiled = int8 and step.compiled
    read = floors["read_gb_per_second"] * 1e9
    int8_read = read if compiled else floors["int8_weight_gb_per_second"] * 1e9
    rate = "int8_gops" if int8 else "float32_gflops"
    weights = step.blocks + step.head
    decoded = step.rows * step.tokens
    context = step.prompt_tokens + step.tokens / 2
    passes = -(-step.rows // MAX_ROWS) * (step.longest or step.tokens)
    operations = 2 * (decoded * weights + step.prompts * step.prompt_tokens * step.blocks)
    # The compiled kernel decodes few rows in a single call.
    calls = 1 if compiled and step.rows <= FEW_ROWS else a.layers
    return {
        "calls": passes * calls * floors["call_seconds"],
        "int8 weights": passes * weights / int8_read if int8 else 0.0,
        "float32 weights": 0.0 if int8 else passes * 4 * weights / read,
        "operations": 0.0 if compiled else operations / (floors[rate] * 1e9),
        "compiled operations": operations / (floors["compiled_gops"] * 1e9) if compiled else 0.0,
        # Logits of every token, keys and values of every position before it
        "traffic": 4 * decoded * (a.vocab + 2 * a.layers * a.kv * context) / read,
        # Text to tokens and back, and its verdict
        "prompts": step.prompts * floors["call_seconds"],
    }


def training_work(step: Step, floors: Mapping[str, float]) -> Work:
    """What the loss, its gradient and the optimizer ask of the machine."""
    a = step.architecture
    completions = step.rows * step.tokens
    if step.frozen:
        sequence = step.prompt_tokens + step.group * step.tokens
        tokens, pairs = step.prompts * sequence, step.prompts * sequence**2
    else:
        sequence = step.prompt_tokens + step.tokens
        tokens, pairs = step.rows * sequence, step.rows * sequence**2
    # Forward; backward to the inputs, and to the weights where those are trained
    passes = 2.0 + (not step.lora_rank) + step.reference
    compiled = step.frozen and step.compiled
    if step.checkpointing:
        passes += 1
    elif step.frozen and not compiled:  # the inside of each MLP is computed again
        passes += a.layers * 3 * a.hidden * a.ffn / step.blocks
    int8, float32 = floors["int8_gops"] * 1e9, floors["float32_gflops"] * 1e9
    compiled_rate = floors["compiled_gops"] * 1e9
    products = 2 * passes * tokens * step.blocks
    elements = passes * tokens * a.layers * a.layer_activations
    attention = 4 * passes * pairs * a.layers * a.attention / float32
    batches = step.micro_batches or step.prompts
    return {
        "step": 1000 * floors["call_seconds"],
        "calls": batches * passes * a.layers * floors["call_seconds"],
        "int8 operations": products / int8 + attention if step.frozen and not compiled else 0.0,
        "compiled operations": products / compiled_rate + attention if compiled else 0.0,
        "float32 operations": 0.0 if step.frozen else products / float32 + attention,
        # What lies between the products
        "traffic": 4 * elements / (floors["read_gb_per_second"] * 1e9),
        "head": 2 * (2.0 + step.reference) * completions * step.head / float32,
        # Gradient, its norm, both moments and the weight, read and written
        "optimizer": 8 * 4 * step.trained / (floors["read_gb_per_second"] * 1e9),
    }


def load_work(step: Step, floors: Mapping[str, float]) -> Work:
    """What importing the libraries and reading the weights asks of the machine."""
    return {
        "import": 100_000 * floors["call_seconds"],
        "weights": 4 * step.architecture.parameters / (floors["read_gb_per_second"] * 1e9),
    }


def memory_work(step: Step) -> Work:
    """Bytes by kind, as ``memory.estimate_training_memory`` counts them: libraries (1 GB, for
    the fit to scale); what stays; what a micro-batch brings; keys and values of the rollouts."""
    a = step.architecture
    # INT8 weights are kept both ways round, but for the compiled kernel
    size = (1 if step.compiled else 2) if step.frozen else 4
    whole: dict[str, Any] = {
        "mode": "lora" if step.lora_rank else "full",
        "lora_rank": step.lora_rank or 1,
        "dtype_bytes": size,
        "checkpointing": step.checkpointing,
        "reference": step.reference,
    }
    if step.frozen:
        tokens = round(step.prompt_tokens + step.group * step.tokens)
        parts = estimate_training_memory(a, tokens_per_sequence=tokens, logits_tile=1, **whole)
        # The inside of the MLPs is computed again, or half of it where the weights take less, and
        # the head makes tiles of the vocabulary.
        half = replace(a, ffn=a.ffn // 2 if step.compiled else 0)
        lean = estimate_training_memory(half, tokens_per_sequence=tokens, **whole)
        batch = lean["activations"]
    else:
        rows = -(-step.rows // (step.micro_batches or step.prompts))
        tokens = max(1, round(step.prompt_tokens + step.tokens))
        parts = estimate_training_memory(
            a,
            tokens_per_sequence=tokens,
            micro_batch=rows,
            logits_tile=max(1, round(rows * step.tokens)),
            **whole,
        )
        batch = parts["activations"] + parts["logits"]
    stays = ("weights", "gradients", "optimizer", "reference")
    rows = min(step.rows, MAX_ROWS)
    positions = rows * (step.prompt_tokens + (step.longest or step.tokens))
    return {
        "libraries": 1e9,
        "state": sum(parts[name] for name in stays),
        "micro-batch": batch,
        "cache": 8 * a.layers * a.kv * positions,
    }


# The fit


@dataclass(frozen=True)
class Fit:
    """Coefficients of one kind of time, or of memory, and relative errors on points left out."""

    coefficients: dict[str, float]
    errors: list[float] = field(default_factory=list)

    def __call__(self, work: Mapping[str, float]) -> float:
        """Seconds."""
        return sum(self.coefficients[kind] * amount for kind, amount in work.items())

    @property
    def error(self) -> float:
        """What nine in ten of the left-out points stay below; 0 to 1 and more."""
        found = sorted(map(abs, self.errors))
        return found[min(len(found) - 1, int(0.9 * len(found)))] if found else WIDER


def solve(works: Sequence[Work], seconds: Sequence[float]) -> dict[str, float]:
    """Coefficients >= 0 with the least sum of squared relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    kinds = list(works[0])
    matrix = np.array([[w[kind] / s for kind in kinds] for w, s in zip(works, seconds)])
    scale = np.maximum(matrix.max(axis=0), 1e-300)
    found, _ = nnls(matrix / scale, np.ones(len(works)))
    return dict(zip(kinds, (found / scale).tolist()))


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Fit:
    """Fit to all points; errors are predicted / measured - 1 of each point, fitted without it."""
    if len(works) < 2 or min(seconds) <= 0:
        raise UserError(f"cannot fit a cost model to {len(works)} points; measure at least 2")
    errors = []
    for i, (work, measured) in enumerate(zip(works, seconds)):
        rest = solve([*works[:i], *works[i + 1 :]], [*seconds[:i], *seconds[i + 1 :]])
        errors.append(Fit(rest)(work) / measured - 1)
    return Fit(solve(works, seconds), errors)


@dataclass(frozen=True)
class CostModel:
    """The fits, the libraries' memory, and the floors that predictions are made with."""

    rollout: Fit
    training: Fit
    load: Fit
    steps: Fit
    """Whole steps; no coefficients of its own, only errors."""
    memory: Fit
    """Bytes, not seconds."""
    bundled_prompt: float
    """Mean tokens of the bundled model's problems."""
    floors: dict[str, float]
    sweep_floors: dict[str, float]
    """Of the machine that the sweep ran on; ``floors`` may be another's."""
    machine: str = ""
    """Where the sweep ran."""
    calibrated: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostModel:
        fits = {name: Fit(**data[name]) for name in FITS}
        return cls(**{**data, **fits})

    @property
    def error(self) -> float:
        return self.steps.error if self.calibrated else max(WIDER, 2 * self.steps.error)

    def step_seconds(self, step: Step) -> float:
        return self.rollout(rollout_work(step, self.floors)) + self.training(
            training_work(step, self.floors)
        )

    def peak_bytes(self, step: Step) -> float:
        return self.memory(memory_work(step))


FITS = ("rollout", "training", "load", "steps", "memory")


def fit_points(
    points: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], floors: dict[str, float]
) -> CostModel:
    """The model from a sweep's points: ``step`` (of :class:`Step`), ``rollout_seconds`` and
    ``step_seconds`` of one step, ``load_seconds``, ``peak_rss_bytes``; and from an evaluation
    of the bundled model, rollouts alone: ``step`` and ``seconds``."""
    steps = [Step.from_json(point["step"]) for point in points]
    rollouts = [point["rollout_seconds"] for point in points]
    trainings = [point["step_seconds"] - point["rollout_seconds"] for point in points]
    evaluated = Step.from_json(evaluation["step"])
    works = [rollout_work(step, floors) for step in (*steps, evaluated)]
    rollout = fit(works, [*rollouts, evaluation["seconds"]])
    training = fit([training_work(step, floors) for step in steps], trainings)
    together = [
        (r * (1 + a) + t * (1 + b)) / (r + t) - 1
        for r, t, a, b in zip(rollouts, trainings, rollout.errors, training.errors)
    ]
    load = fit([load_work(s, floors) for s in steps], [point["load_seconds"] for point in points])
    memory = fit([memory_work(step) for step in steps], [p["peak_rss_bytes"] for p in points])
    return CostModel(
        rollout=rollout,
        training=training,
        load=load,
        steps=Fit({}, together),
        memory=memory,
        bundled_prompt=evaluated.prompt_tokens,
        floors=floors,
        sweep_floors=floors,
    )
