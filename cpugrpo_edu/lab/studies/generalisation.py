"""Study: does training on one domain, or one difficulty, help the others?

Every condition makes the same number of GRPO steps; only the problems differ. Each trained model
answers the same held-out problems of all domains and difficulties.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.lab.pieces import Pieces
from cpugrpo_edu.lab.studies.common import (
    decided_by,
    expected,
    holm,
    item_table,
    packed_evaluation,
    paired_over_seeds,
    run_or_resume,
    signed,
    unpacked_evaluation,
)
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.record.stats import accuracy_table
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.show.palette import Plot, new_figure
from cpugrpo_edu.tasks import DOMAINS, held_out_problems

SEEDS = 5
ALL = "everything"


@dataclass(frozen=True)
class Condition:
    kind: str
    """"domain", "difficulty", or "both" for the control."""
    name: str
    change: dict[str, Any] = field(default_factory=dict)


def conditions(reduced: bool) -> tuple[Condition, ...]:
    """What is trained on; reduced, one domain, one difficulty and everything."""
    steps = 2 if reduced else 18
    split = [tuple(steps if i == j else 0 for j in range(3)) for i in range(3)]
    # One stage has all the steps; "mixed" stages all have every difficulty.
    mixed = {"order": "mixed", "steps": split[0]}
    found = [Condition("both", ALL, dict(mixed))]
    found += [Condition("domain", name, {**mixed, "domains": (name,)}) for name in DOMAINS]
    found += [
        Condition("difficulty", name, {"order": "curriculum", "replay": 0.0, "steps": split[i]})
        for i, name in enumerate(DIFFICULTIES)
    ]
    if reduced:
        return found[0], found[1], found[1 + len(DOMAINS)]
    return tuple(found)


def config_of(condition: Condition, seed: int, reduced: bool) -> RunConfig:
    """Without EWC, and without evaluations of its own: the study makes those."""
    config = RunConfig(
        seed=seed,
        per_cell=0,
        int8_evaluation=False,
        ewc_strength=0.0,
        fisher_examples=0,
        **condition.change,
    )
    if reduced:
        config = replace(config, prompts_per_step=4, num_generations=4, max_completion=48)
    return config


def answers_of(source: str, per_cell: int, limit: int, label: str) -> dict[str, Any]:
    problems = held_out_problems(per_cell)
    greedy = Sampling(limit, temperature=0.0)
    return packed_evaluation(evaluate(load_policy(source), problems, label, greedy))


def run(setting: Setting) -> StudyResult:
    """Train every condition with every seed, and test each on everything."""
    chosen = conditions(setting.reduced)
    seeds = setting.seeds or (1 if setting.reduced else SEEDS)
    per_cell = 3 if setting.reduced else 100
    limit = config_of(chosen[0], 0, setting.reduced).max_completion
    setting.say(
        f"{len(chosen)} conditions x {seeds} seeds: {len(chosen) * seeds} runs"
        + ("" if setting.reduced else expected(len(chosen) * seeds, per_cell))
    )
    decides = decided_by(setting, per_cell=per_cell)
    pieces = Pieces(setting.work, "generalisation", decides)
    before = pieces.once("before", lambda: answers_of("bundled", per_cell, limit, "before"))

    def measure(condition: Condition, seed: int) -> dict[str, Any]:
        place = pieces.folder / "runs" / f"{condition.kind}-{condition.name}-{seed}"
        config = config_of(condition, seed, setting.reduced)
        run_or_resume(config, place, setting.say, ("model",))
        found = answers_of(str(place / "model"), per_cell, limit, condition.name)
        shutil.rmtree(place, ignore_errors=True)
        return found

    after: dict[str, list[dict[str, Any]]] = {condition.name: [] for condition in chosen}
    for seed in range(seeds):
        for condition in chosen:
            setting.say(f"trained on {condition.name}, seed {seed}")
            name = f"{condition.kind}-{condition.name}-{seed}"
            after[condition.name].append(pieces.once(name, partial(measure, condition, seed)))
    kinds = {condition.name: condition.kind for condition in chosen}
    record = new_record(
        "study-generalisation",
        {
            "reduced": setting.reduced,
            "seeds": seeds,
            "per_cell": per_cell,
            "conditions": [asdict(condition) for condition in chosen],
            "default": asdict(config_of(chosen[0], 0, setting.reduced)),
        },
        summarize(before, after, kinds),
    )
    labelled = {
        f"{name} | seed {seed}": each
        for name, runs in after.items()
        for seed, each in enumerate(runs)
    }
    return StudyResult(record, item_table({"before": before, **labelled}))


def margins(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy by domain and by difficulty."""
    table = accuracy_table(unpacked_evaluation(evaluation))
    return {
        kind: {name: row["accuracy"] for name, row in table[f"by_{kind}"].items()}
        for kind in ("domain", "difficulty")
    }


def summarize(
    before: Mapping[str, Any],
    after: Mapping[str, Sequence[Mapping[str, Any]]],
    kinds: Mapping[str, str],
) -> dict[str, Any]:
    """Gain of every condition on every domain and difficulty: mean over seeds, t interval.

    ``{"before": {kind: {tested: accuracy}}, "gains": [{"kind", "trained", "tested", "own",
    "accuracy", "difference", "low", "high", "p_value", "p_holm"}]}``. ``own`` marks what was
    trained on; Holm corrects over everything else.
    """
    start = margins(before)
    gains: list[dict[str, Any]] = []
    for trained, runs in after.items():
        found = [margins(each) for each in runs]
        for kind in ("domain", "difficulty") if kinds[trained] == "both" else (kinds[trained],):
            for tested, level in start[kind].items():
                values = [each[kind][tested] for each in found]
                row = paired_over_seeds([level] * len(values), values)
                own = tested == trained or kinds[trained] == "both"
                gains.append(
                    {
                        "kind": kind,
                        "trained": trained,
                        "tested": tested,
                        "own": own,
                        "accuracy": fmean(values),
                        **row,
                    }
                )
    judged = [row for row in gains if not row["own"] and row["p_value"] is not None]
    for row, corrected in zip(judged, holm([row["p_value"] for row in judged])):
        row["p_holm"] = corrected
    return {"before": start, "gains": gains}


# Tables, findings and plot


def in_order(kind: str, names: Iterable[str]) -> list[str]:
    """The usual order: domains as listed, difficulties from easy to hard."""
    usual: tuple[str, ...] = DOMAINS if kind == "domain" else DIFFICULTIES
    there = set(names)
    return [*(name for name in usual if name in there), *sorted(there - set(usual))]


def tables(record: RunRecord) -> list[Table]:
    found = []
    for kind in ("domain", "difficulty"):
        start = record.results["before"][kind]
        names = in_order(kind, start)
        rows = [["nothing (before)", *(f"{100 * start[name]:.1f} %" for name in names)]]
        gains = [row for row in record.results["gains"] if row["kind"] == kind]
        for trained in dict.fromkeys(row["trained"] for row in gains):
            cells = {row["tested"]: row for row in gains if row["trained"] == trained}
            rows.append([trained, *(signed(cells[name]) for name in names)])
        found.append(
            (
                f"Trained on (rows), tested on (columns), by {kind}: change of accuracy in points "
                "with the 95 % t interval over seeds",
                ["Trained on", *names],
                rows,
            )
        )
    return found


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    gains = record.results["gains"]
    said = []
    for kind in ("domain", "difficulty"):
        alone = [row for row in gains if row["kind"] == kind and row["trained"] != ALL]
        own = [row["difference"] for row in alone if row["own"]]
        other = [row["difference"] for row in alone if not row["own"]]
        if own and other:
            said.append(
                f"By {kind}, training on one alone changed accuracy on it by "
                f"{100 * fmean(own):+.1f} points and on the others by {100 * fmean(other):+.1f}, "
                "on average."
            )
    judged = [row for row in gains if "p_holm" in row]
    if judged:
        clear = sum(row["p_holm"] < 0.05 for row in judged)
        said.append(
            f"{clear} of {len(judged)} changes on what was not trained on are clear after "
            "correction."
        )
    else:
        said.append("One seed: no interval, so nothing can be distinguished from chance.")
    return said


def plot(record: RunRecord) -> Plot:
    """The gains as two maps, trained by tested."""
    figure = new_figure(7.4, 3.6)
    facts = []
    gains = record.results["gains"]
    limit = max(1.0, *(abs(100 * row["difference"]) for row in gains))
    for panel, kind in enumerate(("domain", "difficulty")):
        rows = [row for row in gains if row["kind"] == kind]
        trained = list(dict.fromkeys(row["trained"] for row in rows))
        tested = in_order(kind, record.results["before"][kind])
        cells = {(row["trained"], row["tested"]): 100 * row["difference"] for row in rows}
        values = [[cells[a, b] for b in tested] for a in trained]
        axes = figure.add_subplot(1, 2, panel + 1)
        axes.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                colour = "white" if abs(value) > 0.7 * limit else "black"
                axes.text(j, i, f"{value:+.1f}", ha="center", va="center", color=colour, size=8)
            facts.append(
                f"{trained[i]}: " + ", ".join(f"{b} {v:+.1f}" for b, v in zip(tested, line))
            )
        labels = [name.replace("_", " ") for name in tested]
        axes.set_xticks(range(len(tested)), labels, rotation=30, ha="right", size=8)
        axes.set_yticks(range(len(trained)), [n.replace("_", " ") for n in trained], size=8)
        axes.set_xlabel(f"tested on ({kind})")
        if panel == 0:
            axes.set_ylabel("trained on")
    figure.suptitle("change of accuracy, points", fontsize=10)
    return Plot(
        figure,
        f"Two maps of the change of accuracy in points, trained by tested: {'; '.join(facts)}.",
    )
