"""Linear equations in one unknown: ``Solve for x: 5x+3=2x+18``."""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass
from fractions import Fraction

from cpugrpo_edu.data import (
    ANSWER_MARK,
    Problem,
    Step,
    StepReport,
)
from cpugrpo_edu.tasks.answers import ExactMatch
from cpugrpo_edu.tasks.equations import step_score, working_lines
from cpugrpo_edu.tasks.spelling import without_markup

PRODUCT = re.compile(r"(?<=[\dx)]) ?(?=\()|(?<=[\d)])(?=x)|(?<=[x)])(?=[\dx])", re.ASCII)
"""Where a product has no sign, as in 2(x+1)3 and 5x."""


@dataclass(frozen=True)
class Algebra(ExactMatch):
    name: str = "algebra"

    def generate(self, difficulty: str, rng: random.Random) -> Problem:
        x = rng.randint(2, 15)
        a, b = rng.randint(2, 9), rng.randint(1, 50)
        if difficulty == "basic":
            lines = [side(a, b) + f"={a * x + b}"]
        elif difficulty == "intermediate":
            c = rng.randint(1, 7)
            a += c
            right = (a - c) * x + b
            lines = [f"{side(a, b)}={side(c, right)}", f"{side(a - c, b)}={right}"]
            a -= c
        else:
            c = rng.randint(1, 5)
            a, b = rng.randint(2, 6), rng.randint(1, 9)
            k = a + c
            total = (k - c) * x + k * b
            lines = [
                f"{k}(x+{b})-{term(c)}={total}",
                f"{term(k)}+{k * b}-{term(c)}={total}",
                f"{side(k - c, k * b)}={total}",
            ]
            b, a = k * b, k - c
        lines += [f"{term(a)}={a * x}"] + ([f"x={x}"] if a > 1 else [])
        question, *steps = lines
        solution = "\n".join([*steps, f"{ANSWER_MARK} {x}"])
        return Problem("", self.name, difficulty, f"Solve for x: {question}", str(x), solution)

    def check_steps(self, problem: Problem, completion: str) -> StepReport:
        """A step is valid if it holds only for the true x, and useful if it is also simpler.

        "Simpler" means fewer terms than all lines before, or x alone on a side. So it does not
        pay to copy the question, swap or scale its sides, or subtract x from both again and again.
        In formats other than ``hash``, the steps are the equations in x within running text.
        """
        x = int(problem.answer)
        required = len(working_lines(problem.solution))
        simplest = complexity(problem.question.removeprefix("Solve for x: "))
        steps, useful = [], 0
        lines = working_lines(completion, self.answer_format)
        if self.answer_format != "hash":
            lines = [equation for line in lines for equation in equations(line)]
        for line in lines:
            valid = holds_only_for(line, x)
            if valid and complexity(line) < simplest:
                simplest = complexity(line)
                useful += 1
            steps.append(Step(line, valid))
        invalid = sum(not step.valid for step in steps)
        return StepReport(tuple(steps), required, step_score(useful, invalid, required))


def equations(line: str) -> list[str]:
    """The equations in x in a line of running text, such as "so 5x = 15, and x = 3"."""
    symbols = re.sub(r"[^\W\d_]{2,}", ";", without_markup(line).replace("−", "-"))
    runs = (run.strip(" .") for run in re.split(r"[^-+*/().0-9x =]+", symbols))
    return [run for run in runs if "x" in run and run.count("=") == 1]


def term(coefficient: int) -> str:
    return "x" if coefficient == 1 else f"{coefficient}x"


def side(coefficient: int, constant: int) -> str:
    return f"{term(coefficient)}{'+' if constant >= 0 else '-'}{abs(constant)}"


def linear(text: str) -> tuple[Fraction, Fraction] | None:
    """Read ``4(x+3)-2x`` as (coefficient of x, constant); None if it is not linear text."""
    text = PRODUCT.sub("*", text.strip())
    if not re.fullmatch(r"[-+*/().0-9x ]+", text):
        return None
    try:
        return polynomial(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def polynomial(node: ast.expr, source: str) -> tuple[Fraction, Fraction]:
    """(coefficient of x, constant) of an expression; ``ValueError`` if it is not linear in x."""
    if isinstance(node, ast.Name) and node.id == "x":
        return Fraction(1), Fraction(0)
    if isinstance(node, ast.Constant):  # from its text: 0.1 is 1/10, never the float
        return Fraction(0), Fraction(ast.get_source_segment(source, node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        a, b = polynomial(node.operand, source)
        return (-a, -b) if isinstance(node.op, ast.USub) else (a, b)
    if isinstance(node, ast.BinOp):
        (a, b), (c, d) = polynomial(node.left, source), polynomial(node.right, source)
        if isinstance(node.op, ast.Add):
            return a + c, b + d
        if isinstance(node.op, ast.Sub):
            return a - c, b - d
        if isinstance(node.op, ast.Mult) and not (a and c):
            return a * d + b * c, b * d
        if isinstance(node.op, ast.Div) and not c:
            return a / d, b / d
    raise ValueError(f"not linear in x: {source}")


def holds_only_for(line: str, x: int) -> bool:
    """Whether the line is a linear equation whose only solution is x."""
    sides = line.split("=")
    if len(line) > 80 or len(sides) != 2 or not all(part.strip() for part in sides):
        return False
    left, right = linear(sides[0]), linear(sides[1])
    if left is None or right is None:
        return False
    coefficient, constant = left[0] - right[0], left[1] - right[1]
    return coefficient != 0 and coefficient * x + constant == 0


def complexity(line: str) -> tuple[int, int]:
    """(number of terms, 0 if x stands alone on a side, else 1)."""
    sides = [part.strip() for part in line.split("=")]
    return len(re.findall(r"\d*\*?x|\d+", line.replace(" ", ""))), int("x" not in sides)
