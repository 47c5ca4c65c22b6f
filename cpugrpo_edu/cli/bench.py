"""``cpugrpo bench``: time and memory, beside peers and the machine's floors."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cpugrpo_edu.cli.command import Call, app, command, group, within
from cpugrpo_edu.cli.settings import comma_names
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab import workload as workloads
from cpugrpo_edu.record.markdown import markdown_table
from cpugrpo_edu.record.run_record import RunRecord

bench = group("Time and memory on a 494M-parameter model, beside peers and the machine's floors.")
app.add_typer(bench, name="bench")

Record = Annotated[Path | None, Option("--output", help="Where to write the record.")]
Cache = Annotated[
    Path | None, Option(help="Folder for the random model (3 GB), made on first use.")
]
Steps = Annotated[
    int | None, Option(help="Steps per stage, instead of the workload's.", callback=within(1))
]


def workload_of(name: str, steps: int | None = None) -> workloads.Workload:
    known = workloads.WORKLOADS
    if name not in known:
        raise UserError(f"unknown --workload {name!r}; allowed are {', '.join(known)}")
    return known[name] if steps is None else replace(known[name], steps=steps)


def give(call: Call, kind: str, record: RunRecord, path: Path | None, *more: str) -> None:
    """Write a benchmark's record; print it as JSON, or its kind of table and ``more``."""
    from cpugrpo_edu.lab.tables import TABLES

    _, header, rows = TABLES[kind]
    save(call, record, path)
    call.give(asdict(record), markdown_table(header, rows(record)), *more)


def save(call: Call, record: RunRecord, path: Path | None) -> None:
    if path is not None:
        record.save(path)
        call.say(f"record: {path}")


@command(bench, "machine")
def bench_machine(call: Call, output: Record = None) -> None:
    """Measure what this machine can do at best: arithmetic and memory."""
    from cpugrpo_edu.lab import bench as lab

    record = lab.bench_machine()
    save(call, record, output)
    rows = [[name, f"{value:.1f}"] for name, value in record.results["floors"].items()]
    call.give(asdict(record), markdown_table(["Floor", "Value"], rows))


@command(bench, "b1")
def bench_b1(
    call: Call,
    peers: Annotated[
        str,
        Option(help="stock, stock-lora, ours-packed, ours-full, separated by commas."),
    ] = "",
    workload: Annotated[str, Option(help="b1, b2 (10 steps a stage) or b3 (G = 8).")] = "b1",
    steps: Steps = None,
    peer_steps: Annotated[int, Option(help="Steps of each peer.", callback=within(1))] = 3,
    cache: Cache = None,
    output: Record = None,
) -> None:
    """Three stages of GRPO on the 494M-parameter shape: seconds, memory, ratios, floor.

    Example: `cpugrpo bench b1 --peers stock,stock-lora`
    """
    from cpugrpo_edu.lab import bench as lab

    names = comma_names(peers) if peers else ()
    shape = workload_of(workload, steps)
    give_b1(call, lab.bench_b1(shape, names, peer_steps, folder=cache, say=call.say), output)


def give_b1(call: Call, record: RunRecord, output: Path | None) -> None:
    """Give the record; exit with 1 if one of our own variants did not train."""
    from cpugrpo_edu.lab.bench import untrained
    from cpugrpo_edu.lab.tables import fallback_note

    give(call, "bench-b1", record, output)
    if note := fallback_note(record):
        print(note, file=sys.stderr)
    fail_on(untrained(record.results))


def fail_on(faults: list[str]) -> None:
    """Exit with 1 and the first fault, if there is one."""
    for fault in faults:
        print(f"cpugrpo: {fault}", file=sys.stderr)
        raise SystemExit(1)


@command(bench, "b4")
def bench_b4(
    call: Call,
    peers: Annotated[
        str, Option(help="stock, stock-lora, ours-float, ours-full, separated by commas.")
    ] = "",
    model: Annotated[str, Option(help="smollm2, a model folder, or a hub id.")] = "smollm2",
    steps: Annotated[int, Option(help="Steps of ours.", callback=within(1))] = 5,
    peer_steps: Annotated[int, Option(help="Steps of each peer.", callback=within(1))] = 3,
    output: Record = None,
) -> None:
    """GRPO with LoRA on a real chat model and word problems: seconds, memory, fidelity, floor.

    It fails if weights did not change, or if log-probs are too far from the float32 model's.

    Example: `cpugrpo bench b4 --peers stock,stock-lora`
    """
    from cpugrpo_edu.lab import b4

    names = comma_names(peers) if peers else ()
    record = b4.bench_b4(b4.RealWorkload(model=model, steps=steps), names, peer_steps, call.say)
    give(call, "bench-b4", record, output)
    fail_on(b4.faults(record.results))


@command(bench, "peers")
def bench_peers(call: Call, cache: Cache = None, output: Record = None) -> None:
    """Run `bench b1` with every peer."""
    from cpugrpo_edu.lab import bench as lab

    record = lab.bench_b1(workload_of("b1"), tuple(lab.PEERS), folder=cache, say=call.say)
    give_b1(call, record, output)


@command(bench, "ablate")
def bench_ablate(call: Call, steps: Steps = 3, cache: Cache = None, output: Record = None) -> None:
    """What each fast path is worth: one stage of B1 with one of them off at a time."""
    from cpugrpo_edu.lab import bench as lab

    record = lab.bench_ablate(workload_of("b1", steps), folder=cache, say=call.say)
    give(call, "bench-ablate", record, output)


@command(bench, "rollout")
def bench_rollout(
    call: Call,
    peers: Annotated[
        str, Option(help="llama.cpp and continuous, separated by commas; default: none.")
    ] = "",
    cache: Cache = None,
    output: Record = None,
) -> None:
    """Tokens per second of the rollout engines on the 494M-parameter shape, for G = 2 and 8.

    Example: `cpugrpo bench rollout --peers llama.cpp,continuous`
    """
    from cpugrpo_edu.lab import bench as lab

    names = comma_names(peers) if peers else ()
    record = lab.bench_rollout(workload_of("b1"), names, folder=cache, say=call.say)
    give(call, "bench-rollout", record, output)


@command(bench, "sweep")
def bench_sweep(call: Call, cache: Cache = None, output: Record = None) -> None:
    """GRPO steps over G, completion length, layers and models, and the cost model fitted to them.

    It takes some minutes; an interrupted sweep resumes where it stopped. `cpugrpo models` and
    `cpugrpo run` predict from the record.

    Example: `cpugrpo bench sweep --output records/bench-sweep.json`
    """
    from cpugrpo_edu.lab.sweep import bench_sweep
    from cpugrpo_edu.lab.tables import COEFFICIENT_HEADER, coefficient_rows, sweep_summary

    record = bench_sweep(folder=cache, say=call.say)
    costs = markdown_table(COEFFICIENT_HEADER, coefficient_rows(record))
    give(call, "bench-sweep", record, output, f"\n{costs}", f"\n{sweep_summary(record)}")


@command(bench, "train")
def bench_train(call: Call, output: Record = None) -> None:
    """Steps of the bundled model's default run with each rollout engine."""
    from cpugrpo_edu.lab import bench as lab

    give(call, "bench-train", lab.bench_train(say=call.say), output)


@command(bench, "plot")
def bench_plot(
    call: Call,
    record: Annotated[Path, Argument(help="A record that a bench command wrote.")],
    output: Annotated[
        Path | None, Option(help="The picture (.png); default: next to the record.")
    ] = None,
) -> None:
    """Draw a benchmark's record, and describe the picture in words.

    Example: `cpugrpo bench plot records/bench-b1.json`
    """
    from cpugrpo_edu.lab.bench_plots import plot_record

    plot = plot_record(RunRecord.load(record))
    path = output or record.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plot.png())
    call.say(f"picture: {path}")
    call.give({"picture": str(path), "alt": plot.alt}, plot.alt)
