"""The settings of a run, and the checks that need neither torch nor a model.

The command line makes its options from ``RunConfig``, so nothing heavy is imported here.
"""

from __future__ import annotations

import importlib.util
import json
import operator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cpugrpo_edu.curriculum import ORDERS, Stage, make_stages
from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.engine.options import ENGINES, FISHER_VARIANTS, IMPORTANCE_LEVELS, LOSS_TYPES
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.run.scenarios import SCENARIOS
from cpugrpo_edu.tasks import DOMAINS, TASKS
from cpugrpo_edu.tasks.answers import check_answer_format
from cpugrpo_edu.tasks.statements import ANSWER_FORMATS

BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def setting(default: Any, help: str, choices: tuple[str, ...] = (), **bounds: float) -> Any:
    """A field with its help text and what ``check_settings`` allows; for ``bounds`` see BOUNDS."""
    return field(default=default, metadata={"help": help, "choices": choices, **bounds})


@dataclass(frozen=True)
class RunConfig:
    """Every setting of a run. The defaults suit the bundled model on two cores; `config_for` has
    others for a chat model."""

    model: str = setting("bundled", "bundled, smollm2, a model folder, or a Hugging Face hub id.")
    seed: int = setting(0, "Seed of the training data and the rollouts.", least=0, most=2**31 - 1)
    scenario: str | None = setting(
        None,
        "An experiment: letters (EWC against forgetting) or sums (a chat model learns to add).",
        tuple(SCENARIOS),
    )
    # Data
    data: str = setting(
        "generated",
        "generated, or your own: a file (.jsonl, .csv ...), folder, hub id, or reasoning-gym:TASK.",
    )
    prompt_column: str | None = setting(
        None, "Column of your data with the prompts; by default prompt, question or the like."
    )
    answer_column: str | None = setting(
        None, "Column with the answers; by default answer, ground_truth or the like."
    )
    verifier: str | None = setting(
        None, "Your verifier, path/to/file.py:function; the file is executed."
    )
    domains: tuple[str, ...] = setting(DOMAINS, f"Any of {', '.join(TASKS)} (commas).")
    system: str | None = setting(None, "System prompt; by default the model's own.")
    answer_format: str | None = setting(
        None,
        "hash (default for bundled), auto (for others), boxed, sentence, last-number, math-verify.",
        ANSWER_FORMATS,
    )
    # Curriculum
    order: str = setting(
        "curriculum", "Order of the stages: curriculum, mixed or reversed.", ORDERS
    )
    steps: tuple[int, int, int] = setting(
        (6, 6, 6), "GRPO steps of each stage: one number, or three separated by commas."
    )
    learning_rates: tuple[float, float, float] = setting(
        (3e-4, 3e-4, 3e-4),
        "Learning rate of each stage: one number, or three separated by commas.",
    )
    replay: float = setting(
        0.3, "Share of a stage's problems that have the other difficulties.", least=0, below=1
    )
    # GRPO
    prompts_per_step: int = setting(16, "Prompts (groups) in one step.", least=1)
    num_generations: int = setting(8, "G, the completions of each prompt.", least=2)
    max_completion: int = setting(104, "Longest completion, in tokens.", least=1)
    temperature: float = setting(1.0, "Sampling temperature of the rollouts.", above=0)
    beta: float = setting(0.0, "Weight of the KL term; 0 leaves it out.", least=0)
    loss_type: str = setting("dapo", f"TRL's loss: {', '.join(LOSS_TYPES)}.", LOSS_TYPES)
    importance_level: str = setting(
        "token",
        "Importance ratios for each token, or for each sequence (GSPO).",
        IMPORTANCE_LEVELS,
    )
    epsilon: float = setting(
        0.2, "How far an importance ratio may leave 1 before it is clipped.", least=0
    )
    rewards: str = setting(
        "correct_answer=1,valid_steps=0.5,good_format=0.2",
        "Rewards and their weights, such as correct_answer=1,valid_steps=0.5.",
    )
    patience: int = setting(
        8, "Steps in a row without a learning signal that end the run; 0 never ends it.", least=0
    )
    # Model and memory
    lora_rank: int = setting(0, "LoRA rank; 0 trains all weights.", least=0)
    dtype: str = setting(
        "float32",
        "Type of the weights: float32, auto, or with LoRA also bfloat16 or int8.",
        ("auto", "float32", "bfloat16", "int8"),
    )
    kernel: str = setting(
        "auto",
        "Products of INT8 weights: compiled (C), packed (torch), or auto: C where it compiles.",
        ("auto", "compiled", "packed"),
    )
    checkpointing: str = setting(
        "on",
        "Recompute activations in the backward pass: on, off, or auto (where memory is short).",
        ("auto", "on", "off"),
    )
    micro_batch: int | None = setting(
        None, "Completions in one backward pass; by default planned from the free memory.", least=1
    )
    memory_budget_gib: float | None = setting(
        None, "Most memory that the run may use in all, such as 4GB.", above=0
    )
    cleanup: bool = setting(True, "Return freed memory to the system after each stage.")
    threads: int | None = setting(
        None,
        "Threads; by default all cores, or fewer if those are faster.",
        least=1,
        most=1024,
    )
    # Rollouts and INT8
    engine: str = setting(
        "fast", "Sampler of the rollouts: fast (ours) or generate (Hugging Face's).", ENGINES
    )
    int8_rollouts: bool = setting(True, "Sample from an INT8 copy of the policy.")
    importance_correction: bool = setting(
        True, "Take importance ratios against the INT8 copy that sampled."
    )
    int8_evaluation: bool = setting(True, "Evaluate an INT8 copy of the final model as well.")
    share_prefix: bool | None = setting(
        None, "Run a prompt once for all its completions in training; by default on int8 only."
    )
    # Consolidation
    fisher: str = setting(
        "rollout_score", f"Fisher estimate for EWC: {', '.join(FISHER_VARIANTS)}.", FISHER_VARIANTS
    )
    fisher_examples: int = setting(
        64, "Problems for each Fisher estimate; 0 switches EWC off.", least=0
    )
    ewc_strength: float = setting(
        0.0,
        "Strength of the EWC penalty, such as 0.1; 0 is off: the default stages forget nothing.",
        least=0,
    )
    protect: tuple[str, ...] = setting(
        (), "Difficulties that EWC protects from the first step on, such as basic,intermediate."
    )
    ewc_decay: float = setting(
        1.0, "Factor, 0 to 1, on the Fisher of earlier stages at each new one.", least=0, most=1
    )
    # Evaluation
    per_cell: int = setting(
        300,
        "Held-out problems for each domain and difficulty; 0 skips the evaluations.",
        least=0,
        most=10_000,
    )
    # Safety
    save_minutes: float = setting(
        1.0, "Minutes between two checkpoints within a stage; 0 saves after every step.", least=0
    )

    @property
    def stages(self) -> list[Stage]:
        return make_stages(
            self.order, steps=self.steps, learning_rates=self.learning_rates, replay=self.replay
        )

    @property
    def consolidates(self) -> bool:
        """Whether EWC acts, and so needs Fisher information."""
        return self.ewc_strength > 0 and self.fisher_examples > 0

    @property
    def weights(self) -> str:
        """The dtype to load: "auto" trains all weights in float32, since bfloat16 would round
        their updates away, and leaves the choice to the loader where LoRA trains."""
        return "float32" if self.dtype == "auto" and not self.lora_rank else self.dtype

    @property
    def frozen(self) -> bool:
        """Whether LoRA trains on a frozen INT8 base."""
        return self.dtype == "int8"


CHAT_MODEL: dict[str, Any] = {
    "domains": ("small_stories",),
    "answer_format": "last-number",
    "steps": (40, 40, 40),
    "learning_rates": (4e-4, 3e-4, 3e-4),
    "max_completion": 64,
    "temperature": 0.7,
    "rewards": "correct_answer=1",
    "lora_rank": 16,
    "dtype": "int8",
    "int8_evaluation": False,
    "per_cell": 200,
}
"""Defaults of every model that is not one of ours, for half an hour of training on two cores."""

ALL_WEIGHTS: dict[str, Any] = {"dtype": "float32", "learning_rates": (1e-5, 1e-5, 1e-5)}
"""What differs where all weights of such a model are trained (a LoRA rank of 0)."""


def config_for(model: str | None = None, **given: Any) -> RunConfig:
    """The settings of a run of this model: what is ``given``, and defaults that suit the model, by
    default the scenario's or else the bundled one.

    Our own models take those of ``RunConfig``, all others those of ``CHAT_MODEL`` before them, and
    a scenario has its own. Raises TypeError for a setting that does not exist, and UserError for
    domains beside other data.
    """
    if "domains" in given and given.get("data", "generated") != "generated":
        raise UserError(
            f"--domains is for generated problems, but --data is {given['data']}; leave one of "
            "them out"
        )
    scenario = SCENARIOS.get(given.get("scenario") or "")
    if model is None:
        model = scenario.model if scenario else "bundled"
    defaults: dict[str, Any] = {}
    if not is_ours(model):
        defaults |= CHAT_MODEL
        if given.get("lora_rank") == 0:
            defaults |= ALL_WEIGHTS
        stories = set(given.get("domains") or defaults["domains"]) <= {"stories", "small_stories"}
        own = settings_in(model).get("cpugrpo_answer_format")
        if given.get("data", "generated") != "generated" or not stories or own:
            del defaults["answer_format"]  # no numbers, or it has learned another
    if scenario:
        defaults |= scenario.settings
    return RunConfig(model, **{**defaults, **given})


def is_ours(model: str) -> bool:
    """Whether it is the bundled model, or a folder whose config says that it is one of its kind."""
    return model == "bundled" or bool(settings_in(model).get("cpugrpo_format"))


def settings_in(model: str) -> dict[str, Any]:
    """The config of a model folder; empty where there is none that can be read."""
    try:
        settings = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub id, or something that loading will refuse
        return {}
    return settings if isinstance(settings, dict) else {}


FLAGS = {
    "learning_rates": "--lr",
    "learning_rate": "--lr",
    "lora_rank": "--lora",
    "ewc_strength": "--ewc",
    "memory_budget_gib": "--memory-budget",
}
"""Flags that are shorter than their fields; all others are spelled like the field."""


def flag_of(name: str) -> str:
    """The command line's flag of a setting."""
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def help_of(name: str) -> str:
    """The help text of a field of ``RunConfig``."""
    text: str = RunConfig.__dataclass_fields__[name].metadata["help"]
    return text


TRACKERS = ("none", "tensorboard", "wandb", "mlflow")
"""Where ``report_to`` sends TRL's metrics besides ``metrics.jsonl``."""


def check_tracker(name: str) -> None:
    """UserError for an unknown tracker, or one whose package is missing."""
    if name not in TRACKERS:
        raise UserError(f"unknown --report-to {name!r}; allowed are {', '.join(TRACKERS)}")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"--report-to {name} needs the package {name}, which is not installed; "
            f"pip install {name}, or leave --report-to out"
        )


def check_bounds(config: Any) -> None:
    """UserError, naming the flag, for a setting that its field does not allow."""
    for item in fields(config):
        value, rules, flag = getattr(config, item.name), item.metadata, flag_of(item.name)
        if rules["choices"] and value not in (*rules["choices"], item.default):
            raise UserError(f"unknown {flag} {value!r}; allowed are {', '.join(rules['choices'])}")
        bounds = [(*BOUNDS[name], rules[name]) for name in BOUNDS if name in rules]
        within = value is None or all(holds(value, bound) for _, holds, bound in bounds)
        if bounds and not (within and value != float("inf")):
            allowed = " and ".join(f"{words} {bound}" for words, _, bound in bounds)
            raise UserError(f"{flag} is {value}; give {allowed}")


def check_settings(config: RunConfig) -> None:
    """UserError, naming the flag, for a setting that would fail only later, perhaps after hours."""
    check_bounds(config)
    if max(stage.steps for stage in config.stages) > 1_000_000:
        raise UserError(f"--steps is {config.steps}; a stage can have at most 1000000")
    if not all(0 <= rate < float("inf") for rate in config.learning_rates):
        raise UserError(
            f"--lr is {config.learning_rates}; give finite learning rates of at least 0"
        )
    if len(set(config.domains)) < len(config.domains):
        raise UserError(f"--domains names one twice: {', '.join(config.domains)}; name each once")
    if unknown := sorted(set(config.protect) - set(DIFFICULTIES)):
        raise UserError(
            f"--protect has {', '.join(unknown)}; allowed are {', '.join(DIFFICULTIES)}"
        )
    if config.dtype == "bfloat16" and not config.lora_rank:
        raise UserError(
            "full fine-tuning in bfloat16 loses most updates, since a step is smaller than the "
            "weights' rounding; use --dtype float32, or train LoRA on a bfloat16 base (--lora 16)"
        )
    if config.frozen and not config.lora_rank:
        raise UserError("an int8 base is frozen, so only LoRA can train on it; add --lora 16")
    if config.kernel == "compiled" and not (config.int8_rollouts or config.frozen):
        raise UserError("the compiled kernel is for INT8 rollouts; leave out --no-int8-rollouts")
    if config.answer_format is not None:
        check_answer_format(config.answer_format)
    parse_rewards(config.rewards, config.max_completion)


def plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON would give it back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return found
