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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpugrpo_edu.engine.hardware import (
    available_memory,
    configure_threads,
    native_bfloat16,
    new_record,
)
from cpugrpo_edu.engine.memory import Architecture, PeakMemory
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.cost import calibrate, machine_floors
from cpugrpo_edu.lab.peers import PEERS as ROLLOUT_PEERS
from cpugrpo_edu.record.files import cache_folder
from cpugrpo_edu.record.run_record import RunRecord

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
    stages: int = 3
    # The shape, Qwen2-0.5B's
    layers: int = 24
    hidden: int = 896
    ffn: int = 4864
    heads: int = 14
    kv_heads: int = 2
    vocabulary: int = 151_936

    @property
    def architecture(self) -> Architecture:
        return Architecture(
            name=self.name,
            layers=self.layers,
            hidden=self.hidden,
            ffn=self.ffn,
            heads=self.heads,
            kv_heads=self.kv_heads,
            vocab=self.vocabulary,
            tied=True,
            qkv_bias=True,
        )

    @property
    def prompt_tokens(self) -> float:
        """Mean length of a prompt."""
        return (self.shortest_prompt + self.longest_prompt) / 2

    def prompts(self, seed: int = 0) -> list[str]:
        """Random words, one token each, for all steps of all stages."""
        rng = random.Random(seed)
        return [
            " ".join(
                f"w{rng.randrange(3, self.vocabulary)}"
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
    "ours-compiled": "this package, its INT8 products from C compiled here",
    "ours-full": "this package, full fine-tuning, INT8 rollouts, compiled if it can",
}
PEER_MEMORY = {"stock": 13 * 2**30, "stock-lora": 5 * 2**30}
PEER_MEMORY |= {"ours-compiled": 3 * 2**30, "ours-full": 8 * 2**30}
"""Free bytes that a peer needs; it is skipped with the reason where they are missing."""


# The model


def workload_model(workload: Workload, folder: Path | None = None) -> Path:
    """The folder of the random model, made on first use: ``bf16`` and ``fp32`` in it, the
    same values, with a tokenizer of one token a word."""
    folder = (folder or cache_folder()) / f"workload-{workload.layers}x{workload.hidden}"
    if not (folder / "complete").exists():
        run_worker("make_model", workload=asdict(workload), folder=str(folder))
        (folder / "complete").touch()
    return folder


def make_model(workload: dict[str, Any], folder: str) -> dict[str, Any]:
    shape = Workload(**workload)
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    # Names of special tokens must not begin a word: they would be cut out of it.
    ids = {"<unknown>": 0, "<end>": 1, "<pad>": 2}
    ids |= {f"w{i}": i for i in range(3, shape.vocabulary)}
    words = models.WordLevel(ids, unk_token="<unknown>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).bfloat16()
    for dtype in ("bf16", "fp32"):
        (model if dtype == "bf16" else model.float()).save_pretrained(Path(folder) / dtype)
        wrapped.save_pretrained(Path(folder) / dtype)
    return {"parameters": model.num_parameters()}


# The reward: some completions must be better than others, whatever they say


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


# Contestants; each is called in a process of its own


@dataclass(frozen=True)
class Options:
    """What can be switched off in ours, for the ablation."""

    method: str = "lora"  # "full" trains all weights in float32
    frozen_int8: bool = True
    share_prefix: bool = True
    fast_rollouts: bool = True
    recompute: bool = True
    kernel: str = "packed"


def ours(workload: dict[str, Any], folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """The workload with this package: seconds by part, peak memory, what changed."""
    started = time.perf_counter()
    with PeakMemory() as peak:
        results = _ours(Workload(**workload), Path(folder), Options(**options), started)
    return {**results, "peak_rss_bytes": peak.peak_rss_bytes, "cpu_percent": peak.cpu_percent}


def _ours(workload: Workload, folder: Path, options: Options, started: float) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from cpugrpo_edu.engine.int8 import quantized_engine, usable_kernel
    from cpugrpo_edu.engine.int8_base import load_frozen, spares_memory
    from cpugrpo_edu.engine.options import EngineOptions
    from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
    from cpugrpo_edu.ewc import Anchor, merge_anchors, normalize_fisher, take_anchor
    from cpugrpo_edu.fisher import examples_from_groups, fisher_diagonal
    from cpugrpo_edu.models.load import Policy, add_lora, relative_change, snapshot

    imported = time.perf_counter()
    lora = options.method == "lora"
    compiled_used = usable_kernel(options.kernel) == "compiled"
    if options.frozen_int8 and lora:
        source = folder / "bf16"
        model = load_frozen(str(source), AutoConfig.from_pretrained(source), options.kernel)
    else:
        source = folder / "fp32"
        model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    if lora:
        model = add_lora(model, LORA_RANK)
    policy = Policy(model, tokenizer, str(source))
    anchor: Anchor | None = None
    prompts = workload.prompts()
    steps: list[float] = []
    tally = {"rollout": 0.0, "fisher": 0.0, "save": 0.0}
    logged: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as out:
        first = Path(out) / "first.pt"  # on disk: its memory is not the method's
        torch.save(snapshot(model), first)
        loaded = time.perf_counter()
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
                bf16=not lora and native_bfloat16(),
                seed=stage,
            )
            trainer = CPUGRPOTrainer(
                policy,
                config,
                [even_ids],
                Dataset.from_dict({"prompt": chosen}),
                options=EngineOptions(
                    stop_at_eos=False,
                    ewc_strength=EWC_STRENGTH if anchor else 0.0,
                    engine="fast" if options.fast_rollouts else "generate",
                    share_prefix=options.share_prefix,
                    recompute=options.recompute and spares_memory(model),
                    int8_rollouts=not lora,
                    int8_head=not lora,
                    kernel=options.kernel,
                    spare_memory=not lora,
                    patience=0,
                ),
                anchor=anchor,
                on_step=logged.append,
            )
            trainer.add_callback(step_callback(steps))
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
        moved = relative_change(model, torch.load(first))
    return {
        "seconds": {
            "import": imported - started,
            "load": loaded - imported,
            "work": ended - loaded,
            "steps": sum(steps),
            **tally,
        },
        "step_seconds": steps,
        "int8_kernel": "compiled" if compiled_used else quantized_engine(),
        "weights_changed": {"changed": moved > 0, "relative_l2": moved},
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
            even_ids,  # type: ignore[arg-type]
            args=config,
            train_dataset=Dataset.from_dict({"prompt": workload.prompts()[:steps]}),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            peft_config=peft_config if lora else None,
        )
        times: list[float] = []
        trainer.add_callback(step_callback(times))
        loaded = time.perf_counter()
        trainer.train()
    return {"seconds": {"load": loaded - started, "steps": sum(times)}, "step_seconds": times}


def step_callback(times: list[float], after: Callable[[], Any] = lambda: None) -> Any:
    """A callback that appends the seconds of each optimizer step, then calls ``after``."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.start)
            after()
            print(f"step {len(times)}: {times[-1]:.2f} s", file=sys.stderr, flush=True)

    return Clock()


# Rollout engines


def rollout_speed(
    engine: str, folder: str, rows: int, tokens: int, prompt_tokens: int = 100
) -> dict[str, Any]:
    """Tokens a second of one engine, ``rows`` completions of one prompt, after a warm-up.

    "generate" is Hugging Face's on float32 weights with the prompt given ``rows`` times,
    "ours-float32" and "ours-int8" are this package's; the peers are in ``rollout_peers``.
    """
    with PeakMemory() as peak:
        seconds = _rollout_seconds(engine, Path(folder), rows, tokens, prompt_tokens)
    return {
        "tokens_per_second": rows * tokens / seconds,
        "seconds": seconds,
        "peak_rss_bytes": peak.peak_rss_bytes,
    }


def _rollout_seconds(
    engine: str, folder: Path, rows: int, tokens: int, prompt_tokens: int
) -> float:
    rng = random.Random(0)
    prompt = [rng.randrange(3, 400) for _ in range(prompt_tokens)]
    if engine in ENGINES:
        once = _rollout_engine(engine, folder, prompt, rows)
    else:
        once = ROLLOUT_PEERS[engine](folder, prompt, rows, tokens)
    once(4)
    start = time.perf_counter()
    completions = once(tokens)
    seconds = time.perf_counter() - start
    lengths = [len(completion) for completion in completions]
    if lengths != [tokens] * rows:
        raise UserError(f"{engine} gave completions of {lengths} tokens instead of {tokens} each")
    return seconds


def _rollout_engine(
    engine: str, folder: Path, prompt: list[int], rows: int
) -> Callable[[int], list[list[int]]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from cpugrpo_edu.engine.decode import sample
    from cpugrpo_edu.engine.int8_base import load_frozen
    from cpugrpo_edu.engine.options import EngineOptions
    from cpugrpo_edu.sample import Sampling

    if engine in ("ours-int8", "ours-int8-compiled"):
        source = folder / "bf16"
        kernel = "compiled" if engine == "ours-int8-compiled" else "packed"
        model = load_frozen(str(source), AutoConfig.from_pretrained(source), kernel)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "fp32")

    def once(tokens: int) -> list[list[int]]:
        options = EngineOptions("generate" if engine == "generate" else "fast")
        [group] = sample(
            model, [prompt], rows, Sampling(tokens), eos_ids=set(), pad_id=2, options=options
        )
        return [episode.completion_ids for episode in group.episodes]

    return once


ENGINES = ("generate", "ours-float32", "ours-int8", "ours-int8-compiled")


# Floors: what the machine could at best do


def step_floor(workload: Workload, floors: dict[str, float]) -> dict[str, float]:
    """Least seconds of one step on a frozen INT8 base, by part: no overhead at all.

    Decoding reads every weight once a token; the prompt, the reference, the forward and
    the backward pass multiply P + G C tokens by every weight; the head sees completions.
    """
    blocks = workload.architecture.linear_parameters
    head = workload.vocabulary * workload.hidden
    completions = workload.group * workload.tokens
    packed = workload.prompt_tokens + completions
    int8 = max(floors["int8_gops"], floors["compiled_gops"]) * 1e9
    read = max(floors["int8_weight_gb_per_second"], floors["read_gb_per_second"]) * 1e9
    decode = workload.tokens * (blocks + head) / read
    # With many rows, decoding is bound by arithmetic instead.
    decode = max(decode, 2 * completions * (blocks + head) / int8)
    one_pass = 2 * (packed * blocks + completions * head) / int8
    return {
        "prefill": 2 * workload.prompt_tokens * blocks / int8,
        "decode": decode,
        "reference": one_pass,
        "forward": one_pass,
        "backward": one_pass,
    }


# What the sweep measures lies in a module of its own, which needs this one


def sweep_worker(**arguments: Any) -> dict[str, Any]:
    from cpugrpo_edu.lab.sweep import measure_point

    return measure_point(**arguments)


def evaluation_worker() -> dict[str, Any]:
    from cpugrpo_edu.lab.sweep import measure_evaluation

    return measure_evaluation()


# Whole comparisons


def bundled_speed(steps: int = 3) -> dict[str, Any]:
    """Seconds and tokens a second of GRPO steps on the bundled model, by rollout engine."""
    from cpugrpo_edu.curriculum import stage_problems
    from cpugrpo_edu.engine.options import EngineOptions
    from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
    from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
    from cpugrpo_edu.models.load import load_policy
    from cpugrpo_edu.rewards import parse_rewards
    from cpugrpo_edu.run.pipeline import RunConfig

    results: dict[str, Any] = {}
    run = RunConfig()
    for engine in ("fast", "generate"):
        policy = load_policy("bundled")
        rewards = parse_rewards(run.rewards)
        problems = stage_problems(run.stages[0], run.domains, steps * run.prompts_per_step, seed=0)
        times: list[float] = []
        with tempfile.TemporaryDirectory() as out:
            config = cpu_config(
                out,
                max_steps=steps,
                max_completion_length=run.max_completion,
                learning_rate=run.learning_rates[0],
                reward_weights=[reward.weight for reward in rewards],
            )
            trainer = CPUGRPOTrainer(
                policy,
                config,
                trl_rewards(rewards, problems),
                to_dataset(problems, policy.system),
                EngineOptions(engine=engine),
            )
            trainer.add_callback(step_callback(times))
            trainer.train()
        tally = trainer.tally
        results[engine] = {
            "step_seconds": times,
            "rollout_tokens_per_second": tally.tokens / tally.seconds,
            "tokens_per_second": tally.tokens / sum(times),
        }
    return results


def check_peers(peers: tuple[str, ...], allowed: Iterable[str]) -> None:
    """UserError for a peer that is not among the allowed ones."""
    unknown = sorted(set(peers) - set(allowed))
    if unknown:
        raise UserError(f"unknown peer {', '.join(unknown)}; allowed are {', '.join(allowed)}")


def attempt(need: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a contestant, or why it was left out. Never ends the comparison."""
    available = available_memory()
    if available < need:
        have, want = available / 2**30, need / 2**30
        return {"skipped": f"needs about {want:.0f} GiB of memory, {have:.1f} GiB are free"}
    try:
        return call()
    except UserError as error:
        return {"skipped": str(error)}


def bench_b1(
    workload: Workload,
    peers: tuple[str, ...] = (),
    peer_steps: int = 3,
    options: Options | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RunRecord:
    """Ours on the whole workload and the peers on its first steps, with the floors."""
    check_peers(peers, PEERS)
    options = options or Options()
    say("the model of the workload (made on first use)")
    model = str(workload_model(workload, folder))
    say("the machine's floors")
    floors = run_worker("floors")
    results: dict[str, Any] = {"floors": floors, "step_floor": step_floor(workload, floors)}
    shape = asdict(workload)
    say(f"ours: {workload.stages} stages of {workload.steps} steps")

    def ours(chosen: Options, work: Workload = workload) -> dict[str, Any]:
        given = {"workload": asdict(work), "options": asdict(chosen)}
        return run_worker("ours", say, folder=model, **given)

    results["ours"] = ours(options)
    results["peers"] = {}
    for peer in peers:
        say(f"{peer}: {peer_steps} steps of {PEERS[peer]}")

        def call(peer: str = peer) -> dict[str, Any]:
            if peer == "ours-compiled":
                return ours(replace(options, kernel="compiled"))
            if peer == "ours-full":
                some = replace(workload, steps=peer_steps, stages=1)
                return ours(Options("full", kernel="compiled"), some)
            lora = peer == "stock-lora"
            return run_worker(
                "stock", say, workload=shape, folder=model, lora=lora, steps=peer_steps
            )

        results["peers"][peer] = attempt(PEER_MEMORY[peer], call)
    return new_record(f"bench-{workload.name}", {**shape, "options": asdict(options)}, results)


def steady_seconds(result: dict[str, Any]) -> float:
    """Seconds a step: the mean without the first one, which warms up."""
    steps = result["step_seconds"]
    later = steps[1:] or steps
    return float(sum(later) / len(later))


def b1_rows(record: RunRecord) -> list[list[str]]:
    """The table of ``cpugrpo bench b1``: one row a contestant, the floor last."""
    results, group, tokens = record.results, record.config["group"], record.config["tokens"]
    ours = results["ours"]
    base = steady_seconds(ours)
    rows = []
    for name, result in {"ours": ours, **results["peers"]}.items():
        if "skipped" in result:
            rows.append([name, "skipped: " + result["skipped"], "", "", "", ""])
            continue
        seconds, peak = steady_seconds(result), result["peak_rss_bytes"]
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{group * tokens / seconds:.0f}",
                f"{peak / 1e9:.2f}",
                f"{seconds / base:.1f}",
                f"{ours['peak_rss_bytes'] / peak:.2f}",
            ]
        )
    floor = sum(results["step_floor"].values())
    rows.append(["floor", f"{floor:.2f}", f"{group * tokens / floor:.0f}", "", "", ""])
    return rows


def fallback_note(record: RunRecord) -> str:
    """What the table's reader must know where this machine has no INT8 kernel; else ""."""
    if record.results["ours"].get("int8_kernel") not in ("torch", "qnnpack"):
        return ""
    return (
        "This machine has no INT8 kernel that computes right for training: ours fell back to "
        "float products of the same integers, which saves memory but no time."
    )


B1_HEADER = ["", "s a step", "tokens/s", "peak GB", "x ours", "ours' memory, x"]

ABLATIONS: dict[str, dict[str, Any]] = {
    "all on": {},
    "float products": {"kernel": "exact"},
    "prompt not shared": {"share_prefix": False},
    "generate": {"fast_rollouts": False},
    "compiled": {"kernel": "compiled"},
    "MLPs kept": {"recompute": False},
    "float32 base": {"frozen_int8": False},
}


def bench_ablate(
    workload: Workload,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    names: tuple[str, ...] = tuple(ABLATIONS),
) -> RunRecord:
    """What each fast path is worth: the workload's first stage with one of them off."""
    model = str(workload_model(workload, folder))
    shape = asdict(replace(workload, stages=1))
    results = {}
    for name in names:
        say(f"ablation: {name}")
        options = asdict(replace(Options(), **ABLATIONS[name]))
        results[name] = attempt(
            6 * 2**30,
            lambda options=options: run_worker(  # type: ignore[misc]
                "ours", say, workload=shape, folder=model, options=options
            ),
        )
    return new_record("bench-ablate", shape, {"ablations": results})


ABLATE_HEADER = ["", "s a step", "peak GB", "x all on"]


def ablate_rows(record: RunRecord) -> list[list[str]]:
    results = record.results["ablations"]
    base = steady_seconds(results["all on"])
    return [
        [name, result["skipped"], "", ""]
        if "skipped" in result
        else [
            name,
            f"{steady_seconds(result):.2f}",
            f"{result['peak_rss_bytes'] / 1e9:.2f}",
            f"{steady_seconds(result) / base:.2f}",
        ]
        for name, result in results.items()
    ]


def bench_rollout(
    workload: Workload,
    peers: tuple[str, ...] = (),
    groups: tuple[int, ...] = (2, 8),
    engines: tuple[str, ...] = ENGINES,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RunRecord:
    """Tokens a second of each rollout engine on the workload's shape, for some group sizes."""
    check_peers(peers, ROLLOUT_PEERS)
    model = str(workload_model(workload, folder))
    results: dict[str, dict[str, Any]] = {}
    for engine in (*engines, *peers):
        results[engine] = {}
        for group in groups:
            say(f"rollouts: {engine}, {group} rows")
            results[engine][str(group)] = attempt(
                4 * 2**30,
                lambda engine=engine, group=group: run_worker(  # type: ignore[misc]
                    "rollout",
                    say,
                    engine=engine,
                    folder=model,
                    rows=group,
                    tokens=workload.tokens,
                ),
            )
    return new_record("bench-rollout", {**asdict(workload), "groups": groups}, {"engines": results})


ROLLOUT_HEADER = ["Engine", "G", "tokens/s", "x generate", "peak GB"]


def rollout_rows(record: RunRecord) -> list[list[str]]:
    """One row an engine and group size; ratios are to Hugging Face's ``generate``."""
    rows = []
    engines = record.results["engines"]
    for engine, by_group in engines.items():
        for group, result in by_group.items():
            if "skipped" in result:
                rows.append([engine, group, "skipped: " + result["skipped"], "", ""])
                continue
            speed = result["tokens_per_second"]
            base = engines.get("generate", {}).get(group, {}).get("tokens_per_second")
            ratio = f"{speed / base:.1f}" if base else ""
            peak = f"{result['peak_rss_bytes'] / 1e9:.2f}"
            rows.append([engine, group, f"{speed:.1f}", ratio, peak])
    return rows


TRAIN_HEADER = ["Rollouts by", "s a step", "rollout tokens/s", "tokens/s in all"]


def train_rows(record: RunRecord) -> list[list[str]]:
    """The bundled model's steps, one row a rollout engine."""
    return [
        [
            name,
            f"{sum(result['step_seconds']) / len(result['step_seconds']):.2f}",
            f"{result['rollout_tokens_per_second']:.0f}",
            f"{result['tokens_per_second']:.0f}",
        ]
        for name, result in record.results["engines"].items()
    ]


# Processes

WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "make_model": make_model,
    "ours": ours,
    "stock": stock,
    "rollout": rollout_speed,
    "floors": machine_floors,
    "bundled": bundled_speed,
    "calibrate": calibrate,
    "sweep": sweep_worker,
    "evaluation": evaluation_worker,
}
MARK = "RESULT "


def run_worker(
    name: str, on_line: Callable[[str], None] = lambda line: None, **arguments: Any
) -> dict[str, Any]:
    """Call a worker in a fresh process and return what it returned."""
    command = [sys.executable, "-m", "cpugrpo_edu.lab.bench", name, json.dumps(arguments)]
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
