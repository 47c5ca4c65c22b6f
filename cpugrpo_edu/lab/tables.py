"""The tables of benchmark records: a header and rows of text for each kind of record."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from cpugrpo_edu.lab.cost import fit_sweep
from cpugrpo_edu.record.run_record import RunRecord

Rows = list[list[str]]


def steady_seconds(result: dict[str, Any]) -> float:
    """Seconds a step: the mean without the first one, which warms up."""
    steps = result["step_seconds"]
    return fmean(steps[1:] or steps)


B1_HEADER = ["", "s a step", "tokens/s", "peak GB", "x ours", "ours' memory, x"]


def b1_rows(record: RunRecord) -> Rows:
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


B4_HEADER = ["", "s a step", "tokens", "rollout tokens/s", "peak GB", "x ours", "ours' memory, x"]


def b4_rows(record: RunRecord) -> Rows:
    """The table of ``cpugrpo bench b4``. ``x ours`` compares seconds per completion token, since
    each contestant draws its own completions."""
    results = record.results
    ours, floor = results["ours"], sum(results["step_floor"].values())
    base = steady_seconds(ours) / ours["completion_tokens"]
    rows = []
    for name, result in {"ours": ours, **results["peers"]}.items():
        if "skipped" in result:
            rows.append([name, "skipped: " + result["skipped"], "", "", "", "", ""])
            continue
        seconds, tokens = steady_seconds(result), result["completion_tokens"]
        speed, peak = result.get("rollout_tokens_per_second"), result["peak_rss_bytes"]
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{tokens:.0f}",
                f"{speed:.0f}" if speed else "",
                f"{peak / 1e9:.2f}",
                f"{seconds / tokens / base:.1f}",
                f"{ours['peak_rss_bytes'] / peak:.2f}",
            ]
        )
    rows.append(["floor", f"{floor:.2f}", f"{ours['completion_tokens']:.0f}", "", "", "", ""])
    return rows


def fallback_note(record: RunRecord) -> str:
    """What the table's reader must know where the INT8 kernel was not compiled; else ""."""
    if record.results["ours"].get("int8_kernel") != "packed":
        return ""
    return (
        "No C compiler was found on this machine, so ours multiplied INT8 weights by torch, which "
        "converts them to floats first: slower, and with more memory during rollouts."
    )


ABLATE_HEADER = ["", "s a step", "peak GB", "x all on"]


def ablate_rows(record: RunRecord) -> Rows:
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


ROLLOUT_HEADER = ["Engine", "G", "tokens/s", "x generate", "peak GB"]


def rollout_rows(record: RunRecord) -> Rows:
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


def train_rows(record: RunRecord) -> Rows:
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


SWEEP_HEADER = ["Point", "s a step", "predicted", "error", "peak GB", "predicted ", "error "]


def sweep_rows(record: RunRecord) -> Rows:
    """One row a point: measured, predicted by the fit that left it out, and the error."""
    model = fit_sweep(record.results)
    rows = []
    for point, error, memory_error in zip(
        record.results["points"], model.steps.errors, model.memory.errors
    ):
        seconds, peak = point["step_seconds"], point["peak_rss_bytes"] / 1e9
        rows.append(
            [
                point["name"],
                f"{seconds:.3f}",
                f"{seconds * (1 + error):.3f}",
                f"{error:+.0%}",
                f"{peak:.2f}",
                f"{peak * (1 + memory_error):.2f}",
                f"{memory_error:+.0%}",
            ]
        )
    return rows


COEFFICIENT_HEADER = ["Of", "Kind of work", "x the floor"]


def coefficient_rows(record: RunRecord) -> Rows:
    """The fitted coefficients: how many times its floor each kind of work takes."""
    model = fit_sweep(record.results)
    fits = {"rollout": model.rollout, "training": model.training, "memory": model.memory}
    return [
        [name, kind, f"{value:.2f}"]
        for name, fit in fits.items()
        for kind, value in fit.coefficients.items()
    ]


def sweep_summary(record: RunRecord) -> str:
    """The errors of the fit in one sentence."""
    model = fit_sweep(record.results)

    def say(errors: list[float], most: float) -> str:
        sizes = [abs(error) for error in errors]
        return f"mean {fmean(sizes):.0%}, nine in ten below {most:.0%}, worst {max(sizes):.0%}"

    return (
        f"Error of points left out of the fit, {len(model.steps.errors)} points: "
        f"time {say(model.steps.errors, model.steps.error)}; "
        f"memory {say(model.memory.errors, model.memory.error)}."
    )


TABLES: dict[str, tuple[str, list[str], Callable[[RunRecord], Rows]]] = {
    "bench-b1": ("Three stages of five steps, groups of two.", B1_HEADER, b1_rows),
    "bench-b2": ("Three stages of ten steps.", B1_HEADER, b1_rows),
    "bench-b3": ("Three stages, groups of eight.", B1_HEADER, b1_rows),
    "bench-b4": ("A real chat model: eight prompts, groups of eight.", B4_HEADER, b4_rows),
    "bench-rollout": ("Rollouts alone.", ROLLOUT_HEADER, rollout_rows),
    "bench-ablate": ("One fast path off at a time.", ABLATE_HEADER, ablate_rows),
    "bench-train": ("The bundled model.", TRAIN_HEADER, train_rows),
    "bench-sweep": (
        "The sweep, each point predicted by a fit without it.",
        SWEEP_HEADER,
        sweep_rows,
    ),
}
"""Kind of record: what it is, the table's header and its rows; in the order of the page."""
