"""The figures of chapter 1: probabilities of words, of completions and of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from cpugrpo_edu.policy import token_entropy
from cpugrpo_edu.record.stats import wilson_interval
from cpugrpo_edu.show.palette import BLUE, GREY, VERMILLION, Plot, new_figure, tidy


def in_words(names: Sequence[Any], values: Sequence[float], form: str = "{:.2f}") -> str:
    """Names and numbers of a chart as text."""
    pairs = zip(names, values, strict=True)
    return ", ".join(f"{name} {form.format(float(value))}" for name, value in pairs)


def logits_and_probabilities(words: Sequence[str], logits: Tensor) -> Plot:
    """Logits (V,) of the next word beside the probabilities made of them."""
    figure = new_figure(6.5, 2.6)
    left, right = figure.subplots(1, 2)
    left.bar(words, logits, color=GREY)
    left.axhline(0, color="black", lw=0.8)
    tidy(left, "After “the cat”: logits", y="logit")
    p = logits.softmax(0)
    right.bar(words, p, color=BLUE)
    tidy(right, "... and probabilities", y="probability")
    right.set_ylim(0, 1)
    return Plot(
        figure,
        f"Two bar charts over the words. Logits: {in_words(words, logits.tolist())}. "
        f"Probabilities: {in_words(words, p.tolist())}.",
    )


def likeliest(texts: Sequence[str], probabilities: Tensor, most: int = 12) -> Plot:
    """Bars of the most probable of all completions."""
    order = probabilities.argsort(descending=True)[:most]
    names, p = [texts[i] for i in order], probabilities[order]
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    axes.barh(names, p, color=BLUE)
    axes.invert_yaxis()
    tidy(axes, f"The {most} likeliest of all completions", "probability", grid="x")
    return Plot(figure, f"Bars of probabilities: {in_words(names, p.tolist(), '{:.3f}')}.")


PADDED_ROWS = [
    (["·", "the", "cat"], ["sat", "END", "·"]),
    (["·", "the", "cat"], ["the", "mat", "cat"]),
    (["the", "cat", "sat"], ["END", "·", "·"]),
]


def padded_batch() -> Plot:
    """A batch of three texts with its padding and its mask."""
    figure = new_figure(6.5, 2.1)
    axes = figure.subplots()
    for y, (before, after) in enumerate(PADDED_ROWS):
        for x, word in enumerate(before + after):
            real = word != "·"
            face = "#ffffff" if not real else "#dddddd" if x < 3 else "#bcdcf2"
            axes.add_patch(Rectangle((x, -y), 1, 0.8, fc=face, ec=GREY))
            text, color = (word, "black") if real else ("pad", GREY)
            axes.text(x + 0.5, 0.4 - y, text, ha="center", va="center", c=color)
            if x >= 3:
                axes.text(x + 4, 0.4 - y, str(int(real)), ha="center", va="center")
    for place, name in ((1.5, "prompt"), (4.5, "completion"), (8, "mask")):
        axes.text(place, 1.05, name, ha="center", va="bottom", weight="bold")
    axes.set(xlim=(-0.1, 9.7), ylim=(-2.1, 1.6))
    axes.axis("off")
    return Plot(
        figure,
        "A batch of three rows: prompts padded on the left in grey, completions padded on the "
        "right in blue, and beside them the mask with 1 for each completion token, END included, "
        "and 0 for padding.",
    )


def sums(totals: Mapping[str, float]) -> Plot:
    """Bars of what all completions' probabilities add up to; the first is the right one."""
    names, values = list(totals), [float(v) for v in totals.values()]
    figure = new_figure(6.5, 2.0)
    axes = figure.subplots()
    axes.barh(names, values, color=[BLUE] + [VERMILLION] * (len(names) - 1))
    axes.axvline(1, color="black", ls="--", lw=1)
    axes.invert_yaxis()
    tidy(axes, x="sum of the probabilities of all completions", grid="x")
    return Plot(figure, f"Bars of sums, with a dashed line at one: {in_words(names, values)}.")


def at_temperature(words: Sequence[str], logits: Tensor) -> Callable[[float], Plot]:
    """A function of the temperature that draws the probabilities of the next word."""

    def draw(temperature: float) -> Plot:
        p = (logits / temperature).softmax(0)
        entropy = token_entropy(logits / temperature)
        figure = new_figure(6.0, 2.6)
        axes = figure.subplots()
        axes.bar(words, p, color=BLUE)
        axes.set_ylim(0, 1)
        title = f"T = {temperature:g}: entropy {entropy:.2f} nats, "
        tidy(axes, f"{title}like {entropy.exp():.1f} equal choices", y="probability")
        return Plot(
            figure, f"Probabilities at temperature {temperature:g}: {in_words(words, p.tolist())}."
        )

    return draw


def two_temperatures(by_sentence: Tensor, by_tokens: Tensor, lengths: Tensor) -> Plot:
    """Log-probabilities of all completions (N,): sharpened as a whole against token by token."""
    figure = new_figure(6.5, 3.4)
    axes = figure.subplots()
    facts = []
    for length, marker, color in ((1, "s", VERMILLION), (2, "^", GREY), (3, "o", BLUE)):
        chosen = lengths == length
        name = f"{length} token" + "s" * (length > 1)
        axes.scatter(
            by_sentence[chosen].exp(),
            by_tokens[chosen].exp(),
            marker=marker,
            color=color,
            alpha=0.7,
            label=name,
        )
        above = int((by_tokens > by_sentence)[chosen].sum())
        facts.append(f"{above} of {int(chosen.sum())} completions of {name}")
    low = float(by_sentence.exp().min())
    axes.plot([low, 1], [low, 1], color="black", lw=0.8, ls="--")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False)
    x, y = "whole completions sharpened", "each token sharpened"
    tidy(axes, "The same temperature, two meanings", x, y, grid="both")
    return Plot(
        figure,
        "Scatter plot on logarithmic axes: probability of each completion when whole completions "
        "are sharpened against when each token is. Above the diagonal of equality lie "
        f"{', '.join(facts)}.",
    )


def running_means(estimates: Mapping[str, Tensor], exact: float) -> Plot:
    """Means of the first n samples over n, for each estimator (N,), and the exact value."""
    n = len(next(iter(estimates.values())))
    steps = torch.arange(1, n + 1)
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    facts = []
    looks = ((VERMILLION, "--"), (BLUE, "-"))
    for (label, values), (color, style) in zip(estimates.items(), looks, strict=True):
        running = values.cumsum(0) / steps
        axes.plot(steps, running, label=label, color=color, ls=style)
        facts.append(f"{label} ends at {running[-1]:.2f}")
    axes.axhline(exact, color="black", lw=1, label="exact")
    axes.set(xscale="log", xlim=(10, n), ylim=(exact - 0.5, exact + 0.5))
    axes.legend(frameon=False, ncols=3, fontsize=8)
    tidy(axes, x="completions sampled", y="mean so far (nats)")
    return Plot(
        figure,
        f"Running means over the number of samples, with a line at the exact {exact:.2f} nats: "
        f"{', '.join(facts)}.",
    )


# --- A model at work ---------------------------------------------------------------

LABELS = {"\n": "↵", " ": "␣", "": "∅"}


def readable(piece: str) -> str:
    """A token as a label: visible line ends, no dollar signs for math."""
    return LABELS.get(piece, piece).replace("\n", "↵").replace("$", r"\$")


def next_tokens(tokenizer: Any, logits: Tensor, ids: Sequence[int]) -> Callable[[int], Plot]:
    """A function of the position t that draws the likeliest tokens there, and the one written.

    ``logits`` (T, V) predict the text ``ids`` (T,).
    """

    def draw(t: int) -> Plot:
        p = logits[t].softmax(0)
        top = p.topk(8).indices.tolist()
        if ids[t] not in top:
            top[-1] = ids[t]
        own = [i == ids[t] for i in top]
        figure = new_figure(6.2, 2.9)
        axes = figure.subplots()
        for row, (i, written) in enumerate(zip(top, own, strict=True)):
            axes.barh(row, p[i], color=VERMILLION if written else BLUE, hatch="//" * written)
        names = [readable(tokenizer.decode([i])) for i in top]
        axes.set_yticks(range(len(top)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        before = readable("".join(tokenizer.decode([i]) for i in ids[:t]))
        tidy(axes, f"Written so far: {before or '(nothing yet)'}", "probability", grid="x")
        return Plot(
            figure,
            f"The likeliest next tokens after {t} tokens of the worked solution: "
            f"{in_words(names, p[top].tolist())}. The solution goes on with "
            f"{names[own.index(True)]}.",
        )

    return draw


def surprise(pieces: Sequence[str], surprisal: Tensor) -> Plot:
    """Bars of the surprisal of each token, (T,) in nats."""
    figure = new_figure(6.5, 2.6)
    axes = figure.subplots()
    axes.bar(range(len(pieces)), surprisal, color=BLUE)
    ticks = [readable(p).replace("####", "##\n##") for p in pieces]
    axes.set_xticks(range(len(pieces)), ticks, fontsize=8)
    tidy(axes, "Surprise along the worked solution", "token", "nats")
    facts = in_words([readable(p) for p in pieces], surprisal.tolist())
    return Plot(figure, f"Bars of the surprisal of each token in nats: {facts}.")


def perplexities(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Plot:
    """Perplexity of wrong against right answers, a panel for each form: (problems,) each."""
    high = 1.2 * max(float(x.max()) for pair in pairs.values() for x in pair)
    figure = new_figure(6.5, 3.3)
    facts = []
    for i, (name, (right, wrong)) in enumerate(pairs.items()):
        axes = figure.add_subplot(1, len(pairs), i + 1)
        axes.scatter(right, wrong, s=18, color=BLUE, alpha=0.7)
        axes.plot([1, high], [1, high], color="black", ls="--", lw=0.8)
        axes.set(xscale="log", yscale="log", xlim=(0.9, high), ylim=(0.9, high))
        axes.set_box_aspect(1)
        tidy(axes, name, "perplexity, right answer", "... wrong answer", "both")
        facts.append(f"{name}: {int((wrong > right).sum())} of {len(right)} above the diagonal")
    return Plot(
        figure,
        "Scatter plots of the perplexity of wrong against right answers, a point a problem. "
        f"{'; '.join(facts)}.",
    )


def exact_and_sampled(answers: Sequence[int], exact: Tensor, counts: Sequence[int], n: int) -> Plot:
    """Computed probability of each answer, and its share of n samples with Wilson intervals."""
    found = [wilson_interval(k, n) for k in counts]
    figure = new_figure(6.5, 2.9)
    axes = figure.subplots()
    axes.bar(answers, exact, color=BLUE, alpha=0.5, label="computed")
    axes.errorbar(
        answers,
        [f.estimate for f in found],
        [[f.estimate - f.low for f in found], [f.high - f.estimate for f in found]],
        fmt="o",
        ms=4,
        lw=1,
        color=VERMILLION,
        label=f"share of {n} samples, 95 % interval",
    )
    axes.set_xticks(answers)
    axes.set_ylim(0)
    axes.legend(frameon=False)
    tidy(axes, x="bare answer", y="probability")
    pairs = zip(exact.tolist(), found, strict=True)
    covered = sum(f.low <= p <= f.high for p, f in pairs)
    return Plot(
        figure,
        f"Bars: computed probability of each bare answer; points with intervals: its share of "
        f"{n} samples. {covered} of {len(found)} intervals cover the bar.",
    )
