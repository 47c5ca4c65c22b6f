"""Whatever comes in, the only exception that goes out is a UserError with one sentence."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cpugrpo_edu.cli.settings import three_numbers
from cpugrpo_edu.curriculum import make_stages
from cpugrpo_edu.data import DIFFICULTIES, Episode, Problem
from cpugrpo_edu.engine.memory import parse_bytes
from cpugrpo_edu.engine.trl_data import trl_rewards
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.evaluations import Evaluation, load_evaluation
from cpugrpo_edu.record.metrics import read_metrics
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.rewards import Reward, parse_rewards
from cpugrpo_edu.run.config import RunConfig, check_settings
from cpugrpo_edu.tasks import DOMAINS, get_task, make_problems
from cpugrpo_edu.tasks.answers import answers_match, extract_answer, normalize_answer, parse_number
from cpugrpo_edu.tasks.custom import load_custom
from cpugrpo_edu.tasks.gsm8k import load_gsm8k
from cpugrpo_edu.tasks.verifiers import load_verifier

FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Text as a model writes it: marks, numbers, operators and steps, besides anything at all
PIECES = st.sampled_from(
    ["####", "#### 12", "=", " ", "\n", "3 * 4 = 12", "(", ")", "1/0", "x", "-", "½", "٣", "1e999"]
)
COMPLETION = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=20).map("".join))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
NUMBER = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 1e308, math.nan, math.inf, 10**400])
)


def result(function, *arguments, **named):
    """What the function gives, or the UserError it raised; any other exception is a failure."""
    try:
        return function(*arguments, **named)
    except UserError as error:
        assert str(error).strip()
        return error


@FUZZ
@given(COMPLETION, COMPLETION)
def test_answers_are_read_from_any_text(completion, reference):
    answer = extract_answer(completion)
    assert answer is None or answer in completion
    assert isinstance(answers_match(answer, reference), bool)
    canonical = normalize_answer(reference)
    if parse_number(reference) is not None:
        assert parse_number(canonical) == parse_number(reference)


@FUZZ
@given(st.sampled_from(DOMAINS), st.integers(0, 50), COMPLETION)
def test_every_verifier_judges_any_completion(domain, seed, completion):
    [problem] = make_problems(domain, "basic", "train", 1, seed)
    task = get_task(domain)
    assert isinstance(task.verify(problem, completion), bool)
    assert 0 <= task.check_steps(problem, completion).score <= 1
    assert task.verify(problem, problem.solution)


ROW = st.fixed_dictionaries(
    {},
    optional={
        key: COMPLETION | JSON
        for key in ("question", "answer", "prompt", "difficulty", "id", "domain")
    },
)
LINES = st.lists(st.one_of(ROW.map(json.dumps), st.text(max_size=40)), max_size=4).map("\n".join)
FILE = LINES.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=80)


@FUZZ
@given(FILE, st.sampled_from([".jsonl", ".json", ".parquet"]))
@example(b"[" * 100_000, ".jsonl")
@example(b'{"question": "a", "answer": "#### ' + b"9" * 5000 + b'"}', ".jsonl")
def test_data_files_of_any_bytes(tmp_path, content, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    problems = result(load_gsm8k, path)
    assert isinstance(problems, UserError) or all(problem.answer for problem in problems)
    if suffix != ".parquet":
        result(load_custom, path, lambda problem, completion: True)
        result(load_custom, path)


@FUZZ
@given(st.text(max_size=30))
@example("-" * 5000)
def test_flags_of_any_text(text):
    for kind in (int, float):
        read = result(three_numbers, text, kind)
        assert isinstance(read, UserError) or len(read) == 3
    size = result(parse_bytes, text)
    assert isinstance(size, UserError) or size >= 0
    terms = result(parse_rewards, text)
    assert isinstance(terms, UserError) or any(term.weight for term in terms)
    result(load_verifier, text)


@FUZZ
@given(
    st.text(max_size=12) | st.sampled_from(["curriculum", "mixed"]),
    st.lists(st.integers(-3, 9), max_size=4),
    NUMBER,
)
def test_stages_of_any_settings(order, steps, replay):
    stages = result(make_stages, order, steps=steps, learning_rates=[1e-4] * 3, replay=replay)
    if not isinstance(stages, UserError):
        assert all(math.isclose(sum(stage.mixture.values()), 1) for stage in stages)


@FUZZ
@given(st.data())
def test_run_settings_of_any_value(data):
    """One or two settings changed to anything of the type that the command line would give."""
    changed = {}
    for item in data.draw(st.lists(st.sampled_from(dataclasses.fields(RunConfig)), max_size=2)):
        default = getattr(RunConfig(), item.name)
        if isinstance(default, bool):
            values = st.booleans()
        elif isinstance(default, int):
            values = st.integers(-(10**12), 10**12)
        elif isinstance(default, float):
            values = st.floats()
        elif isinstance(default, str):
            values = st.text(max_size=12)
        elif item.type == "tuple[str, ...]":
            word = st.sampled_from((*DOMAINS, *DIFFICULTIES)) | st.text(max_size=5)
            values = st.lists(word, max_size=3).map(tuple)
        elif isinstance(default, tuple):
            pick = NUMBER if isinstance(default[0], float) else st.integers(-9, 10**7)
            values = st.tuples(pick, pick, pick)
        else:
            values = st.none()
        changed[item.name] = data.draw(values, label=item.name)
    result(check_settings, RunConfig(**changed))


RECORD = {
    "kind": "run",
    "created": "now",
    "seed": 0,
    "commit": "c",
    "machine": {},
    "versions": {},
    "config": {},
    "results": {},
}


@FUZZ
@given(
    st.one_of(
        st.binary(max_size=60),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.tuples(st.sampled_from(sorted(RECORD)), JSON).map(
            lambda change: json.dumps({**RECORD, change[0]: change[1]}).encode()
        ),
    )
)
@example(b"[" * 100_000)
def test_record_files_of_any_bytes(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    record = result(RunRecord.load, path)
    assert isinstance(record, (UserError, RunRecord))
    for packed in (content, gzip.compress(content), gzip.compress(content)[:-4]):
        path.write_bytes(packed)
        assert isinstance(result(load_evaluation, path), (UserError, Evaluation))
    if len(content) < 10_000:
        path.write_bytes(content)
        assert isinstance(result(read_metrics, path), (UserError, list))


def through_trl(function, count):
    """What TRL gets from the reward function for ``count`` completions of one problem."""
    problem = Problem("p", "lists", "basic", "?", "a")
    [reward] = trl_rewards([Reward("mine", function)], [problem])
    return reward(["c"] * count, ["p"] * count)


@FUZZ
@given(st.one_of(JSON, NUMBER, st.lists(NUMBER, max_size=4)), st.integers(1, 4))
def test_rewards_of_any_value(returned, count):
    """A reward function may return anything: the run gets finite numbers or one sentence."""
    rewards = result(through_trl, lambda problem, episode: returned, count)
    if not isinstance(rewards, UserError):
        assert len(rewards) == count
        assert all(math.isfinite(reward) for reward in rewards if reward is not None)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (math.nan, "gave nan for problem 'p'; return a finite number"),
        ([1.0, 1.0], "gave [1.0, 1.0] for problem 'p'; return a finite number"),
        (10**400, "gave 1000"),
        ([1.0], "gave [1.0] for problem 'p'"),
        ("good", "gave 'good' for problem 'p'"),
    ],
)
def test_a_bad_reward_ends_with_one_sentence(returned, words):
    mine = Reward("mine", lambda problem, episode: returned)
    for judge in (
        lambda: mine(Problem("p", "lists", "basic", "?", "a"), Episode(text="c")),
        lambda: through_trl(mine.function, 2),
    ):
        with pytest.raises(UserError) as caught:
            judge()
        assert words in str(caught.value) and "reward mine" in str(caught.value)
