"""A diary of a training run: every completion that was written, a page for each optimizer step."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpugrpo_edu.data import Episode, Problem
from cpugrpo_edu.rewards import Reward

Page = list[tuple[Problem, Episode]]

EQUATION = re.compile(r"^(\d+)([-+])(\d+)=(-?\d+)$", re.MULTILINE)
"""A line of working with two whole numbers, such as ``12+9=21``."""


class Diary:
    """An observer of a run: a reward of weight 0 that keeps what it sees.

    Give ``observer`` to the trainer as one more reward, and ``turn_page`` as its ``on_step``.
    ``pages`` then has the completions of every finished step.
    """

    def __init__(self) -> None:
        self.pages: list[Page] = []
        self.page: Page = []
        self.observer = Reward("diary", self.write, 0.0)

    def write(self, problem: Problem, episode: Episode) -> float:
        self.page.append((problem, episode))
        return 0.0

    def turn_page(self, metrics: Any = None) -> None:
        self.pages.append(self.page)
        self.page = []

    def written(self, steps: slice = slice(None)) -> Page:
        """All completions of some steps, as one page."""
        return list(itertools.chain.from_iterable(self.pages[steps]))


def tokens_of(page: Page) -> NDArray[np.int64]:
    """Length of each completion in tokens."""
    return np.array([len(episode.completion_ids) for _, episode in page])


def right_on(page: Page) -> NDArray[np.bool_]:
    """Which completions state the right answer."""
    return np.array([problem.verify(episode.text) for problem, episode in page])


def equations_on(page: Page) -> NDArray[np.int64]:
    """Every equation in the working as (its true value, the value it states): (equations, 2)."""
    lines = [line for _, episode in page for line in EQUATION.findall(episode.text)]
    pairs = [(int(a) + (int(b) if sign == "+" else -int(b)), int(c)) for a, sign, b, c in lines]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
