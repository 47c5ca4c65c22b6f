"""Word problems with money, time and percentages, in the spirit of GSM8K.

Each template is a function that draws its numbers and returns the question with
the steps that solve it. Numbers are chosen so that every step gives a whole number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from cpugrpo_edu.data import Problem, StepReport
from cpugrpo_edu.tasks.answers import ExactMatch
from cpugrpo_edu.tasks.equations import check_equations, write_solution
from cpugrpo_edu.tasks.prose import check_prose

Steps = list[tuple[int, str, int]]
Template = Callable[[random.Random], tuple[str, Steps]]

NAMES = ("Maria", "Tom", "Ana", "Ben", "Lea", "Omar", "Mei", "Sam")
GOODS = ("pens", "books", "cups", "plants", "lamps", "maps")


def weekly_saving(rng: random.Random) -> tuple[str, Steps]:
    name, start = rng.choice(NAMES), rng.randint(5, 60)
    rate, weeks = rng.randint(3, 12), rng.randint(2, 9)
    question = (
        f"{name} has ${start} and saves ${rate} a week. How many dollars after {weeks} weeks?"
    )
    return question, [(rate, "*", weeks), (start, "+", rate * weeks)]


def change_from_shopping(rng: random.Random) -> tuple[str, Steps]:
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    money = count * price + rng.randint(1, 40)
    question = f"{name} buys {count} {goods} at ${price} each with ${money}. How much is left?"
    return question, [(price, "*", count), (money, "-", price * count)]


def hours_and_minutes(rng: random.Random) -> tuple[str, Steps]:
    name, hours, minutes = rng.choice(NAMES), rng.randint(2, 9), rng.randint(5, 55)
    question = f"{name} reads for {hours} hours and {minutes} minutes. How many minutes is that?"
    return question, [(60, "*", hours), (60 * hours, "+", minutes)]


def two_days_of_work(rng: random.Random) -> tuple[str, Steps]:
    name, hours, minutes = rng.choice(NAMES), rng.randint(2, 9), rng.randint(5, 55)
    second = rng.randint(10, 90)
    question = (
        f"{name} works {hours} hours and {minutes} minutes on Monday and {second} minutes "
        "on Tuesday. How many minutes in all?"
    )
    first = 60 * hours + minutes
    return question, [(60, "*", hours), (60 * hours, "+", minutes), (first, "+", second)]


def percent_off(value: int, percent: int) -> Steps:
    """The steps: one percent of ``value``, ``percent`` times that, and what is left."""
    cut = value // 100 * percent
    return [(value, "/", 100), (value // 100, "*", percent), (value, "-", cut)]


def discount(rng: random.Random) -> tuple[str, Steps]:
    goods, percent = rng.choice(GOODS), 5 * rng.randint(1, 12)
    price = 100 * rng.randint(2, 9)
    question = (
        f"A crate of {goods} costs ${price}. It gets {percent}% cheaper. What is the new price?"
    )
    return question, percent_off(price, percent)


def wages(rng: random.Random) -> tuple[str, Steps]:
    name, rate, hours = rng.choice(NAMES), rng.randint(5, 9), rng.randint(3, 9)
    days, spent = rng.randint(2, 5), rng.randint(5, 60)
    day = rate * hours
    if day * days <= spent:
        return wages(rng)
    question = (
        f"{name} earns ${rate} an hour, works {hours} hours a day for {days} days, "
        f"then spends ${spent}. How many dollars are left?"
    )
    return question, [(rate, "*", hours), (day, "*", days), (day * days, "-", spent)]


def two_cuts(rng: random.Random, largest: int) -> tuple[int, int, int]:
    """A multiple of 100 and two percentages, such that the first cut leaves a multiple of 100."""
    while True:
        value, first = 100 * rng.randint(2, largest), 5 * rng.randint(1, 15)
        if (value // 100) * (100 - first) % 100 == 0:
            return value, first, 5 * rng.randint(1, 15)


def stock_in_two_parts(rng: random.Random) -> tuple[str, Steps]:
    goods = rng.choice(GOODS)
    stock, first, second = two_cuts(rng, 20)
    rest = stock - stock // 100 * first
    question = (
        f"A shop has {stock} {goods}. It sells {first}% on Monday and {second}% of the rest "
        "on Tuesday. How many are left?"
    )
    return question, percent_off(stock, first) + percent_off(rest, second)


def depreciation(rng: random.Random) -> tuple[str, Steps]:
    value, first, second = two_cuts(rng, 40)
    rest = value - value // 100 * first
    thing = rng.choice(("car", "machine", "boat", "truck"))
    question = (
        f"A {thing} costs ${value}. It loses {first}% of its value in the first year and "
        f"{second}% of the rest in the second. What is it worth then?"
    )
    return question, percent_off(value, first) + percent_off(rest, second)


TEMPLATES: dict[str, tuple[Template, ...]] = {
    "basic": (weekly_saving, change_from_shopping, hours_and_minutes),
    "intermediate": (two_days_of_work, discount, wages),
    "advanced": (stock_in_two_parts, depreciation),
}


@dataclass(frozen=True)
class WordProblems(ExactMatch):
    name: str = "word_problems"

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        question, steps = rng.choice(TEMPLATES[difficulty])(rng)
        solution, answer = write_solution(steps)
        return Problem("", self.name, difficulty, question, answer, solution)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """The lines of the worked solutions, or in other formats equations in running text."""
        if self.answer_format == "hash":
            return check_equations(problem, completion)
        return check_prose(problem, completion, self.answer_format)
