"""Time and memory of GRPO on a model of 494 million parameters, beside its peers and floors.

The workload B1 is three stages of GRPO on a randomly initialised model of Qwen2-0.5B's shape:
each stage 5 optimizer steps of 1 prompt (80 to 128 tokens) with 2 completions of exactly 64
tokens, KL to the base with beta 0.1, the Fisher information after each stage, EWC in the
next, and the adapter saved. B2 has 10 steps a stage, B3 groups of 8.

Every contestant runs in a process of its own, so that its peak memory is its own, and does
the same steps on the same prompts with the same reward. A random model learns nothing worth
having; what is measured is the work. *Floors* say how fast the machine could at best be.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpugrpo_edu.hardware import (
    configure_threads,
)
from cpugrpo_edu.memory import PeakMemory, return_large_blocks
from cpugrpo_edu.types import UserError

VOCABULARY = 151_936
LORA_RANK = 16
LEARNING_RATE = 1e-4
BETA = 0.1
EWC_STRENGTH = 0.1


@dataclass(frozen=True)
class Workload:
    """Three stages of ``steps`` GRPO steps: 1 prompt, ``group`` completions of ``tokens``."""

    name: str = "b1"
    steps: int = 5
    group: int = 2
    tokens: int = 64
    shortest_prompt: int = 80
    longest_prompt: int = 128
    layers: int = 24
    stages: int = 3

    def prompts(self, seed: int = 0) -> list[str]:
        """Random words, one token each, for all steps of all stages."""
        rng = random.Random(seed)
        return [
            " ".join(
                f"w{rng.randrange(3, VOCABULARY)}"
                for _ in range(rng.randint(self.shortest_prompt, self.longest_prompt))
            )
            for _ in range(self.steps * self.stages)
        ]


WORKLOADS = {
    "b1": Workload(),
    "b2": Workload("b2", steps=10),
    "b3": Workload("b3", group=8),
}

PEERS = {
    "stock": "TRL's GRPOTrainer, full fine-tuning, float32",
    "stock-lora": "TRL's GRPOTrainer with LoRA on all linear layers, float32",
}
PEER_MEMORY = {"stock": 13 * 2**30, "stock-lora": 5 * 2**30}
"""Free bytes that a peer needs; it is skipped with the reason where they are missing."""


# The model


def cache_folder() -> Path:
    return Path.home() / ".cache" / "cpugrpo_edu"


def workload_model(workload: Workload, folder: Path | None = None) -> Path:
    """The folder of the random model, made on first use: ``bf16`` and ``fp32`` in it, the
    same values, with a tokenizer of one token a word."""
    folder = (folder or cache_folder()) / f"qwen2-0.5b-shape-{workload.layers}"
    if not (folder / "complete").exists():
        run_worker("make_model", workload=asdict(workload), folder=str(folder))
        (folder / "complete").touch()
    return folder


def make_model(workload: dict[str, Any], folder: str) -> dict[str, Any]:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=workload["layers"],
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    words = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w1", pad_token="w2", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).bfloat16()
    for dtype in ("bf16", "fp32"):
        (model if dtype == "bf16" else model.float()).save_pretrained(Path(folder) / dtype)
        wrapped.save_pretrained(Path(folder) / dtype)
    return {"parameters": model.num_parameters()}


# The reward: some completions must be better than others, whatever they say


def low_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of tokens from the lower half of the vocabulary."""
    return [sum(i < VOCABULARY // 2 for i in ids) / len(ids) for ids in completion_ids]


# Contestants; each is called in a process of its own


@dataclass(frozen=True)
class Options:
    """What can be switched off in ours, for the ablation."""

    method: str = "lora"  # "full" trains all weights in float32
    frozen_int8: bool = True
    share_prefix: bool = True
    fast_rollouts: bool = True
    compact: bool = True
    large_blocks: bool = True
    exact: bool = False


def ours(workload: dict[str, Any], folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """The workload with this package: seconds by part, peak memory, what changed."""
    started = time.perf_counter()
    with PeakMemory() as peak:
        results = _ours(Workload(**workload), Path(folder), Options(**options), started)
    return {**results, "peak_rss_bytes": peak.peak_rss_bytes, "cpu_percent": peak.cpu_percent}


def _ours(workload: Workload, folder: Path, options: Options, started: float) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from cpugrpo_edu.ewc import Anchor, merge_anchors, normalize_fisher, take_anchor
    from cpugrpo_edu.fisher import examples_from_groups, fisher_diagonal
    from cpugrpo_edu.frozen import load_frozen
    from cpugrpo_edu.models import Policy, add_lora, fingerprint, relative_change, snapshot
    from cpugrpo_edu.trainer import CPUGRPOTrainer, CPUOptions, cpu_config

    class Endless(Policy):
        """No token ends a completion, so all have full length."""

        @property
        def eos_ids(self) -> set[int]:
            return set()

    if options.large_blocks:
        return_large_blocks()
    imported = time.perf_counter()
    lora = options.method == "lora"
    if options.frozen_int8 and lora:
        source = folder / "bf16"
        model = load_frozen(str(source), AutoConfig.from_pretrained(source), options.exact)
    else:
        source = folder / "fp32"
        model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    if lora:
        model = add_lora(model, LORA_RANK)
    policy = Endless(model, tokenizer, str(source))
    before, first = fingerprint(model) if lora else "", snapshot(model)
    loaded = time.perf_counter()
    anchor: Anchor | None = None
    prompts = workload.prompts()
    steps: list[float] = []
    tally = {"rollout": 0.0, "fisher": 0.0, "save": 0.0}
    logged: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as out:
        for stage in range(workload.stages):
            chosen = prompts[stage * workload.steps : (stage + 1) * workload.steps]
            config = cpu_config(
                Path(out) / "trainer",
                prompts_per_step=1,
                num_generations=workload.group,
                max_completion_length=workload.tokens,
                max_steps=workload.steps,
                beta=BETA,
                learning_rate=LEARNING_RATE,
                optim="adamw_torch" if lora else "adafactor",
                seed=stage,
            )
            trainer = CPUGRPOTrainer(
                policy,
                config,
                [low_ids],
                Dataset.from_dict({"prompt": chosen}),
                options=CPUOptions(
                    ewc_strength=EWC_STRENGTH if anchor else 0.0,
                    engine="fast" if options.fast_rollouts else "generate",
                    share_prefix=options.share_prefix,
                    compact=options.compact,
                    patience=0,
                ),
                anchor=anchor,
                on_step=logged.append,
            )
            trainer.add_callback(StepTimes(steps))
            trainer.train()
            tally["rollout"] += trainer.tally.seconds
            start = time.perf_counter()
            if lora:
                # The last step's rollouts, of the policy one update ago: no extra decoding.
                examples = examples_from_groups(trainer.last_groups)
                fisher = fisher_diagonal(model, examples)
                anchor = merge_anchors(anchor, take_anchor(model, normalize_fisher(fisher)))
                del fisher
            tally["fisher"] += time.perf_counter() - start
            start = time.perf_counter()
            model.save_pretrained(Path(out) / f"stage-{stage + 1}")
            tally["save"] += time.perf_counter() - start
            trainer.optimizer = None
            del trainer
    ended = time.perf_counter()
    return {
        "seconds": {
            "import": imported - started,
            "load": loaded - imported,
            "work": ended - loaded,
            "steps": sum(steps),
            **tally,
        },
        "step_seconds": steps,
        "weights_changed": {
            "changed": fingerprint(model) != before if lora else True,
            "relative_l2": relative_change(model, first),
        },
        "reward": [row["reward"] for row in logged],
        "kl": [row["kl"] for row in logged],
        "ewc_penalty": [row["ewc_penalty"] for row in logged if "ewc_penalty" in row],
        "grad_norm": [row["grad_norm"] for row in logged],
    }


def stock(workload: dict[str, Any], folder: str, lora: bool, steps: int) -> dict[str, Any]:
    """Some steps of the workload with plain TRL, made legal on a CPU and else by its defaults.

    No Fisher, no EWC: that is less work than ours does.
    """
    started = time.perf_counter()
    with PeakMemory() as peak:
        results = _stock(Workload(**workload), Path(folder) / "fp32", lora, steps, started)
    return {**results, "peak_rss_bytes": peak.peak_rss_bytes, "cpu_percent": peak.cpu_percent}


def _stock(
    workload: Workload, folder: Path, lora: bool, steps: int, started: float
) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out,
            use_cpu=True,
            bf16=False,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=workload.group,
            num_generations=workload.group,
            max_completion_length=workload.tokens,
            generation_kwargs={"min_new_tokens": workload.tokens},
            max_steps=steps,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        peft_config = LoraConfig(
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        trainer = GRPOTrainer(
            str(folder),
            low_ids,  # type: ignore[arg-type]
            args=config,
            train_dataset=Dataset.from_dict({"prompt": workload.prompts()[:steps]}),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            peft_config=peft_config if lora else None,
        )
        times: list[float] = []
        trainer.add_callback(StepTimes(times))
        loaded = time.perf_counter()
        trainer.train()
    return {"seconds": {"load": loaded - started, "steps": sum(times)}, "step_seconds": times}


def StepTimes(times: list[float]) -> Any:
    """A callback that appends the seconds of each optimizer step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.start)
            print(f"step {len(times)}: {times[-1]:.2f} s", file=sys.stderr, flush=True)

    return Clock()


# Processes

WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "make_model": make_model,
    "ours": ours,
    "stock": stock,
}
MARK = "RESULT "


def run_worker(
    name: str, on_line: Callable[[str], None] = lambda line: None, **arguments: Any
) -> dict[str, Any]:
    """Call a worker in a fresh process and return what it returned."""
    command = [sys.executable, "-m", "cpugrpo_edu.bench", name, json.dumps(arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                result: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return result
            lines.append(line.rstrip())
            on_line(lines[-1])
    finally:
        if process.poll() is None and sys.exc_info()[0] is not None:
            process.kill()
        process.wait()
    tail = " | ".join(lines[-3:])
    raise UserError(f"the benchmark {name!r} ended with exit code {process.returncode}: {tail}")


def worker(name: str, arguments: str) -> None:
    """What the fresh process does: threads first, then the work, then one line of JSON."""
    warnings.simplefilter("ignore")
    configure_threads()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = WORKERS[name](**json.loads(arguments))
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    worker(*sys.argv[1:])
