"""Study: what each part of the recipe contributes, at equal compute.

One factor at a time differs from the default run. Every arm samples the same number of completions
and makes the same number of optimizer steps; time and memory are reported, not held equal.
Hypotheses and analysis were written into ``docs/LOG.md`` before any run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.pieces import Pieces
from cpugrpo_edu.lab.studies.common import (
    decided_by,
    draw_differences,
    expected,
    holm,
    item_table,
    last_evaluation,
    paired_over_seeds,
    run_or_resume,
    signed,
)
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.show.palette import BLUE, Plot, new_figure, tidy

SEEDS = 5
COMPLETIONS = 128
"""Of a step, in every arm: prompts times G."""
BASE = "default"


@dataclass(frozen=True)
class Arm:
    factor: str
    name: str
    change: dict[str, Any] = field(default_factory=dict)
    """Fields of ``RunConfig``."""


FISHERS = ("rollout_score", "sample", "empirical", "batched", "lightning")
"""Without "exact": a backward pass for every word of the vocabulary at every token would take many
times the compute of everything else in the run."""
STRENGTHS = (0.1, 1.0)
REWARDS = {
    "answer": "correct_answer=1",
    "answer and steps": "correct_answer=1,valid_steps=0.5",
    "answer and format": "correct_answer=1,good_format=0.2",
}

ARMS = (
    Arm("none", BASE),
    *(Arm("order", order, {"order": order}) for order in ("mixed", "reversed")),
    *(
        Arm("ewc", f"{name}, {strength:g}", {"fisher": name, "ewc_strength": strength})
        for name in FISHERS
        for strength in STRENGTHS
    ),
    *(
        Arm("group", f"G = {g}", {"num_generations": g, "prompts_per_step": COMPLETIONS // g})
        for g in (2, 4, 16)
    ),
    Arm("loss", "grpo", {"loss_type": "grpo"}),
    Arm("loss", "dr_grpo", {"loss_type": "dr_grpo"}),
    Arm(
        "loss", "sequence ratio (gspo-like)", {"loss_type": "grpo", "importance_level": "sequence"}
    ),
    *(Arm("beta", f"beta = {beta:g}", {"beta": beta}) for beta in (0.01, 0.1)),
    *(Arm("reward", name, {"rewards": text}) for name, text in REWARDS.items()),
    Arm("system", "no checkpointing", {"checkpointing": "off"}),
    Arm("system", "float32 rollouts", {"int8_rollouts": False}),
)

FACTORS = tuple(dict.fromkeys(arm.factor for arm in ARMS[1:]))


def config_of(arm: Arm, seed: int, reduced: bool) -> RunConfig:
    """The run of an arm; reduced, the same change at a fraction of the compute."""
    config = replace(RunConfig(per_cell=100, int8_evaluation=False), seed=seed, **arm.change)
    if reduced:
        config = replace(
            config,
            steps=(1, 1, 0),
            prompts_per_step=config.prompts_per_step // 4,
            max_completion=32,
            fisher_examples=4,
            per_cell=1,
        )
    return config


def chosen_arms(setting: Setting) -> tuple[Arm, ...]:
    """The default and the arms to compare with it; reduced, one of each of three factors."""
    if setting.only is not None and setting.only not in FACTORS:
        raise UserError(f"unknown factor {setting.only!r}; allowed are {', '.join(FACTORS)}")
    arms = [arm for arm in ARMS if setting.only in (None, arm.factor) or arm.name == BASE]
    if setting.reduced and setting.only is None:
        wanted = ("order", "ewc", "loss")
        arms = [arms[0]] + [next(a for a in arms if a.factor == factor) for factor in wanted]
    return tuple(arms)


def measure_arm(arm: Arm, seed: int, setting: Setting, pieces: Pieces) -> dict[str, Any]:
    place = pieces.folder / "runs" / f"{ARMS.index(arm)}-{seed}"
    config = config_of(arm, seed, setting.reduced)
    record = run_or_resume(config, place, setting.say, apart=not setting.reduced)
    results = record.results
    last = results["evaluations"][-1]
    forgetting = results["forgetting"]["mean_points"]
    return {
        "arm": arm.name,
        "factor": arm.factor,
        "seed": seed,
        "accuracy": last["table"]["overall"]["accuracy"],
        "by_difficulty": {
            level: row["accuracy"] for level, row in last["table"]["by_difficulty"].items()
        },
        "forgetting": None if forgetting is None else forgetting / 100,
        "forgetting_matrix": results["forgetting"]["accuracy"],
        "seconds": results["seconds"]["train"],
        "peak_rss_bytes": results["peak_rss_bytes"],
        "completions": sum(stage["completions"] for stage in results["stages"]),
        "tokens": sum(stage["tokens_generated"] for stage in results["stages"]),
        "evaluation": last_evaluation(record, place),
    }


def run(setting: Setting) -> StudyResult:
    """Every arm with every seed; each finished run is kept."""
    arms = chosen_arms(setting)
    seeds = setting.seeds or (1 if setting.reduced else SEEDS)
    setting.say(
        f"{len(arms)} arms x {seeds} seeds: {len(arms) * seeds} runs"
        + ("" if setting.reduced else expected(len(arms) * seeds, 100))
    )
    pieces = Pieces(setting.work, "ablations", decided_by(setting))
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for arm in arms:
            setting.say(f"run {len(rows) + 1} of {len(arms) * seeds}: {arm.name}, seed {seed}")
            rows.append(measure_arm(arm, seed, setting, pieces))
    items = item_table({f"{r['arm']} | seed {r['seed']}": r.pop("evaluation") for r in rows})
    record = new_record(
        "study-ablations",
        {
            "reduced": setting.reduced,
            "seeds": seeds,
            "only": setting.only,
            "arms": [asdict(arm) for arm in arms],
            "default": asdict(config_of(ARMS[0], 0, setting.reduced)),
        },
        {"runs": rows, "arms": summarize(rows)},
    )
    return StudyResult(record, items)


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm against the default, paired by seed: accuracy (primary, Holm over all arms),
    forgetting (secondary), time and memory."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    base = by_arm[BASE]
    found: list[dict[str, Any]] = []
    for name, runs in by_arm.items():
        each: dict[str, Any] = {
            "arm": name,
            "factor": runs[0]["factor"],
            "accuracy": fmean(row["accuracy"] for row in runs),
            "seconds": fmean(row["seconds"] for row in runs),
            "peak_rss_bytes": fmean(row["peak_rss_bytes"] for row in runs),
            "completions": fmean(row["completions"] for row in runs),
            "tokens": fmean(row["tokens"] for row in runs),
        }
        if name != BASE:
            for key in ("accuracy", "forgetting"):
                pairs = [
                    (a[key], b[key])
                    for a, b in zip(base, runs, strict=True)
                    if a[key] is not None and b[key] is not None
                ]
                if pairs:
                    ours, theirs = zip(*pairs, strict=True)
                    each[f"{key}_difference"] = paired_over_seeds(ours, theirs)
        found.append(each)
    tested = [
        each["accuracy_difference"]
        for each in found
        if each.get("accuracy_difference", {}).get("p_value") is not None
    ]
    for row, corrected in zip(tested, holm([row["p_value"] for row in tested])):
        row["p_holm"] = corrected
    return found


# Tables, findings and plot


def tables(record: RunRecord) -> list[Table]:
    rows = []
    for each in record.results["arms"]:
        change, forgot = each.get("accuracy_difference"), each.get("forgetting_difference")
        p = (change or {}).get("p_holm")
        rows.append(
            [
                each["factor"] if each["arm"] != BASE else "–",
                each["arm"],
                f"{100 * each['accuracy']:.1f} %",
                "–" if change is None else signed(change),
                "–" if p is None else f"{p:.3f}",
                "–" if forgot is None else signed(forgot),
                f"{each['seconds']:.0f}",
                f"{each['peak_rss_bytes'] / 2**30:.2f}",
            ]
        )
    seeds = record.config["seeds"]
    return [
        (
            f"Each arm against the default, {seeds} seed{'s' if seeds > 1 else ''}: accuracy "
            "after training; its difference in points with the 95 % t interval over seeds; p after "
            "Holm; difference of the mean forgetting in points; training time and peak memory",
            ["Factor", "Arm", "Accuracy", "Difference", "p", "Forgetting", "s", "GiB"],
            rows,
        ),
        (
            "Accuracy in % by difficulty, before training and after each stage, mean over seeds",
            ["Factor", "Arm", *DIFFICULTIES],
            matrix_rows(record.results["runs"]),
        ),
    ]


def matrix_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The forgetting matrix of every arm, one column of it a cell: ``20, 41, 40, 38``."""
    found = []
    for name in dict.fromkeys(row["arm"] for row in runs):
        matrices = [row["forgetting_matrix"] for row in runs if row["arm"] == name]
        cells = [
            ", ".join(
                f"{100 * fmean(matrix[stage][column] for matrix in matrices):.0f}"
                for stage in range(len(matrices[0]))
            )
            for column in range(len(DIFFICULTIES))
        ]
        factor = next(row["factor"] for row in runs if row["arm"] == name)
        found.append(["–" if name == BASE else factor, name, *cells])
    return found


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    arms = [each for each in record.results["arms"] if each["arm"] != BASE]
    tested = [e for e in arms if "p_holm" in e["accuracy_difference"]]
    if not tested:
        return ["One seed: no arm can be distinguished from the default."]
    clear = [each for each in tested if each["accuracy_difference"]["p_holm"] < 0.05]
    rest = [each["accuracy_difference"] for each in tested if each not in clear]
    said = [
        f"{len(clear)} of {len(tested)} arms differ from the default in accuracy after correction "
        "for all of them."
    ]
    said += [f"{e['arm']}: {signed(e['accuracy_difference'])} points." for e in clear]
    if rest:
        low, high = (f(row[end] for row in rest) for f, end in ((min, "low"), (max, "high")))
        said.append(
            "The others were not shown to differ, which is not the same as equal: their intervals "
            f"reach from {100 * low:+.1f} to {100 * high:+.1f} points."
        )
    return [*caution(record), *said]


def caution(record: RunRecord) -> list[str]:
    """What confounds a record whose default had EWC on."""
    strength = record.config["default"]["ewc_strength"]
    if not strength:
        return []
    without = next((e for e in record.results["arms"] if e["arm"] == "no EWC"), None)
    cost = f" ({signed(without['accuracy_difference'])} points without it)" if without else ""
    return [
        f"**In this record the default has EWC on, at {strength:g}{cost}, and so have all arms but "
        "those of the factor EWC.** Its pull keeps its size while other arms scale the gradient of "
        "the reward, so every difference below is one under this brake, and part of it may be "
        "the brake's. Without EWC, the default of today, the arms have not been measured yet."
    ]


def plot(record: RunRecord) -> Plot:
    """The difference in accuracy of every arm, with its interval over seeds."""
    arms = [each for each in record.results["arms"] if each["arm"] != BASE]
    figure = new_figure(7, 1 + 0.28 * len(arms))
    axes = figure.add_subplot()
    changes = [each["accuracy_difference"] for each in arms]
    draw_differences(axes, changes, range(len(arms)), marker="o", color=BLUE, capsize=3)
    facts = [f"{each['arm']} {signed(change)}" for each, change in zip(arms, changes)]
    axes.set_yticks(range(len(arms)), [f"{e['factor']}: {e['arm']}" for e in arms])
    axes.invert_yaxis()
    tidy(axes, x="accuracy against the default, points (bars: 95 % over seeds)", grid="both")
    return Plot(
        figure, f"Dot chart of accuracy against the default run, a row an arm: {'; '.join(facts)}."
    )
