"""Who does the benchmarks' work: this package, with and without its fast paths, and plain TRL.

Each function is called in a process of its own, so that its peak memory is its own. All do the
same steps on the same prompts with the same reward.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any, ParamSpec

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from cpugrpo_edu.curriculum import stage_problems
from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.guard import RolloutTally
from cpugrpo_edu.engine.int8_base import is_frozen, load_frozen
from cpugrpo_edu.engine.int8_matrix import usable
from cpugrpo_edu.engine.memory import PeakMemory
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.ewc import Anchor, merge_anchors, normalize_fisher, take_anchor
from cpugrpo_edu.fisher import examples_from_groups
from cpugrpo_edu.lab.workload import Workload, even_ids
from cpugrpo_edu.models.load import add_lora, load_policy, relative_change, snapshot
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.machine import native_bfloat16
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.stage import grpo_arguments

P = ParamSpec("P")

LORA_RANK = 16
LEARNING_RATE = 1e-4
BETA = 0.1
EWC_STRENGTH = 0.1


@dataclass(frozen=True)
class Variant:
    """How this package does the work; the ablation switches one fast path off at a time."""

    method: str = "lora"  # "full" trains all weights in float32
    frozen_int8: bool = True
    share_prefix: bool = True
    fast_rollouts: bool = True
    recompute: bool = True
    kernel: str = "auto"


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, and of the rollouts in it, which our trainer tallies."""

    def __init__(self, tally: RolloutTally | None = None):
        self.tally = tally or RolloutTally()
        self.steps: list[float] = []
        self.rollouts: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.start)
        self.rollouts.append(self.tally.seconds - sum(self.rollouts))


def measured(work: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
    """``work`` that also returns the peak memory and the CPU use of its process."""

    @wraps(work)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> dict[str, Any]:
        with PeakMemory() as peak:
            results = work(*arguments, **named)
        return {**results, "peak_rss_bytes": peak.peak_rss_bytes, "cpu_percent": peak.cpu_percent}

    return wrapped


def process_seconds() -> float:
    """Since this process began: starting Python and importing the libraries take seconds."""
    return time.time() - psutil.Process().create_time()


# This package


@measured
def ours(workload: Workload, folder: Path, variant: Variant = Variant()) -> dict[str, Any]:
    """The workload with this package: seconds by part, peak memory, what changed."""
    seconds = {"import": process_seconds(), "fisher": 0.0, "save": 0.0}
    start = time.perf_counter()
    policy = load_ours(folder, variant)
    prompts, anchor = workload.prompts(), None
    steps: list[float] = []
    rollouts: list[float] = []
    logged: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as out:
        first = Path(out) / "first.pt"  # on disk: its memory is not the method's
        torch.save(snapshot(policy.model), first)
        loaded = time.perf_counter()
        seconds["load"] = loaded - start
        for stage in range(workload.stages):
            chosen = prompts[stage * workload.steps : (stage + 1) * workload.steps]
            trainer = make_trainer(policy, workload, chosen, variant, stage, anchor, Path(out))
            trainer.on_step = logged.append
            clock = StepClock(trainer.tally)
            trainer.add_callback(clock)
            trainer.train()
            steps += clock.steps
            rollouts += clock.rollouts
            start = time.perf_counter()
            if variant.method == "lora":
                # The last step's rollouts, of the policy one update ago: no extra decoding.
                fisher = estimate_fisher(policy.model, examples_from_groups(trainer.last_groups))
                latest = take_anchor(policy.model, normalize_fisher(fisher))
                anchor = merge_anchors(anchor, latest)
                del fisher, latest
            seconds["fisher"] += time.perf_counter() - start
            start = time.perf_counter()
            policy.model.save_pretrained(Path(out) / f"stage-{stage + 1}")
            seconds["save"] += time.perf_counter() - start
            trainer.optimizer = None
            del trainer
        seconds["work"] = time.perf_counter() - loaded
        moved = relative_change(policy.model, torch.load(first))
    seconds |= {"steps": sum(steps), "rollout": sum(rollouts)}
    return {
        "seconds": seconds,
        "step_seconds": steps,
        "rollout_seconds": rollouts,
        "int8_kernel": usable(variant.kernel),
        "weights_changed": {"changed": moved > 0, "relative_l2": moved},
        "ewc_penalty": [row["ewc_penalty"] for row in logged if "ewc_penalty" in row],
        **{name: [row[name] for row in logged] for name in ("reward", "kl", "grad_norm")},
    }


def load_ours(folder: Path, variant: Variant) -> Policy:
    """The workload's model as a variant trains it."""
    lora = variant.method == "lora"
    source = folder / ("bf16" if variant.frozen_int8 and lora else "fp32")
    if variant.frozen_int8 and lora:
        model = load_frozen(str(source), AutoConfig.from_pretrained(source), variant.kernel)
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    return Policy(add_lora(model, LORA_RANK) if lora else model, tokenizer, str(source))


def make_trainer(
    policy: Policy,
    workload: Workload,
    prompts: list[str],
    variant: Variant,
    stage: int,
    anchor: Anchor | None,
    out: Path,
) -> CPUGRPOTrainer:
    """A trainer of one stage; completions have their full length."""
    lora = variant.method == "lora"
    config = cpu_config(
        out / "trainer",
        prompts_per_step=1,
        num_generations=workload.group,
        max_completion_length=workload.tokens,
        max_steps=workload.steps,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        optim="adamw_torch" if lora else "adafactor",
        bf16=not lora and native_bfloat16(),
        seed=stage,
    )
    options = EngineOptions(
        stop_at_eos=False,
        ewc_strength=EWC_STRENGTH if anchor else 0.0,
        engine="fast" if variant.fast_rollouts else "generate",
        share_prefix=variant.share_prefix,
        recompute=variant.recompute and is_frozen(policy.model),
        int8_rollouts=not lora,
        int8_head=not lora,
        kernel=variant.kernel,
        spare_memory=not lora,
        patience=0,
    )
    data = Dataset.from_dict({"prompt": prompts})
    return CPUGRPOTrainer(policy, config, [even_ids], data, options, anchor)


@measured
def bundled(config: RunConfig, options: EngineOptions, rewards: str = "") -> dict[str, Any]:
    """The first stage of a run of the bundled model, all weights.

    Without ``rewards`` (such as "correct_answer=1") they are those of the random models.
    """
    seconds, start = {"import": process_seconds()}, time.perf_counter()
    policy, stage = load_policy("bundled"), config.stages[0]
    seconds["load"] = time.perf_counter() - start
    problems = stage_problems(stage, config.domains, stage.steps * config.prompts_per_step, seed=0)
    functions: list[Any] = [even_ids]
    weights = [1.0]
    if rewards:
        parsed = parse_rewards(rewards)
        functions, weights = trl_rewards(parsed, problems), [reward.weight for reward in parsed]
    with tempfile.TemporaryDirectory() as out:
        checkpointing = config.checkpointing == "on"
        arguments = grpo_arguments(
            config, out, stage, gradient_checkpointing=checkpointing, reward_weights=weights
        )
        data = to_dataset(problems, policy.system)
        trainer = CPUGRPOTrainer(policy, arguments, functions, data, options)
        clock = StepClock(trainer.tally)
        trainer.add_callback(clock)
        trainer.train()
    return {
        "seconds": seconds,
        "step_seconds": clock.steps,
        "rollout_seconds": clock.rollouts,
        "prompt_tokens": fmean(len(group.prompt_ids) for group in trainer.last_groups),
        "rollout_tokens_per_second": trainer.tally.tokens / trainer.tally.seconds,
        "tokens_per_second": trainer.tally.tokens / sum(clock.steps),
    }


# TRL


def stock_config(out: str, **own: Any) -> GRPOConfig:
    """TRL's defaults, made legal on a CPU and quiet, with the ``own`` settings of a workload."""
    return GRPOConfig(
        out,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **own,
    )


def stock_adapter(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


@measured
def stock(workload: Workload, folder: Path, lora: bool, steps: int) -> dict[str, Any]:
    """Some steps of the workload with plain TRL: made legal on a CPU, otherwise its defaults.

    No Fisher information and no EWC: that is less work than ours does.
    """
    imported, start = process_seconds(), time.perf_counter()
    source = folder / "fp32"
    with tempfile.TemporaryDirectory() as out:
        config = stock_config(
            out,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=workload.group,
            num_generations=workload.group,
            max_completion_length=workload.tokens,
            generation_kwargs={"min_new_tokens": workload.tokens},
            max_steps=steps,
        )
        trainer = GRPOTrainer(
            str(source),
            even_ids,  # type: ignore[arg-type]
            args=config,
            train_dataset=Dataset.from_dict({"prompt": workload.prompts()[:steps]}),
            processing_class=PreTrainedTokenizerFast.from_pretrained(source),
            peft_config=stock_adapter(LORA_RANK) if lora else None,
        )
        clock = StepClock()
        trainer.add_callback(clock)
        loaded = time.perf_counter()
        trainer.train()
    seconds = {"import": imported, "load": loaded - start, "steps": sum(clock.steps)}
    return {"seconds": seconds, "step_seconds": clock.steps}
