"""Study: what fewer bits cost a real chat model, before and after GRPO.

The chat model and what a default run makes of it answer the same stories, and problems written by
people, in ten number formats. Formats that no layer of ours computes in are *simulated*: weights
are rounded to the format's values and multiplied in float32. That gives the accuracy, and no speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.data import DIFFICULTIES, Group, Problem
from cpugrpo_edu.engine.int8 import measure_drift, quantize_for_rollout
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.lab.pieces import Pieces
from cpugrpo_edu.lab.studies.common import (
    decided_by,
    draw_differences,
    holm,
    item_table,
    packed_evaluation,
    run_or_resume,
    signed,
    unpacked_evaluation,
)
from cpugrpo_edu.lab.studies.quantization import (
    PREDICTORS,
    Format,
    in_each_format,
    layer_errors,
    round_groups,
    simulated,
    slope_of,
)
from cpugrpo_edu.lab.studies.real_model import config_of, problems_of_people
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.record.stats import accuracy_table, compare
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.show.palette import BLUE, VERMILLION, Plot, new_figure, tidy
from cpugrpo_edu.show.text import percent, records_folder, verdict
from cpugrpo_edu.tasks import held_out_problems, make_problems
from cpugrpo_edu.tasks.answers import with_answer_format

BEFORE, AFTER = "before training", "after GRPO"
PER_CELL, DRIFT_PROBLEMS = 200, 60

NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
"""Levels of NormalFloat4: about equally likely under a normal distribution (Dettmers et al. 2023,
arXiv:2305.14314, appendix E)."""


def round_to_levels(weight: Tensor, levels: Sequence[float], group: int) -> Tensor:
    """(out, in) weights, each at the level nearest to it times the largest of its ``group``."""
    table = torch.tensor(levels)
    between = (table[1:] + table[:-1]) / 2
    rounded = []
    for part in weight.detach().float().split(group, 1):
        top = part.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        rounded.append(table[torch.bucketize((part / top).contiguous(), between)] * top)
    return torch.cat(rounded, 1)


def round_with_offset(weight: Tensor, bits: int, group: int) -> Tensor:
    """(out, in) weights at scale * q + offset, with q of ``bits`` bits, and 16 bits each for the
    scale and the offset (the least weight) of a ``group``, as llama.cpp's Q4_1 has them."""
    rounded = []
    for part in weight.detach().float().split(group, 1):
        low, high = part.aminmax(dim=1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half().float()
        low = low.half().float()
        q = ((part - low) / scale.clamp(min=2.0**-24)).round().clamp(0, 2**bits - 1)
        rounded.append(scale * q + low)
    return torch.cat(rounded, 1)


FORMATS = (
    Format("fp32", lambda model: model),
    Format("bf16", partial(quantize_for_rollout, kernel="bf16"), bits=16),
    Format(
        "INT8, one scale, 8-bit inputs", partial(quantize_for_rollout, per_channel=False), bits=8
    ),
    Format(
        "INT8, a scale a row, 8-bit inputs", partial(quantize_for_rollout, kernel="packed"), bits=8
    ),
    Format("INT8, blocks of 32, 16-bit inputs", quantize_for_rollout, bits=9),
    simulated("INT8 weights, a scale a row", 8, partial(round_groups, bits=8)),
    simulated("INT8 weights, blocks of 32 (as Q8_0)", 8.5, partial(round_groups, bits=8, group=32)),
    simulated(
        "4 bits, blocks of 32, offset (as Q4_1)", 5, partial(round_with_offset, bits=4, group=32)
    ),
    simulated("4 bits, blocks of 32", 4.5, partial(round_groups, bits=4, group=32)),
    simulated("NF4, blocks of 64", 4.5, partial(round_to_levels, levels=NF4, group=64)),
)
"""``bits`` counts scales and offsets as well."""

FLOAT = FORMATS[0].name


# Measuring


def run(setting: Setting) -> StudyResult:
    """Both models in all formats, each piece once. ``setting.models`` may name the trained one."""
    model = ("smollm2", "bundled")[setting.reduced]
    config = config_of(model, 0, setting.reduced)
    pieces = Pieces(setting.work, "chat-formats", decided_by(setting, models=setting.models))
    if setting.models:
        trained = setting.models[0]
    else:
        setting.say("a default run of GRPO")
        run_or_resume(config, pieces.folder / "grpo", setting.say, keep=("model",))
        trained = str(pieces.folder / "grpo" / "model")
    problems = exam(config, setting)
    measured = {
        name: measure_all(name, source, config, problems, pieces, setting)
        for name, source in ((BEFORE, model), (AFTER, trained))
    }
    about = {"model": model, "trained": bool(setting.models), "reduced": setting.reduced}
    about |= {"formats": {f.name: {"bits": f.bits, "simulated": f.simulated} for f in FORMATS}}
    about |= {"run": asdict(config), "people": sum(p.domain == "custom" for p in problems)}
    record = new_record("study-chat-formats", about, summary(measured))
    answers = {
        f"{model} | {name}": each["evaluation"]
        for model, forms in measured.items()
        for name, each in forms.items()
    }
    return StudyResult(record, item_table(answers))


def exam(config: RunConfig, setting: Setting) -> list[Problem]:
    """Held-out stories and, where their file is, problems written by people."""
    problems = held_out_problems(min(PER_CELL, config.per_cell), config.domains)
    problems = problems + problems_of_people(setting)
    return with_answer_format(problems, config.answer_format or "last-number")


def measure_all(
    name: str,
    source: str,
    config: RunConfig,
    problems: list[Problem],
    pieces: Pieces,
    setting: Setting,
) -> dict[str, dict[str, Any]]:
    """``{format: what measure() gives}`` of one model, which is loaded if anything is missing."""
    loaded: list[tuple[Policy, list[Group], list[Problem]]] = []

    def measured(chosen: Format) -> dict[str, Any]:
        if not loaded:
            policy = load_policy(source, dtype="float32")
            some = problems[:: max(1, len(problems) // DRIFT_PROBLEMS)]
            own = rollout(policy, some, 1, Sampling(config.max_completion, config.temperature))
            worked = [
                problem
                for difficulty in DIFFICULTIES
                for problem in make_problems(config.domains[0], difficulty, "train", 8, seed=0)
            ]
            loaded.append((policy, own, worked))
        return measure(chosen, name, config, problems, *loaded[0])

    return in_each_format(name, FORMATS, measured, pieces, setting.say)


def measure(
    chosen: Format,
    name: str,
    config: RunConfig,
    problems: list[Problem],
    policy: Policy,
    own: list[Group],
    worked: list[Problem],
) -> dict[str, Any]:
    """Greedy answers in a format, its divergence from float32 on ``own`` completions, and the
    errors of its layers on ``worked`` problems."""
    changed = chosen.make(policy.model)
    greedy = Sampling(config.max_completion, temperature=0.0)
    answers = evaluate(replace(policy, model=changed), problems, f"{name}, {chosen.name}", greedy)
    drift = measure_drift(policy.model, changed, own, config.temperature)
    return {
        "evaluation": packed_evaluation(answers),
        "kl": drift.kl,
        "agreement": drift.agreement,
        **layer_errors(policy, changed, worked),
    }


# Results


def summary(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Accuracy, paired difference to float32 (Holm over all), drift and speed of each format."""
    rows = []
    for model, forms in measured.items():
        reference = unpacked_evaluation(forms[FLOAT]["evaluation"])
        for chosen in FORMATS:
            each = forms[chosen.name]
            evaluation = unpacked_evaluation(each["evaluation"])
            speed = None if chosen.simulated else sum(evaluation.tokens) / evaluation.seconds
            row: dict[str, Any] = {"model": model, "format": chosen.name}
            row |= {"accuracy": accuracy_table(evaluation)["overall"], "tokens_per_second": speed}
            row |= {key: each[key] for key in ("kl", "agreement", *PREDICTORS)}
            if chosen.name != FLOAT:
                paired = compare(reference, evaluation)
                row["against_fp32"] = {key: paired[key] for key in ("overall", "by_domain")}
            rows.append(row)
    compared = [row["against_fp32"]["overall"] for row in rows if "against_fp32" in row]
    for overall, corrected in zip(compared, holm([each["p_value"] for each in compared])):
        overall["p_holm"] = corrected
    problems = len(next(iter(measured.values()))[FLOAT]["evaluation"]["item_ids"])
    return {"problems": problems, "rows": rows, "gain": gains(measured), "predictor": predict(rows)}


def gains(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What training gained in each format: after against before, paired by problem."""
    return {
        chosen.name: compare(
            unpacked_evaluation(measured[BEFORE][chosen.name]["evaluation"]),
            unpacked_evaluation(measured[AFTER][chosen.name]["evaluation"]),
        )["overall"]
        for chosen in FORMATS
    }


def predict(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean absolute error of losses foretold by a slope fitted to the *bundled* family's record,
    whose models this one does not resemble; and of foretelling no loss. Empty without a record."""
    path = records_folder() / "study-quantization.json"
    if not path.exists():
        return {}
    family = [
        {**row, "loss": -row["against_fp32"]["overall"]["difference"]}
        for row in RunRecord.load(path).results["rows"]
        if "against_fp32" in row
    ]
    here = [
        (row, -row["against_fp32"]["overall"]["difference"])
        for row in rows
        if "against_fp32" in row
    ]
    found = {"no loss": fmean(abs(loss) for _, loss in here)}
    for name in PREDICTORS:
        slope = slope_of(name, family)
        found[name] = fmean(abs(slope * row[name] - loss) for row, loss in here)
    return found


# Tables, findings and plot


def tables(record: RunRecord) -> list[Table]:
    results, formats = record.results, record.config["formats"]
    accuracy = []
    for row in results["rows"]:
        change, speed = row.get("against_fp32", {}).get("overall"), row["tokens_per_second"]
        accuracy.append(
            [
                row["model"],
                row["format"] + (" (simulated)" if formats[row["format"]]["simulated"] else ""),
                f"{formats[row['format']]['bits']:g}",
                percent(row["accuracy"]["accuracy"]),
                "–" if change is None else signed(change),
                "–" if change is None else f"{change['p_holm']:.3f}",
                f"{row['kl']:.4f}",
                "–" if speed is None else f"{speed:.0f}",
            ]
        )
    kept = [[name, signed(row)] for name, row in results["gain"].items()]
    errors = [
        [name.replace("_", " "), f"{100 * error:.2f}"]
        for name, error in results["predictor"].items()
    ]
    return [
        (
            f"Greedy accuracy on the same {results['problems']} problems; difference to fp32 in "
            "points (95 % interval), McNemar's p after Holm, KL from fp32 in nats a token",
            ["Model", "Format", "Bits", "Accuracy", "Difference", "p", "KL", "tokens/s"],
            accuracy,
        ),
        ("What training gained, in each format, in points", ["Format", "After − before"], kept),
        (
            "Loss foretold from the family of small models: mean absolute error in points",
            ["Predictor", "Error"],
            errors,
        ),
    ]


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    results = record.results
    rows = [row for row in results["rows"] if "against_fp32" in row]
    said = []
    for model in (BEFORE, AFTER):
        clear = [
            f"{row['format']} ({signed(row['against_fp32']['overall'])} points)"
            for row in rows
            if row["model"] == model and row["against_fp32"]["overall"]["p_holm"] < 0.05
        ]
        said.append(
            f"{model.capitalize()}, these formats differ from fp32 after correction for "
            f"{len(rows)} comparisons: {'; '.join(clear) or 'none'}."
        )
    for name, row in results["gain"].items():
        word = verdict(row["low"], row["high"], "rises", "falls")
        said.append(f"In {name}, accuracy {word} by training ({signed(row)} points).")
    return said


def plot(record: RunRecord) -> Plot:
    """The difference to fp32 in each format, of both models."""
    rows = [row for row in record.results["rows"] if "against_fp32" in row]
    names = list(dict.fromkeys(row["format"] for row in rows))
    figure = new_figure(7.4, 1.2 + 0.4 * len(names))
    axes = figure.add_subplot()
    facts = []
    for model, marker, colour, shift in (
        (BEFORE, "o", BLUE, -0.12),
        (AFTER, "s", VERMILLION, 0.12),
    ):
        chosen = [row["against_fp32"]["overall"] for row in rows if row["model"] == model]
        looks = {"marker": marker, "color": colour, "capsize": 2, "ms": 4, "label": model}
        draw_differences(axes, chosen, [i + shift for i in range(len(names))], **looks)
        worst = min(range(len(names)), key=lambda i: chosen[i]["difference"])
        facts.append(f"{model} {names[worst]} {100 * chosen[worst]['difference']:+.1f} points")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    tidy(axes, x="accuracy against fp32, points (bars: 95 % intervals)", grid="both")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return Plot(
        figure,
        f"Dot chart of the change of accuracy against fp32 in {len(names)} formats; the largest "
        f"losses: {'; '.join(facts)}.",
    )
