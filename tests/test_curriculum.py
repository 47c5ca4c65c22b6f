"""Stages, their mixtures, and the data sets made from them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpugrpo_edu.curriculum import Stage, make_stages, stage_problems
from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.rewards import parse_rewards
from cpugrpo_edu.run.data import select_problems
from cpugrpo_edu.tasks import DOMAINS, make_problems, split_of
from cpugrpo_edu.tasks.complexity import complexity


def test_curriculum_goes_up_and_reversed_goes_down():
    up = make_stages("curriculum", steps=(1, 2, 3), learning_rates=(0.1, 0.2, 0.3), replay=0.2)
    down = make_stages("reversed", steps=(1, 2, 3), learning_rates=(0.1, 0.2, 0.3), replay=0.2)
    assert [stage.name for stage in up] == list(DIFFICULTIES)
    assert [stage.name for stage in down] == list(DIFFICULTIES)[::-1]
    for stages in (up, down):  # steps and learning rates belong to the position, not the name
        assert [(s.steps, s.learning_rate) for s in stages] == [(1, 0.1), (2, 0.2), (3, 0.3)]
        for stage in stages:
            assert stage.mixture[stage.name] == pytest.approx(0.8)
            assert sorted(stage.mixture.values())[:2] == pytest.approx([0.1, 0.1])


def test_mixed_draws_all_alike_and_replay_zero_draws_one():
    for stage in make_stages("mixed", replay=0.9):
        assert stage.mixture == pytest.approx(dict.fromkeys(DIFFICULTIES, 1 / 3))
    assert len({stage.name for stage in make_stages("mixed")}) == 3
    for stage in make_stages(replay=0):
        assert stage.mixture == {d: float(d == stage.name) for d in DIFFICULTIES}


@settings(max_examples=30)
@given(st.sampled_from(["curriculum", "mixed", "reversed"]), st.floats(0, 0.99))
def test_mixtures_sum_to_one(order, replay):
    for stage in make_stages(order, replay=replay):
        assert sum(stage.mixture.values()) == pytest.approx(1)
        assert min(stage.mixture.values()) >= 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"order": "random"}, "'random'.*curriculum, mixed, reversed"),
        ({"steps": (1, 2)}, r"\[1, 2\].*three"),
        ({"steps": (0, 0, 0)}, r"\[0, 0, 0\].*at least one step"),
        ({"steps": (5, -1, 5)}, r"\[5, -1, 5\]"),
        ({"learning_rates": (1e-4,)}, r"\[0.0001\].*three"),
        ({"replay": 1.0}, "replay is 1.0"),
        ({"replay": -0.1}, "replay is -0.1"),
        ({"replay": float("nan")}, "replay is nan"),
    ],
)
def test_bad_stages_are_refused(arguments, names):
    with pytest.raises(UserError, match=names):
        make_stages(**arguments)


@pytest.mark.parametrize("order", ["curriculum", "mixed"])
def test_every_stretch_is_close_to_the_mixture(order):
    stage = make_stages(order, replay=0.3)[1]
    problems = stage_problems(stage, DOMAINS, 120, seed=4)
    assert len({p.question for p in problems}) == 120
    assert {split_of(p.question) for p in problems} == {"train"}
    for start in range(0, 100, 10):
        stretch = Counter(p.difficulty for p in problems[start : start + 20])
        for difficulty in DIFFICULTIES:
            assert stretch[difficulty] / 20 == pytest.approx(stage.mixture[difficulty], abs=0.2)
    whole = Counter((p.domain, p.difficulty) for p in problems)
    for (_, difficulty), count in whole.items():
        assert count == pytest.approx(120 * stage.mixture[difficulty] / len(DOMAINS), abs=1.5)
    assert len(whole) == 12


def test_without_replay_only_the_stages_difficulty_and_the_asked_domains_come():
    stage = make_stages(replay=0)[2]
    problems = stage_problems(stage, ["lists", "algebra"], 11, seed=0)
    assert {(p.domain, p.difficulty) for p in problems} == {
        ("lists", "advanced"),
        ("algebra", "advanced"),
    }
    assert problems == stage_problems(stage, ["lists", "algebra"], 11, seed=0)
    assert problems != stage_problems(stage, ["lists", "algebra"], 11, seed=1)


def test_unknown_difficulty_or_domain_in_a_stage():
    with pytest.raises(UserError, match="'hard'"):
        stage_problems(Stage("s", {"hard": 1.0}, 1, 1e-4), ["lists"], 4, 0)
    with pytest.raises(UserError, match="'poetry'"):
        stage_problems(make_stages()[0], ["poetry"], 4, 0)


def fixed(count: int = 30) -> list[Problem]:
    words = "one two three four five six seven"
    return [
        Problem(f"{d}{i}", "gsm8k", d, words[: 3 + i % 30] + f" {i}+{i}?", str(2 * i))
        for d in DIFFICULTIES
        for i in range(count)
    ]


def test_a_fixed_set_is_mixed_cycled_and_shuffled():
    stage = make_stages(replay=0.2)[0]
    chosen = select_problems(stage, fixed(), 50)
    assert Counter(p.difficulty for p in chosen) == {"basic": 40, "intermediate": 5, "advanced": 5}
    beginning = Counter(
        p.difficulty for p in select_problems(make_stages("mixed")[0], fixed(), 90)[:30]
    )
    assert min(beginning[x] for x in ("basic", "intermediate", "advanced")) >= 4
    basics = [p.id for p in chosen if p.difficulty == "basic"]
    assert len(set(basics)) == 30  # more than the pool holds: every one comes, some twice
    later = select_problems(stage, fixed(), 10, offset=8)
    early = select_problems(stage, fixed(), 10)
    assert not {p.id for p in later if p.difficulty == "basic"} & {p.id for p in early}


def without(*lacking: str) -> list[Problem]:
    return [p for p in fixed() if p.difficulty not in lacking]


def test_difficulties_that_a_fixed_set_lacks_give_their_share_to_the_others():
    stage = make_stages(replay=0.5)[0]  # 1/2, 1/4, 1/4
    chosen = select_problems(stage, without("advanced"), 12)
    assert Counter(p.difficulty for p in chosen) == {"basic": 8, "intermediate": 4}
    chosen = select_problems(stage, without("basic"), 12)
    assert Counter(p.difficulty for p in chosen) == {"intermediate": 6, "advanced": 6}


@pytest.mark.parametrize("replay", [0, 0.3])
@pytest.mark.parametrize("index", range(3))
def test_every_stage_of_a_fixed_set_takes_what_there_is(replay, index):
    stage = make_stages(replay=replay)[index]
    for others in (DIFFICULTIES[1:], DIFFICULTIES[:2]):
        chosen = select_problems(stage, without(*others), 12)
        assert len({p.id for p in chosen}) == 12
    with pytest.raises(UserError, match="training data is empty; give at least one"):
        select_problems(stage, [], 12)


@given(
    st.sampled_from(["curriculum", "mixed", "reversed"]),
    st.floats(0, 0.99),
    st.integers(0, 2),
    st.integers(1, 40),
)
def test_a_fixed_set_keeps_to_the_mixture_at_any_count(order, replay, index, count):
    stage = make_stages(order, replay=replay)[index]
    found = Counter(p.difficulty for p in select_problems(stage, fixed(), count))
    assert found.total() == count
    for difficulty, share in stage.mixture.items():
        assert abs(found[difficulty] - share * count) < 1 + 1e-9


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("", 0),
        ("how are you", 3),
        ("Compute 7+5*3-4.", 2 + 2 * 3 + 1.5 * 4),
        ("Compute ((2+3)*4).", 2 + 2 * 2 + 1.5 * 3 + 3 * 2),
        ("(a) (b)", 2 + 3),  # depth, not the number of brackets
        ("2.5 %", 2 + 2 + 1.5),
        (")))", 1),
    ],
)
def test_complexity_by_hand(question, expected):
    assert complexity(question) == expected


def test_complexity_grows_with_each_part():
    base = complexity("Compute 7+5.")
    for harder in ("Compute 7+5+6.", "Please compute 7+5.", "Compute (7+5).", "Compute 7+5*1."):
        assert complexity(harder) > base


@pytest.mark.parametrize("domain", ["arithmetic", "algebra", "lists"])
def test_mean_complexity_rises_with_difficulty(domain):
    means = []
    for difficulty in DIFFICULTIES:
        problems = make_problems(domain, difficulty, "train", 40)
        means.append(sum(complexity(p.question) for p in problems) / 40)
    assert means == sorted(means)
    assert len(set(means)) == 3


def test_to_dataset_has_a_conversation_and_the_id_by_which_rewards_find_the_problem():
    problems = make_problems("lists", "basic", "train", 3)
    data = to_dataset(iter(problems), system="Be brief.")
    assert set(data.column_names) == {"prompt", "problem_id"}
    for row, problem in zip(data, problems, strict=True):
        assert row["prompt"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": problem.question},
        ]
        assert row["problem_id"] == problem.id
        [reward] = trl_rewards(parse_rewards("correct_answer=1"), problems)
        columns = {"completions": [problem.solution, "#### no"], "problem_id": [problem.id] * 2}
        assert reward(prompts=[row["prompt"]] * 2, **columns) == [1.0, 0.0]
    assert [m["role"] for m in to_dataset(problems)[0]["prompt"]] == ["user"]
