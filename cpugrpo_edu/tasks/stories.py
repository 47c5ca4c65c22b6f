"""Word problems in everyday English, for real chat models.

A basic story takes one step, an intermediate one two; an advanced story takes three or more, or
two and has a sentence that is beside the point. `story_schemas` holds the stories and
`story_words` their words. The small stories all take one step and have small numbers: a model of
135 million weights that cannot multiply 51 by 3 may still learn when to multiply.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from types import SimpleNamespace

from cpugrpo_edu.data import ANSWER_MARK, Problem, StepReport
from cpugrpo_edu.tasks.answers import ExactMatch
from cpugrpo_edu.tasks.equations import apply
from cpugrpo_edu.tasks.prose import check_prose
from cpugrpo_edu.tasks.story_schemas import BESIDE_THE_POINT, ONE_STEP, SCHEMAS, Schema
from cpugrpo_edu.tasks.story_words import Scene, count

SMALL: dict[str, tuple[tuple[Schema, ...], int]] = {
    "basic": (SCHEMAS["basic"], 12),
    "intermediate": (ONE_STEP, 20),
    "advanced": (ONE_STEP, 50),
}
"""The small stories of each difficulty, and their largest number or result. Some advanced ones
are as small as intermediate ones and have a sentence that is beside the point."""

_WORKING = re.compile(r"\[([^\]:]+)(?:: (\w+))?\]")
_SENTENCE_END = re.compile(r"(?<=[.?!]) (?=[A-Z{])")


@dataclass(frozen=True)
class Stories(ExactMatch):
    """The domains ``stories`` and ``small_stories``.

    ``ending`` is the last line of a worked solution, with the answer for ``{}``; another is ``The
    answer is {}.`` The small ones are those of `SMALL`.
    """

    name: str = "stories"
    ending: str = f"{ANSWER_MARK} {{}}"
    small: bool = False

    def schemas(self, difficulty: str) -> tuple[Schema, ...]:
        """The kinds of story of a difficulty."""
        return small_schemas(difficulty) if self.small else SCHEMAS[difficulty]

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        """Draw one story. Its ``id`` is the schema and the numbers, without those that are beside
        the point: it decides the split, so no instance is in two splits in other words."""
        distract = difficulty == "advanced" and rng.random() < 0.4
        schema = rng.choice(self.schemas("intermediate" if distract else difficulty))
        numbers, results = draw_numbers(schema, rng)
        kind, _, text = rng.choice(schema.texts).rpartition("| ")
        scene = Scene(rng, kind or "thing", pair="{B" in text)
        if distract:
            text, numbers["x"] = add_beside_the_point(text, schema, rng)
        question = scene.fill(text, numbers)
        known = numbers | {f"r{i}": result for i, result in enumerate(results, start=1)}
        steps = [write_step(step, scene, known) for step in schema.steps]
        answer = str(results[-1])
        solution = "\n".join([*steps, self.ending.format(answer)])
        values = sorted(value for name, value in numbers.items() if name != "x")
        instance = f"{schema.name}/{'-'.join(map(str, values))}"
        return Problem(instance, self.name, difficulty, question, answer, solution)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """The steps are the equations in the prose, as for GSM8K."""
        return check_prose(problem, completion, self.answer_format)


SMALL_STORIES = Stories("small_stories", small=True)


@lru_cache
def small_schemas(difficulty: str) -> tuple[Schema, ...]:
    """The schemas of `SMALL`, with no number or result above the largest allowed.

    Those that allow fewer than 1 % of their draws then are left out.
    """
    schemas, largest = SMALL[difficulty]
    small, rng = [], random.Random(0)
    for schema in schemas:
        ranges: dict[str, Sequence[int]] = {
            name: [v for v in values if v <= largest] for name, values in schema.numbers.items()
        }
        if all(ranges.values()):
            schema = replace(schema, numbers=ranges, largest=largest)
            if sum(draw_once(schema, rng) is not None for _ in range(300)) >= 3:
                small.append(schema)
    return tuple(small)


def draw_numbers(schema: Schema, rng: random.Random) -> tuple[dict[str, int], list[int]]:
    """Numbers for which the story makes sense, and the result of each step."""
    while (drawn := draw_once(schema, rng)) is None:
        pass
    return drawn


def draw_once(schema: Schema, rng: random.Random) -> tuple[dict[str, int], list[int]] | None:
    numbers = {name: rng.choice(values) for name, values in schema.numbers.items()}
    results = work_out(schema, numbers)
    return (numbers, results) if results and schema.where(SimpleNamespace(**numbers)) else None


def work_out(schema: Schema, numbers: dict[str, int]) -> list[int]:
    """The result of each step; empty if one is not a whole number, below 2 or too large."""
    known, results = dict(numbers), []
    for step in schema.steps:
        for expression, _ in _WORKING.findall(step):
            value = evaluate(expression, known)
            if value.denominator != 1 or not 2 <= value <= schema.largest:
                return []
            results.append(int(value))
            known[f"r{len(results)}"] = int(value)
    return results


def evaluate(expression: str, known: dict[str, int]) -> Fraction:
    """The value of ``$n * k / 100``, from left to right."""
    first, *rest = expression.replace("$", "").split()
    value = Fraction(known.get(first) or int(first))
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        number = apply(value, operator, Fraction(known.get(operand) or int(operand)))
        assert number is not None  # no schema divides by 0
        value = number
    return value


def write_step(step: str, scene: Scene, known: dict[str, int]) -> str:
    """``They have [n * m: thing].`` becomes ``They have 3 x 4 = 12 apples.``"""

    def equation(match: re.Match[str]) -> str:
        expression, noun = match[1], match[2]
        left = re.sub(r"[a-z]\d?", lambda name: str(known[name[0]]), expression)
        result = int(evaluate(expression, known))
        if noun:
            right = count(result, scene.word(noun))
        else:
            right = f"${result}" if "$" in expression else str(result)
        return f"{left.replace('*', 'x')} = {right}"

    return scene.fill(_WORKING.sub(equation, step), known)


def add_beside_the_point(text: str, schema: Schema, rng: random.Random) -> tuple[str, int]:
    """The text with a sentence that changes nothing, first or before the last; its number."""
    fits = [
        (sentence, values)
        for topic, sentence, values in BESIDE_THE_POINT
        if topic not in schema.topics and ("{A" in text or "{A" not in sentence)
    ]
    sentence, values = rng.choice(fits)
    sentences = _SENTENCE_END.split(text)
    sentences.insert(rng.choice((0, len(sentences) - 1)), sentence)
    return " ".join(sentences), rng.choice(values)
