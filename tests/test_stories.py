"""Stories: right against arithmetic written anew, sound English, disjoint splits, many of them."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest

from cpugrpo_edu.curriculum import make_stages, stage_problems
from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.data import load_data
from cpugrpo_edu.tasks import (
    DOMAINS,
    SPLIT_SHARES,
    TASKS,
    get_task,
    held_out_problems,
    make_problems,
)
from cpugrpo_edu.tasks.answers import extract_answer, with_answer_format
from cpugrpo_edu.tasks.stories import SMALL_STORIES, Stories, work_out
from cpugrpo_edu.tasks.story_schemas import BESIDE_THE_POINT, SCHEMAS
from cpugrpo_edu.tasks.story_words import KINDS, PEOPLE, Scene, count, plural, with_article

# The answer of each schema, from its numbers in the order in which a phrasing names them
BY_ORDER = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "join": lambda a, b: a + b,
    "separate": lambda a, b: a - b,
    "start_unknown": lambda a, b: a + b,
    "compare": lambda a, b: a - b,
    "more_than": lambda a, b: a + b,
    "fewer_than": lambda a, b: a - b,
    "combine": lambda a, b: a + b,
    "groups": lambda a, b: a * b,
    "sharing": lambda a, b: a / b,
    "price": lambda a, b: a * b,
    "expensive": lambda a, b: a - b,
    "times_as_many": lambda a, b: a * b,
    "fraction": lambda a, b: a / b,
    "age_later": lambda a, b: a + b,
    "age_before": lambda a, b: a - b,
    "distance": lambda a, b: a + b,
    "distance_left": lambda a, b: a - b,
    "rate": lambda a, b: a * b,
    "speed": lambda a, b: a * b,
    "groups_and_fewer": lambda a, b, c: a * b - c,
    "join_separate": lambda a, b, c: a + b - c,
    "separate_twice": lambda a, b, c: a - b - c,
    "more_and_together": lambda a, b: 2 * a + b,
    "fewer_and_together": lambda a, b: 2 * a - b,
    "times_and_together": lambda a, b: a * (1 + b),
    "times_and_difference": lambda a, b: a * (b - 1),
    "join_share": lambda a, b, c: (a + b) / c,
    "separate_pack": lambda a, b, c: (a - b) / c,
    "fraction_left": lambda a, b: a - a / b,
    "speed_and_more": lambda a, b, c: a * b + c,
    "speed_and_rest": lambda a, b, c: a - b * c,
    "younger_later": lambda a, b, c: a - b + c,
    "times_older_later": lambda a, b, c: a * b + c,
    "pages_left": lambda a, b, c: a - b * c,
    "empty_seats": lambda a, b, c: a * b - c,
    "weeks_of_saving": lambda a, b, c: (a - b) / c,
    "minutes": lambda a, b: 60 * a + b,
    "weeks": lambda a, b: 7 * a * b,
    "bake_and_pack": lambda a, b, c, d: (a * b - c) / d,
    "three_people": lambda a, b, c: a + (a + b) + (a + b) * c,
    "three_people_fewer": lambda a, b, c: a + a * b + (a * b - c),
    "two_kinds_of_rows": lambda a, b, c, d, e: a * b + c * d - e,
    "fraction_and_more": lambda a, b, c: a - a / b + c,
    "two_speeds": lambda a, b, c, d: a * b + c * d,
    "legs": lambda a, b: 2 * a + 4 * b,
    "average": lambda a, b, c: (a + b + c) / 3,
    "three_ages": lambda a, b, c: a + (a + b) + (a + b) / c,
    "fence": lambda a, b, c: 2 * (a + b) * c,
    "vans": lambda a, b, c, d: (a + b) / c * d,
}
# Where phrasings differ in their order: a word that tells the first from the second
BY_WORD = {
    "subtract": (("Subtract", lambda a, b: b - a), ("", lambda a, b: a - b)),
    "change_unknown": (("gave", lambda a, b: b - a), ("", lambda a, b: a - b)),
    "packing": (("sells", lambda a, b: b / a), ("", lambda a, b: a / b)),
    "unit_price": (
        ("If", lambda a, b: b / a),
        ("group", lambda a, b: b / a),
        ("", lambda a, b: a / b),
    ),
    "change": (("had", lambda a, b: a - b), ("", lambda a, b: b - a)),
    "groups_and_more": (("drawer", lambda a, b, c: a + b * c), ("", lambda a, b, c: a * b + c)),
    "buy_and_change": (("had", lambda a, b, c: a - b * c), ("", lambda a, b, c: c - a * b)),
    "two_items": (("", lambda a, b, c: c - a - b),),
    "wage_and_tips": (("baby", lambda a, b, c: a * c + b), ("", lambda a, b, c: a * b + c)),
    "two_kinds_and_change": (
        ("had", lambda a, b, c, d, e: a - b * c - d * e),
        ("", lambda a, b, c, d, e: e - a * b - c * d),
    ),
    "wages_and_purchase": (("", lambda a, b, c, d: a * b * c - d),),
    "profit": (
        ("Making", lambda a, b, c, d: a * (b - c) - d),
        ("", lambda a, b, c, d: a * (c - b) - d),
    ),
    "sale": (("", lambda a, b, c: a * (1 - b / 100) + c),),
    "party": (("", lambda a, b, c, d: a * b - c * d),),
    "rest_of_a_book": (("", lambda a, b, c, d: (a - b * c) / d),),
    "tank": (
        ("fit in", lambda a, b, c, d: a - b - c * d),
        ("", lambda a, b, c, d: a - b - c * d),
    ),
}
IN_WORDS = {
    **{"twice": 2, "half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6},
}
NUMBER = re.compile(rf"\d+|\b(?:{'|'.join(IN_WORDS)})\b", re.IGNORECASE)
SLOTS = {"{A}": r"[A-Z]\w+", "{A's}": r"[A-Z]\w+'s", "{his}": r"\w+", "{x}": r"\d+"}


def pattern(sentence: str) -> re.Pattern[str]:
    """What finds the sentence, whoever it is about."""
    parts = re.split(r"(\{[^}]+\})", sentence)
    return re.compile("".join(SLOTS.get(part, re.escape(part)) for part in parts) + " ?")


BESIDE = [(topic, pattern(sentence)) for topic, sentence, _ in BESIDE_THE_POINT]
TOPICS = {schema.name: schema.topics for schemas in SCHEMAS.values() for schema in schemas}


def draw(difficulty: str, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [Stories().generate(difficulty, rng) for _ in range(count)]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Problem]]:
    return {difficulty: draw(difficulty, 12_000) for difficulty in DIFFICULTIES}


def to_the_point(problem: Problem) -> str:
    """The question without the sentence beside the point, which only an advanced story may have."""
    if problem.difficulty != "advanced" or problem.solution.count(" = ") > 2:
        return problem.question
    topics = TOPICS[schema_of(problem)]
    found = [
        text
        for topic, sentence in BESIDE
        if topic not in topics
        for text in sentence.findall(problem.question)
    ]
    assert len(found) == 1, problem
    return problem.question.replace(found[0], "")


def numbers_of(text: str) -> list[Fraction]:
    return [Fraction(IN_WORDS.get(word.lower(), word)) for word in NUMBER.findall(text)]


def schema_of(problem: Problem) -> str:
    return problem.id.split("/")[0]


# --- Right --------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_answers_agree_with_arithmetic_on_the_numbers_of_the_question(difficulty, drawn):
    for problem in drawn[difficulty]:
        name, question = schema_of(problem), to_the_point(problem)
        rules = BY_WORD.get(name) or (("", BY_ORDER[name]),)
        rule = next(rule for word, rule in rules if word in question)
        assert rule(*numbers_of(question)) == int(problem.answer) > 0, problem


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_working_is_true_whole_and_ends_in_the_answer(difficulty, drawn):
    for problem in drawn[difficulty]:
        *steps, last = problem.solution.splitlines()
        found = re.findall(r"([$\dx+/ -]+) = \$?(\d+)", "\n".join(steps))
        assert len(found) == len(steps)
        for left, right in found:
            assert eval(left.replace("$", "").replace("x", "*")) == int(right) > 1, problem
        assert found[-1][1] == problem.answer and last == f"#### {problem.answer}"


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_difficulty_is_the_number_of_steps(difficulty, drawn):
    for problem in drawn[difficulty]:
        steps = problem.solution.count(" = ")
        beside = len(to_the_point(problem)) < len(problem.question)
        if difficulty == "advanced":
            assert steps >= 3 or (steps == 2 and beside), problem
        else:
            assert steps == {"basic": 1, "intermediate": 2}[difficulty] and not beside, problem
    if difficulty == "advanced":  # both kinds, and most without
        share = sum(p.solution.count(" = ") == 2 for p in drawn[difficulty]) / 12_000
        assert share == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_task_judges_its_own_solutions(difficulty):
    for problem in make_problems("stories", difficulty, "train", 200):
        assert problem.verify(problem.solution) and problem.verify(f"#### {problem.answer}")
        assert problem.verify(f"So it is ${problem.answer} in all.\n#### ${problem.answer}.")
        assert not problem.verify(f"#### {int(problem.answer) + 1}")
        assert not problem.verify(problem.solution.split("####")[0].replace("=", "is"))
        report = problem.check_steps(problem.solution)
        assert report.score == 1 and report.required == problem.solution.count(" = ")
        assert all(step.valid for step in report.steps)
        assert problem.check_steps(f"#### {problem.answer}").score == 0


def test_a_solution_may_end_as_a_person_would_say_it():
    rng, same = random.Random(4), random.Random(4)
    story = Stories(ending="The answer is {}.").generate("intermediate", rng)
    usual = Stories().generate("intermediate", same)
    assert story.question == usual.question
    assert story.solution.splitlines()[-1] == f"The answer is {story.answer}."
    assert story.solution.splitlines()[:-1] == usual.solution.splitlines()[:-1]
    problem = replace(story, task=Stories())
    for answer_format, read in (("auto", True), ("sentence", True), ("boxed", False)):
        [judged] = with_answer_format([problem], answer_format)
        assert judged.verify(story.solution) is read
        assert judged.check_steps(story.solution).score == 1


# --- Sensible -----------------------------------------------------------------


def test_every_schema_and_every_phrasing_occurs_and_there_are_many(drawn):
    assert {d: len(SCHEMAS[d]) >= 18 for d in DIFFICULTIES} == dict.fromkeys(DIFFICULTIES, True)
    for difficulty in DIFFICULTIES:
        names = [schema.name for schema in SCHEMAS[difficulty]]
        assert len(set(names)) == len(names)
        assert {schema_of(problem) for problem in drawn[difficulty]} >= set(names)
        assert all(len(set(schema.texts)) >= 2 for schema in SCHEMAS[difficulty])
    assert sum(len(schema.texts) for schemas in SCHEMAS.values() for schema in schemas) > 150


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_numbers_are_of_the_size_of_daily_life(difficulty, drawn):
    largest = max(
        int(number) for p in drawn[difficulty] for number in re.findall(r"\d+", p.solution)
    )
    assert largest <= {"basic": 300, "intermediate": 700, "advanced": 3000}[difficulty]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_no_answer_dominates(difficulty, drawn):
    answers = Counter(problem.answer for problem in drawn[difficulty])
    (_, most), *_ = answers.most_common(1)
    assert most / 12_000 < 0.03 and len(answers) > 100


WRONG = [
    r"\b1 (?!hour\b)\w+s\b",  # 1 apples
    r"\b(?:[02-9]|\d\d+) (?:more |new )?(?:apple|box|child|person|penny|foot|shelf|day|week)\b",
    r"\b[Aa] [aeiou]\w+",  # a apple
    r"\b[Aa]n [^aeiouh\s]\w+",  # an plum
    r"\ban? (?:8|11|18)\b",
    r"\b[Tt]hey \w+s\b",
    r"(?<!did )(?<!will )\b(?:[Hh]e|[Ss]he) (?:have|are|were|do|give|pay|buy|pack|drive|want)\b",
    r"[{}\[\]|]",
    r"  | [.,?]|\.\.|\?\?",
    r"(?:^|[.?!] )[a-z]",  # a sentence with a small first letter
    r"\b([A-Za-z]+) \1\b",  # a word twice
    r"\b(?:are|were) 1 |\b1 \w+ (?:are|were|remain)\b",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_no_slip_of_grammar(wrong, drawn):
    pattern = re.compile(wrong)
    for problem in itertools.chain(*(problems[:4000] for problems in drawn.values())):
        for text in (problem.question, *problem.solution.splitlines()[:-1]):
            assert not pattern.search(text), text


@pytest.mark.parametrize(
    "slip",
    [
        *("He has 1 apples.", "She has 2 apple.", "Tom buys a umbrella.", "Tom buys an mug."),
        *("Then they has 3.", "Then she have 3.", "How many {things}?", "How many  apples?"),
        *("Tom has 3 , too.", "He has 3. he has 4.", "How many many apples?", "There are 1 apple."),
    ],
)
def test_the_rules_of_grammar_find_slips(slip):
    assert any(re.search(wrong, slip) for wrong in WRONG)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_pronoun_has_one_person_it_can_mean(difficulty, drawn):
    people = {name: pronoun for pronoun, names in PEOPLE.items() for name in names}
    forms = {"he": "he him his", "she": "she her", "they": "they them their"}
    seen = Counter()
    for problem in drawn[difficulty]:
        words = re.findall(r"[A-Za-z]+", problem.question.replace("'s", ""))
        named = [people[word] for word in dict.fromkeys(words) if word in people]
        seen.update(named[:1])
        for pronoun in ("he", "she"):
            used = set(forms[pronoun].split()) & {word.lower() for word in words}
            assert not used or pronoun in named, problem.question
            assert not used or named.count(pronoun) == 1 or named[0] == pronoun, problem.question
        assert "they" not in named or named == ["they"], problem.question
    assert min(seen.values()) > 300  # he, she and they


def test_the_words():
    assert [
        plural(w) for w in ("box", "cherry", "toy car", "child", "daisy", "peach", "scarf")
    ] == [*("boxes", "cherries", "toy cars", "children", "daisies", "peaches", "scarves")]
    assert plural("person") == "people" and plural("pair of boots") == "pairs of boots"
    assert count(1, "apple") == "1 apple" and count(2, "apple") == "2 apples"
    assert [with_article(w) for w in ("apple", "plum")] == ["an apple", "a plum"]
    assert all(len(set(words)) == len(words) for words in KINDS.values())
    names = [name for group in PEOPLE.values() for name in group]
    assert len(set(names)) == len(names) > 40 and not any(name.endswith("s") for name in names)


def test_the_slots_of_a_template():
    scene = Scene(random.Random(0), "apple")
    scene.words = {"A": "Alex", "B": "Mia", "C": "Tom"}
    scene.pronouns = {"A": "they", "B": "she", "C": "he"}
    filled = scene.fill(
        "{A's} {n thing}: {he has} {m red thing}. {His} {part k}. {B his}", {"n": 1, "m": 2, "k": 3}
    )
    assert filled == "Alex's 1 apple: they have 2 red apples. Their a third. her"
    assert scene.fill("{An thing}, {things}, {times k}", {"k": 2}) == "An apple, apples, twice"
    with pytest.raises(ValueError, match="no slot 'nothing'"):
        scene.fill("{nothing}", {})


def test_a_step_that_is_no_whole_number_above_one_rules_the_numbers_out():
    divide = next(schema for schema in SCHEMAS["basic"] if schema.name == "divide")
    subtract = next(schema for schema in SCHEMAS["basic"] if schema.name == "subtract")
    assert work_out(divide, {"n": 12, "m": 4}) == [3]
    assert work_out(divide, {"n": 13, "m": 4}) == work_out(divide, {"n": 4, "m": 4}) == []
    assert work_out(subtract, {"n": 20, "m": 29}) == work_out(subtract, {"n": 9, "m": 8}) == []


@pytest.mark.parametrize(
    ("difficulty", "largest"), list(zip(DIFFICULTIES, (12, 20, 50), strict=True))
)
def test_small_stories_take_one_step_and_have_small_numbers(difficulty, largest):
    names = {schema.name for schema in SCHEMAS["basic"]}
    assert len(SMALL_STORIES.schemas(difficulty)) >= 12
    assert {schema.name for schema in SMALL_STORIES.schemas(difficulty)} <= names
    rng = random.Random(1)
    problems = [SMALL_STORIES.generate(difficulty, rng) for _ in range(3000)]
    for problem in problems:
        [result] = re.findall(r"= \$?(\d+)", problem.solution)
        assert result == problem.answer and int(result) <= largest, problem
        assert problem.domain == "small_stories" and problem.id.split("/")[0] in names
    if difficulty != "advanced":  # numbers beside the point may be any
        numbers = [int(n) for p in problems for n in re.findall(r"\d+", p.question)]
        assert max(numbers) <= max(largest, 20)


def test_small_stories_are_enough_to_train_on_and_no_instance_is_in_two_splits():
    for difficulty in DIFFICULTIES:
        splits = [
            {p.question for p in make_problems("small_stories", difficulty, split, 1000)}
            for split in ("train", "eval")
        ]
        assert [len(split) for split in splits] == [1000, 1000] and not splits[0] & splits[1]


# --- Splits -------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_no_instance_is_in_two_splits_whatever_the_words(difficulty, monkeypatch):
    @dataclass(frozen=True)
    class Recording(Stories):
        raw: dict = field(default_factory=dict)

        def generate(self, difficulty, rng):
            problem = super().generate(difficulty, rng)
            self.raw[problem.question] = problem
            return problem

    task = Recording()
    monkeypatch.setitem(TASKS, "stories", task)
    found = {}
    for split in SPLIT_SHARES:
        problems = make_problems("stories", difficulty, split, 1500)
        assert len({problem.question for problem in problems}) == 1500
        raw = [task.raw[problem.question] for problem in problems]
        found[split] = {(schema_of(p), *sorted(numbers_of(to_the_point(p)))) for p in raw}
    assert min(map(len, found.values())) > 500
    for one, other in itertools.combinations(found, 2):
        assert not found[one] & found[other]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_there_are_more_than_ten_thousand_problems_in_each_cell(difficulty, drawn):
    assert len({problem.question for problem in drawn[difficulty]}) > 10_000
    assert len({problem.id for problem in drawn[difficulty]}) > 5_000  # other numbers, not words


def test_the_same_seed_gives_the_same_stories_and_another_seed_others():
    first = make_problems("stories", "advanced", "train", 50, seed=1)
    assert first == make_problems("stories", "advanced", "train", 50, seed=1)
    other = make_problems("stories", "advanced", "train", 50, seed=2)
    assert not {p.question for p in first} & {p.question for p in other}
    assert all(re.fullmatch(r"stories/advanced/[0-9a-f]{10}", p.id) for p in first)


# --- In use -------------------------------------------------------------------


def test_stories_are_chosen_by_name_and_no_default():
    assert "stories" not in DOMAINS and "stories" not in RunConfig().domains
    assert get_task("stories").name == "stories"
    assert {p.domain for p in held_out_problems(1)} == set(DOMAINS)
    training, held_out = load_data(RunConfig(domains=("stories", "lists"), per_cell=2))
    assert training is None and len(held_out) == 2 * 3 * 2
    assert {p.domain for p in held_out} == {"stories", "lists"}
    problems = stage_problems(make_stages()[0], ["stories"], 20, seed=0)
    assert len(problems) == 20 and {p.domain for p in problems} == {"stories"}
    assert not {p.question for p in problems} & {p.question for p in held_out}


def test_the_answer_of_a_solution_is_read_back():
    for problem in draw("advanced", 50):
        assert extract_answer(problem.solution) == problem.answer
