"""What one can ask of a run, and the checks of it before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from cpugrpo_edu.curriculum import Stage, make_stages
from cpugrpo_edu.engine.options import ENGINES
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks import DOMAINS

# The checks import torch and TRL themselves: the command line reads RunConfig for its --help,
# and before it sets the number of threads.


@dataclass(frozen=True)
class RunConfig:
    """Everything one can ask of a run. The defaults suit the bundled model on two cores."""

    model: str = "bundled"
    seed: int = 0
    # Data: "generated", or a GSM8K-format file, folder or hub id, or a prompts file.
    data: str = "generated"
    verifier: str | None = None
    domains: tuple[str, ...] = DOMAINS
    system: str | None = None
    # Curriculum
    order: str = "curriculum"
    steps: tuple[int, int, int] = (6, 6, 6)
    learning_rates: tuple[float, float, float] = (3e-4, 3e-4, 3e-4)
    replay: float = 0.3
    # GRPO
    prompts_per_step: int = 16
    num_generations: int = 8
    max_completion: int = 104
    temperature: float = 1.0
    beta: float = 0.0
    loss_type: str = "dapo"
    importance_level: str = "token"
    epsilon: float = 0.2
    rewards: str = "correct_answer=1,valid_steps=0.5,good_format=0.2"
    patience: int = 8
    # Model and memory
    lora_rank: int = 0
    dtype: str = "float32"
    kernel: str = "packed"
    checkpointing: str = "on"
    micro_batch: int | None = None
    memory_budget_gib: float | None = None
    cleanup: bool = True
    threads: int | None = None
    # Rollouts and serving
    engine: str = "fast"
    int8_rollouts: bool = True
    importance_correction: bool = True
    int8_evaluation: bool = True
    share_prefix: bool | None = None
    # Consolidation
    fisher: str = "rollout_score"
    fisher_examples: int = 64
    ewc_strength: float = 0.1
    ewc_decay: float = 1.0
    # Evaluation
    per_cell: int = 300
    # Safety: minutes between two checkpoints within a stage; after each stage there is one anyway
    save_minutes: float = 1.0

    @property
    def stages(self) -> list[Stage]:
        return make_stages(
            self.order, steps=self.steps, learning_rates=self.learning_rates, replay=self.replay
        )


TRACKERS = ("none", "tensorboard", "wandb")
"""Where ``report_to`` sends TRL's metrics besides ``metrics.jsonl``."""


def check_tracker(name: str) -> None:
    """UserError for an unknown tracker, or one whose package is missing."""
    if name not in TRACKERS:
        raise UserError(f"unknown tracker {name!r} in report_to; allowed are {', '.join(TRACKERS)}")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"report_to {name} needs the package {name}, which is not installed; "
            f"pip install {name}, or leave report_to out"
        )


def check_settings(config: RunConfig) -> None:
    """What would otherwise come out only when its turn comes, perhaps after an hour."""
    from cpugrpo_edu.engine.fisher import Variant
    from cpugrpo_edu.models.load import FROZEN

    for name, allowed in (
        ("engine", ENGINES),
        ("checkpointing", ("auto", "on", "off")),
        ("fisher", get_args(Variant)),
    ):
        value = getattr(config, name)
        if value not in allowed:
            raise UserError(f"unknown {name} {value!r}; allowed are {', '.join(allowed)}")
    for name, least in (
        ("micro_batch", 1),
        ("max_completion", 1),
        ("per_cell", 0),
        ("fisher_examples", 0),
        ("patience", 0),
        ("lora_rank", 0),
        ("beta", 0),
        ("ewc_strength", 0),
        ("save_minutes", 0),
        ("epsilon", 0),
    ):
        value = getattr(config, name)
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"{name} is {value}; give at least {least}")
    if config.memory_budget_gib is not None and not 0 < config.memory_budget_gib < float("inf"):
        raise UserError(
            f"the memory budget is {config.memory_budget_gib} GiB; give a finite one above 0"
        )
    if not 0 <= config.seed < 2**31:
        raise UserError(f"seed is {config.seed}; give a whole number from 0 to {2**31 - 1}")
    if max(config.steps) > 1_000_000:
        raise UserError(f"steps are {config.steps}; a stage can have at most 1000000")
    if config.per_cell > 10_000:
        raise UserError(f"per_cell is {config.per_cell}; give at most 10000")
    if len(set(config.domains)) < len(config.domains):
        raise UserError(f"a domain in {', '.join(config.domains)} is named twice; name each once")
    if config.dtype == FROZEN and not config.lora_rank:
        raise UserError("an int8 base is frozen, so only LoRA can train on it; add --lora 16")
    if config.kernel not in ("packed", "compiled"):
        raise UserError(f"unknown kernel {config.kernel!r}; allowed are packed and compiled")
    if config.kernel == "compiled" and not (config.int8_rollouts or config.dtype == FROZEN):
        raise UserError("the compiled kernel is for INT8 rollouts; leave out --no-int8-rollouts")
    if not 0 <= config.ewc_decay <= 1:
        raise UserError(f"ewc_decay is {config.ewc_decay}; give a number from 0 to 1")
    if not 0 < config.temperature < float("inf"):
        raise UserError(f"temperature is {config.temperature}; rollouts need one above 0")
    if not all(0 <= rate < float("inf") for rate in config.learning_rates):
        raise UserError(f"learning rates {config.learning_rates} are not all finite, 0 or more")
    grpo_arguments(config, "unused", config.stages[0])  # checks the rest


def grpo_arguments(config: RunConfig, folder: str | Path, stage: Stage, **more: Any) -> Any:
    """TRL's configuration for one stage, on this process's share of the prompts."""
    from cpugrpo_edu.engine import ranks
    from cpugrpo_edu.engine.trl_trainer import cpu_config

    processes = ranks.size()
    if processes > 1:
        # Buffers are constant and ranks run the model different numbers of times.
        more |= {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": False}
    return cpu_config(
        folder,
        prompts_per_step=ranks.prompts_per_process(config.prompts_per_step, processes),
        num_generations=config.num_generations,
        max_completion_length=config.max_completion,
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        temperature=config.temperature,
        beta=config.beta,
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_level,
        epsilon=config.epsilon,
        **more,
    )


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON would give it back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return found
