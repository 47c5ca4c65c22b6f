"""The clinic of chapter 7: ten runs with one fault each, and the pictures of their logs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl import GRPOConfig

from cpugrpo_edu.data import Episode, Problem
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.rewards import Reward, parse_rewards
from cpugrpo_edu.show.palette import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Plot,
    new_figure,
    tidy,
)
from cpugrpo_edu.tasks import make_problems

G = 8
"""Completions of each prompt."""
DOMAINS = ("arithmetic", "algebra", "lists")
REWARDS = parse_rewards("correct_answer=1,valid_steps=0.5,good_format=0.2")
Rows = Sequence[Mapping[str, Any]]
"""A log: the metrics of each step."""
WHY = {
    "activation_checkpointing": "it computes forward twice",
    "gradient_checkpointing": "its old name",
    "learning_rate": "asked for by us",
    "logging_steps": "every step is shown",
    "logging_nan_inf_filter": "a NaN must be seen",
    "per_device_train_batch_size": "prompts x G: one whole step",
    "generation_batch_size": "follows from it",
    "router_aux_loss_coef": "for mixtures of experts",
    "max_completion_length": "as long as our solutions",
    "lr_scheduler_type": "short runs",
    "shuffle_dataset": "the curriculum orders",
}
"""Why ``cpu_config`` differs from TRL's defaults."""


# --- training --------------------------------------------------------------------------------


def draw_problems(
    level: str, seed: int, per_domain: int = 1, domains: Sequence[str] = DOMAINS
) -> list[Problem]:
    """The same few training problems each time."""
    drawn = [make_problems(domain, level, "train", per_domain, seed) for domain in domains]
    return [problem for problems in drawn for problem in problems]


def make_trainer(
    folder: str,
    policy: Any,
    problems: Sequence[Problem],
    steps: int,
    *,
    data: Any = None,
    kind: Callable[..., Any] = CPUGRPOTrainer,
    prompts_per_step: int | None = None,
    rewards: Sequence[Reward] = REWARDS,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    **settings: Any,
) -> Any:
    """A trainer on some problems; one step takes all of them by default. No guard stops it."""
    given = {"max_completion_length": 48, "learning_rate": 1e-3, **settings}
    config = cpu_config(
        folder,
        prompts_per_step=prompts_per_step or len(problems),
        num_generations=G,
        max_steps=steps,
        reward_weights=[reward.weight for reward in rewards],
        **given,
    )
    functions = trl_rewards(rewards, problems)
    data = to_dataset(problems) if data is None else data
    return kind(policy, config, functions, data, EngineOptions(patience=0), on_step=on_step)


Span = tuple[str, float, float]
"""The name of a method, and when it began and ended."""


def watch(trainer: Any, methods: Sequence[str]) -> list[Span]:
    """Note from now on when each of the trainer's methods begins and ends."""
    spans: list[Span] = []

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = method(*args, **kwargs)
            spans.append((name, start, perf_counter()))
            return result

        return call

    for name in methods:
        setattr(trainer, name, timed(name, getattr(trainer, name)))
    trainer.rollout_func = trainer.rollout  # what TRL calls
    return spans


# --- the faults ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fault: how it is made, its tell-tale sign, its cure, and who met it."""

    name: str
    made: str = ""
    sign: str = ""
    cure: str = ""
    source: str = ""  # a thread on GitHub, owner/name#number; empty: constructed
    settings: dict[str, Any] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    rewards: Sequence[Reward] = field(default_factory=lambda: REWARDS)
    change_data: Callable[[Any], Any] | None = None
    meanwhile: Callable[[Any], AbstractContextManager[Any]] = lambda policy: nullcontext()


def as_plain_text(dataset: Any) -> Any:
    """Prompts as bare strings instead of conversations."""
    questions = [prompt[0]["content"] for prompt in dataset["prompt"]]
    return dataset.remove_columns("prompt").add_column("prompt", questions)


def right_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Like left_pad, but on the other side."""
    width = max(map(len, prompts))
    ids = [list(p) + [pad_id] * (width - len(p)) for p in prompts]
    lengths = torch.tensor([[len(p)] for p in prompts])
    return torch.tensor(ids), torch.arange(width) < lengths


@contextmanager
def wrong_end(policy: Any) -> Iterator[None]:
    """The tokenizer names another end-of-text token."""
    tokenizer, settings = policy.tokenizer, policy.model.generation_config
    kept = tokenizer.eos_token, settings.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token
    settings.eos_token_id = None
    try:
        yield
    finally:
        tokenizer.eos_token, settings.eos_token_id = kept


def brevity(problem: Problem, episode: Episode) -> float:
    """A tie-breaker for short answers: minus one a token."""
    return -float(len(episode.completion_ids))


def cases() -> list[Case]:
    """Ten faults of training on three easy problems."""
    easy = draw_problems("basic", seed=7)
    hard = draw_problems("advanced", 0, per_domain=3, domains=("lists",))
    return [
        Case(
            "chat template not applied",
            "prompts are bare strings",
            "nothing right at the very first step, texts without any form, though few are cut",
            "prompts as conversations",
            "TIGER-AI-Lab/MMLU-Pro#15",
            problems=easy,
            change_data=as_plain_text,
        ),
        Case(
            "every completion truncated",
            "max_completion_length=3",
            "the share cut is 1 and the length is constant and tiny",
            "raise max_completion_length",
            "huggingface/trl#5697",
            problems=easy,
            settings={"max_completion_length": 3},
        ),
        Case(
            "too hard, and only the answer pays",
            "advanced lists, one reward",
            "reward zero, all groups alike, next to no gradient",
            "reward the steps as well, or easier problems first",
            "huggingface/trl#3452",
            problems=hard,
            rewards=parse_rewards("correct_answer=1"),
        ),
        Case(
            "sampling is greedy in disguise",
            "top_p=0.1",
            "all groups alike though the policy is undecided; the gap is large",
            "top_p 1, temperature 1",
            "huggingface/trl#5783",
            problems=easy,
            settings={"top_p": 0.1},
        ),
        *later_cases(easy),
    ]


def later_cases(easy: Sequence[Problem]) -> list[Case]:
    """The other six of :func:`cases`."""
    return [
        Case(
            "one reward term drowns the others",
            "minus one a token",
            "the reward is the length, upside down; accuracy does not follow it and answers stay "
            "short",
            "bring the terms to one scale, small weight for the tie-breaker",
            problems=easy,
            rewards=[*REWARDS, Reward("brevity", brevity)],
        ),
        Case(
            "prompts padded on the right",
            "right_pad for left_pad",
            "looks nearly healthy; only the gap is not rounding error",
            "pad prompts on the left",
            "deepspeedai/DeepSpeedExamples#637",
            problems=easy,
            meanwhile=lambda policy: mock.patch("cpugrpo_edu.engine.decode.left_pad", right_pad),
        ),
        Case(
            "wrong end-of-text token",
            "the padding token instead",
            "the share cut is 1 at the full length; texts go on after the answer",
            "the end-of-text token that the model was trained with",
            "huggingface/trl#7039",
            problems=easy,
            meanwhile=wrong_end,
        ),
        Case(
            "learning rate far too high",
            "learning_rate=3e-2",
            "a healthy first step, then gibberish; the KL jumps",
            "a lower learning rate, from the old weights",
            "datawhalechina/hello-agents#770",
            problems=easy,
            settings={"learning_rate": 3e-2},
        ),
        Case(
            "sign of the KL term reversed",
            "beta=-10",
            "the loss falls and falls, the KL runs away, the reward does not follow",
            "beta must not be negative",
            problems=easy,
            settings={"beta": -10.0},
        ),
        Case(
            "learning rate left at TRL's default",
            f"learning_rate={GRPOConfig.learning_rate:g}",
            "gradients are fine, but the KL stays at zero: nothing moves",
            "a learning rate that suits the model",
            "XueZeyue/DanceGRPO#45",
            problems=easy,
            settings={"learning_rate": GRPOConfig.learning_rate},
        ),
    ]


# --- pictures --------------------------------------------------------------------------------


def timeline(spans: Sequence[Span], owners: Mapping[str, str]) -> Plot:
    """Bars over time of one training step, a row a method; ``owners``: the class of each."""
    [whole] = [span for span in spans if span[0] == "training_step"]
    figure = new_figure(6.8, 3)
    axes = figure.add_subplot()
    looks = {"CPUGRPOTrainer": (BLUE, ""), "GRPOTrainer": (ORANGE, "//")}
    names = list(owners)
    said = []
    for name, start, end in spans:
        colour, hatch = looks[owners[name]]
        left, width = 1e3 * (start - whole[1]), 1e3 * (end - start)
        at = names.index(name)
        axes.barh(at, width, left=left, color=colour, hatch=hatch, edgecolor="white")
        said.append(f"{name} {left:.0f} to {left + width:.0f}")
    for label, (colour, hatch) in looks.items():
        axes.barh(0, 0, color=colour, hatch=hatch, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="center right", title="defined in")
    tidy(axes, "One optimizer step", "milliseconds since it began", "", "x")
    return Plot(figure, "Bars over time, in milliseconds: " + "; ".join(said) + ".")


def early_and_late(rows: Rows, names: Mapping[str, str]) -> list[str]:
    """A sentence for each metric (key to name): its means in the first and last three steps."""

    def mean(part: Rows, key: str) -> float:
        return float(sum(row[key] for row in part) / len(part))

    return [
        f"{name}: {mean(rows[:3], key):.2f} in the first three steps, "
        f"{mean(rows[-3:], key):.2f} in the last three"
        for key, name in names.items()
    ]


def curve(axes: Any, rows: Rows, key: str, **style: Any) -> None:
    """One metric over the steps that have it."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    axes.plot(*zip(*points, strict=True), **style)


VITALS = {
    "reward": "reward",
    "rewards/correct_answer/mean": "accuracy",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "entropy": "entropy, nats",
    "": "share cut ●, alike ▲",
    "completions/mean_length": "length, tokens",
    "kl": "KL, nats a token",
    "gap": "gap, nats a token",
}
"""What the chart of a patient shows; the empty key stands for two shares in one panel."""
CUT, ALIKE = "completions/clipped_ratio", "frac_reward_zero_std"


def chart(letter: str, rows: Rows, control: Rows) -> Plot:
    """All vital signs of a patient beside the control's."""
    figure = new_figure(6.8, 4.8)
    figure.set_layout_engine("none")  # ten figures: place them by hand
    grid = figure.add_gridspec(
        3, 3, left=0.07, right=0.98, bottom=0.1, top=0.87, hspace=0.75, wspace=0.33
    )
    for i, (key, title) in enumerate(VITALS.items()):
        axes = figure.add_subplot(grid[i])
        if key:
            curve(axes, control, key, color=GREY, ls="--")
            curve(axes, rows, key, color=VERMILLION, marker="o", ms=3)
        else:
            curve(axes, rows, CUT, color=VERMILLION, marker="o", ms=4)
            curve(axes, rows, ALIKE, color=BLUE, marker="^", ms=4, ls=":")
            axes.set_ylim(-0.05, 1.05)
        if key == "gap":  # rounding error must look like zero
            axes.set_ylim(-0.005, max(0.1, axes.get_ylim()[1]))
        tidy(axes, title, "step" if i > 5 else "")
        axes.title.set_fontsize(9)
        axes.locator_params(nbins=4)
    figure.suptitle(f"Patient {letter}", fontsize=11)
    first, last = rows[0], rows[-1]
    said = "; ".join(
        f"{title} from {first[key]:.3g} to {last[key]:.3g}"
        for key, title in [*VITALS.items(), (CUT, "share cut"), (ALIKE, "share alike")]
        if key and first.get(key) is not None and last.get(key) is not None
    )
    return Plot(figure, f"Patient {letter}, from step {first['step']} to {last['step']}: {said}.")


def score(rows: Rows) -> list[dict[str, Any]]:
    """The healthy run's reward at each step, whatever the patient was paid."""
    terms = {f"rewards/{term.name}/mean": term.weight for term in REWARDS}
    return [
        {"step": row["step"], "score": sum(w * row.get(key, 0) for key, w in terms.items())}
        for row in rows
    ]


def recovery(names: Mapping[str, str], ill: Any, treated: Any, control: Rows) -> Plot:
    """The reward of every patient (``names``: letter to fault), ill, then treated, and the
    control's."""
    figure = new_figure(7, 4.4)
    said = []
    for i, (letter, name) in enumerate(names.items()):
        axes = figure.add_subplot(2, 5, i + 1)
        curve(axes, score(control), "score", color=GREY, ls="--", lw=1)
        curve(axes, score(ill[letter]), "score", color=VERMILLION, marker="o")
        curve(axes, score(treated[letter]), "score", color=GREEN, marker="s")
        axes.axvline(ill[letter][-1]["step"] + 0.5, color=GREY, lw=0.8, ls=":")
        axes.set_ylim(-0.05, 1.8)
        for line in axes.lines:
            line.set_markersize(3)
        tidy(axes, "", "step" if i > 4 else "", "" if i % 5 else "reward")
        title = textwrap.fill(f"{letter}: {name}", 19)
        axes.set_title(title, fontsize=7.5, loc="left")
        last = score(ill[letter])[-1]["score"], score(treated[letter])[-1]["score"]
        said.append(f"{name} {last[0]:.2f}, then {last[1]:.2f}")
    return Plot(
        figure,
        "Ten small charts of the reward beside the healthy control's. At the end of the faulty "
        f"steps, then of the treated ones: {'; '.join(said)}.",
    )


def alarm_grid(ringing: Mapping[str, Collection[str]], names: Sequence[str]) -> Plot:
    """A dot for each alarm (``names``) that rings for a patient."""
    figure = new_figure(7, 3.4)
    axes = figure.add_subplot()
    words = []
    for x, (who, rings) in enumerate(ringing.items()):
        found = [name for name in names if name in rings]
        axes.plot([x] * len(found), list(map(names.index, found)), "o", color=VERMILLION, ms=9)
        words.append(f"{who}: {', '.join(found) or 'none'}")
    labels = [textwrap.shorten(column, 26, placeholder=" ...") for column in ringing]
    axes.set_xticks(range(len(ringing)), labels, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8)
    axes.set_xlim(-0.5, len(ringing) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    tidy(axes, "Which alarm rings for which patient", grid="both")
    return Plot(figure, f"A grid of alarms by patients. {'; '.join(words)}.")
