"""Where a completion states its answer, in every format, and what must not count as one."""

from __future__ import annotations

import importlib.util
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpugrpo_edu.data import Episode, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.rewards import correct_answer, good_format, valid_steps
from cpugrpo_edu.tasks import DOMAINS, make_problems, symbolic
from cpugrpo_edu.tasks.answers import (
    answers_match,
    check_answer_format,
    exact_match,
    extract_answer,
    well_formed,
    with_answer_format,
)
from cpugrpo_edu.tasks.custom import Custom
from cpugrpo_edu.tasks.statements import ANSWER_FORMATS, statements, working

# Each states 42, and the formats besides auto that read it.
STATED = {
    "#### 42": {"hash"},
    "6 * 7 = 42\n#### 42": {"hash"},
    r"So it is \boxed{42}.": {"boxed"},
    r"\[ \boxed{42 \text{ apples}} \]": {"boxed"},
    r"The final answer is $\boxed{42}$.": {"boxed", "sentence"},
    "<answer>42</answer>": set(),
    "<think>40 + 2</think><answer> 42 </answer>": set(),
    "The answer is 42.": {"sentence"},
    "the answer is: 42": {"sentence"},
    "The correct answer is **42**.": {"sentence"},
    "So the answer to the question is 42 apples.": {"sentence"},
    "The answer is 42 apples in total.": {"sentence"},
    "The answer is 42, because 6 * 7 = 42.": {"sentence"},
    "The answer would be 42": {"sentence"},
    "The answer is $42.": {"sentence"},
    "The answer is x = 42.": {"sentence"},
    "The answer is 40 + 2 = 42.": {"sentence"},
    "The answer is found by adding 40 and 2.\nThe answer is 42.": {"sentence"},
    "Answer: 42": {"sentence"},
    "Answer = 42": {"sentence"},
    "**Answer:** 42": {"sentence"},
    "**Answer: 42**": {"sentence"},
    "**Answer: 42 apples** in total": {"sentence"},
    "### Final Answer:\n42": {"sentence"},
    "Answer:\n\n$$42$$": {"sentence"},
    "#### 42\nThe answer is: 42": {"hash", "sentence"},
    "#### Step 1: add 2\n40 + 2 = 42\n\nThe answer is 42.": {"sentence"},
    "**42**": set(),
    "So he has **42** apples.": set(),
    "**Conclusion:** 6 * 7 = **42**": set(),
    "6 * 7 = 42": set(),
    "Therefore, he has 40 + 2 = 42 apples left.": set(),
    "40 + 2 = 21 + 21 = 42.": set(),
    "So 40 + 2 equals 42.": set(),
    "$6 \\times 7 = 42$": set(),
    "We get\n$$\n6 \\times 7 = 42\n$$": set(),
    "\\[ 6 \\cdot 7 = 42 \\]": set(),
    "x = 42": set(),
    "So 2x = 84, which gives x = 42.": set(),
    "First 12.\n\n42\n": set(),
    "The answer is calculated as follows:\n6 * 7 = 42": set(),
}


@pytest.mark.parametrize("text", STATED)
def test_each_format_reads_its_own_forms(text):
    problem = Problem("1", "any", "basic", "?", "42")
    read = {form for form in ("hash", "boxed", "sentence") if exact_match(problem, text, form)}
    assert read == STATED[text]
    assert exact_match(problem, text, "auto")
    assert exact_match(problem, text, "last-number")
    wrong = Problem("1", "any", "basic", "?", "40")
    assert not any(exact_match(wrong, text, form) for form in ANSWER_FORMATS)


NOT_STATED = [
    "",
    "He has 42 apples",  # no sentence, and no form says that this is the answer
    "He has 42 of 50 apples.",
    "The answer is 41 or 42.",
    "The answer is either 41 or 42.",
    "The answer is 41 or 42. The answer is 42.",
    "The answer is 42. No, the answer is 41.",
    "Answer: 41\nAnswer: 42",
    "Answer: 42\n\nQuestion: what is 1 + 1? Answer: 2",
    r"\boxed{41} \boxed{42}",
    r"\boxed{41}, so the answer is 42",
    "#### 41\n\\boxed{42}",
    "<answer>41</answer><answer>42</answer>",
    "**41** or **42**",
    "**42** of **84**",
    "So it is **41**, since 6 * 7 = 42",
    "x = 41 or x = 42",
    "x = 41, x = 42",
    "6 * 7 = 41 or 42",
    "41 = 42",
    "The answer is not 42.",
    "The answer is 42 thousand.",
    "The answer is 42x.",
    "The answer is 42 pm.",
    "The answer is 42 minus one.",
    "The answer is 42 dozen eggs in total",
    r"\boxed{42",  # never closed
    "so 6 * 7 = 42\nand now some chatter",  # not the last line
    "\n".join(f"Answer: {i}" for i in range(100)),
    " ".join(f"**{i}**" for i in range(100)),
    "Answer: " + "0" * 200 + "42",
]


@pytest.mark.parametrize("text", NOT_STATED)
@pytest.mark.parametrize("form", ["auto", "sentence", "boxed", "hash"])
def test_hedging_and_what_is_no_statement_earn_nothing(text, form):
    expected = {  # what one form alone cannot see
        (r"\boxed{41}, so the answer is 42", "sentence"),
        ("#### 41\n\\boxed{42}", "boxed"),
    }
    problem = Problem("1", "any", "basic", "?", "42")
    assert exact_match(problem, text, form) == ((text, form) in expected)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("from 41 to 42", "42"),
        ("It is -42.", "-42"),
        ("5-3", "3"),
        ("we pay $1,250.50 in all.", "1250.5"),
        ("3/4 of it", "3/4"),
        ("about 5 million people", "5000000"),
        ("in step 2, 42 apples", "42"),
        ("none at all", None),
    ],
)
def test_the_last_number(text, answer):
    stated = extract_answer(text, "last-number")
    assert stated == answer if answer is None else answers_match(stated, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is b, d, a.", "b d a"),
        ("Answer: yes", "yes"),
        ("Answer: yes\n1 = 1", "yes"),
        ("so it is **yes**", "yes"),
        (r"\boxed{\text{yes}}", "yes"),
        ("The answer is 4 pm.", "4 pm"),
        (r"\boxed{3x}", "3x"),
    ],
)
def test_answers_that_are_no_numbers(text, answer):
    problem = Problem("1", "any", "basic", "?", answer)
    assert exact_match(problem, text, "auto")
    assert not exact_match(Problem("1", "any", "basic", "?", "no"), text, "auto")


def test_a_statement_knows_its_place():
    text = "so 6 * 7 = 42. The answer is 42 apples. Bye"
    [found] = statements(text, "auto")
    assert text[found.start : found.end] == "The answer is 42 apples"
    assert working(text, "auto") == "so 6 * 7 = 42. "
    assert working("6 * 7 = 42", "auto") == "6 * 7 = 42"  # the step states the answer


@pytest.mark.parametrize(
    ("text", "form", "good"),
    [
        ("6 * 7 = 42\n#### 42", "hash", True),
        ("6 * 7 = 42\n#### 42 ", "hash", True),
        ("6 * 7 = 42\nThe answer is 42.", "hash", False),
        ("6 * 7 = 42\nThe answer is 42.", "auto", True),
        ("6 * 7 = 42\n\\[\\boxed{42}\\]", "auto", True),
        ("6 * 7 = 42\n\\[\\boxed{42}\\]", "boxed", True),
        ("6 * 7 = 42\n#### 42", "auto", True),
        ("so 6 * 7 = 42.", "auto", True),
        ("The answer is 42.", "auto", False),  # no working
        ("6 * 7 = 42\nThe answer is 42. Bye", "auto", False),  # something after it
        ("6 * 7 = 42\n#### 42\nThe answer is: 42", "auto", False),  # twice
        ("6 * 7 = 42\nThe answer is 41. The answer is 42.", "auto", False),
        ("he has 42 apples", "auto", False),
    ],
)
def test_good_format(text, form, good):
    assert well_formed(text, form) is good


@pytest.mark.parametrize("domain", ["arithmetic", "word_problems", "algebra", "lists"])
def test_worked_solutions_of_a_domain_earn_all_in_prose(domain):
    """The steps of the worked solution within sentences count as they do alone."""
    [problem] = with_answer_format(make_problems(domain, "advanced", "train", 1), "auto")
    *steps, last = problem.solution.splitlines()
    said = "\n".join(f"{i}. Then **{step}**" for i, step in enumerate(steps, 1))
    said = f"We go step by step.\n{said}\n\nThe answer is {last.removeprefix('#### ')}."
    assert problem.verify(said) and problem.check_steps(said).score == 1
    assert well_formed(said, "auto")
    assert not problem.verify(said.replace("The answer is", "So we have 1 and"))
    false = said.replace(steps[-1], steps[-1] + "1" if domain != "lists" else "reverse: a b c")
    assert problem.check_steps(false).score < 1


def test_rewards_ask_the_format_of_the_problem():
    [problem] = make_problems("arithmetic", "basic", "train", 1)
    steps = problem.solution.split("####")[0]
    episode = Episode(text=f"{steps}The answer is {problem.answer}.")
    rewards = correct_answer, good_format, valid_steps
    assert [reward(problem, episode) for reward in rewards] == [0, 0, 0.5]
    [problem] = with_answer_format([problem], "auto")
    assert [reward(problem, episode) for reward in rewards] == [1, 1, 1]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_format_belongs_to_the_problem_and_to_no_other(domain):
    [problem] = make_problems(domain, "basic", "train", 1)
    said = f"The answer is {problem.answer}."
    [changed] = with_answer_format([problem], "auto")
    assert changed.verify(said) and changed.answer_format == "auto" and changed == problem
    assert not problem.verify(said) and problem.answer_format == "hash"


def test_a_verifier_of_ones_own_judges_in_every_format():
    problem = Problem("1", "custom", "basic", "?", "1", task=Custom(lambda p, c: c == "yes"))
    [changed] = with_answer_format([problem], "auto")
    assert changed.verify("yes") and not changed.verify("The answer is 1.")
    assert changed.answer_format == "auto"


def test_an_unknown_format_is_named():
    with pytest.raises(UserError, match=r"unknown answer format 'xml'; allowed are auto, hash"):
        check_answer_format("xml")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(symbolic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"extra math.*pip install math-verify, or"):
        check_answer_format("math-verify")


needs_library = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra math"
)


@needs_library
@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"\boxed{x^2 + 2x + 1}", r"(x+1)^2", True),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
        (r"The answer is $\frac{\pi}{4}$.", r"\frac{\pi}{4}", True),
        (r"\boxed{x \cdot 3}", "3x", True),
        ("Answer: 0.5", r"\frac12", True),
        ("Answer: yes", "yes", True),
        (r"\boxed{3y}", "3x", False),
        ("Answer: 4 am", "4 pm", False),
        ("Answer: sey", "yes", False),
        ("Answer: 0.3333333333", "1/3", False),
        ("Answer: 18 thousand", "18", False),
        (r"\boxed{\sqrt{8}} \boxed{3}", r"\sqrt{8}", False),  # hedging
        (r"\boxed{9^{9^{9^9}}}", "2x", False),  # would never end
        (r"\boxed{((9^{99})^{99})^{99}}", "2x", False),
        (r"\boxed{99999!}", "2x", False),
    ],
)
def test_math_verify_compares_formulas(text, answer, right):
    problem = Problem("1", "any", "basic", "?", answer)
    assert exact_match(problem, text, "math-verify") is right


PIECES = [
    *("The answer is ", "Answer: ", "#### ", r"\boxed{", "}", "**", "= ", "x", "<answer>"),
    *("42", "41", "40", " or ", "\n", ". ", " thousand", " pm", "$", "½", "7 * 6", "or", " eggs"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(ANSWER_FORMATS))
def test_any_text_is_read_in_any_format(text, form):
    stated = extract_answer(text, form)
    assert stated is None or isinstance(stated, str)
    assert isinstance(well_formed(text, form), bool)
    places = [(s.start, s.end) for s in statements(text, form)]
    assert places == sorted(places) and all(0 <= a <= b <= len(text) for a, b in places)
    assert text.startswith(working(text, form))


FORMS = ["The answer is {}.", "Answer: {}", "#### {}", r"\boxed{{{}}}", "<answer>{}</answer>"]


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 2**31))
def test_two_answers_in_any_two_forms_count_only_if_they_are_one(first, second, seed):
    rng = random.Random(seed)
    text = "\n".join(rng.choice(FORMS).format(value) for value in (first, second))
    for value in (first, second):
        problem = Problem("1", "any", "basic", "?", str(value))
        assert exact_match(problem, text, "auto") == (first == second)


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.sampled_from(FORMS))
def test_nothing_before_a_wrong_statement_mends_it(before, form):
    """In its last line a text states 17; whatever comes before, it never earns 18."""
    text = f"{before}\n{form.format(17)}"
    assert not exact_match(Problem("1", "any", "basic", "?", "18"), text, "auto")


@pytest.mark.parametrize("piece", ["5", "#### 5\n", "Answer: 5\n", r"\boxed{", "**", "= ", "$"])
def test_a_long_text_is_read_in_linear_time(piece):
    """A super-linear reader would not come back from this."""
    for form in ANSWER_FORMATS[:-1]:
        assert isinstance(well_formed(piece * (200_000 // len(piece)), form), bool)
