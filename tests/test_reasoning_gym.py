"""Reasoning Gym: its tasks are right, judged by their own scorers, and split without overlap."""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from cpugrpo_edu.data import DIFFICULTIES, Episode
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.rewards import correct_answer
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.data import load_data, select_problems
from cpugrpo_edu.tasks import reasoning_gym
from cpugrpo_edu.tasks.reasoning_gym import ReasoningGym, draw, is_usable, load_reasoning_gym

needs_the_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="needs the extra reasoning-gym: pip install reasoning-gym",
)

TRIED = (
    *("chain_sum", "basic_arithmetic", "gsm_symbolic", "leg_counting", "products", "gcd", "lcm"),
    *("letter_counting", "simple_equations", "calendar_arithmetic", "fraction_simplification"),
    *("count_bits", "spell_backward", "time_intervals", "syllogism", "prime_factorization"),
    *("family_relationships", "caesar_cipher"),
)
ONE_LEVEL = {"gsm_symbolic"}
REFUSES_A_LEVEL = {"caesar_cipher"}  # its curriculum leaves the limits of its own settings


def load(names, per_cell=6, seed=1, keep=lambda question: True):
    return load_reasoning_gym(f"reasoning-gym:{names}", per_cell, seed, keep)


@needs_the_package
@pytest.mark.parametrize("name", TRIED)
def test_a_task_gives_problems_of_each_difficulty_and_judges_them(name):
    problems = load(name)
    counts = Counter(problem.difficulty for problem in problems)
    expected = DIFFICULTIES[: 1 if name in ONE_LEVEL else 2 if name in REFUSES_A_LEVEL else 3]
    assert counts == dict.fromkeys(expected, 6)
    assert len({problem.question for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.domain == name and problem.id.startswith(f"{name}/{problem.difficulty}/")
        right = f"Let me think.\n#### {problem.answer}"
        assert problem.verify(right) and problem.grade(right) == 1
        for wrong in ("", problem.answer, "#### banana", f"#### {problem.answer}\n#### banana"):
            assert not problem.verify(wrong) and problem.grade(wrong) < 1
        assert correct_answer(problem, Episode(text=right)) == 1


def whole(text):
    return [int(number) for number in re.findall(r"-?\d+", text)]


@needs_the_package
@pytest.mark.parametrize(
    ("name", "solve"),
    [
        ("chain_sum", lambda q: eval(q.split(":")[1].rstrip("= "))),
        ("products", lambda q: eval(re.search(r"[\d* ]+\d", q.split(":")[1])[0])),
        ("gcd", lambda q: math.gcd(*whole(q))),
        ("lcm", lambda q: math.lcm(*whole(q))),
        ("count_bits", lambda q: bin(whole(q)[-1]).count("1")),
        ("letter_counting", lambda q: q.split('text: "')[1].lower().count(q.split('"')[1])),
        ("spell_backward", lambda q: q.split("): ")[1][::-1]),
    ],
)
def test_answers_agree_with_python_and_wrong_ones_do_not_pass(name, solve):
    for problem in load(name, per_cell=20):
        answer = solve(problem.question)
        assert str(answer) == problem.answer
        assert problem.verify(f"#### {answer}")
        wrong = answer + 1 if isinstance(answer, int) else answer + "x"
        assert not problem.verify(f"#### {wrong}")


@needs_the_package
def test_difficulties_are_levels_of_the_tasks_own_curriculum():
    problems = load("chain_sum", per_cell=30)
    terms = {difficulty: set() for difficulty in DIFFICULTIES}
    for problem in problems:
        numbers = re.findall(r"\d+", problem.question)
        terms[problem.difficulty].add((len(numbers), max(map(len, numbers))))
    assert terms == {"basic": {(2, 1)}, "intermediate": {(3, 2)}, "advanced": {(4, 3)}}


@needs_the_package
def test_held_out_problems_are_the_same_in_every_run_and_never_trained_on():
    config = RunConfig(data="reasoning-gym:chain_sum, gcd", per_cell=40)
    training, held_out = load_data(config)
    other, same = load_data(RunConfig(data=config.data, per_cell=40, seed=5))
    assert held_out == same and training != other
    assert training == load_data(config)[0]
    seen = {problem.question for problem in held_out}
    assert not seen & {problem.question for problem in training + other}
    assert {problem.domain for problem in training} == {"chain_sum", "gcd"}
    assert len({problem.id for problem in training}) == len(training)
    assert load_data(config, to_train=False) == ([], held_out)
    # 81 pairs of digits with + and -: the hash leaves both sides their share of the few there are
    basic = [p for p in training + held_out if (p.domain, p.difficulty) == ("chain_sum", "basic")]
    assert 60 < len(basic) < 200
    chosen = select_problems(config.stages[0], training, 32)
    assert len(chosen) == 32 and {p.difficulty for p in chosen} == set(DIFFICULTIES)


@needs_the_package
def test_two_tasks_in_one_process_are_each_judged_by_their_own_scorer():
    first, second = load("gcd", 3), load("spell_backward", 3)
    assert all(p.verify(f"#### {p.answer}") for p in first + second)
    for a, b in zip(first, second):
        assert not a.verify(f"#### {b.answer}") and not b.verify(f"#### {a.answer}")


@needs_the_package
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("chain_sun", r"no task 'chain_sun' \(did you mean chain_sum.*\?\); some of its \d+ are"),
        ("poetry9", r"no task 'poetry9'; some of its \d+ are chain_sum, basic_arithmetic"),
        ("", "no task ''"),
        ("gcd,", "no task ''"),
        ("gcd,gcd", "names a task twice"),
        ("mini_sudoku", "mini_sudoku has no problems that can be used here: one line"),
        ("boxnet", "boxnet has no problems that can be used here"),  # it has no reference answers
        ("game_of_life_halting", "scorer of .*game_of_life_halting accepts any text"),
        ("composite", "composite cannot be set up here .AssertionError"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(names, message):
    with pytest.raises(UserError, match=message) as caught:
        load(names)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


@needs_the_package
def test_a_verifier_beside_it_is_refused():
    with pytest.raises(UserError, match="scorers of their own; leave out the verifier"):
        load_data(RunConfig(data="reasoning-gym:gcd", verifier="judge.py:judge"))


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(reasoning_gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        load_data(RunConfig(data="reasoning-gym:chain_sum"))
    message = str(caught.value)
    assert "pip install reasoning-gym (our extra of that name)" in message
    assert "gsm_symbolic" in message and "\n" not in message


# --- Scorers that misbehave -----------------------------------------------------


def problem_of(score):
    dataset = SimpleNamespace(score_answer=score)
    task = ReasoningGym(name="odd", dataset=dataset, entry={"answer": "7"})
    return reasoning_gym.Problem("odd/1", "odd", "basic", "?", "7", task=task)


def raises(answer, entry):
    raise ValueError(answer)


def leaves(answer, entry):
    raise SystemExit(answer)


@pytest.mark.parametrize(
    ("score", "grade"),
    [
        (lambda answer, entry: 1.0 * (answer == entry["answer"]), 1.0),
        (lambda answer, entry: 0.25, 0.25),
        (lambda answer, entry: 7, 1.0),
        (lambda answer, entry: -1, 0.0),
        (lambda answer, entry: None, 0.0),
        (raises, 0.0),
        (leaves, 0.0),
    ],
)
def test_a_grade_is_in_bounds_whatever_the_scorer_does(score, grade):
    problem = problem_of(score)
    assert problem.grade("It is\n#### 7.") == grade
    assert problem.verify("It is\n#### 7.") is (grade == 1)
    assert problem.grade("7") == 0  # nothing is stated


def test_a_scorer_that_takes_too_long_gives_nothing(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "TIME_LIMIT", 0.05)
    assert problem_of(lambda answer, entry: time.sleep(5) or 1.0).grade("#### 7") == 0


def test_a_problem_is_usable_if_its_scorer_accepts_the_short_answer_and_no_other():
    exact = problem_of(lambda answer, entry: float(answer == "7"))
    assert is_usable(exact)
    for answer in ("", "8", "7\n7", "7" * 200):
        assert not is_usable(reasoning_gym.replace(exact, answer=answer))
    with pytest.raises(UserError, match="accepts any text"):
        is_usable(problem_of(lambda answer, entry: 1.0))


def test_problems_come_from_a_file_of_their_own():
    task = ReasoningGym(name="gcd", dataset=None, entry={})
    with pytest.raises(UserError, match="--data reasoning-gym:gcd"):
        task.generate("basic", None)


@needs_the_package
def test_draws_that_fail_or_never_end_are_left_out(monkeypatch):
    from reasoning_gym import factory

    class Dataset:
        def __init__(self, settings):
            pass

        def __getitem__(self, i):
            if i % 4 == 1:
                raise ValueError("no solution")
            if i % 4 == 2:
                time.sleep(5)
            return {"question": f" {i}? ", "answer": i}

    monkeypatch.setitem(factory.DATASETS, "odd", (Dataset, None))
    monkeypatch.setattr(reasoning_gym, "TIME_LIMIT", 0.02)
    drawn = list(draw("odd", "basic", SimpleNamespace(size=100)))
    # the fifth draw that takes too long ends it: 2, 6, 10, 14, 18
    assert [p.question for p in drawn] == [f"{i}?" for i in (0, 3, 4, 7, 8, 11, 12, 15, 16)]
