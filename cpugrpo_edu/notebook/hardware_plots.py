"""The pictures of chapter 8: quotas, timings, the roofline, threads, bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cpugrpo_edu.notebook.pictures import STYLES, curves, draw_curves, log_axes
from cpugrpo_edu.show.palette import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)


def quota(threads: int, quota_ms: float = 200, period_ms: float = 100) -> Plot:
    """When each of the threads may run, over three periods of a quota."""
    running = min(period_ms, quota_ms / threads)
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    for thread in range(threads):
        spans = [(period * period_ms, running) for period in range(3)]
        axes.broken_barh(spans, (thread + 0.6, 0.8), color=BLUE, edgecolor="white")
    for period in range(4):
        axes.axvline(period * period_ms, color=GREY, ls="--", lw=1)
    axes.set_ylim(0.4, 16.6)
    axes.set_yticks([1, 4, 8, 12, 16])
    axes.set_xlim(-2, 302)
    title = f"threads: {threads}, running for {running / period_ms:.0%} of the time"
    tidy(axes, title, "time (ms)", "thread", grid="x")
    return Plot(
        figure,
        f"Bars of running time for {threads} threads over three periods of {period_ms:.0f} ms. "
        f"Each runs for the first {running:.0f} ms of a period, then stands still.",
    )


def timings(times: Tensor) -> Plot:
    """A histogram of repeated timings (µs), with the shortest, the median and the mean."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    shown = times.clamp(max=4 * float(times.median()))
    axes.hist(shown.numpy(), bins=60, color=BLUE)
    marks = {"shortest": times.min(), "median": times.median(), "mean": times.mean()}
    for (name, where), colour, style in zip(
        marks.items(), (GREEN, ORANGE, VERMILLION), ("-", "--", ":"), strict=True
    ):
        if where <= shown.max():
            axes.axvline(float(where), color=colour, ls=style, lw=2, label=name)
    axes.legend(frameon=False)
    tidy(axes, f"{len(times)} timings of one product", "time (µs)", "timings")
    said = ", ".join(f"{name} {float(where):.1f}" for name, where in marks.items())
    return Plot(
        figure,
        f"Histogram of {len(times)} timings in µs: {said}. Times beyond four medians are in the "
        "last bar.",
    )


def rate_by_size(sizes: Sequence[int], rates: Sequence[float]) -> Plot:
    """FLOP/s of square products against their size; dashed, the largest."""
    giga = [rate / 1e9 for rate in rates]
    return curves(
        {"rate": (sizes, giga)},
        "One thread, square matrices",
        "size n",
        "GFLOP/s",
        log="xy",
        ticks=sizes,
        level=max(giga),
        alt=f"GFLOP/s by size: {', '.join(f'{g:.2g}' for g in giga)}.",
    )


def reading_by_size(kilobytes: Sequence[int], rates: Sequence[float]) -> Plot:
    """Bytes/s against the size of the array that is read again and again."""
    speeds = [rate / 1e9 for rate in rates]
    return curves(
        {"reading": (kilobytes, speeds)},
        "Reading with one thread",
        "size of the array (kB)",
        "GB/s",
        log="x",
        ticks=[16, 128, 1024, 8192, 65536],
        from_zero=True,
        alt=f"GB/s by size: {', '.join(f'{s:.0f}' for s in speeds)}.",
    )


def step_by_rows(
    rows: Sequence[int], seconds: Mapping[str, Sequence[float]], off: Sequence[float]
) -> Plot:
    """Time of a decoding step against its rows; ``off``: measured over predicted time."""
    ratios = ", ".join(f"{m}: {o:.1f}" for m, o in zip(rows, off, strict=True))
    return curves(
        {name: (rows, [1e3 * t for t in times]) for name, times in seconds.items()},
        "One decoding step",
        "rows",
        "time (ms)",
        log="xy",
        ticks=rows,
        alt=f"Measured over predicted time, by rows: {ratios}.",
    )


def roofline(
    rows: int,
    counts: Sequence[int],
    seconds: Sequence[float],
    shape: tuple[int, int],
    peak: float,
    bandwidth: float,
) -> Plot:
    """The ceilings, the measured rates of a float32 layer, and the point of ``rows``.

    ``peak`` in FLOP/s, ``bandwidth`` in bytes/s; ``seconds`` of a layer for each of ``counts``.
    """
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    line = torch.logspace(-0.5, 2, 60)
    roof = (line * bandwidth).clamp(max=peak) / 1e9
    axes.loglog(line, roof, color=GREY, label="ceilings")
    rate = [2 * m * shape[0] * shape[1] / t / 1e9 for m, t in zip(counts, seconds, strict=True)]
    axes.loglog([m / 2 for m in counts], rate, "o", color=BLUE)
    axes.set_ylim(min(rate) / 2, 2 * max(peak / 1e9, *rate))
    at = counts.index(rows)
    axes.loglog(rows / 2, rate[at], "D", ms=10, color=VERMILLION)
    log_axes(axes, "y", [m / 2 for m in counts])
    each = seconds[at] / rows * 1e6
    title = f"rows: {rows}, {seconds[at] * 1e3:.1f} ms, or {each:.0f} µs a row"
    tidy(axes, title, "FLOP per byte", "GFLOP/s", grid="both")
    return Plot(
        figure,
        f"The roofline with the measured rates of {counts[0]} to {counts[-1]} rows, from "
        f"{min(rate):.0f} to {max(rate):.0f} GFLOP/s. Marked: {title}.",
    )


def threads(
    tries: Sequence[int],
    rates: Mapping[str, Sequence[float]],
    busy: Mapping[str, Sequence[float]],
    cores: int,
) -> Plot:
    """Speed against the number of threads, and the share of the processor in use."""
    figure = new_figure(6.8, 3)
    left, right = figure.subplots(1, 2)
    speed = {name: (tries, [r / rate[0] for r in rate]) for name, rate in rates.items()}
    draw_curves(left, speed, STYLES)
    draw_curves(right, {name: (tries, share) for name, share in busy.items()}, STYLES)
    left.plot(tries, [min(count, cores) for count in tries], color=GREY, lw=1)
    for axes in (left, right):
        axes.axvline(cores, color=GREY, ls="--", lw=1)
        axes.set_xticks(tries)
        axes.set_ylim(0)
    right.set_ylim(0, 108)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    tidy(left, "Speed, one thread = 1", "threads", "times as fast")
    tidy(right, "Processor in use", "threads", "% of all CPUs")
    said = "; ".join(
        f"{name} " + ", ".join(f"{n} threads {y:.1f}" for n, y in zip(x, ys, strict=True))
        for name, (x, ys) in speed.items()
    )
    return Plot(
        figure,
        f"Left, speed relative to one thread on {cores} cores: {said}. Right, the share of the "
        "processor in use.",
    )


def amdahl(share: float) -> Plot:
    """Speed-up against cores when ``share`` of the work can be split."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    many = list(range(1, 65))
    gain = [1 / (1 - share + share / c) for c in many]
    axes.plot(many, many, color=GREY, lw=1, label="perfect")
    axes.plot(many, gain, color=BLUE, label="Amdahl")
    if share < 1 and 1 / (1 - share) < 64:
        axes.axhline(1 / (1 - share), color=VERMILLION, ls="--", label="limit")
    axes.set_ylim(0, 66)
    axes.legend(frameon=False, loc="upper left")
    title = f"{share:.0%} can be split: {gain[-1]:.1f} times as fast on 64 cores"
    tidy(axes, title, "cores", "times as fast")
    return Plot(figure, f"Speed-up against cores. {title}.")


def stuck(weights: Tensor, rate: float) -> Plot:
    """Which bfloat16 ``weights`` a step of this size leaves as they are, by their size."""
    stays = weights - rate == weights
    share = float(stays.float().mean())
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    size = weights.float().abs().clamp(min=1e-6).log10()
    axes.hist(
        [size[~stays].numpy(), size[stays].numpy()],
        bins=[-6 + 0.1 * i for i in range(74)],
        stacked=True,
        color=[BLUE, VERMILLION],
        label=["moves", "stuck"],
    )
    axes.legend(frameon=False)
    axes.set_xlim(-5, 1.2)
    axes.set_xticks(range(-5, 2), [f"1e{i}" for i in range(-5, 2)])
    axes.set_yticks([])
    title = f"A step of {rate:g}: {share:.0%} of the weights are stuck"
    tidy(axes, title, "size of the weight", "weights")
    return Plot(figure, f"Histogram of the weights' sizes. {title}: the large ones.")
