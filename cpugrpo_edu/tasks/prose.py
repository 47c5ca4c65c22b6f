"""Check the equations that stand in running text."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from cpugrpo_edu.data import Problem, Step, StepReport
from cpugrpo_edu.tasks.equations import step_score
from cpugrpo_edu.tasks.quantities import parse_number
from cpugrpo_edu.tasks.spelling import without_markup
from cpugrpo_edu.tasks.statements import working

MAX_WORKING_CHARS = 10_000
"""Working is read only up to here, which bounds the cost of checking it."""

MAX_SIDE_CHARS = 60
"""The longest side of an equation that is read."""

ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # a calculator annotation, as in 3*4=<<3*4=12>>12
_PLAIN = r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
_TERM = rf"[($-]*{_PLAIN}\)*"
_NUMBER = re.compile(_PLAIN, re.ASCII)
_LEFT = re.compile(rf"{_TERM}(?: *[-+*/x] *{_TERM})+ *$", re.ASCII)
_RIGHT = re.compile(rf" *(-? *\$? *{_PLAIN}(?:/\d+)?)", re.ASCII)


def check_prose(problem: Problem, completion: str, answer_format: str = "hash") -> StepReport:
    """Check the equations in running text, such as ``so 3 * 4 = 12 apples``.

    A step is valid if it is exactly true. It is useful if in addition its operands are known
    (from the question, the worked solution's givens, or an earlier useful step) and its
    result is wanted. The wanted results are those of the worked solution; without one, they are
    the results that a numeric reference answer depends on, and then every equation counts as
    required. Each result counts once, so repeating a true equation, or adding ``1 + 1 = 2``,
    earns nothing. With neither a worked solution nor a numeric answer, the score is 0.
    """
    reference = _equations(working(problem.solution))
    found = _equations(working(completion, answer_format))
    known = _numbers(problem.question)
    if reference:
        wanted = Counter(e.result for e in reference)
        known |= set().union(*(e.operands for e in reference)) - set(wanted)
    else:
        wanted = _trace_back(found, parse_number(problem.answer))
    useful = 0
    for equation in found:
        if equation.true and equation.operands <= known and wanted[equation.result] > 0:
            wanted[equation.result] -= 1
            known.add(abs(equation.result))
            useful += 1
    steps = tuple(Step(equation.text, equation.true) for equation in found)
    required = len(reference or found)
    invalid = sum(not step.valid for step in steps)
    return StepReport(steps, required, step_score(useful, invalid, required))


@dataclass(frozen=True)
class _Equation:
    text: str
    operands: frozenset[Fraction]
    result: Fraction
    true: bool


def _equations(text: str) -> list[_Equation]:
    """Find ``expression = number`` in working, which may be marked up in Markdown or LaTeX."""
    text = without_markup(ANNOTATION.sub("", text[:MAX_WORKING_CHARS]))
    text = text.replace("×", "*").replace("÷", "/").replace("−", "-")
    found = []
    for line in text.splitlines():
        for before, after in pairwise(line.split("=")):
            left = _LEFT.search(before[-MAX_SIDE_CHARS:])
            right = _RIGHT.match(after[:MAX_SIDE_CHARS])
            if not left or not right:
                continue
            expression = left[0].strip()
            if expression.count("(") != expression.count(")"):  # as in "(so 3 + 4 = 7)"
                expression = expression.strip("()")
            result = _evaluate(right[1])
            if result is not None:
                text = f"{expression} = {right[1].strip()}"
                true = _evaluate(expression) == result
                found.append(_Equation(text, frozenset(_numbers(expression)), result, true))
    return found


def _trace_back(equations: list[_Equation], answer: Fraction | None) -> Counter[Fraction]:
    """The results that the answer depends on, each once, found by following operands back."""
    wanted: Counter[Fraction] = Counter()
    open_values = set() if answer is None else {answer}
    for equation in reversed(equations):
        reached = open_values & {equation.result, abs(equation.result)}
        if equation.true and reached:
            open_values = (open_values - reached) | equation.operands
            wanted[equation.result] = 1
    return wanted


def _numbers(text: str) -> set[Fraction]:
    """The magnitudes of all numbers in a text."""
    return {Fraction(n.replace(",", "")) for n in _NUMBER.findall(text) if len(n) < MAX_SIDE_CHARS}


def _evaluate(expression: str) -> Fraction | None:
    """The exact value of ``+ - * /`` and brackets; None for anything else or a zero divisor."""
    plain = expression.replace(",", "").replace("$", "").replace("x", "*").strip()
    try:
        return _value(ast.parse(plain, mode="eval").body, plain)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant):  # from its text: 0.1 is 1/10, never the float
        return Fraction(ast.get_source_segment(source, node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, source), _value(node.right, source)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError(f"not arithmetic: {source}")
