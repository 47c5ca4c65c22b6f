"""The figures of chapter 3: advantages, clip, KL estimators, divisors, and learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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


def advantages(counts: Sequence[int], right: Tensor, wrong: Tensor) -> Plot:
    """Advantages of right and wrong answers over the number of right ones in the group."""
    figure = new_figure(6.5, 2.7)
    axes = figure.subplots()
    axes.plot(counts, right, "o-", color=BLUE, label="right answers")
    axes.plot(counts, wrong, "s--", color=VERMILLION, label="wrong answers")
    axes.axhline(0, color="black", lw=0.8)
    axes.legend(frameon=False)
    tidy(axes, x=f"right answers in the group of {len(counts) + 1}", y="advantage")
    return Plot(
        figure,
        f"Advantages over the number of right answers in a group of {len(counts) + 1}: right ones "
        f"fall from {right[0]:.2f} to {right[-1]:.2f}, wrong ones from {wrong[0]:.2f} to "
        f"{wrong[-1]:.2f}.",
    )


def ratios(
    distances: Sequence[float], cosines: Mapping[str, Sequence[float]], spreads: Any
) -> Plot:
    """Cosine with the exact gradient, and noise of the estimate, over the distance moved."""
    figure = new_figure(6.8, 2.8)
    left, right = figure.subplots(1, 2)
    looks = {
        "token ratios": (BLUE, "-", "o"),
        "product": (VERMILLION, "--", "s"),
        "root (GSPO)": (GREEN, ":", "^"),
    }
    facts = []
    for name, (color, style, marker) in looks.items():
        look = {"color": color, "ls": style, "marker": marker, "ms": 4, "label": name}
        left.plot(distances, cosines[name], **look)
        right.plot(distances, spreads[name], **look)
        facts.append(
            f"{name}: cosine {cosines[name][-1]:.3f} and standard deviation "
            f"{spreads[name][-1]:.2f} at the farthest point"
        )
    left.legend(frameon=False, fontsize=8)
    x = "KL(old || new) of completions (nats)"
    tidy(left, "Cosine with the exact gradient", x)
    tidy(right, "Noise of the weighted reward", x, "standard deviation")
    return Plot(figure, f"Lines over the distance from the old policy. {'; '.join(facts)}.")


def clip(surrogate: Callable[[Tensor, float, float], Tensor]) -> Callable[[float], Plot]:
    """A function of the ratio that draws the clipped objective for both signs of A."""

    def draw(at: float) -> Plot:
        ratio = torch.linspace(0.4, 1.6, 121)
        figure = new_figure(6.2, 2.7)
        facts = []
        for i, (sign, color) in enumerate(((1.0, GREEN), (-1.0, VERMILLION))):
            axes = figure.add_subplot(1, 2, i + 1)
            axes.plot(ratio, surrogate(ratio, sign, 0.2), color=color)
            axes.plot(ratio, ratio * sign, color=GREY, ls=":", lw=1)
            dot = torch.tensor(at, requires_grad=True)
            value = surrogate(dot, sign, 0.2)
            [slope] = torch.autograd.grad(value, dot)
            axes.plot(at, value.item(), "o", color="black")
            axes.axvspan(0.8, 1.2, color=GREY, alpha=0.12, lw=0)
            does = f"gradient {slope:+.0f}" if slope else "no gradient"
            tidy(axes, f"A = {sign:+.0f}: {does}", "ratio", "objective")
            facts.append(f"for A = {sign:+.0f} the value is {value:.1f} with {does}")
        return Plot(figure, f"The clipped objective at ratio {at:g}: {', '.join(facts)}.")

    return draw


KINDS = {"k1": (VERMILLION, "--", "s"), "k2": (ORANGE, ":", "^"), "k3": (BLUE, "-", "o")}


def kl_estimators(
    d: Tensor, curves: Mapping[str, Tensor], samples: Mapping[str, Tensor], exact: float
) -> Plot:
    """The estimators over d = log ref - log pi, and their means over samples with intervals."""
    figure = new_figure(6.5, 2.9)
    left, axes = figure.subplots(1, 2)
    facts, n = [], 0
    for x, (name, (color, style, marker)) in enumerate(KINDS.items()):
        left.plot(d, curves[name], color=color, ls=style, label=name)
        values, n = samples[name], len(samples[name])
        error = 1.96 * values.std(correction=1) / n**0.5
        axes.errorbar([x], values.mean(), error, fmt=marker, color=color, capsize=4)
        facts.append(f"{name} {values.mean():.3f} ± {error:.3f}")
    left.axhline(0, color="black", lw=0.8)
    left.legend(frameon=False)
    tidy(left, "One sample", "d = log ref - log pi", "estimate (nats)")
    axes.axhline(exact, color="black", lw=1, ls="--")
    axes.text(-0.45, exact, "exact", va="bottom")
    axes.set(xlim=(-0.5, 2.5), ylim=(0, 2.2 * exact))
    axes.set_xticks(range(3), list(KINDS))
    tidy(axes, f"{n} samples, 95 % interval", "", "mean (nats)")
    return Plot(
        figure,
        "Left: the three estimators as functions of d; k1 is a falling line, k2 a parabola, k3 "
        f"never negative and tangent to zero. Right: means of {n} samples, {', '.join(facts)}, "
        f"with a dashed line at the exact {exact:.3f}.",
    )


def pushes(lengths: Tensor, per_token: Mapping[str, Tensor]) -> Plot:
    """Size of the gradient on each token, and on the whole, of completions by length (L,)."""
    figure = new_figure(6.5, 2.9)
    panels = figure.subplots(1, 2)
    looks = ((VERMILLION, "//"), (BLUE, ""), (GREEN, ".."))
    facts = []
    for i, ((how, token), (color, hatch)) in enumerate(zip(per_token.items(), looks, strict=True)):
        for axes, values in zip(panels, (token, token * lengths), strict=True):
            x = torch.arange(len(lengths)) + 0.27 * (i - 1)
            axes.bar(x, values, 0.25, color=color, hatch=hatch, label=how)
        facts.append(f"{how} {', '.join(f'{v:.4f}' for v in token.tolist())}")
    for axes, title in zip(panels, ("on each token", "on the whole"), strict=True):
        axes.set_xticks(range(len(lengths)), [f"{n}" for n in lengths.tolist()])
        tidy(axes, f"Push {title}", "completion length (tokens)")
    panels[0].set_ylabel("size of the gradient")
    panels[1].legend(frameon=False)
    names = ", ".join(str(n) for n in lengths.tolist())
    return Plot(
        figure,
        f"Bars for completions of {names} tokens. Push on each token: {'; '.join(facts)}. The "
        "push on the whole is that times the length.",
    )


def learning(seen: Sequence[float], teaching: Sequence[float], exact: Mapping[int, Any]) -> Plot:
    """Share of right answers over the steps, sampled and exact, and of groups that teach."""
    figure = new_figure(6.5, 3.0)
    left, axes = figure.subplots(1, 2)
    curve = torch.tensor(list(exact.values()))
    left.plot(seen, color=GREY, lw=0.7, alpha=0.7, label="samples")
    looks = [("trained on", BLUE, "-"), ("held out", VERMILLION, "--")]
    facts = []
    for values, (label, color, style) in zip(curve.T, looks, strict=True):
        left.plot(list(exact), values, color=color, ls=style, label=label)
        facts.append(f"{label} from {values[0]:.2f} to {values[-1]:.2f}")
    left.set_ylim(0, 1.02)
    left.legend(frameon=False, loc="lower right")
    tidy(left, "Share of right answers", "step")
    axes.plot(teaching, color=PURPLE, lw=1)
    axes.set_ylim(0, 1.02)
    tidy(axes, "Groups that teach something", "step", "share of groups")
    return Plot(
        figure,
        f"Left: learning curves, {', '.join(facts)}. Right: the share of groups with both right "
        f"and wrong answers, {teaching[0]:.2f} at the start, {max(teaching):.2f} at most, "
        f"{teaching[-1]:.2f} at the end.",
    )


def grid(chances: Tensor, crosses: Tensor, step: int) -> Plot:
    """Chance of the right answer for each pair of digits (10, 10); crosses are held-out pairs."""
    figure = new_figure(4.4, 3.6)
    axes = figure.subplots()
    image = axes.imshow(chances, vmin=0, vmax=1, cmap="cividis")
    axes.plot(crosses[:, 1], crosses[:, 0], "x", color=VERMILLION, ms=5)
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    figure.colorbar(image, label="chance of the right answer")
    tidy(axes, f"after {step} steps", "second digit", "first digit", "both")
    axes.grid(visible=False)
    return Plot(
        figure,
        f"A ten by ten map of the chance of a right answer after {step} steps; its mean is "
        f"{chances.mean():.2f}.",
    )


def with_and_without_clip(tracks: Mapping[str, Tensor]) -> Plot:
    """Expected reward (batches, runs) of policies that use each batch many times."""
    figure = new_figure(6.0, 2.9)
    axes = figure.subplots()
    facts = []
    looks = ((BLUE, "-"), (VERMILLION, "--"))
    for (name, runs), (color, style) in zip(tracks.items(), looks, strict=True):
        low, high = runs.quantile(torch.tensor([0.1, 0.9]), dim=1)
        axes.fill_between(range(len(runs)), low, high, color=color, alpha=0.15, lw=0)
        axes.plot(runs.mean(1), color=color, ls=style, lw=2, label=name)
        facts.append(
            f"{name}: mean from {runs[0].mean():.2f} to {runs[-1].mean():.2f}, a tenth of the "
            f"runs ends below {low[-1]:.2f}"
        )
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")
    tidy(axes, "Expected reward, mean and 10 % to 90 % of the runs", "batches")
    return Plot(figure, f"Curves of the exact expected reward with bands. {'; '.join(facts)}.")


def history(metrics: Sequence[Mapping[str, float]]) -> Plot:
    """Mean reward, completion length and silent groups over the steps of a run."""
    panels = {
        "reward": ("Mean reward", "per completion", BLUE),
        "completion_length": ("Completions", "tokens", ORANGE),
        "frac_zero_std": ("Teach nothing", "share of groups", GREY),
    }
    figure = new_figure(6.8, 2.6)
    steps = [row["step"] for row in metrics]
    facts = []
    for axes, (key, (title, unit, color)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        values = [row[key] for row in metrics]
        axes.plot(steps, values, "o-", color=color, ms=4)
        axes.set_ylim(0, 1.1 * max(values) or 1)
        tidy(axes, title, "step", unit)
        facts.append(f"{title.lower()} ({unit}) from {values[0]:.2f} to {values[-1]:.2f}")
    return Plot(figure, f"Curves over {len(steps)} steps: {'; '.join(facts)}.")
