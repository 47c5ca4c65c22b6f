"""Time and memory of GRPO on a model of 494 million parameters, beside its peers and floors.

Every contestant (:mod:`cpugrpo_edu.lab.contestants`) runs in a process of its own, so that its
peak memory is its own, and does the same work (:mod:`cpugrpo_edu.lab.workload`). *Floors* say how
fast the machine could at best be. Each function here returns a record;
:mod:`cpugrpo_edu.lab.tables` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.contestants import Variant, bundled, ours, stock
from cpugrpo_edu.lab.engines import ENGINES, rollout_speed
from cpugrpo_edu.lab.engines import PEERS as ROLLOUT_PEERS
from cpugrpo_edu.lab.floors import machine_floors
from cpugrpo_edu.lab.worker import run_worker, silent
from cpugrpo_edu.lab.workload import Workload, workload_model
from cpugrpo_edu.record.machine import GIB, available_memory
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run.config import RunConfig

Say = Callable[[str], None]

PEERS = {
    "stock": "TRL's GRPOTrainer, full fine-tuning, float32",
    "stock-lora": "TRL's GRPOTrainer with LoRA on all linear layers, float32",
    "ours-packed": "this package without a C compiler",
    "ours-full": "this package, full fine-tuning, INT8 rollouts",
}
PEER_MEMORY = {
    "stock": 13 * GIB,
    "stock-lora": 5 * GIB,
    "ours-packed": 3 * GIB,
    "ours-full": 8 * GIB,
}
"""Free bytes that a peer needs; with less it is skipped, and the record says why."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "all on": {},
    "prompt not shared": {"share_prefix": False},
    "generate": {"fast_rollouts": False},
    "no compiler": {"kernel": "packed"},
    "MLPs kept": {"recompute": False},
    "float32 base": {"frozen_int8": False},
}
"""What is switched off: fields of ``contestants.Variant``."""


def step_floor(workload: Workload, floors: dict[str, float]) -> dict[str, float]:
    """Least seconds of one step on a frozen INT8 base, by part: no overhead at all.

    Decoding reads every weight once a token; the prompt, the reference, the forward and
    the backward pass multiply P + G C tokens by every weight; the head sees completions.
    """
    blocks = workload.architecture.linear_parameters
    head = workload.architecture.vocab * workload.architecture.hidden
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


def check_peers(peers: tuple[str, ...], allowed: Iterable[str]) -> None:
    """UserError for a peer that is not among the allowed ones."""
    unknown = sorted(set(peers) - set(allowed))
    if unknown:
        raise UserError(f"unknown peer {', '.join(unknown)}; allowed are {', '.join(allowed)}")


def untrained(results: dict[str, Any]) -> list[str]:
    """A sentence for each contestant whose weights did not change."""
    return [
        f"the weights of {name} did not change: no training took place"
        for name, result in {"ours": results["ours"], **results["peers"]}.items()
        if not result.get("weights_changed", {"changed": True})["changed"]
    ]


def attempt(need: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a contestant, or why it was skipped. Never ends the comparison."""
    available = available_memory()
    if available < need:
        have, want = available / GIB, need / GIB
        return {"skipped": f"needs about {want:.0f} GiB of memory, {have:.1f} GiB are free"}
    try:
        return call()
    except UserError as error:
        return {"skipped": str(error)}


def bench_machine() -> RunRecord:
    """What this machine could at best do."""
    return new_record("bench-machine", {}, {"floors": run_worker(machine_floors)})


def bench_b1(
    workload: Workload,
    peers: tuple[str, ...] = (),
    peer_steps: int = 3,
    folder: Path | None = None,
    say: Say = silent,
) -> RunRecord:
    """Ours on the whole workload and the peers on its first steps, with the floors."""
    check_peers(peers, PEERS)
    say("the model of the workload (made on first use)")
    model = workload_model(workload.architecture, folder)
    say("the machine's floors")
    floors = run_worker(machine_floors)
    say(f"ours: {workload.stages} stages of {workload.steps} steps")
    results: dict[str, Any] = {
        "floors": floors,
        "step_floor": step_floor(workload, floors),
        "ours": run_worker(ours, workload, model),
        "peers": {},
    }
    first = replace(workload, steps=peer_steps, stages=1)
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "stock": partial(run_worker, stock, workload, model, lora=False, steps=peer_steps),
        "stock-lora": partial(run_worker, stock, workload, model, lora=True, steps=peer_steps),
        "ours-packed": partial(run_worker, ours, workload, model, Variant(kernel="packed")),
        "ours-full": partial(run_worker, ours, first, model, Variant("full")),
    }
    for peer in peers:
        say(f"{peer}: {PEERS[peer]}")
        results["peers"][peer] = attempt(PEER_MEMORY[peer], calls[peer])
    config = {**asdict(workload), "peer_steps": peer_steps, "options": asdict(Variant())}
    return new_record(f"bench-{workload.name}", config, results)


def bench_ablate(
    workload: Workload,
    folder: Path | None = None,
    say: Say = silent,
    names: tuple[str, ...] = tuple(ABLATIONS),
) -> RunRecord:
    """What each fast path is worth: the workload's first stage with one of them off."""
    model, workload = workload_model(workload.architecture, folder), replace(workload, stages=1)
    results = {}
    for name in names:
        say(f"ablation: {name}")
        call = partial(run_worker, ours, workload, model, Variant(**ABLATIONS[name]))
        results[name] = attempt(6 * GIB, call)
    return new_record("bench-ablate", asdict(workload), {"ablations": results})


def bench_rollout(
    workload: Workload,
    peers: tuple[str, ...] = (),
    groups: tuple[int, ...] = (2, 8),
    engines: tuple[str, ...] = tuple(ENGINES),
    folder: Path | None = None,
    say: Say = silent,
) -> RunRecord:
    """Tokens a second of each rollout engine on the workload's shape, for some group sizes."""
    check_peers(peers, ROLLOUT_PEERS)
    model = workload_model(workload.architecture, folder)
    results: dict[str, dict[str, Any]] = {}
    for engine in (*engines, *peers):
        results[engine] = {}
        for rows in groups:
            say(f"rollouts: {engine}, {rows} rows")
            call = partial(run_worker, rollout_speed, engine, model, rows, workload.tokens)
            results[engine][str(rows)] = attempt(4 * GIB, call)
    return new_record("bench-rollout", {**asdict(workload), "groups": groups}, {"engines": results})


def bench_train(steps: int = 3, say: Say = silent) -> RunRecord:
    """Steps of the bundled model's default run with each rollout engine, without INT8 copies."""
    config, results = RunConfig(steps=(steps, 0, 0), checkpointing="off"), {}
    for engine in ("fast", "generate"):
        say(f"the bundled model, rollouts by {engine}")
        results[engine] = run_worker(bundled, config, EngineOptions(engine), config.rewards)
    return new_record("bench-train", {}, {"engines": results})
