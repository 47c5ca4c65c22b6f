"""Word problems with money, time and percentages, in the spirit of GSM8K.

Each template is a function that draws its numbers and returns the question with
the steps that solve it. Numbers are chosen so that every step is whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from cpugrpo_edu.answers import answers_match, extract_answer
from cpugrpo_edu.tasks.equations import check_equations, write_solution
from cpugrpo_edu.types import Difficulty, Problem, StepReport

Steps = list[tuple[int, str, int]]
Template = Callable[[random.Random], tuple[str, Steps]]

NAMES = ("Maria", "Tom", "Ana", "Ben", "Lea", "Omar", "Mei", "Sam")
GOODS = ("pens", "books", "cups", "plants", "lamps", "maps")


def weekly_saving(rng: random.Random) -> tuple[str, Steps]:
    name, start = rng.choice(NAMES), rng.randint(5, 60)
    rate, weeks = rng.randint(3, 25), rng.randint(2, 9)
    question = (
        f"{name} has ${start} and saves ${rate} a week. How many dollars after {weeks} weeks?"
    )
    return question, [(rate, "*", weeks), (start, "+", rate * weeks)]


def change_from_shopping(rng: random.Random) -> tuple[str, Steps]:
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    count, price = rng.randint(2, 9), rng.randint(2, 15)
    money = count * price + rng.randint(1, 40)
    question = f"{name} buys {count} {goods} at ${price} each with ${money}. How much is left?"
    return question, [(price, "*", count), (money, "-", price * count)]


def hours_and_minutes(rng: random.Random) -> tuple[str, Steps]:
    name, hours, minutes = rng.choice(NAMES), rng.randint(2, 7), rng.randint(5, 55)
    question = f"{name} reads for {hours} hours and {minutes} minutes. How many minutes is that?"
    return question, [(60, "*", hours), (60 * hours, "+", minutes)]


def two_days_of_work(rng: random.Random) -> tuple[str, Steps]:
    name, hours, minutes = rng.choice(NAMES), rng.randint(2, 7), rng.randint(5, 55)
    second = rng.randint(10, 90)
    question = (
        f"{name} works {hours} hours and {minutes} minutes on Monday and {second} minutes "
        "on Tuesday. How many minutes in all?"
    )
    first = 60 * hours + minutes
    return question, [(60, "*", hours), (60 * hours, "+", minutes), (first, "+", second)]


def discount(rng: random.Random) -> tuple[str, Steps]:
    goods, percent = rng.choice(GOODS), rng.choice((5, 10, 15, 20, 25, 30, 40, 50))
    price = 20 * rng.randint(1, 25)
    question = f"A box of {goods} costs ${price}. It gets {percent}% cheaper. What is the new price?"
    cut = price * percent // 100
    return question, [(price, "*", percent), (price * percent, "/", 100), (price, "-", cut)]


def wages(rng: random.Random) -> tuple[str, Steps]:
    name, rate, hours = rng.choice(NAMES), rng.randint(8, 25), rng.randint(3, 9)
    days, spent = rng.randint(2, 5), rng.randint(10, 90)
    question = (
        f"{name} earns ${rate} an hour, works {hours} hours a day for {days} days, "
        f"then spends ${spent}. How many dollars are left?"
    )
    day = rate * hours
    return question, [(rate, "*", hours), (day, "*", days), (day * days, "-", spent)]


def stock_in_two_parts(rng: random.Random) -> tuple[str, Steps]:
    goods, stock = rng.choice(GOODS), 20 * rng.randint(2, 30)
    first = rng.choice((5, 10, 20, 25, 30, 40, 50))
    sold = stock * first // 100
    rest = stock - sold
    options = [p for p in (10, 20, 25, 50) if rest * p % 100 == 0]
    if not options:
        return stock_in_two_parts(rng)
    second = rng.choice(options)
    question = (
        f"A shop has {stock} {goods}. It sells {first}% on Monday and {second}% of the rest "
        "on Tuesday. How many are left?"
    )
    return question, [
        (stock, "*", first),
        (stock * first, "/", 100),
        (stock, "-", sold),
        (rest, "*", second),
        (rest * second, "/", 100),
        (rest, "-", rest * second // 100),
    ]


def depreciation(rng: random.Random) -> tuple[str, Steps]:
    percent, years = rng.choice((5, 10, 20, 25, 50)), rng.choice((1, 2))
    value = 100 * rng.randint(2, 90)
    steps: Steps = []
    now = value
    for _ in range(years):
        if now * percent % 100:
            return depreciation(rng)
        loss = now * percent // 100
        steps += [(now, "*", percent), (now * percent, "/", 100), (now, "-", loss)]
        now -= loss
    thing = rng.choice(("car", "machine", "boat", "truck"))
    question = (
        f"A {thing} costs ${value} and loses {percent}% of its value a year. "
        f"What is it worth after {years} year{'s' if years > 1 else ''}?"
    )
    return question, steps


TEMPLATES: dict[str, tuple[Template, ...]] = {
    "basic": (weekly_saving, change_from_shopping, hours_and_minutes),
    "intermediate": (two_days_of_work, discount, wages),
    "advanced": (stock_in_two_parts, depreciation),
}


@dataclass(frozen=True)
class WordProblems:
    name: str = "word_problems"

    def generate(self, difficulty: Difficulty, rng: random.Random) -> Problem:
        question, steps = rng.choice(TEMPLATES[difficulty])(rng)
        solution, answer = write_solution(steps)
        return Problem("", self.name, difficulty, question, answer, solution)

    def verify(self, problem: Problem, completion: str) -> bool:
        stated = extract_answer(completion)
        return stated is not None and answers_match(stated, problem.answer)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        return check_equations(problem, completion)
