"""Rewards: their values, their guards, and every trick that must not pay."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpugrpo_edu import rewards
from cpugrpo_edu.data import Episode, Group, Problem, StepReport
from cpugrpo_edu.engine.trl_data import trl_rewards
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.rewards import (
    REWARDS,
    Reward,
    correct_answer,
    give_rewards,
    good_format,
    length_penalty,
    make_length_penalty,
    parse_rewards,
    total_reward,
    valid_steps,
)
from cpugrpo_edu.tasks import DOMAINS, get_task, make_problems
from cpugrpo_edu.tasks.answers import MAX_ANSWER_CHARS, answers_match, extract_answer
from cpugrpo_edu.tasks.gsm8k import GSM8K


class FakeTask(GSM8K):
    """Stands for any domain."""

    def verify(self, problem, completion):
        return answers_match(extract_answer(completion), problem.answer)


TASK = FakeTask("fake")
PROBLEM = Problem(
    "fake/1",
    "fake",
    "basic",
    "A box holds 12 pens. Ann buys 3 boxes and loses 1 pen. How many remain?",
    "35",
    "12 * 3 = 36\n36 - 1 = 35\n#### 35",
    TASK,
)
RIGHT = PROBLEM.solution
KEYWORDS = "first then next so therefore step calculate multiply divide add subtract "


def score(function, *completions, problem=PROBLEM):
    """What each completion earns, through the guard that every reward passes."""
    reward = Reward(getattr(function, "__name__", "mine"), function)
    return [reward(problem, Episode(text=completion)) for completion in completions]


def through_trl(function, *completions, problems=(PROBLEM,), **columns):
    """The same in the signature of TRL; the completions are those of the one problem."""
    [reward] = trl_rewards([Reward("mine", function)], problems)
    ids = [problems[0].id] * len(completions)
    return reward(prompts=ids, completions=list(completions), problem_id=ids, **columns)


# --- values ---------------------------------------------------------------------------


def test_all_rewards_of_a_perfect_completion():
    assert [score(f, RIGHT) for f in REWARDS.values()] == [[1.0], [1.0], [1.0], [0.0]]


def test_one_number_per_completion_in_order():
    assert score(correct_answer, RIGHT, "#### 34", RIGHT) == [1.0, 0.0, 1.0]
    assert score(valid_steps, RIGHT, "12 * 3 = 36\n#### 36") == [1.0, 0.5]
    assert score(correct_answer) == []


def test_what_trl_hands_over_besides_is_ignored():
    extra = {"trainer_state": object(), "log_metric": print, "completion_ids": [[1, 2]], "x": [0]}
    earned = [through_trl(f, RIGHT, **extra) for f in REWARDS.values()]
    assert earned == [[1.0], [1.0], [1.0], [0.0]]


def test_conversational_completions():
    said = [{"role": "assistant", "content": RIGHT}]
    called = [{"role": "assistant", "content": None}, {"role": "tool", "content": "#### 35"}]
    assert through_trl(correct_answer, said, called, []) == [1.0, 0.0, 0.0]
    assert through_trl(good_format, said, called, []) == [1.0, 0.0, 0.0]


def test_each_completion_meets_its_own_problem():
    other = Problem("fake/2", "fake", "basic", "1 + 1?", "2", "1 + 1 = 2\n#### 2", TASK)
    groups = [Group([1], [Episode(text="#### 2")], problem) for problem in (PROBLEM, other)]
    give_rewards(groups, parse_rewards("correct_answer=1"))
    assert [group.episodes[0].reward for group in groups] == [0.0, 1.0]
    [reward] = trl_rewards(parse_rewards("correct_answer=1"), [PROBLEM, other])
    asked = ["fake/1", "fake/2"]
    assert reward(prompts=asked, completions=["#### 2"] * 2, problem_id=asked) == [0.0, 1.0]


@pytest.mark.parametrize("domain", DOMAINS)
def test_real_domains_reward_their_own_solutions(domain):
    [problem] = make_problems(domain, "intermediate", "train", 1)
    for reward in (correct_answer, valid_steps, good_format):
        assert score(reward, problem.solution, problem=problem) == [1.0]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (10, 0), (11, -0.1), (15, -0.5), (20, -1), (10**6, -1)]
)
def test_length_penalty_is_dapo_equation_13(length, expected):
    penalty = make_length_penalty(soft_limit=10, hard_limit=20)
    assert score(penalty, "x" * length) == pytest.approx([expected])  # characters
    ids = [[7] * length]
    expected = pytest.approx([expected])
    assert through_trl(penalty, "short", completion_ids=ids) == expected
    assert [penalty(PROBLEM, Episode(ids[0], text="short"))] == expected


@given(st.integers(0, 100), st.integers(0, 100))
def test_length_penalty_never_rewards_length(a, b):
    penalty = make_length_penalty(20, 60)
    short, long = score(penalty, "x" * min(a, b), "x" * max(a, b))
    assert 0 >= short >= long >= -1


@pytest.mark.parametrize("limits", [(5, 5), (6, 5), (-1, 5)])
def test_length_limits_that_do_not_fit(limits):
    with pytest.raises(UserError, match="soft < hard"):
        make_length_penalty(*limits)


# --- gaming ---------------------------------------------------------------------------

WRONG_ANSWERS = {
    "empty": "",
    "whitespace": " \n\t\u00a0\u2003 ",
    "zero-width only": "\u200b\u200d\ufeff",
    "keyword stuffing": KEYWORDS * 20,
    "keyword stuffing with a mark": KEYWORDS * 20 + "\n#### therefore",
    "two answers, wrong then right": "12 * 3 = 36\n#### 34\n#### 35",
    "two answers, right then wrong": "12 * 3 = 36\n#### 35\n#### 34",
    "two answers on a line": "#### 34 #### 35",
    "two answers in words": "12 * 3 = 36\n#### 34 or 35",
    "every answer": "\n".join(f"#### {i}" for i in range(100)),
    "a range": "working\n#### 30-40",
    "the answer in the steps only": "12 * 3 = 36\n36 - 1 = 35",
    "the answer in the steps, another stated": "12 * 3 = 36\n36 - 1 = 35\n#### 36",
    "an echoed prompt": "End with #### answer.\n12 * 3 = 36\n#### 35",
    "an echoed example": "For example: #### 7\n12 * 3 = 36\n#### 35",
    "superscripts": "working\n#### 3⁵",
    "digits apart": "working\n#### 3 5",
    "a heading": "working\n##### 35",
    "a broken mark": "working\n##\u200b## 35",
    "absurdly long": "working\n#### " + "0" * 10**6 + "35",
    "answer hidden behind spaces": "working\n#### 34" + " " * 500 + "35",
    "vertical whitespace": "working\n####\n35",
    "not a number": "working\n#### nan",
    "infinite": "working\n#### inf",
    "always true": "working\n#### True",
}


@pytest.mark.parametrize("trick", WRONG_ANSWERS)
def test_no_trick_earns_correct_answer(trick):
    assert score(correct_answer, WRONG_ANSWERS[trick]) == [0.0]


@pytest.mark.parametrize(
    "stated", ["35", "35.", "$35.", "35 pens", "35.0", "３５", "٣٥", "70/2", "\u202e35", "3\u200b5"]
)
def test_honest_spellings_earn_correct_answer(stated):
    assert score(correct_answer, f"#### {stated}") == [1.0]


def test_thousands_separators_either_way():
    big = Problem("fake/3", "fake", "basic", "?", "1,000", task=TASK)
    spellings = ["#### 1000", "#### 1,000", "#### $1,000.00.", "#### 1,00", "#### 10,00"]
    assert score(correct_answer, *spellings, problem=big) == [1, 1, 1, 0, 0]


ILL_FORMED = {
    name: text
    for name, text in WRONG_ANSWERS.items()
    if name
    not in {
        # well-formed though wrong: format says nothing on right or wrong
        "keyword stuffing with a mark",
        "two answers in words",
        "a range",
        "the answer in the steps, another stated",
        "superscripts",
        "digits apart",
        "not a number",
        "infinite",
        "always true",
    }
} | {
    "no working": "#### 35",
    "invisible working": "\u200b\n#### 35",
    "working of punctuation": "...\n---\n#### 35",
    "chatter after the answer": "12 * 3 = 36\n#### 35\nI hope this helps!",
    "answer inside a line": "12 * 3 = 36\nso #### 35",
    "no space": "12 * 3 = 36\n####35",
    "many spaces": "12 * 3 = 36\n####      35",
    "the same answer twice": "12 * 3 = 36\n#### 35\n#### 35",
    "a bare mark besides": "12 * 3 = 36\n####\n#### 35",
    "an exotic line end": "12 * 3 = 36\u2028#### 35",
    "an essay as answer": "12 * 3 = 36\n#### " + "x" * (MAX_ANSWER_CHARS + 1),
}


@pytest.mark.parametrize("trick", ILL_FORMED)
def test_no_trick_earns_good_format(trick):
    assert score(good_format, ILL_FORMED[trick]) == [0.0]


def test_good_format_pays_once_however_many_keywords():
    plain, stuffed = score(good_format, "so\n#### 1", KEYWORDS * 50 + "\n#### 1")
    assert plain == stuffed == 1.0


WORTHLESS_STEPS = {
    "empty": "",
    "whitespace": " \n ",
    "keyword stuffing": KEYWORDS * 20 + "\n#### 35",
    "answer without steps": "#### 35",
    "true but useless": "1 + 1 = 2\n2 + 2 = 4\n1 * 1 = 1\n#### 35",
    "from unknown operands": "34 + 1 = 35\n30 + 6 = 36\n#### 35",
    "adding zero": "36 + 0 = 36\n35 + 0 = 35\n#### 35",
    "false": "12 * 3 = 35\n#### 35",
    "steps after the answer": "#### 35\n12 * 3 = 36\n36 - 1 = 35",
    "identities": "35 = 35\n36 = 36\n#### 35",
    "results alone": "36\n35\n#### 35",
    "a long way round is cut": "1 + 1 = 2\n" * 5000 + "12 * 3 = 36\n#### 35",
}


@pytest.mark.parametrize("trick", WORTHLESS_STEPS)
def test_no_trick_earns_valid_steps(trick):
    assert score(valid_steps, WORTHLESS_STEPS[trick]) == [0.0]


def test_padding_never_raises_valid_steps():
    half = "12 * 3 = 36\n"
    padded = [half + "12 * 3 = 36\n" * 10, half + "1 + 1 = 2\n" * 10, half + KEYWORDS]
    assert score(valid_steps, half, *padded) == [0.5] * 4
    assert score(valid_steps, RIGHT.replace("####", "2 + 2 = 5\n####")) == [
        0.5
    ]  # a false one costs


@given(st.lists(st.sampled_from(["12 * 3 = 36", "36 - 1 = 35", "1 + 1 = 2", "1 + 1 = 3", "so"])))
def test_valid_steps_never_exceed_the_distinct_useful_ones(lines):
    useful = len({"12 * 3 = 36", "36 - 1 = 35"} & set(lines))
    assert 0 <= score(valid_steps, "\n".join(lines))[0] <= useful / 2


def test_silence_beats_length_but_never_a_right_answer():
    """The length penalty is at most 0, so an empty completion only avoids a loss."""
    empty = [score(f, "")[0] for f in REWARDS.values()]
    assert empty == [0.0, 0.0, 0.0, 0.0]


def test_an_empty_completion_earns_nothing_even_from_a_lenient_task(monkeypatch):
    monkeypatch.setattr(FakeTask, "verify", lambda *_: True)
    assert score(correct_answer, "", " \n\t", "a") == [0.0, 0.0, 1.0]


# --- guards ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "method"), [(correct_answer, "verify"), (valid_steps, "check_steps")]
)
def test_a_verifier_that_raises_is_named_with_its_problem(reward, method, monkeypatch):
    def broken(self, problem, completion):
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr(FakeTask, method, broken)
    with pytest.raises(UserError, match=r"fake/1.*ZeroDivisionError: oh no"):
        score(reward, RIGHT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_a_step_score_out_of_range_is_refused(value, monkeypatch):
    monkeypatch.setattr(FakeTask, "check_steps", lambda *_: StepReport((), 1, value))
    with pytest.raises(UserError, match=r"valid_steps.*fake/1.*outside"):
        score(valid_steps, RIGHT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", [1.0], 10**400])
def test_a_reward_that_is_no_finite_number_is_refused(value):
    def mine(problem, episode):
        return 0.0 if episode.text == "a" else value

    with pytest.raises(UserError, match=r"reward mine gave .* for problem 'fake/1'; return a fin"):
        score(mine, "a", "b")
    with pytest.raises(UserError, match=r"reward mine gave .* for problem 'fake/1'"):
        through_trl(mine, "a", "b")
    assert score(mine, "a") == through_trl(mine, "a") == [0.0]


@pytest.mark.parametrize("value", [[], [1.0], [1.0, 1.0, 1.0]])
def test_several_rewards_for_one_completion_are_refused(value):
    with pytest.raises(UserError, match="return a finite number for each completion"):
        score(lambda problem, episode: value, "a", "b")


def test_a_reward_that_returns_none_leaves_the_total_to_the_others():
    def mine(problem, episode):
        return 1.0 if episode.text == "#### 35" else None

    assert score(mine, "#### 35", "b") == through_trl(mine, "#### 35", "b") == [1.0, None]
    group = Group([1], [Episode(text="#### 35"), Episode(text="b")], PROBLEM)
    give_rewards([group], [Reward("mine", mine, 2), Reward("other", lambda *_: 0.5)])
    assert [episode.reward for episode in group.episodes] == [2.5, 0.5]
    with pytest.raises(UserError, match="every reward returned None .* 'fake/1'; at least one"):
        give_rewards([group], [Reward("mine", mine)])


@pytest.mark.parametrize("columns", [{"problem_id": ["fake/1"]}, {"completion_ids": [[1]]}])
def test_columns_of_another_length_are_refused(columns):
    [reward] = trl_rewards([Reward("mine", correct_answer)], [PROBLEM])
    columns = {"problem_id": ["fake/1"] * 2} | columns
    with pytest.raises(ValueError, match="shorter|longer"):
        reward(prompts=["p"] * 2, completions=["a", "b"], **columns)


def test_a_reward_that_raises_is_named():
    class Mine:
        def __call__(self, problem, episode):
            raise KeyError("secret column")

    with pytest.raises(UserError, match=r"reward mine failed on .* with KeyError.*secret column"):
        score(Mine(), "a")


def test_numbers_of_numpy_are_numbers():
    for number, expected in ((np.float32(0.5), 0.5), (True, 1.0)):
        result = score(lambda problem, episode, number=number: number, "a")
        assert result == [expected]
        assert all(type(reward) is float for reward in result)


def test_a_missing_column_is_named():
    [reward] = trl_rewards([Reward("mine", correct_answer)], [PROBLEM])
    with pytest.raises(TypeError, match="problem_id"):
        reward(prompts=["p"], completions=[RIGHT])
    with pytest.raises(KeyError, match="fake/9"):
        reward(prompts=["p"], completions=[RIGHT], problem_id=["fake/9"])


def test_two_problems_of_one_id_are_refused():
    other = Problem("fake/1", "fake", "basic", "1 + 1?", "2", task=TASK)
    with pytest.raises(ValueError, match="two problems have the id 'fake/1'"):
        trl_rewards([], [PROBLEM, other])
    assert through_trl(correct_answer, RIGHT, problems=(PROBLEM, PROBLEM)) == [1.0]


def test_an_unknown_domain_is_named():
    with pytest.raises(UserError, match="nowhere"):
        get_task("nowhere")
    with pytest.raises(UserError, match=r"correct_answer failed on problem '1'.*no task.*nowhere"):
        score(correct_answer, RIGHT, problem=Problem("1", "nowhere", "basic", "?", "1"))


def test_a_group_without_a_problem_earns_nothing():
    with pytest.raises(ValueError, match="no problem to judge"):
        give_rewards([Group([1], [Episode(text=RIGHT)])], parse_rewards("correct_answer=1"))


# --- composition ----------------------------------------------------------------------


def test_parse():
    parsed = parse_rewards(" correct_answer = 1 ,valid_steps=.5")
    assert [(r.name, r.weight) for r in parsed] == [("correct_answer", 1.0), ("valid_steps", 0.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "correct_answer, valid_steps"),
        ("correct_answer", "name=weight"),
        ("correct_answer=high", "name=weight"),
        ("correct_answer=1,", "name=weight"),
        ("right=1", r"unknown reward 'right'.*correct_answer"),
        ("correct_answer=1,correct_answer=2", "twice"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(UserError, match=message):
        parse_rewards(text)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_not_allowed(weight):
    with pytest.raises(UserError, match="not allowed"):
        Reward("correct_answer", correct_answer, weight)
    with pytest.raises(UserError, match="not allowed"):
        parse_rewards(f"correct_answer={weight}")


def test_the_total_is_the_weighted_sum():
    rewards = parse_rewards("correct_answer=1,valid_steps=0.5,good_format=0.2")
    half = "12 * 3 = 36\n#### 36"
    group = Group([1], [Episode(text=RIGHT), Episode(text=half), Episode(text="")], PROBLEM)
    give_rewards([group], rewards)
    expected = [1 + 0.5 + 0.2, 0.5 * 0.5 + 0.2, 0.0]
    assert [episode.reward for episode in group.episodes] == pytest.approx(expected)
    totals = [total_reward(rewards, PROBLEM, episode) for episode in group.episodes]
    assert totals == pytest.approx(expected)


def test_rewards_go_to_trl_under_their_names_without_their_weights():
    def mine(problem, episode):
        return math.nan

    rewards = [*parse_rewards("valid_steps=0.5"), Reward("s", valid_steps, 0.5)]
    assert [reward.weight for reward in rewards] == [0.5, 0.5]
    functions = trl_rewards(rewards, [PROBLEM])
    assert [f.__name__ for f in functions] == ["valid_steps", "s"]
    for function in functions:
        given_ = function(prompts=["p"], completions=[RIGHT], problem_id=["fake/1"])
        assert given_ == [1.0]
    with pytest.raises(UserError, match="mine"):
        through_trl(mine, "a")


@pytest.mark.parametrize("nothing", ["correct_answer=0", "correct_answer=0,valid_steps=0"])
def test_rewarding_nothing_is_refused(nothing):
    with pytest.raises(UserError, match="zero"):
        parse_rewards(nothing)


def test_names_agree_with_functions():
    assert {name: f.__name__ for name, f in REWARDS.items()} == {name: name for name in REWARDS}
    assert rewards.length_penalty is length_penalty


@pytest.mark.parametrize("text", ["5" * 10**6, "#" * 10**6, "#### 5\n" * 10**5, "1+1=2\n" * 10**5])
def test_a_million_characters_are_handled(text):
    """A super-linear parser would not come back from this."""
    assert all(math.isfinite(score(f, text)[0]) for f in REWARDS.values())


def test_the_length_penalty_fits_the_run():
    [penalty] = parse_rewards("length_penalty=1", max_completion=100)
    given = [penalty(PROBLEM, Episode([0] * n)) for n in (75, 80, 100)]
    assert given == pytest.approx([0.0, -0.2, -1.0])
    [penalty] = parse_rewards("length_penalty=1")
    assert penalty.function is length_penalty
