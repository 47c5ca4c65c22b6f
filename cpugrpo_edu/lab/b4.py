"""B4, the work that users have: LoRA on a real chat model and word problems, beside stock TRL.

Each step takes 8 prompts with 8 completions of at most 64 tokens at temperature 0.8; completions
end where the model ends them. The learning rate is small, so that all contestants sample from
nearly the same policy: they differ in the tokens they happen to draw, which the record counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine.int8 import measure_drift
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import Architecture
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.lab.bench import attempt, check_peers, untrained
from cpugrpo_edu.lab.contestants import (
    StepClock,
    measured,
    process_seconds,
    stock_adapter,
    stock_config,
)
from cpugrpo_edu.lab.floors import machine_floors
from cpugrpo_edu.lab.worker import run_worker, silent
from cpugrpo_edu.models.load import load_policy, relative_change, resolve_source, snapshot
from cpugrpo_edu.record.machine import GIB, native_bfloat16
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.tasks import make_problems
from cpugrpo_edu.tasks.answers import with_answer_format

LEARNING_RATE = 1e-5
KL_LIMIT, OUTSIDE_LIMIT, NEAREST = 0.01, 0.01, 0.96
"""What ours must keep against the float32 model: KL in nats a token, the share of importance ratios
outside [0.8, 1.2] before the first update, the share of tokens with the same most likely token."""


@dataclass(frozen=True)
class RealWorkload:
    """``steps`` GRPO steps of ``prompts`` groups of ``group`` completions."""

    name: str = "b4"
    model: str = "smollm2"
    steps: int = 5
    prompts: int = 8
    group: int = 8
    tokens: int = 64  # at most
    temperature: float = 0.8
    lora_rank: int = 16

    def problems(self) -> list[Problem]:
        """The same for every contestant."""
        found = make_problems("stories", "basic", "train", self.steps * self.prompts)
        return with_answer_format(found, "auto")


PEERS = {
    "stock": "TRL's GRPOTrainer, full fine-tuning, float32",
    "stock-lora": "TRL's GRPOTrainer with LoRA on all linear layers, float32",
    "ours-float": "this package without INT8: LoRA on a float32 base",
    "ours-full": "this package, full fine-tuning, INT8 rollouts, Adafactor",
}
NEED = {"stock": 9 * GIB, "stock-lora": 8 * GIB, "ours-float": 4 * GIB, "ours-full": 4 * GIB}
"""Free bytes that a peer needs; with less it is skipped, and the record says why."""


@measured
def ours(workload: RealWorkload, dtype: str = "int8", lora: bool = True) -> dict[str, Any]:
    """The workload with this package: LoRA, or all weights."""
    imported, start = process_seconds(), time.perf_counter()
    rank = workload.lora_rank if lora else 0
    policy = load_policy(workload.model, dtype=dtype, lora_rank=rank)
    problems, before = workload.problems(), snapshot(policy.model)
    with tempfile.TemporaryDirectory() as out:
        config = cpu_config(
            out,
            prompts_per_step=workload.prompts,
            num_generations=workload.group,
            max_completion_length=workload.tokens,
            temperature=workload.temperature,
            max_steps=workload.steps,
            learning_rate=LEARNING_RATE,
            optim="adamw_torch" if lora else "adafactor",
            bf16=not lora and native_bfloat16(),
        )
        options = EngineOptions(
            share_prefix=True,
            recompute=True,
            int8_rollouts=not lora,
            int8_head=not lora,
            spare_memory=not lora,
            patience=0,
        )
        rewards = trl_rewards(parse_rewards("correct_answer=1"), problems)
        data = to_dataset(problems, policy.system)
        trainer = CPUGRPOTrainer(policy, config, rewards, data, options)
        clock = StepClock(trainer.tally)
        trainer.add_callback(clock)
        loaded = time.perf_counter()
        trainer.train()
    tally = trainer.tally
    moved = relative_change(policy.model, before)
    return {
        "seconds": {"import": imported, "load": loaded - start, "steps": sum(clock.steps)},
        "step_seconds": clock.steps,
        "rollout_seconds": clock.rollouts,
        "prompt_tokens": fmean(len(group.prompt_ids) for group in trainer.last_groups),
        "completion_tokens": tally.tokens / workload.steps,
        "rollout_tokens_per_second": tally.tokens / tally.seconds,
        "rows_without_signal": tally.skipped / tally.rows,
        "weights_changed": {"changed": moved > 0, "relative_l2": moved},
    }


@measured
def stock(workload: RealWorkload, lora: bool, steps: int) -> dict[str, Any]:
    """Some steps with plain TRL: made legal on a CPU, otherwise its defaults.

    64 completions are drawn together and trained in passes of 8, since the logits of 64 would not
    fit into the memory of a laptop.
    """
    imported, start = process_seconds(), time.perf_counter()
    source, problems = resolve_source(workload.model), workload.problems()
    rows = workload.prompts * workload.group
    with tempfile.TemporaryDirectory() as out:
        config = stock_config(
            out,
            learning_rate=LEARNING_RATE,
            temperature=workload.temperature,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=rows // 8,
            num_generations=workload.group,
            max_completion_length=workload.tokens,
            max_steps=steps,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            trl_rewards(parse_rewards("correct_answer=1"), problems),  # type: ignore[arg-type]
            args=config,
            train_dataset=to_dataset(problems),
            processing_class=AutoTokenizer.from_pretrained(source, padding_side="left"),
            peft_config=stock_adapter(workload.lora_rank) if lora else None,
        )
        before = snapshot(trainer.model)
        clock = StepClock()
        trainer.add_callback(clock)
        loaded = time.perf_counter()
        trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history[:steps]]
    moved = relative_change(trainer.model, before)
    return {
        "seconds": {"import": imported, "load": loaded - start, "steps": sum(clock.steps)},
        "step_seconds": clock.steps,
        "completion_tokens": rows * sum(lengths) / len(lengths),
        "weights_changed": {"changed": moved > 0, "relative_l2": moved},
    }


def fidelity(workload: RealWorkload) -> dict[str, float]:
    """How far our policy is from the float32 model, on completions that the latter samples."""
    exact = load_policy(workload.model)
    problems = workload.problems()[: workload.prompts]
    sampling = Sampling(workload.tokens, workload.temperature)
    groups = rollout(exact, problems, 2, sampling)
    frozen = load_policy(workload.model, dtype="int8", lora_rank=workload.lora_rank)
    return asdict(measure_drift(exact.model, frozen.model, groups, workload.temperature))


def step_floor(
    workload: RealWorkload, measured_step: dict[str, Any], floors: dict[str, float]
) -> dict[str, float]:
    """Least seconds of one step by part: the products alone, at this machine's best rate for them.

    Each prompt goes through the network once, and so do the completion tokens that were drawn;
    then forwards and backwards to the inputs, for all of them.
    """
    shape = Architecture.from_config(resolve_source(workload.model))
    blocks, head = shape.linear_parameters, shape.vocab * shape.hidden
    tokens = measured_step["completion_tokens"]
    prompts = workload.prompts * measured_step["prompt_tokens"]
    rate = 1e9 * max(floors[name] for name in ("compiled_gops", "bfloat16_gflops"))
    one_pass = 2 * ((prompts + tokens) * blocks + tokens * head) / rate
    return {
        "prefill": 2 * prompts * blocks / rate,
        "decode": 2 * tokens * (blocks + head) / rate,
        "forward": one_pass,
        "backward": one_pass,
    }


def bench_b4(
    workload: RealWorkload,
    peers: tuple[str, ...] = (),
    peer_steps: int = 3,
    say: Callable[[str], None] = silent,
) -> RunRecord:
    """Ours and the peers on the real model, its fidelity to the float32 model, and the floors."""
    check_peers(peers, PEERS)
    resolve_source(workload.model)  # fetched on first use, here and not in a contestant's time
    say("the machine's floors")
    floors = run_worker(machine_floors)
    say(f"ours: {workload.steps} steps")
    own = run_worker(ours, workload)
    say("ours against the float32 model")
    results: dict[str, Any] = {
        "floors": floors,
        "ours": own,
        "fidelity": run_worker(fidelity, workload),
        "step_floor": step_floor(workload, own, floors),
        "peers": {},
    }
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "stock": partial(run_worker, stock, workload, lora=False, steps=peer_steps),
        "stock-lora": partial(run_worker, stock, workload, lora=True, steps=peer_steps),
        "ours-float": partial(run_worker, ours, workload, "float32"),
        "ours-full": partial(run_worker, ours, workload, "float32", lora=False),
    }
    for peer in peers:
        say(f"{peer}: {PEERS[peer]}")
        results["peers"][peer] = attempt(NEED[peer], calls[peer])
    config = {**asdict(workload), "peer_steps": peer_steps}
    return new_record(f"bench-{workload.name}", config, results)


def faults(results: dict[str, Any]) -> list[str]:
    """What makes the benchmark fail: no training, or a policy that is not the model's."""
    found = untrained(results)
    kept = results["fidelity"]
    if kept["kl"] > KL_LIMIT or kept["outside"] > OUTSIDE_LIMIT or kept["agreement"] < NEAREST:
        found.append(f"log-probs miss their tolerance: {kept}")
    return found
