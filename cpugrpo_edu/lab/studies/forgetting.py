"""Study: how much do five tasks in a row forget, and what do springs and replay keep?

Tiny policies learn the tasks of ``lab.five_tasks`` by GRPO, one after the other. Lambda is chosen
for each Fisher variant on seeds of its own; then every arm runs once on fresh seeds. Design and
analysis were written into ``docs/LOG.md`` before any of these seeds ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.lab.five_tasks import (
    EQUAL,
    RULES,
    TASKS,
    UNIFORM,
    Arm,
    Plan,
    learn_in_a_row,
    problems,
)
from cpugrpo_edu.lab.pieces import Pieces
from cpugrpo_edu.lab.studies.common import decided_by, paired_over_seeds, signed
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.record.stats import over_seeds
from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, ORANGE, VERMILLION, Plot, new_figure, tidy
from cpugrpo_edu.show.text import verdict

SEEDS = 12
FIRST_SEED = 20
CHOICE_SEEDS = (100, 101, 102)
"""Lambda is chosen on these; the arms never run on them."""
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TOGETHER = 3
"""Seeds of all arms in one stack: more at a time are no faster."""
MARGIN = 0.05
"""Accuracies that differ by less count as equal."""

NONE, REPLAY, JOINT, EXACT = "none", "replay", "joint", "exact"
VARIANTS = (EXACT, *EQUAL, "sample", "rollout_score", "empirical", "batched", "lightning")
PLAIN = (Arm(NONE), Arm(REPLAY, practice="replay"), Arm(JOINT, practice="joint"))


def plan_of(reduced: bool) -> Plan:
    return replace(Plan(), steps=40, fisher_prompts=8) if reduced else Plan()


def grid_of(reduced: bool) -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]:
    """Fisher variants, lambdas, and the seeds that choose among them."""
    if reduced:
        return (EXACT, UNIFORM), (0.03, 0.3), (900,)
    return VARIANTS, STRENGTHS, CHOICE_SEEDS


def seeds_of(setting: Setting) -> list[int]:
    """The seeds that the arms run on; the reduced study leaves those of the full one alone."""
    if setting.reduced:
        return list(range(901, 901 + (setting.seeds or 2)))
    return list(range(FIRST_SEED, FIRST_SEED + (setting.seeds or SEEDS)))


def outcomes(right: Tensor) -> list[list[list[str]]]:
    """Per arm and seed, and per stage, a string of ones and zeros over all tasks' problems."""
    rows = right.permute(1, 2, 0, 3, 4).flatten(3).int().tolist()
    return [[["".join(map(str, x)) for x in stages] for stages in seeds] for seeds in rows]


def accuracies(stages: Sequence[str]) -> Tensor:
    """(1 + tasks, tasks) from one policy's strings."""
    found = torch.tensor([[float(bit) for bit in text] for text in stages])
    return found.unflatten(1, (len(TASKS), -1)).mean(2)


def measures(stages: Sequence[str]) -> dict[str, Any]:
    """What became of one policy: means over the tasks, with ``end = learned - lost``.

    ``learned`` is a task's accuracy right after its stage, ``lost`` what is gone of it at the end.
    """
    table = accuracies(stages)
    end, learned = float(table[-1].mean()), float(table[1:].diagonal().mean())
    return {"end": end, "learned": learned, "lost": learned - end, "tasks": table[-1].tolist()}


def train(arms: Sequence[Arm], seeds: Sequence[int], setting: Setting) -> list[list[list[str]]]:
    setting.say(f"{', '.join(arm.name for arm in arms)}; seeds {seeds[0]} to {seeds[-1]}")
    return outcomes(learn_in_a_row(arms, seeds, plan_of(setting.reduced), setting.say))


def choose(curves: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The lambda with the highest mean accuracy at the end, of each variant."""
    return {name: max(curve, key=lambda x: curve[x]) for name, curve in curves.items()}


def choice_curves(setting: Setting, pieces: Pieces) -> dict[str, dict[float, float]]:
    """Mean accuracy at the end by lambda, of each variant, on the seeds that choose."""
    variants, strengths, seeds = grid_of(setting.reduced)
    curves = {}
    for variant in variants:
        arms = [Arm(f"{variant} {x:g}", fisher=variant, strength=x) for x in strengths]
        found = pieces.once(f"choice {variant}", partial(train, arms, seeds, setting))
        ends = (fmean(measures(stages)["end"] for stages in arm) for arm in found)
        curves[variant] = dict(zip(strengths, ends, strict=True))
    return curves


def run(setting: Setting) -> StudyResult:
    """Choose lambda on its seeds, then run every arm on others."""
    plan = plan_of(setting.reduced)
    pieces = Pieces(setting.work, "forgetting", decided_by(setting, plan=asdict(plan)))
    curves = choice_curves(setting, pieces)
    chosen = choose(curves)
    arms = [*PLAIN, *(Arm(name, fisher=name, strength=x) for name, x in chosen.items())]
    strings: dict[str, list[list[str]]] = {arm.name: [] for arm in arms}
    seeds = seeds_of(setting)
    for start in range(0, len(seeds), TOGETHER):
        some = seeds[start : start + TOGETHER]
        name = f"seeds {some}, lambda {list(chosen.values())}"
        for arm, found in zip(arms, pieces.once(name, partial(train, arms, some, setting))):
            strings[arm.name] += found
    record = new_record(
        "study-forgetting",
        {
            "reduced": setting.reduced,
            "seeds": seeds,
            "choice_seeds": list(grid_of(setting.reduced)[2]),
            "margin": MARGIN,
            "plan": asdict(plan),
            "chosen": chosen,
        },
        summarize(strings, curves),
    )
    return StudyResult(record, item_table(strings))


def item_table(strings: Mapping[str, list[list[str]]]) -> dict[str, Any]:
    """The held-out problems once, and per arm, seed and stage which of them were right."""
    prompts, answers = problems("test")
    return {
        "tasks": list(RULES),
        "prompts": prompts.flatten(0, 1).tolist(),
        "answers": answers.flatten().tolist(),
        "stages": ["before", *TASKS],
        "correct": dict(strings),
    }


def summarize(
    strings: Mapping[str, list[list[str]]], curves: Mapping[str, Mapping[float, float]]
) -> dict[str, Any]:
    """Measures by arm with t intervals over seeds, and differences paired by seed.

    ``{"arms": {name: {"end", "learned", "lost": {"mean", "low", "high", "values"}, "tasks",
    "minus_none", "minus_uniform", "exact_minus_it", "learned_minus_none", "lost_minus_none"}},
    "choice": {variant: [[lambda, accuracy], ...]}}``; without a name all are about the end.
    """
    found = {name: [measures(stages) for stages in runs] for name, runs in strings.items()}

    def gap(base: str, arm: str, key: str = "end") -> dict[str, Any]:
        return paired_over_seeds(*([row[key] for row in found[name]] for name in (base, arm)))

    arms: dict[str, Any] = {}
    for name, rows in found.items():
        arm: dict[str, Any] = {
            key: with_interval([row[key] for row in rows]) for key in ("end", "learned", "lost")
        }
        arm["tasks"] = [fmean(each) for each in zip(*(row["tasks"] for row in rows), strict=True)]
        if name != NONE:
            arm["minus_none"] = gap(NONE, name)
            for key in ("learned", "lost"):
                arm[f"{key}_minus_none"] = gap(NONE, name, key)
        if name != UNIFORM:
            arm["minus_uniform"] = gap(UNIFORM, name)
        if name != EXACT:
            arm["exact_minus_it"] = gap(name, EXACT)
        arms[name] = arm
    choice = {name: [[x, y] for x, y in curve.items()] for name, curve in curves.items()}
    return {"arms": arms, "choice": choice}


def with_interval(values: Sequence[float]) -> dict[str, Any]:
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None, "values": list(values)}
    s = over_seeds(list(values))
    return {"mean": s.mean, "low": s.low, "high": s.high, "values": list(values)}


# Tables, findings and plot


def arms_in_order(record: RunRecord) -> dict[str, Any]:
    """Without Fisher first; JSON sorts them by name."""
    arms = record.results["arms"]
    return {name: arms[name] for name in (NONE, REPLAY, JOINT, *VARIANTS) if name in arms}


def percent_of(row: Mapping[str, Any]) -> str:
    text = f"{100 * row['mean']:.1f}"
    return (
        text
        if row["low"] is None
        else f"{text} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    )


def tables(record: RunRecord) -> list[Table]:
    arms, chosen = arms_in_order(record), record.config["chosen"]
    rows = [
        [
            name,
            f"{chosen[name]:g}" if name in chosen else "–",
            percent_of(arm["end"]),
            # Joint training practises a task in other stages too: none is learned in its own.
            *("–" if name == JOINT else percent_of(arm[key]) for key in ("learned", "lost")),
            *(signed(arm[key]) if key in arm else "" for key in ("minus_none", "minus_uniform")),
        ]
        for name, arm in arms.items()
    ]
    header = ["Arm", "Lambda", "End, %", "Just learned, %", "Lost since, points"]
    header += ["End minus none", "End minus uniform"]
    tasks = [[n, *(f"{100 * x:.0f}" for x in arm["tasks"])] for n, arm in arms.items()]
    strengths = [x for x, _ in record.results["choice"][EXACT]]
    curves = record.results["choice"]
    choice = [
        [name, *(f"{100 * y:.0f}" for _, y in curves[name])] for name in VARIANTS if name in curves
    ]
    return [
        ("Mean over the five tasks, with 95 % t intervals over seeds", header, rows),
        ("Accuracy at the end by task, in the order learned, %", ["Arm", *TASKS], tasks),
        (
            "Accuracy at the end by lambda, on the seeds that chose it, %",
            ["Variant", *(f"{x:g}" for x in strengths)],
            choice,
        ),
    ]


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    arms = record.results["arms"]
    primary, shape = arms[EXACT]["minus_none"], arms[EXACT]["minus_uniform"]
    if primary["low"] is None:
        return ["One seed: no interval, so nothing can be distinguished from chance."]
    margin = record.config["margin"]
    helps = verdict(
        primary["low"], primary["high"], "keep more", "keep less", unclear="are not shown to matter"
    )
    beats = verdict(
        shape["low"],
        shape["high"],
        "beats equal springs",
        "does worse than equal springs",
        margin,
        f"equals equal springs within {100 * margin:g} points",
        "is not shown to differ from equal springs",
    )
    return [
        f"Springs with the exact Fisher {helps}: {signed(primary)} points at the end against "
        "no protection (primary).",
        "Its two parts (not registered): right after each task's own stage "
        f"{signed(arms[EXACT]['learned_minus_none'])}, in what is lost since "
        f"{signed(arms[EXACT]['lost_minus_none'])}.",
        f"The Fisher's shape {beats}: {signed(shape)} points (secondary).",
        f"Of what all tasks trained together reach ({percent_of(arms[JOINT]['end'])} %), no "
        f"protection reaches {percent_of(arms[NONE]['end'])} %, replay "
        f"{percent_of(arms[REPLAY]['end'])} %.",
    ]


LOOKS = {
    EXACT: (BLUE, "o-"),
    UNIFORM: (ORANGE, "s--"),
    "uniform, attention tenfold": (VERMILLION, "^:"),
    "uniform, MLP tenfold": (GREEN, "D-."),
}


def plot(record: RunRecord) -> Plot:
    """Accuracy at the end of every arm, a dot a seed; and by lambda on the choice seeds."""
    figure = new_figure(7.4, 3.8)
    left, right = figure.subplots(1, 2)
    arms = arms_in_order(record)
    facts = []
    for y, (name, arm) in enumerate(arms.items()):
        end, (colour, _) = arm["end"], LOOKS.get(name, (GREY, ""))
        left.plot(end["values"], [y] * len(end["values"]), "o", ms=3, color=colour, alpha=0.5)
        if end["low"] is not None:
            left.plot([end["low"], end["high"]], [y + 0.25] * 2, color=colour)
        left.plot(end["mean"], y + 0.25, "D", ms=5, color=colour)
        facts.append(f"{name} {end['mean']:.2f}")
    left.set_yticks(range(len(arms)), [name.replace("_", " ") for name in arms], size=8)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    tidy(left, "At the end", "mean accuracy over five tasks", grid="x")
    others = "other Fishers, and Lightning"
    for name, curve in sorted(record.results["choice"].items(), key=lambda x: x[0] in LOOKS):
        colour, look = LOOKS.get(name, (GREY, "-"))
        label = name if name in LOOKS else others
        right.semilogx(*zip(*curve, strict=True), look, ms=4, color=colour, label=label)
        others = ""
    right.set_ylim(0, 1)
    right.legend(frameon=False, fontsize=7, loc="lower left")
    tidy(right, "By lambda, on other seeds", "lambda", "")
    return Plot(
        figure,
        "Left, the mean accuracy over five tasks at the end, a dot a seed and the mean with its "
        f"interval: {', '.join(facts)}. Right, the same by lambda on the seeds that chose it.",
    )
