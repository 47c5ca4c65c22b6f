"""Study: does EWC keep what training on something else would erase?

The scenario ``letters``: the bundled model sorts three and four letters, GRPO teaches it five, and
springs hold it at its start. The strength of each kind of spring is chosen on seeds of its own.
The design was written into ``docs/LOG.md`` before any run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.lab.pieces import Pieces
from cpugrpo_edu.lab.studies.common import (
    decided_by,
    draw_differences,
    paired_over_seeds,
    run_or_resume,
    signed,
)
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.record.stats import over_seeds
from cpugrpo_edu.run.config import RunConfig, config_for
from cpugrpo_edu.run.scenarios import SCENARIOS
from cpugrpo_edu.show.palette import BLUE, GREY, ORANGE, Plot, new_figure, tidy
from cpugrpo_edu.show.text import verdict

SEEDS = 10
FIRST_SEED, FIRST_CHOOSING_SEED, CHOOSING_SEEDS = 200, 100, 4
NONE = "none"
SPRINGS = {"EWC": "rollout_score", "uniform": "uniform"}
"""Kinds of spring, by the Fisher estimate that gives their stiffness."""
STRENGTHS = (0.1, 0.3, 1.0, 3.0)
MARGIN = 0.05
LEVELS = SCENARIOS["letters"].levels
PAIRS = (("EWC", NONE), ("uniform", NONE), ("EWC", "uniform"))

Accuracies = dict[str, float]
"""Of "before" or "after", by difficulty."""


def config_of(arm: str, strength: float, seed: int, reduced: bool) -> RunConfig:
    """A run of the scenario; reduced, of a step on few problems."""
    fisher = SPRINGS.get(arm, "rollout_score")
    config = config_for(scenario="letters", seed=seed, fisher=fisher, ewc_strength=strength)
    if reduced:
        config = replace(config, steps=(1, 0, 0), fisher_examples=4, per_cell=3, patience=0)
    return config


def run(setting: Setting) -> StudyResult:
    """Choose the strength of each kind of spring, then test it on other seeds."""
    seeds = setting.seeds or (1 if setting.reduced else SEEDS)
    strengths = STRENGTHS[:1] if setting.reduced else STRENGTHS
    choosing = range(
        FIRST_CHOOSING_SEED, FIRST_CHOOSING_SEED + (CHOOSING_SEEDS, 1)[setting.reduced]
    )
    runs = len(SPRINGS) * len(strengths) * len(choosing) + (1 + len(SPRINGS)) * seeds
    setting.say(f"{runs} short runs")
    pieces = Pieces(setting.work, "letters", decided_by(setting))

    def measure(arm: str, strength: float, seed: int) -> dict[str, Any]:
        name = f"{arm}-{strength:g}-{seed}"
        place = pieces.folder / "runs" / name
        config = config_of(arm, strength, seed, setting.reduced)
        setting.say(name)
        row: dict[str, Any] = pieces.once(name, partial(measured, config, place, setting))
        return {"arm": arm, "strength": strength, "seed": seed, **row}

    choice = [
        measure(arm, strength, seed)
        for seed in choosing
        for arm in SPRINGS
        for strength in strengths
    ]
    chosen = {arm: best_strength(choice, arm) for arm in SPRINGS}
    rows = [
        measure(arm, strength, seed)
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        for arm, strength in {NONE: 0.0, **chosen}.items()
    ]
    config = {
        "reduced": setting.reduced,
        "seeds": seeds,
        "choosing_seeds": list(choosing),
        "strengths": list(strengths),
        "margin": MARGIN,
        "scenario": asdict(config_of("EWC", chosen["EWC"], FIRST_SEED, setting.reduced)),
    }
    results = {"choice": choice, "chosen": chosen, "runs": rows, "pairs": contrasts(rows)}
    return StudyResult(new_record("study-letters", config, results))


def measured(config: RunConfig, place: Any, setting: Setting) -> dict[str, Accuracies]:
    """Accuracy before and after a run, by difficulty and over all."""
    record = run_or_resume(config, place, setting.say)
    compared = record.results["comparisons"]["after vs before"]
    cells = {**compared["by_difficulty"], "all": compared["overall"]}
    return {when: {x: row[when] for x, row in cells.items()} for when in ("before", "after")}


def best_strength(rows: Sequence[Mapping[str, Any]], arm: str) -> float:
    """The one with the highest mean accuracy over all three lengths; the weaker of equal ones."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault(row["strength"], []).append(row["after"]["all"])
    return max(sorted(found), key=lambda strength: fmean(found[strength]))


def contrasts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each pair of arms, by difficulty and over all: the difference after training, by seed."""
    found = []
    for arm, base in PAIRS:
        for level in ("all", *DIFFICULTIES):
            one, other = (after(rows, name, level) for name in (arm, base))
            row = paired_over_seeds(other, one)
            found.append({"arm": arm, "base": base, "tested": level, **row})
    return found


def after(rows: Sequence[Mapping[str, Any]], arm: str, level: str) -> list[float]:
    return [row["after"][level] for row in rows if row["arm"] == arm]


# Tables, findings and plot


def contrast(record: RunRecord, arm: str, base: str, level: str = "all") -> dict[str, Any]:
    wanted = (arm, base, level)
    return next(
        row for row in record.results["pairs"] if (row["arm"], row["base"], row["tested"]) == wanted
    )


def mean_text(values: Sequence[float]) -> str:
    """``53.0 % (44.1 to 61.9)``: mean with the t interval over seeds."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f} %"
    s = over_seeds(values)
    return f"{100 * s.mean:.1f} % ({100 * s.low:.1f} to {100 * s.high:.1f})"


def tables(record: RunRecord) -> list[Table]:
    runs, choice = record.results["runs"], record.results["choice"]
    strengths = record.config["strengths"]
    names = [*LEVELS.values(), "all"]
    levels = (*DIFFICULTIES, "all")
    first = runs[0]["before"]
    rows = [["before training", "–", *(f"{100 * first[x]:.1f} %" for x in levels)]]
    for arm in (NONE, *SPRINGS):
        strength = next(row["strength"] for row in runs if row["arm"] == arm)
        cells = [mean_text(after(runs, arm, x)) for x in levels]
        rows.append([arm, f"{strength:g}", *cells])
    pairs = [
        [f"{a} minus {b}", *(signed(contrast(record, a, b, x)) for x in levels)] for a, b in PAIRS
    ]
    each = [
        [str(row["seed"]), row["arm"], *(f"{100 * row['after'][x]:.0f}" for x in levels)]
        for row in runs
    ]
    chosen = []
    for arm in SPRINGS:
        tried = {s: [r for r in choice if (r["arm"], r["strength"]) == (arm, s)] for s in strengths}
        means = [f"{100 * fmean(r['after']['all'] for r in rs):.1f}" for rs in tried.values()]
        chosen.append([arm, *means, f"{record.results['chosen'][arm]:g}"])
    seeds = record.config["seeds"]
    return [
        (
            f"Accuracy after training on five letters only, mean of {seeds} "
            f"seed{'s' if seeds > 1 else ''} with the 95 % t interval",
            ["Springs", "lambda", *names],
            rows,
        ),
        (
            "Differences in points, paired by seed, with the 95 % t interval",
            ["Arms", *names],
            pairs,
        ),
        (
            "The choice of lambda, on other seeds: mean accuracy over the three lengths, %",
            ["Springs", *(f"{s:g}" for s in strengths), "chosen"],
            chosen,
        ),
        ("Every run: accuracy after training, %", ["Seed", "Springs", *names], each),
    ]


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    if record.config["seeds"] < 2:
        return ["One seed: no interval, so nothing can be distinguished from chance."]
    said = []
    for arm in SPRINGS:
        row = contrast(record, arm, NONE)
        word = verdict(row["low"], row["high"], "raise", "lower", unclear="are not shown to change")
        kind = "Springs of the Fisher (EWC)" if arm == "EWC" else "Equal springs"
        said.append(f"{kind} {word} the accuracy over all three lengths: {signed(row)} points.")
    for level, name in LEVELS.items():
        row = contrast(record, "EWC", NONE, level)
        word = verdict(row["low"], row["high"], "higher", "lower", unclear="not shown to differ")
        said.append(f"With EWC, {name} end {word}: {signed(row)} points.")
    row = contrast(record, "EWC", "uniform")
    word = verdict(
        *(row["low"], row["high"], "beats", "is worse than"),
        margin=record.config["margin"],
        same="is, within the margin, as good as",
        unclear="is not shown to differ from",
    )
    said.append(f"EWC {word} equal springs: {signed(row)} points.")
    return said


def plot(record: RunRecord) -> Plot:
    """The difference to no springs by length, for both kinds of spring."""
    figure = new_figure(7, 2.8)
    axes = figure.add_subplot()
    facts = []
    for shift, (arm, colour) in enumerate((("EWC", BLUE), ("uniform", ORANGE))):
        rows = [contrast(record, arm, NONE, level) for level in (*DIFFICULTIES, "all")]
        at = [i - 0.1 + 0.2 * shift for i in range(len(rows))]
        draw_differences(axes, rows, at, marker="os"[shift], color=colour, capsize=3, label=arm)
        named = zip([*LEVELS.values(), "all"], rows)
        facts.append(f"{arm}: " + ", ".join(f"{name} {signed(row)}" for name, row in named))
    axes.set_yticks(range(4), [*LEVELS.values(), "all"])
    axes.invert_yaxis()
    axes.axhline(2.5, color=GREY, lw=0.5)
    tidy(axes, x="accuracy against no springs, points (bars: 95 % over seeds)", grid="both")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return Plot(
        figure,
        "Dot chart of the accuracy with springs minus that without, by length: "
        f"{'; '.join(facts)}.",
    )
