"""The order of training problems: three stages, with replay of the other difficulties.

Curriculum learning (Bengio et al. 2009) trains on easy examples first. Training strictly in
stages causes forgetting, so each stage may replay a share of the other difficulties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.tasks import make_problems

ORDERS = ("curriculum", "mixed", "reversed")


@dataclass(frozen=True)
class Stage:
    """A stage of training: its mixture of difficulties, number of steps and learning rate."""

    name: str
    mixture: dict[str, float]
    steps: int
    learning_rate: float

    @property
    def trained(self) -> list[str]:
        """The difficulties that it trains on, including those that are only replayed."""
        return [name for name, share in self.mixture.items() if share and self.steps]


def make_stages(
    order: str = "curriculum",
    *,
    steps: Sequence[int] = (16, 16, 16),
    learning_rates: Sequence[float] = (1e-4, 1e-4, 1e-4),
    replay: float = 0.25,
) -> list[Stage]:
    """Make three stages. ``replay`` is the share of each that comes from the other difficulties.

    "curriculum" goes from basic to advanced and "reversed" from advanced to basic. "mixed" draws
    all difficulties equally in every stage, as a control at equal compute.
    """
    if order not in ORDERS:
        raise UserError(f"unknown order {order!r}; allowed are {', '.join(ORDERS)}")
    if len(steps) != 3 or len(learning_rates) != 3 or min(steps) < 0 or sum(steps) < 1:
        raise UserError(
            f"steps {list(steps)} and learning rates {list(learning_rates)} are not allowed; give "
            "three of each, one per stage, with at least one step in total"
        )
    if not 0 <= replay < 1:
        raise UserError(f"replay is {replay}; give a share of at least 0 and below 1")
    names = list(reversed(DIFFICULTIES)) if order == "reversed" else list(DIFFICULTIES)
    stages: list[Stage] = []
    for name, count, rate in zip(names, steps, learning_rates, strict=True):
        if order == "mixed":
            mixture: dict[str, float] = {other: 1 / 3 for other in DIFFICULTIES}
        else:
            mixture = {other: 1 - replay if other == name else replay / 2 for other in DIFFICULTIES}
        stages.append(
            Stage(f"mixed {len(stages) + 1}" if order == "mixed" else name, mixture, count, rate)
        )
    return stages


def stage_problems(stage: Stage, domains: Sequence[str], count: int, seed: int) -> list[Problem]:
    """``count`` training problems in the stage's mixture, cycling through the domains.

    The order keeps every part of the list close to the mixture.
    """
    pools: dict[tuple[str, str], list[Problem]] = {}
    for difficulty, share in stage.mixture.items():
        for domain in domains:
            if share > 0:
                need = 2 + int(share * count / len(domains))
                pools[domain, difficulty] = make_problems(domain, difficulty, "train", need, seed)
    debt = dict.fromkeys(pools, 0.0)
    problems: list[Problem] = []
    while len(problems) < count:
        for domain, difficulty in debt:
            debt[domain, difficulty] += stage.mixture[difficulty] / len(domains)
        cell = max(debt, key=lambda key: debt[key])
        debt[cell] -= 1
        problems.append(pools[cell].pop())
    return problems
