"""The recorded runs of the default stages, and what they tell about the next one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from types import SimpleNamespace

from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.text import records_folder


def recorded_runs(model: str = "bundled") -> list[RunRecord]:
    """The recorded runs of a model's default stages; the bundled model's without EWC and with."""
    name = "run-seed*.json" if model == "bundled" else f"run-{model}-seed*.json"
    return [RunRecord.load(path) for path in sorted(records_folder().glob(name))]


def recorded_config(run: RunRecord) -> SimpleNamespace:
    """A record's settings, and whether EWC acted, which follows from them."""
    acts = bool(run.config["ewc_strength"] and run.config["fisher_examples"])
    return SimpleNamespace(**run.config, consolidates=acts)


def completion_lengths(runs: Sequence[RunRecord]) -> tuple[float, float]:
    """Mean tokens of the runs' completions: sampled in training, and greedy in evaluations."""
    sampled = [step["completion_length"] for run in runs for step in run.results["steps"]]
    tables = [each["table"] for run in runs for each in run.results["evaluations"]]
    return fmean(sampled), fmean(table["overall"]["tokens"] for table in tables)
