"""What the studies share: runs that resume, evaluations packed, paired statistics.

The runner of every study is a loop over the cells of a grid that keeps each finished one. Runs
also resume within a cell, and the analysis is paired by seed; a library for searches does neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from cpugrpo_edu.lab.recorded import recorded_runs
from cpugrpo_edu.lab.studies.setting import Say, Setting
from cpugrpo_edu.lab.worker import run_worker
from cpugrpo_edu.record.evaluations import Evaluation, evaluation_path, load_evaluation
from cpugrpo_edu.record.machine import describe_machine
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import over_seeds
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.pipeline import Interrupted, run
from cpugrpo_edu.show.palette import GREY
from cpugrpo_edu.show.progress import ProgressDisplay


def decided_by(setting: Setting, **more: Any) -> dict[str, Any]:
    """What decides a piece of a study: the machine, the size of the study, and ``more``."""
    machine = describe_machine()
    return {
        "machine": f"{machine.cpu}, {machine.usable_cores} usable cores",
        "reduced": setting.reduced,
        **more,
    }


def expected(runs: int, per_cell: int) -> str:
    """``, about 40 min at the recorded speed``, from the recorded default runs; "" without any."""
    seconds = []
    for record in recorded_runs():
        took, share = record.results["seconds"], per_cell / record.config["per_cell"]
        seconds.append(took["load"] + took["train"] + share * took["evaluate"])
    if not seconds:
        return ""
    return f", about {runs * fmean(seconds) / 60:.0f} min at the recorded speed"


def run_or_resume(
    config: RunConfig, folder: Path, say: Say, keep: tuple[str, ...] = (), apart: bool = False
) -> RunRecord:
    """The record of a run in ``folder``: finished before, resumed, or run now.

    Of a finished run only the record, the metrics, the evaluations and ``keep`` stay. ``apart``
    gives it a process of its own, so that its peak memory is its own.
    """
    if (folder / "record.json").exists():
        return RunRecord.load(folder / "record.json")
    if not (folder / "state.json").exists():  # interrupted before there was anything to resume
        shutil.rmtree(folder, ignore_errors=True)
    record = run_worker(run_here, config, folder) if apart else run_here(config, folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in ("evaluations", *keep):
            shutil.rmtree(path, ignore_errors=True)
    for name in ("report.html", "report.md"):
        (folder / name).unlink(missing_ok=True)
    say(f"  {record.results['seconds']['total']:.0f} s")
    return record


def run_here(config: RunConfig, folder: Path) -> RunRecord:
    resume = (folder / "state.json").exists()
    try:
        return run(config, folder, resume=resume, display=ProgressDisplay(quiet=True))
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from error


def last_evaluation(record: RunRecord, folder: Path) -> dict[str, Any]:
    """The last evaluation of a run in ``folder``, packed."""
    label = record.results["evaluations"][-1]["label"]
    return packed_evaluation(load_evaluation(evaluation_path(folder, label)))


def packed_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation without its texts, which are nearly all of its size."""
    kept = asdict(evaluation)
    kept.pop("completions")
    return kept


def unpacked_evaluation(data: Mapping[str, Any]) -> Evaluation:
    return Evaluation.from_json({**data, "completions": [""] * len(data["item_ids"])})


def item_table(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Evaluations of the same problems, with the problems listed once.

    ``{"item_ids", "domains", "difficulties", "answers": {label: {"correct": "0110...",
    "tokens": [...]}}}``.
    """
    if not evaluations:
        return {"item_ids": [], "domains": [], "difficulties": [], "answers": {}}
    first = next(iter(evaluations.values()))
    for label, each in evaluations.items():
        if each["item_ids"] != first["item_ids"]:
            raise ValueError(f"{label} has other problems than {next(iter(evaluations))}")
    answers = {
        label: {
            "correct": "".join("1" if right else "0" for right in each["correct"]),
            "tokens": each["tokens"],
        }
        for label, each in evaluations.items()
    }
    return {key: first[key] for key in ("item_ids", "domains", "difficulties")} | {
        "answers": answers
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for testing all of them (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def paired_over_seeds(base: Sequence[float], arm: Sequence[float]) -> dict[str, Any]:
    """Mean of arm - base over seeds with its t interval and p-value; no interval for one seed."""
    differences = [b - a for a, b in zip(base, arm, strict=True)]
    found: dict[str, Any] = {
        "n": len(differences),
        "difference": fmean(differences),
        "low": None,
        "high": None,
        "p_value": None,
    }
    if len(differences) < 2:
        return found
    summary = over_seeds(differences)
    if summary.sd == 0:  # the t statistic is 0/0, or infinite
        p = 1.0 if summary.mean == 0 else 0.0
    else:
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return found | {"low": summary.low, "high": summary.high, "p_value": p}


def signed(row: Mapping[str, Any], scale: float = 100) -> str:
    """``+1.2 (-0.3 to +2.7)``, or ``+1.2 (no interval)``."""
    text = f"{scale * row['difference']:+.1f}"
    if row.get("low") is None:
        return f"{text} (no interval)"
    return f"{text} ({scale * row['low']:+.1f} to {scale * row['high']:+.1f})"


def draw_differences(
    axes: Any, rows: Sequence[Mapping[str, Any]], at: Sequence[float], **style: Any
) -> None:
    """A dot for each difference in points at its height, with a bar for the interval if any."""
    middle = [100 * row["difference"] for row in rows]
    spread = [
        [0 if row["low"] is None else abs(100 * row[end] - each) for row, each in zip(rows, middle)]
        for end in ("low", "high")
    ]
    axes.errorbar(middle, at, xerr=spread, ls="", **style)
    axes.axvline(0, color=GREY, lw=1)
