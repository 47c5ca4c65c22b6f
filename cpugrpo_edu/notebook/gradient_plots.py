"""The figures of chapter 2: gradients, their noise, and what baselines do to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cpugrpo_edu.notebook.policy_plots import in_words
from cpugrpo_edu.show.palette import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)

STYLES = {
    "exact": ("black", "-", ""),
    "none": (VERMILLION, "--", "s"),
    "leave one out": (BLUE, "-", "o"),
    "group mean": (PURPLE, ":", "x"),
    "GRPO": (GREEN, "-.", "^"),
}
"""Colour, line and marker of each kind of advantage."""


def rewards_and_gradient(
    answers: Sequence[str], rewards: Tensor, J: float, gradient: Tensor
) -> Plot:
    """Rewards (A,) with their mean J under the policy, beside the exact gradient (A,)."""
    figure = new_figure(6.5, 2.5)
    left, right = figure.subplots(1, 2)
    left.bar(answers, rewards, color=GREY)
    left.axhline(J, color="black", ls="--", lw=1)
    left.text(3, J + 0.03, "J", ha="center")
    tidy(left, "Rewards, and the mean J", y="reward")
    right.bar(answers, gradient, color=[GREEN if g > 0 else ORANGE for g in gradient])
    right.axhline(0, color="black", lw=0.8)
    tidy(right, "Exact gradient of J", y="dJ / d weight")
    return Plot(
        figure,
        f"Left: rewards {in_words(answers, rewards.tolist())}, with a dashed line at their mean "
        f"under the policy, {J:.2f}. Right: exact gradient "
        f"{in_words(answers, gradient.tolist(), '{:+.3f}')}.",
    )


def estimate_and_exact(
    answers: Sequence[str], exact: Tensor, mean: Tensor, error: Tensor, n: int
) -> Plot:
    """The exact gradient (A,) and the mean of n samples with its standard error (A,)."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    axes.bar(answers, exact, color=BLUE, alpha=0.5, label="exact")
    label = f"mean of {n} samples, 95 % interval"
    axes.errorbar(answers, mean, 1.96 * error, fmt="o", color=VERMILLION, capsize=3, label=label)
    axes.axhline(0, color="black", lw=0.8)
    axes.legend(frameon=False)
    tidy(axes, y="dJ / d weight")
    return Plot(
        figure,
        f"Bars: exact gradient {in_words(answers, exact.tolist(), '{:+.3f}')}. Points with "
        f"intervals: mean of the sampled estimates {in_words(answers, mean.tolist(), '{:+.3f}')}.",
    )


def cloud(estimates: Tensor, exact: Tensor, b: float, spread: float) -> Plot:
    """Estimated gradients (N, 5) at baseline b: the components of A and D."""
    figure = new_figure(5.6, 3.4)
    axes = figure.subplots()
    axes.scatter(estimates[:, 0], estimates[:, 3], s=8, color=BLUE, alpha=0.4)
    axes.scatter([exact[0]], [exact[3]], marker="*", s=160, color=VERMILLION, zorder=3)
    axes.set(xlim=(-0.6, 0.9), ylim=(-0.9, 0.6))
    title = f"b = {b:g}: exact standard deviation, all weights, {spread:.3f}"
    tidy(axes, title, "gradient for A", "gradient for D", "both")
    return Plot(
        figure,
        f"A cloud of estimated gradients at baseline {b:g} around the star of the exact gradient; "
        f"exact standard deviation over all weights {spread:.3f}.",
    )


def variance(b: Tensor, curve: Sequence[float], marks: Mapping[str, tuple[float, float]]) -> Plot:
    """Variance of one sample's estimate over the baseline; marks are (baseline, variance)."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    axes.plot(b, curve, color=BLUE)
    for (label, at), look in zip(marks.items(), ("s", "o", "*"), strict=True):
        color = {"s": GREY, "o": ORANGE, "*": VERMILLION}[look]
        axes.plot(*at, look, ms=9, color=color, label=label)
    axes.set_ylim(0, 1.2)
    axes.legend(frameon=False)
    tidy(axes, x="baseline b", y="variance of one sample")
    facts = in_words(list(marks), [v for _, v in marks.values()], "{:.3f}")
    return Plot(
        figure, f"A parabola: variance of the estimated gradient over the baseline; {facts}."
    )


def bonus(runs: Mapping[tuple[int, bool], Tensor]) -> Plot:
    """Learning curves (steps, runs) by bonus and by whether the group mean is subtracted."""
    figure = new_figure(6.5, 2.9)
    amounts = sorted({amount for amount, _ in runs})
    panels = figure.subplots(1, len(amounts), sharey=True)
    facts = []
    for (amount, baseline), curves in runs.items():
        axes = panels[amounts.index(amount)]
        color, style = (BLUE, "-") if baseline else (VERMILLION, "--")
        low, high = curves.quantile(torch.tensor([0.1, 0.9]).double(), dim=1)
        axes.fill_between(range(len(curves)), low, high, color=color, alpha=0.15, lw=0)
        name = "group mean subtracted" if baseline else "no baseline"
        axes.plot(curves.mean(1), color=color, ls=style, label=name)
        axes.set_ylim(0, 1.02)
        tidy(axes, f"a bonus of {amount} for everybody", "step")
        facts.append(f"bonus {amount}, {name}: mean {curves[-1].mean():.2f} at the end")
    panels[0].set_ylabel("expected reward J, without bonus")
    panels[0].legend(frameon=False, loc="lower right")
    return Plot(
        figure,
        "Learning curves with bands from the 10 % to the 90 % quantile of the runs. "
        f"{'; '.join(facts)}.",
    )


def noise(sizes: Sequence[int], values: Mapping[str, Sequence[float]]) -> Plot:
    """Relative noise of the gradient over the group size, for each kind of advantage."""
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    for kind, line in values.items():
        color, style, marker = STYLES[kind]
        axes.plot(sizes, line, color=color, ls=style, marker=marker, label=kind)
    axes.set_xticks(sizes)
    axes.set_ylim(0)
    axes.legend(frameon=False)
    tidy(axes, x="group size G", y="noise: variance / length²")
    facts = [f"{kind} from {line[0]:.1f} to {line[-1]:.1f}" for kind, line in values.items()]
    return Plot(
        figure,
        f"Lines of relative noise over group sizes {sizes[0]} to {sizes[-1]}: {', '.join(facts)}.",
    )


def weight(p: Tensor, G: int, plain: Tensor, scaled: Tensor) -> Plot:
    """How much a prompt counts over its chance of success p (N,), with and without division."""
    figure = new_figure(6.0, 2.9)
    axes = figure.subplots()
    axes.plot(p, plain, color=PURPLE, ls=":", lw=2, label="group mean")
    axes.plot(p, scaled, color=GREEN, label="GRPO: / std")
    limit = (p * (1 - p)) ** -0.5
    axes.plot(p, limit, color=GREY, ls="--", lw=1, label="1 / std, G → ∞")
    axes.set_ylim(0, 8)
    axes.legend(frameon=False, loc="upper center")
    tidy(axes, f"G = {G}: how much a prompt counts", "chance p that a completion is right", "w(p)")
    return Plot(
        figure,
        f"Weight of a prompt over its chance of success for groups of {G}: with the group mean "
        f"alone {plain.min():.2f} to {plain.max():.2f}; with division by the standard deviation "
        f"{scaled.min():.2f} to {scaled.max():.2f}, and {scaled[len(p) // 2]:.2f} in the middle.",
    )


def cosines(counts: Sequence[int], found: Mapping[str, Sequence[Tensor]]) -> Plot:
    """Cosine with the exact gradient over groups averaged: repetitions (R,) for each count."""
    figure = new_figure(6.5, 2.9)
    axes = figure.subplots()
    levels, facts = torch.tensor([0.1, 0.5, 0.9]), []
    for shift, (kind, values) in zip((0.94, 1.0, 1.06), found.items(), strict=True):
        color, style, marker = STYLES[kind]
        low, middle, high = torch.stack([v.quantile(levels) for v in values]).T
        axes.errorbar(
            [n * shift for n in counts],
            middle,
            torch.stack([middle - low, high - middle]),
            color=color,
            ls=style,
            marker=marker,
            ms=4,
            capsize=2,
            label=kind,
        )
        facts.append(f"{kind} from {middle[0]:.2f} to {middle[-1]:.2f}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.legend(frameon=False, loc="lower right")
    tidy(axes, x="groups of 8 averaged", y="cosine with exact gradient")
    return Plot(
        figure,
        f"Cosine between the averaged estimate and the exact gradient over {counts[0]} to "
        f"{counts[-1]} groups, medians with 10 % to 90 % bars: {', '.join(facts)}.",
    )


def climbs(curves: Mapping[str, Sequence[Sequence[float]]]) -> Plot:
    """Learning curves of the exact expected reward: runs by kind, thin, and their mean."""
    figure = new_figure(6.5, 3.0)
    axes = figure.subplots()
    facts = []
    for kind, lines in curves.items():
        color, style, _ = STYLES[kind]
        runs = torch.tensor(lines)
        for run in runs:
            axes.plot(run, color=color, lw=0.7, alpha=0.4)
        axes.plot(runs.mean(0), color=color, ls=style, lw=2, label=kind)
        facts.append(f"{kind} {', '.join(f'{end:.2f}' for end in runs[:, -1].tolist())}")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    tidy(axes, x="step (one group of 8 each)", y="exact J")
    return Plot(
        figure,
        "Learning curves of the exact expected reward, thin lines for seeds. At the end: "
        f"{'; '.join(facts)}.",
    )
