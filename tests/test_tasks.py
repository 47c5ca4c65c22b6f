"""Generated problems: right against independent arithmetic, split by content, hard to game."""

from __future__ import annotations

import itertools
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpugrpo_edu import tasks
from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.pretrain import problem_stream
from cpugrpo_edu.tasks import DOMAINS, TASKS, get_task, make_problems, prompt_messages, split_of
from cpugrpo_edu.tasks.algebra import linear
from cpugrpo_edu.tasks.equations import MAX_LINES, apply, step_score, write_solution
from cpugrpo_edu.tasks.sums import LARGEST as SUMS

CELLS = [(domain, difficulty) for domain in DOMAINS for difficulty in DIFFICULTIES]
NUMBERS = re.compile(r"\d+")


def draw(domain: str, difficulty: str, count: int = 60) -> list[Problem]:
    rng = random.Random(f"{domain}{difficulty}")
    return [TASKS[domain].generate(difficulty, rng) for _ in range(count)]


def score(problem: Problem, completion: str) -> float:
    return TASKS[problem.domain].check_steps(problem, completion).score


# --- The problems are right ---------------------------------------------------


@pytest.mark.parametrize(("domain", "difficulty"), CELLS)
def test_every_generator_solves_its_own_problems(domain, difficulty):
    task = get_task(domain)
    for problem in draw(domain, difficulty):
        report = task.check_steps(problem, problem.solution)
        assert task.verify(problem, problem.solution)
        assert report.score == 1
        assert len(report.steps) == report.required >= 2
        assert all(step.valid for step in report.steps)
        assert problem.solution.splitlines()[-1] == f"#### {problem.answer}"
        assert (problem.domain, problem.difficulty) == (domain, difficulty)
        # a bare answer is right but shows no step, and no answer is not right
        assert task.verify(problem, f"#### {problem.answer}")
        assert score(problem, f"#### {problem.answer}") == 0
        assert not task.verify(problem, problem.solution.split("####")[0])


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_arithmetic_agrees_with_python(difficulty):
    for problem in draw("arithmetic", difficulty):
        expression = re.fullmatch(r"Compute ([\d+*-]+)\.", problem.question)[1]
        assert eval(expression) == int(problem.answer) >= 0
        for line in problem.solution.splitlines()[:-1]:
            left, right = line.split("=")
            assert eval(left) == int(right) >= 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2(x+1)3", (6, 6)),
        ("(x+1)(2)", (2, 2)),
        ("2(3(x-1)+x)", (8, -6)),
        ("-(x-4)", (-1, 4)),
        ("x3", (3, 0)),
        ("3 * (x + 2) / 6", (0.5, 1)),
        ("4(x+3)-2x", (2, 12)),
        ("2 3", None),
        ("x x", None),
        ("x(x+1)", None),
        ("xx", None),
        ("1/x", None),
        ("1/0", None),
        ("y", None),
        ("__import__('os')", None),
        ("", None),
    ],
)
def test_linear_text(text, expected):
    assert linear(text) == expected


TERMS = st.sampled_from(["x", "2x", "3", "(x+1)", "(2x-3)", "(4)", "-1"])


@given(st.lists(TERMS, min_size=1, max_size=4), st.lists(st.sampled_from("+-* "), min_size=4))
def test_linear_text_agrees_with_python(terms, signs):
    """Products with and without a sign, against Python's own value at several x."""
    text = "".join(t + s.strip() for t, s in zip(terms, [*signs[: len(terms) - 1], ""]))
    found = linear(text)
    if found is None:
        return
    source = re.sub(r"(?<=[\dx)])(?=[(x])|(?<=[x)])(?=\d)", "*", text)
    for x in (-3, 0, 1, 7):
        assert found[0] * x + found[1] == eval(source, {"x": x})


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_algebra_holds_for_the_answer_and_no_other_number(difficulty):
    def value(side: str, x: int) -> int:
        return eval(side.replace("(x", "*(x").replace("x", "*x").replace("(*", "("), {"x": x})

    def both(line: str, x: int) -> bool:
        sides = re.sub(r"(?<!\d)x", "1x", line).replace("(1x", "(x").split("=")
        return value(sides[0], x) == value(sides[1], x)

    for problem in draw("algebra", difficulty):
        x = int(problem.answer)
        lines = [problem.question.removeprefix("Solve for x: "), *problem.solution.splitlines()]
        for line in lines[:-1]:
            assert [both(line, other) for other in (x - 1, x, x + 1)] == [False, True, False], line


@pytest.mark.parametrize(("difficulty", "largest"), SUMS.items())
def test_sums_however_asked_are_in_one_split(difficulty, largest):
    pairs = {}
    for split in ("train", "eval"):
        problems = make_problems("sums", difficulty, split, 128)  # what a run of the scenario draws
        numbers = [sorted(map(int, re.findall(r"\d+", p.question))) for p in problems]
        assert all(2 <= a <= b <= largest for a, b in numbers)
        assert [str(a + b) for a, b in numbers] == [p.answer for p in problems]
        assert all(p.verify(p.solution) for p in problems)
        assert len({re.sub(r"\d+", "", p.question) for p in problems}) == 4
        pairs[split] = set(map(tuple, numbers))
    assert not pairs["train"] & pairs["eval"]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_letters_are_to_be_sorted(difficulty):
    """The same question as a list of one operation, with the letters as its answer."""
    count = {"basic": 3, "intermediate": 4, "advanced": 5}[difficulty]
    for problem in draw("letters", difficulty):
        found = re.fullmatch(r"Take ([a-l ]+)\. Then sort\.", problem.question).group(1).split()
        assert len(set(found)) == count and problem.answer == " ".join(sorted(found))
        assert TASKS["letters"].verify(problem, problem.solution)
        assert not TASKS["letters"].verify(problem, f"#### {problem.answer[:-2]}")
        assert score(problem, problem.solution) == 1


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_lists_agree_with_a_simulation_by_position(difficulty):
    for problem in draw("lists", difficulty):
        start, operations = re.fullmatch(r"Take ([a-l ]+)\. Then (.+)\.", problem.question).groups()
        items = start.split()
        for operation in operations.split(", "):
            n = len(items)
            order = list(range(n))
            if operation == "reverse":
                order = [n - 1 - i for i in range(n)]
            elif operation == "rotate left":
                order = [(i + 1) % n for i in range(n)]
            elif operation == "rotate right":
                order = [(i - 1) % n for i in range(n)]
            elif operation == "swap ends":
                order[0], order[-1] = n - 1, 0
            elif operation == "drop first":
                order.pop(0)
            elif operation == "drop last":
                order.pop()
            else:
                assert operation == "sort"
                order.sort(key=lambda i: ord(items[i]))
            items = [items[i] for i in order]
        assert items == problem.answer.split()


def word_answer(question: str) -> Fraction:
    """The answer from the question's numbers and its story, with fractions throughout."""
    n = [Fraction(number) for number in NUMBERS.findall(question)]
    if "saves" in question:
        return n[0] + n[1] * n[2]
    if "buys" in question:
        return n[2] - n[0] * n[1]
    if "reads" in question:
        return n[0] * 60 + n[1]
    if "Monday and" in question and "works" in question:
        return n[0] * 60 + n[1] + n[2]
    if "crate" in question:
        return n[0] * (1 - n[1] / 100)
    if "earns" in question:
        return n[0] * n[1] * n[2] - n[3]
    assert "% on Monday" in question or "% of its value" in question
    return n[0] * (1 - n[1] / 100) * (1 - n[2] / 100)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_word_problems_agree_with_their_story(difficulty):
    for problem in draw("word_problems", difficulty, 120):
        assert word_answer(problem.question) == Fraction(problem.answer) >= 0
        for line in problem.solution.splitlines()[:-1]:
            left, right = line.split("=")
            a, b = map(Fraction, NUMBERS.findall(left))
            operator = re.sub(r"\d", "", left)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
            assert value == Fraction(right)


def test_write_solution_refuses_what_is_not_whole():
    assert write_solution([(7, "-", 9), (6, "/", 3)]) == ("7-9=-2\n6/3=2\n#### 2", "2")
    for step in ((7, "/", 2), (7, "/", 0)):
        with pytest.raises(ValueError, match="not a whole number"):
            write_solution([step])
    assert apply(Fraction(1), "/", Fraction(0)) is None


# --- Splits -------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out() -> dict[tuple[str, str], list[Problem]]:
    # advanced algebra has 3,150 questions, so about 470 in each of the small splits
    return {
        cell: make_problems(*cell, "eval", 400 if cell == ("algebra", "advanced") else 600)
        for cell in CELLS
    }


def test_each_cell_supplies_enough_distinct_evaluation_problems(held_out):
    for cell, problems in held_out.items():
        assert len({p.question for p in problems}) == len(problems) >= 400, cell
        assert len({p.id for p in problems}) == len(problems)
        assert {(p.domain, p.difficulty) for p in problems} == {cell}
        assert all(p.id.startswith("/".join(cell) + "/") for p in problems)


@pytest.mark.parametrize(("domain", "difficulty"), CELLS)
def test_each_cell_supplies_enough_training_problems_none_of_them_held_out(
    domain, difficulty, held_out
):
    count = 400 if (domain, difficulty) == ("algebra", "advanced") else 600
    train = {p.question for p in make_problems(domain, difficulty, "train", count, seed=3)}
    assert len(train) == count
    assert not train & {p.question for p in held_out[domain, difficulty]}


def test_pretraining_never_draws_a_training_or_evaluation_question(held_out):
    drawn = {
        problem.question
        for seed in (0, 1)
        for problem in itertools.islice(problem_stream(seed, (1, 1, 1)), 4000)
    }
    evaluated = {p.question for problems in held_out.values() for p in problems}
    assert len(drawn) > 4000
    assert not drawn & evaluated
    assert {split_of(question) for question in drawn} == {"pretrain"}


def test_splits_have_their_shares_whatever_the_seed_and_cover_everything():
    questions = [p.question for cell in CELLS for p in draw(*cell, 300)]
    found = [split_of(question) for question in dict.fromkeys(questions)]
    for split, share in tasks.SPLIT_SHARES.items():
        assert found.count(split) / len(found) == pytest.approx(share, abs=0.03)
    assert sum(tasks.SPLIT_SHARES.values()) == pytest.approx(1)
    assert found == [split_of(question) for question in dict.fromkeys(questions)]


def test_same_arguments_give_the_same_problems_and_other_seeds_give_others():
    first = make_problems("arithmetic", "advanced", "train", 20, seed=5)
    assert first == make_problems("arithmetic", "advanced", "train", 20, seed=5)
    assert first[:7] == make_problems("arithmetic", "advanced", "train", 7, seed=5)
    other = make_problems("arithmetic", "advanced", "train", 20, seed=6)
    assert len({p.question for p in first} & {p.question for p in other}) < 5
    # identities belong to the question, not to the draw
    assert all(re.fullmatch(r"arithmetic/advanced/[0-9a-f]{10}", p.id) for p in first)


def test_bad_requests_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"'poetry'.*arithmetic"):
        make_problems("poetry", "basic", "eval", 1)
    with pytest.raises(UserError, match=r"'easy'.*basic"):
        make_problems("lists", "easy", "eval", 1)
    monkeypatch.setattr(tasks, "split_of", lambda question: "train")
    with pytest.raises(UserError, match=r"only 0 distinct .*eval split, but 2 were requested"):
        make_problems("algebra", "advanced", "eval", 2)
    assert make_problems("lists", "basic", "eval", 0) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_task_is_found_by_name_and_by_its_problems(domain):
    task = get_task(domain)
    assert task.name == domain
    [problem] = make_problems(domain, "basic", "train", 1)
    assert problem.task is task
    assert problem.verify(problem.solution) and problem.grade(problem.solution) == 1
    assert problem.check_steps(problem.solution).score == 1
    assert not problem.verify("#### no") and problem.grade("#### no") == 0
    with pytest.raises(UserError, match=f"unknown domain 'mine'; allowed are .*{domain}"):
        get_task("mine")


@pytest.mark.parametrize("method", ["verify", "grade", "check_steps"])
def test_a_problem_without_a_task_judges_nothing(method):
    problem = Problem("mine/1", "lists", "basic", "Q?", "a")
    with pytest.raises(ValueError, match="'mine/1' has no task"):
        getattr(problem, method)("#### a")


def test_prompt_messages_put_the_system_prompt_first():
    problem = Problem("", "lists", "basic", "Q?", "a")
    assert prompt_messages(problem) == [{"role": "user", "content": "Q?"}]
    assert prompt_messages(problem, "S") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q?"},
    ]


# --- Steps cannot be gamed ----------------------------------------------------

SUM = Problem(
    "", "arithmetic", "intermediate", "Compute 7+5*3-4.", "18", "5*3=15\n7+15=22\n22-4=18"
)
STORY = Problem(
    "",
    "word_problems",
    "basic",
    "Tom reads for 2 hours and 5 minutes. How many minutes is that?",
    "125",
    "60*2=120\n120+5=125\n#### 125",
)
LINE = Problem("", "algebra", "basic", "Solve for x: 5x+3=18", "3", "5x=15\nx=3\n#### 3")
TWO_SIDES = Problem(
    "", "algebra", "intermediate", "Solve for x: 9x+3=4x+18", "3", "5x+3=18\n5x=15\nx=3\n#### 3"
)
BRACKETS = Problem(
    "",
    "algebra",
    "advanced",
    "Solve for x: 7(x+3)-2x=36",
    "3",
    "7x+21-2x=36\n5x+21=36\n5x=15\nx=3\n#### 3",
)
LETTERS = Problem(
    "",
    "lists",
    "basic",
    "Take c a d b. Then reverse, sort.",
    "a b c d",
    "reverse: b d a c\nsort: a b c d\n#### a b c d",
)


@pytest.mark.parametrize(
    ("problem", "completion", "expected"),
    [
        # what counts
        (SUM, "5*3=15", 1 / 3),
        (SUM, "5 * 3 = 15\n\n  7 + 15 = 22  \n22-4=18\n#### 18", 1),
        (SUM, "5*3=15\n15-4=11\n7+11=18", 2 / 3),  # another way to the same end
        (STORY, "60*2=120", 1 / 2),  # the 60 is a given of the worked solution
        # true but useless
        (SUM, "5*3=15\n5*3=15\n5*3=15\n5*3=15", 1 / 3),
        (SUM, "7+5=12\n5+3=8\n7+4=11\n4+3=7", 0),
        (SUM, "1+1=2\n" * 3, 0),  # the 1 is unknown: not even valid
        (SUM, "5*3=15\n1+1=2\n1+1=2", 0),
        (SUM, "Compute 7+5*3-4.", 0),
        (SUM, "7+5*3-4=18", 0),  # not one operation a line
        (SUM, "15=15\n22=22\n18=18", 0),
        (SUM, "#### 18\n5*3=15\n7+15=22\n22-4=18", 0),  # after the answer is no working
        # false or unknown
        (SUM, "22-4=18", 0),  # 22 was not reached
        (SUM, "5*3=16\n7+16=23", 0),
        (SUM, "5*3=15\n7+15=21", 0),
        (SUM, "7/0=15", 0),
        (SUM, "5*3=15.0", 0),
        (SUM, "٥*٣=١٥", 0),
        (SUM, "\uff15*3=15", 0),  # a full-width 5
        (SUM, "5×3=15", 0),
        (SUM, "5*3=15 and so on", 0),
        (SUM, "9" * 500 + "*1=" + "9" * 500, 0),
        (SUM, "5*3=" + "0" * 11 + "15", 0),
        (SUM, "", 0),
        # algebra
        (LINE, "5x=15\nx=3", 1),
        (LINE, "5x=18-3\n5x=15\n3=x", 1),
        (LINE, "x=3", 1 / 2),
        (LINE, "5x+3=18", 0),
        (LINE, "5x+3=18\n" * 5, 0),
        (LINE, "18=5x+3", 0),  # turned round
        (LINE, "3+5x=18", 0),
        (LINE, "10x+6=36\n20x+12=72", 0),  # scaled up
        (LINE, "4x+3=15\n3x+3=12\n2x+3=9", 0),  # counted down
        (LINE, "5x=15\n4x=12\n3x=9\n2x=6", 1 / 2),
        (LINE, "5x=15\n50x=150\nx=3", 1),
        (LINE, "x=x", 0),
        (LINE, "5x=15\nx=x", 0),
        (LINE, "3=3\n0=0\n18=18", 0),
        (LINE, "0x=0", 0),
        (LINE, "x=4", 0),
        (LINE, "x==3", 0),
        (LINE, "x=3=3", 0),
        (LINE, "=\nx=\n=3", 0),
        (LINE, "x=٣", 0),
        (LINE, "x*x=9", 0),
        (LINE, "5*x=15\nx=3", 1),
        (LINE, "2(x+1)3=11\nx=3", 1 / 2 - 1 / 2),  # a product is no sum: 2*4*3 is 24
        (LINE, "5x=1 5\nx=3", 0),  # nor are digits apart one number
        (LINE, "x=0_3", 0),
        (LINE, "x=1e999999999", 0),
        (LINE, "x=3**1", 0),
        (LINE, "Solve for x: 5x+3=18", 0),
        (LINE, "9" * 60 + "x=" + "9" * 60, 0),
        (TWO_SIDES, "8x+3=3x+18\n7x+3=2x+18\n6x+3=x+18", 0),  # x subtracted from both sides
        (TWO_SIDES, "5x=15\nx=3", 2 / 3),
        (BRACKETS, "7x+21-2x=36+0+0\n7x+21-2x=36+0", 0),
        (BRACKETS, "7(x+3)=36+2x", 0),
        (BRACKETS, "7x+21-2x=36\n7x-2x=15\n5x=15\nx=3", 1),
        # lists
        (LETTERS, "reverse: b d a c", 1 / 2),
        (LETTERS, "reverse: b d a c\nreverse: b d a c", 0),
        (LETTERS, "sort: a b c d", 0),
        (LETTERS, "sort: a b c d\nreverse: b d a c", 0),
        (LETTERS, "Take c a d b. Then reverse, sort.", 0),
        (LETTERS, "reverse: b d a c sort: a b c d", 0),
        (LETTERS, "reverse: b d a c\nsort: а b c d", 0),  # a Cyrillic а
    ],
)
def test_step_scores(problem, completion, expected):
    assert score(problem, completion) == pytest.approx(expected)


@pytest.mark.parametrize("problem", [SUM, STORY, LINE, TWO_SIDES, BRACKETS, LETTERS])
def test_hundreds_of_lines_earn_nothing_more(problem):
    task = TASKS[problem.domain]
    first = problem.solution.splitlines()[0]
    honest = score(problem, first)
    for padding in (first, problem.question, "1+1=2", "x=x", "7+4=11"):
        report = task.check_steps(problem, first + ("\n" + padding) * 500)
        assert report.score <= honest
        assert len(report.steps) == MAX_LINES
    assert score(problem, "\n".join(["1+1=2"] * 500) + "\n" + problem.solution) == 0


def test_steps_report_which_lines_hold():
    report = TASKS["arithmetic"].check_steps(SUM, "5*3=15\n7+15=23\n#### 18")
    assert [(s.text, s.valid) for s in report.steps] == [("5*3=15", True), ("7+15=23", False)]
    assert report.required == 3


def test_step_score_stays_between_zero_and_one():
    assert step_score(2, 1, 4) == 0.25
    assert step_score(1, 5, 2) == 0
    assert step_score(9, 0, 2) == 1
    assert step_score(0, 0, 0) == 0


PIECES = st.sampled_from(
    [
        *("5*3=15", "7+15=22", "22-4=18", "1+1=2", "7+5=12", "x=3", "5x=15", "18=5x+3", "x=x"),
        *("4x=12", "5x+3=18", "#### 3", "####", "reverse: b d a c", "sort: a b c d", "", "("),
        *("=", "9x+3=4x+18", "²x=٣", "-" * 90),
    ]
)


@settings(max_examples=150)
@given(st.lists(PIECES | st.text(max_size=12), max_size=12))
def test_no_completion_scores_without_reaching_that_many_of_the_required_results(lines):
    completion = "\n".join(lines)
    working = completion.split("####")[0]
    for problem in (SUM, LINE, TWO_SIDES, BRACKETS, LETTERS):
        value = score(problem, completion)
        assert 0 <= value <= 1
        if value == 1:  # only with the last result of the working at hand
            last = {"arithmetic": "18", "algebra": "3", "lists": "a b c d"}[problem.domain]
            assert any(last in line for line in working.splitlines())


@pytest.mark.parametrize(
    ("problem", "completion", "right"),
    [
        (SUM, "#### 18", True),
        (SUM, "#### 18.0", True),
        (SUM, "#### 19\n#### 18", False),
        (SUM, "#### 17 or 18", False),
        (SUM, "18", False),
        (SUM, "The answer is 18.", False),
        (SUM, "#### 18 #### 19", False),
        (SUM, "#### -18", False),
        (SUM, "#### 9*2", False),
        (SUM, "#### 36/2", True),
        (SUM, "#### " + "0" * 300 + "18", False),
        (LINE, "#### 3", True),
        (LINE, "#### 2 3", False),
        (LETTERS, "#### a b c d", True),
        (LETTERS, "#### [a, b, c, d]", True),
        (LETTERS, "#### abcd", False),
        (LETTERS, "#### d c b a", False),
        (LETTERS, "#### a b c d\n#### d c b a", False),
    ],
)
def test_verification_wants_exactly_one_right_answer(problem, completion, right):
    assert TASKS[problem.domain].verify(problem, completion) is right


@pytest.mark.parametrize(("domain", "difficulty"), CELLS)
def test_another_problems_solution_is_wrong(domain, difficulty):
    task = get_task(domain)
    problems = draw(domain, difficulty, 30)
    pairs = [(a, b) for a, b in itertools.pairwise(problems) if a.answer != b.answer]
    assert len(pairs) > 15
    for problem, other in pairs:  # with the same answer, the steps may hold for both
        assert not task.verify(problem, other.solution)
        assert task.check_steps(problem, other.solution).score < 1
