"""Evaluations: paired, repeatable, and read back as written."""

from __future__ import annotations

import dataclasses
import gzip

import pytest

from cpugrpo_edu.data import DIFFICULTIES, Episode, Group
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.record.evaluations import load_evaluation, save_evaluation
from cpugrpo_edu.record.stats import working_share
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.tasks import DOMAINS, held_out_problems, split_of


@pytest.fixture(scope="module")
def problems():
    return held_out_problems(1)


def greedy(max_new_tokens, seed=0):
    return Sampling(max_new_tokens, temperature=0.0, seed=seed)


def without_time(evaluation):
    return dataclasses.replace(evaluation, seconds=0.0)


def test_held_out_problems_are_the_same_for_all_and_of_the_evaluation_split(problems):
    assert [(p.domain, p.difficulty) for p in problems] == [
        (domain, difficulty) for domain in DOMAINS for difficulty in DIFFICULTIES
    ]
    assert {split_of(p.question) for p in problems} == {"eval"}
    assert problems == held_out_problems(1)
    assert {p.domain for p in held_out_problems(1, ["lists"])} == {"lists"}
    with pytest.raises(UserError, match="per_cell is 0"):
        held_out_problems(0)


def test_items_keep_the_order_of_the_problems(tiny_policy, problems):
    """Answer each prompt from its own text; only the right pairing scores."""

    def oracle(model, prompts, copies, sampling, **options):
        encode = tiny_policy.tokenizer.encode
        groups = []
        for prompt, problem in zip(prompts, problems, strict=True):
            assert problem.question in tiny_policy.tokenizer.decode(prompt)
            index = problems.index(problem)
            text = problem.solution if index % 2 else "#### no"
            tokens = encode(text) + [2] * (index % 3 == 0)
            groups.append(Group(prompt, [Episode(tokens, [0.0] * len(tokens), index % 3 == 0)]))
        return groups

    result = evaluate(dataclasses.replace(tiny_policy, sampler=oracle), problems, "oracle")
    assert result.item_ids == [p.id for p in problems]
    assert result.domains == [p.domain for p in problems]
    assert result.difficulties == [p.difficulty for p in problems]
    assert result.correct == [bool(i % 2) for i in range(12)]
    assert result.step_score == [float(i % 2) for i in range(12)]
    assert result.finished == [i % 3 == 0 for i in range(12)]
    assert result.completions[1] == problems[1].solution  # special tokens are left out
    share = working_share(result)
    assert share == {
        "n": 12,
        "share_with_working": 0.5,
        "accuracy_with_working": 1.0,
        "accuracy_bare": 0.0,
    }


def test_greedy_is_deterministic_and_one_problems_result_does_not_depend_on_the_others(
    tiny_policy, problems
):
    first = evaluate(tiny_policy, problems, "a", greedy(8))
    again = evaluate(tiny_policy, problems, "a", greedy(8, seed=0))
    assert without_time(first) == without_time(again)
    back = evaluate(tiny_policy, problems[::-1], "a", greedy(8))
    assert back.completions[::-1] == first.completions
    assert back.item_ids[::-1] == first.item_ids
    assert all(1 <= tokens <= 8 for tokens in first.tokens)
    assert first.temperature == 0


def test_sampling_depends_on_the_seed(tiny_policy, problems):
    def sample(seed):
        return evaluate(tiny_policy, problems, "s", Sampling(6, 1.0, seed=seed)).completions

    assert sample(1) == sample(1) != sample(2)


def test_another_model_can_stand_in(tiny_policy, problems):
    class Called(Exception):
        pass

    class StandIn:
        training = False
        config = tiny_policy.model.config
        generation_config = tiny_policy.model.generation_config

        def eval(self):
            raise Called

    with pytest.raises(Called):
        evaluate(dataclasses.replace(tiny_policy, model=StandIn()), problems, "int8")


def test_no_problems_is_an_error(tiny_policy):
    with pytest.raises(UserError, match="no problems"):
        evaluate(tiny_policy, [], "empty")


def test_saved_evaluations_read_back_equal(tiny_policy, problems, tmp_path):
    evaluation = evaluate(tiny_policy, problems, "résumé ×", greedy(3))
    path = save_evaluation(evaluation, tmp_path / "deep" / "e.json.gz")
    assert load_evaluation(path) == evaluation


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        gzip.compress(b"{"),
        gzip.compress(b"[]"),
        gzip.compress(b"{}"),
        gzip.compress(b'{"label": "a", "surprise": 1}'),
        gzip.compress(b"\xff\xfe"),
        gzip.compress(b'{"label": "a"}' * 50)[:-12],
    ],
    ids=range(8),  # the compressed bytes hold the time, and test names must not
)
def test_corrupted_files_are_named(tmp_path, content):
    path = tmp_path / "broken.json.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json\.gz.*cpugrpo evaluate"):
        load_evaluation(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.gz"):
        load_evaluation(tmp_path / "nowhere.gz")


def test_working_share_without_one_kind_has_no_accuracy_for_it(tiny_policy, problems):
    evaluation = evaluate(tiny_policy, problems[:2], "x", greedy(1))
    bare = dataclasses.replace(evaluation, completions=["#### 1", "\n\n#### 2\n"])
    share = working_share(dataclasses.replace(bare, correct=[True, False]))
    assert share["share_with_working"] == 0
    assert share["accuracy_with_working"] is None
    assert share["accuracy_bare"] == 0.5
