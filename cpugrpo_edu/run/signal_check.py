"""Before a stage trains: do the rewards differ within groups? And an answer, to see it change.

GRPO learns only from rewards that differ within a group. A few groups, sampled before the first
optimizer step, say in seconds what a run without a signal would show after many steps.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from cpugrpo_edu.data import Group
from cpugrpo_edu.engine import ranks
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.run.pause import Interrupted
from cpugrpo_edu.run.references import unmatched
from cpugrpo_edu.run.stage import steps_before
from cpugrpo_edu.run.state import Learner, Session
from cpugrpo_edu.sample import Sampling, rollout

PROMPTS = 8
"""Groups in a round of sampling."""
ROUNDS = 8
SECONDS = 60.0
"""As long as there is no signal, rounds follow until one of these is reached."""
SEED = 15_485_863
"""Of the first round: no rollout of the training has it."""


@dataclass(frozen=True)
class Signal:
    """What groups that were sampled before a stage show."""

    groups: int
    with_signal: int
    """Groups whose rewards are not all equal."""
    mean_reward: float
    cut: float
    """Share of completions that were cut at the length limit."""
    unmatched: str | None = None
    """Where none of the answers is right, one of them beside its reference."""

    def __str__(self) -> str:
        cut = f", {self.cut:.0%} of the completions cut at the limit" if self.cut > 0.5 else ""
        return (
            f"{self.with_signal} of {self.groups} groups sampled before training have a signal "
            f"(rewards that differ), mean reward {self.mean_reward:.2f}{cut}"
            + (f"; {self.unmatched}" if self.unmatched else "")
        )


def has_signal(groups: list[Group]) -> int:
    """Groups whose rewards are not all equal."""
    return sum(len({e.reward for e in group.episodes}) > 1 for group in groups)


def signal_of(groups: list[Group]) -> Signal:
    episodes = [episode for group in groups for episode in group.episodes]
    return Signal(
        groups=len(groups),
        with_signal=has_signal(groups),
        mean_reward=sum(e.reward for e in episodes) / len(episodes),
        cut=sum(not e.finished for e in episodes) / len(episodes),
        unmatched=unmatched(groups),
    )


def check_signal(session: Session, learner: Learner, index: int) -> None:
    """Say how many groups of a stage have a signal, and keep that for the record.

    Done once a stage, also in a run that is resumed. Raises UserError if nothing has been trained
    yet and no group has one, unless the run's patience is 0.
    """
    config, stage, signals = session.config, session.config.stages[index], session.state.signals
    if not stage.steps or stage.name in signals:
        return
    must = bool(config.patience) and steps_before(config, index) == 0
    found = ranks.on_main(lambda: look(session, learner, index, ROUNDS if must else 1))
    if must and not found.with_signal:
        raise UserError(without_signal(session, found))
    signals[stage.name] = asdict(found)
    session.display.message(f"{stage.name}: {found}")


def look(session: Session, learner: Learner, index: int, rounds: int) -> Signal:
    """Sample groups of the stage's problems, in their order, until one has a signal."""
    config, problems = session.config, session.problems[index]
    begun = time.monotonic()
    groups: list[Group] = []

    def on_done(prompts: int) -> None:
        if session.control.should_stop():
            raise Interrupted("stopped before the first step")

    count = min(PROMPTS, len(problems))
    for number in range(rounds):
        chosen = [problems[(number * count + i) % len(problems)] for i in range(count)]
        seed = SEED + 1000 * config.seed + 100 * index + number
        sampling = Sampling(config.max_completion, config.temperature, seed=seed)
        groups += rollout(
            learner.policy, chosen, config.num_generations, sampling, session.rewards, on_done
        )
        if has_signal(groups) or time.monotonic() - begun > SECONDS:
            break
    return signal_of(groups)


def without_signal(session: Session, found: Signal) -> str:
    """The sentence that ends a run that could not learn anything."""
    best = sum(reward.weight for reward in session.rewards)
    if 2 * found.mean_reward > best:
        data = "harder problems (--data, --domains, --order reversed)"
    else:
        data = (
            "easier problems (--data, --domains), another way to read answers (--answer-format), "
            "a warm start (cpugrpo warmstart)"
        )
    longer = " longer completions (--max-completion)," if found.cut > 0.5 else ""
    example = f" ({found.unmatched})" if found.unmatched else ""
    return (
        f"the run stops before its first step: in none of {found.groups} groups of "
        f"{session.config.num_generations} completions do the rewards differ (their mean is "
        f"{found.mean_reward:.2f}), so there is nothing to learn from{example}; what helps:"
        f"{longer} {data}, more completions of each prompt (--num-generations) or a higher "
        "--temperature; --patience 0 trains all the same"
    )


def show_answer(session: Session, learner: Learner, index: int, when: str) -> None:
    """Show a greedy answer to the first held-out problem of a stage's difficulty."""
    stage, display = session.config.stages[index], session.display
    if display.quiet or not stage.steps:
        return
    own = [problem for problem in session.held_out if problem.difficulty == stage.name]
    problem = (own or session.held_out)[0]
    greedy = Sampling(session.config.max_completion, temperature=0.0)
    [group] = rollout(learner.policy, [problem], 1, greedy)
    text = group.episodes[0].text
    sample: dict[str, Any] = {
        "prompt": problem.question,
        "completion": text,
        "correct": problem.verify(text),
    }
    display.answer(f"{stage.name}, {when}", sample)
