"""Study: does GRPO teach a real chat model, or sharpen what it can do already?

The chat model is trained with the defaults of `cpugrpo run`. Supervised fine-tuning on worked
solutions and on the model's own right answers get as many seconds. All of them answer the same
held-out stories, greedily and 64 times; stories of two steps and more, which no arm was trained
on; and problems written by people, if their file is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.engine.int8 import measure_drift
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.lab.pieces import Pieces
from cpugrpo_edu.lab.studies.common import (
    decided_by,
    packed_evaluation,
    paired_over_seeds,
    run_or_resume,
    signed,
)
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.notebook.teach_or_sharpen import ladder
from cpugrpo_edu.policy import Policy, token_log_probs
from cpugrpo_edu.record.pass_at_k import ks, pass_at_k
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.run.config import RunConfig, config_for
from cpugrpo_edu.run.vote import evaluate_samples
from cpugrpo_edu.run.warmstart import warmstart
from cpugrpo_edu.run.warmstart_config import WarmstartConfig
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.show.palette import Plot
from cpugrpo_edu.show.text import percent, verdict
from cpugrpo_edu.tasks import held_out_problems
from cpugrpo_edu.tasks.answers import with_answer_format
from cpugrpo_edu.tasks.custom import load_custom

SEEDS = 3
BASE, GRPO = "base", "grpo"
ARMS = {GRPO: "GRPO", "sft": "SFT on worked solutions", "rft": "SFT on own right answers"}
SAMPLES, SAMPLED_PER_CELL, LONGER_PER_CELL = 64, 67, 150
KL_PROBLEMS = 60
OTHER_EXAMS = {"longer": "of two steps and more", "people": "written by people"}
PEOPLE = "svamp.jsonl"
"""Problems written by people, in the work folder: a prompt and an answer a line."""
PLAIN = Path(__file__).with_name("plain_english.txt")
TRIAL_STEPS = 8


def config_of(model: str, seed: int, reduced: bool) -> RunConfig:
    if not reduced:
        return config_for(model, seed=seed)
    least: dict[str, Any] = {"steps": (1, 0, 0), "prompts_per_step": 4, "max_completion": 64}
    least |= {"per_cell": 2, "domains": ("arithmetic",), "int8_evaluation": False}
    return config_for(model, seed=seed, **least)


def run(setting: Setting) -> StudyResult:
    """Train every arm, or GRPO and the one of ``setting.only``, with every seed and measure all of
    them, each piece once."""
    if setting.only not in (None, *ARMS):
        raise UserError(f"unknown --only {setting.only!r}; allowed are {', '.join(ARMS)}")
    arms = ARMS if setting.only is None else dict.fromkeys((GRPO, setting.only))
    model = setting.models[0] if setting.models else ("smollm2", "bundled")[setting.reduced]
    seeds = setting.seeds or (1 if setting.reduced else SEEDS)
    pieces = Pieces(setting.work, "real-model", decided_by(setting, model=model))
    exam = Exam.of(config_of(model, 0, setting.reduced), setting)
    measured = {BASE: [pieces.once(BASE, partial(exam.take, model))]}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        config = config_of(model, seed, setting.reduced)
        place = pieces.folder / f"seed{seed}"
        setting.say(f"seed {seed}: {ARMS[GRPO]}")
        record = run_or_resume(config, place / GRPO, setting.say, keep=("model",))
        seconds[GRPO].append(record.results["seconds"]["train"])
        for arm in arms:
            if arm != GRPO:
                setting.say(f"seed {seed}: {ARMS[arm]}")
                took = trained_for(seconds[GRPO][-1], arm, config, place, setting)
                seconds[arm].append(took)
            folder = place / arm / "model" if arm == GRPO else place / arm
            row = pieces.once(f"{arm}-{seed}", partial(exam.take, str(folder)))
            measured.setdefault(arm, []).append(row)
    results = summary(measured, exam.samples) | {"seconds": seconds}
    about = {"model": model, "seeds": seeds, "reduced": setting.reduced, "samples": exam.samples}
    about |= {"only": setting.only}
    about |= {"run": asdict(config_of(model, 0, setting.reduced)), "people": len(exam.people)}
    return StudyResult(new_record("study-real-model", about, results), measured)


# Training


def trained_for(seconds: float, arm: str, run: RunConfig, place: Path, setting: Setting) -> float:
    """Fine-tune in ``place/arm`` for about ``seconds``, sampling included, unless that is done.

    A short trial says how many steps that is, so that the learning rate falls to 0 in time.
    Returns how long it took.
    """
    path = place / arm / "record.json"
    if path.exists():
        return spent(RunRecord.load(path).results["seconds"])
    problems = 8 if setting.reduced else {"sft": 4096, "rft": 512}[arm]
    config = WarmstartConfig(
        run.model,
        arm,
        run.seed,
        domains=run.domains,
        answer_format=run.answer_format,
        problems=problems,
        max_completion=run.max_completion,
        temperature=run.temperature,
        lora_rank=run.lora_rank or 16,
    )
    share = 1 if setting.reduced else 8
    trial = replace(config, steps=TRIAL_STEPS, problems=problems // share)
    took = warmstarted(trial, place / f"{arm}-trial")
    steps = (seconds - share * took["prepare"]) / (took["train"] / TRIAL_STEPS)
    return spent(warmstarted(replace(config, steps=max(1, round(steps))), place / arm))


def spent(seconds: Mapping[str, float]) -> float:
    return seconds["prepare"] + seconds["train"]


def warmstarted(config: WarmstartConfig, folder: Path) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)  # interrupted halfway
    found: dict[str, float] = warmstart(config, folder).results["seconds"]
    return found


# Measuring


def problems_of_people(setting: Setting) -> list[Problem]:
    """Those in the work folder; none, which is said, where their file is not there."""
    path = setting.work / PEOPLE
    if path.exists():
        return load_custom(path)
    setting.say(f"no {path}: problems written by people are left out")
    return []


@dataclass(frozen=True)
class Exam:
    """What every model is asked, and how."""

    stories: list[Problem]
    few: list[Problem]
    longer: list[Problem]
    people: list[Problem]
    run: RunConfig

    @property
    def samples(self) -> int:
        """Completions of each of the few."""
        return SAMPLES if self.run.per_cell >= SAMPLED_PER_CELL else 4

    @classmethod
    def of(cls, run: RunConfig, setting: Setting) -> Exam:
        form = run.answer_format or "last-number"

        def ask(per_cell: int, domains: Sequence[str] = run.domains) -> list[Problem]:
            problems = held_out_problems(min(per_cell, run.per_cell), domains)
            return with_answer_format(problems, form)

        people = with_answer_format(problems_of_people(setting), form)
        longer = [p for p in ask(LONGER_PER_CELL, ("stories",)) if p.difficulty != "basic"]
        return cls(ask(run.per_cell), ask(SAMPLED_PER_CELL), longer, people, run)

    def take(self, model: str) -> dict[str, Any]:
        """Everything measured of a model, without its texts."""
        policy = load_policy(model, dtype=self.run.weights)
        limit = self.run.max_completion
        greedy = Sampling(limit, temperature=0.0)
        several = Sampling(limit, self.run.temperature, seed=1)
        sampled = evaluate_samples(policy, self.few, model, self.samples, several)
        own = rollout(policy, self.few[:: max(1, len(self.few) // KL_PROBLEMS)], 1, several)
        base = load_policy(self.run.model, dtype=self.run.weights)

        def answers(problems: list[Problem]) -> Any:
            return problems and packed_evaluation(evaluate(policy, problems, model, greedy))

        return {
            "stories": answers(self.stories),
            "longer": answers(self.longer),
            "people": answers(self.people),
            "right": [sum(row) for row in sampled.correct],
            "vote": sampled.majority_correct,
            "difficulties": sampled.difficulties,
            "tokens": fmean(len(group.episodes[0].completion_ids) for group in own),
            "kl_nats": measure_drift(policy.model, base.model, own, several.temperature).kl,
            "plain_nats": plain_nats(policy),
        }


@torch.no_grad()
def plain_nats(policy: Policy) -> float:
    """Mean negative log-likelihood of plain English sentences, in nats a token."""
    total, count = 0.0, 0
    for line in PLAIN.read_text(encoding="utf-8").splitlines():
        ids = policy.tokenizer.encode(line, add_special_tokens=False)
        row = torch.tensor([ids])
        logps = token_log_probs(policy.model, row[:, :1], row[:, 1:], torch.ones_like(row))
        total, count = total - float(logps.sum()), count + len(ids) - 1
    return total / count


# Results


def accuracy(row: Mapping[str, Any], exam: str, level: str = "all") -> float:
    """Share right in a greedy exam (stories, longer, people), of one difficulty or all."""
    found = row[exam]
    pairs = zip(found["correct"], found["difficulties"], strict=True)
    return fmean(right for right, each in pairs if level in ("all", each))


def pass_rate(row: Mapping[str, Any], k: int, n: int) -> float:
    return fmean(pass_at_k(n, right, k) for right in row["right"])


def summary(measured: Mapping[str, Sequence[Mapping[str, Any]]], n: int) -> dict[str, Any]:
    """Each arm's difference from the base model, paired by seed; one base for all seeds.

    ``n`` completions of each problem were sampled.
    """
    [base] = measured[BASE]
    found: dict[str, Any] = {"samples": n, "arms": {}}
    for arm, rows in measured.items():
        part: dict[str, Any] = {"stories": {}, "pass": {}}
        for level in (*DIFFICULTIES, "all"):
            part["stories"][level] = against(
                base, rows, partial(accuracy, exam="stories", level=level)
            )
        for exam in OTHER_EXAMS:
            if base[exam]:
                part[exam] = against(base, rows, partial(accuracy, exam=exam))
        for k in ks(n):
            part["pass"][str(k)] = against(base, rows, partial(pass_rate, k=k, n=n))
        part["vote"] = against(base, rows, lambda row: fmean(row["vote"]))
        for number in ("plain_nats", "kl_nats", "tokens"):
            part[number] = against(base, rows, itemgetter(number))
        found["arms"][arm] = part
    stories = partial(accuracy, exam="stories")
    found["grpo_minus"] = {
        arm: paired_over_seeds(
            [stories(row) for row in rows], [stories(row) for row in measured[GRPO]]
        )
        for arm, rows in measured.items()
        if arm not in (BASE, GRPO)
    }
    return found


def against(base: Any, rows: Sequence[Any], measure: Any) -> dict[str, Any]:
    values = [measure(row) for row in rows]
    return {"mean": fmean(values), **paired_over_seeds([measure(base)] * len(values), values)}


# Tables, findings and plot


def tables(record: RunRecord) -> list[Table]:
    arms = record.results["arms"]
    names = {BASE: "before training", **ARMS}

    def line(arm: str, row: Mapping[str, Any]) -> str:
        return percent(row["mean"]) + ("" if arm == BASE else f", {signed(row)}")

    levels = (*DIFFICULTIES, "all")
    others = [exam for exam in OTHER_EXAMS if exam in arms[BASE]]
    greedy = [
        [
            names[a],
            f"{fmean(record.results['seconds'].get(a, [0])) / 60:.1f}",
            *(line(a, p["stories"][x]) for x in levels),
            *(line(a, p[x]) for x in others),
        ]
        for a, p in arms.items()
    ]
    counts = list(arms[BASE]["pass"])
    passes = [
        [names[a], *(line(a, p["pass"][k]) for k in counts), line(a, p["vote"])]
        for a, p in arms.items()
    ]
    changed = [
        [
            names[a],
            f"{p['plain_nats']['mean']:.3f}",
            "" if a == BASE else nats_text(p["plain_nats"]),
            f"{p['kl_nats']['mean']:.3f}",
            f"{p['tokens']['mean']:.0f}",
        ]
        for a, p in arms.items()
    ]
    seeds = record.config["seeds"]
    over = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return [
        (
            f"Greedy answers: share right, and points more than before (95 % t interval, {over})",
            ["Model", "Minutes of training", *levels, *(OTHER_EXAMS[exam] for exam in others)],
            greedy,
        ),
        (
            f"Sampled answers: pass@k and the majority vote of {record.results['samples']}",
            ["Model", *(f"pass@{k}" for k in counts), "majority"],
            passes,
        ),
        (
            "What else changed",
            [
                "Model",
                "Plain English: nats a token",
                "change",
                "KL from before",
                "tokens an answer",
            ],
            changed,
        ),
    ]


def nats_text(row: Mapping[str, Any]) -> str:
    if row["low"] is None:
        return f"{row['difference']:+.3f} (no interval)"
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    if record.config["seeds"] < 2:
        return ["One seed: no interval, so nothing can be distinguished from chance."]
    said = []
    if missing := [name for arm, name in ARMS.items() if arm not in record.results["arms"]]:
        said.append(f"Not measured yet: {', '.join(missing)}.")
    for arm, part in record.results["arms"].items():
        if arm == BASE:
            continue
        first, *_, last = part["pass"].items()
        for what, row in (
            ("greedy accuracy on held-out stories", part["stories"]["all"]),
            *(
                (f"accuracy on problems {what}", part[exam])
                for exam, what in OTHER_EXAMS.items()
                if exam in part
            ),
            *((f"pass@{k}", row) for k, row in (first, last)),
        ):
            word = verdict(row["low"], row["high"], "rises", "falls")
            said.append(f"{ARMS[arm]}: {what} {word} ({signed(row)} points).")
    for arm, row in record.results["grpo_minus"].items():
        low, high = row["low"], row["high"]
        word = verdict(low, high, "is higher", "is lower", unclear="is not shown to differ")
        said.append(
            f"GRPO against {ARMS[arm]}, after as many seconds: greedy accuracy on stories {word} "
            f"({signed(row)} points)."
        )
    return said


def plot(record: RunRecord) -> Plot:
    """pass@k of every arm, mean over seeds."""
    arms = record.results["arms"]
    curves = {
        ARMS.get(arm, "before training"): [row["mean"] for row in part["pass"].values()]
        for arm, part in arms.items()
    }
    return ladder(curves, [int(k) for k in arms[BASE]["pass"]], "At least one of k answers right")
