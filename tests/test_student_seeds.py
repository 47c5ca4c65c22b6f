"""Seeds that differ by student, repeat at every regrading, and keep the secret."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import pytest

from cpugrpo_edu.course import student_seeds
from cpugrpo_edu.course.peers import peer_reviews
from cpugrpo_edu.errors import UserError


def seed_of_a_process(**settings: str) -> tuple[int, str]:
    """The seed that a new process draws, and the settings still in its environment."""
    code = (
        "import os; from cpugrpo_edu.course.student_seeds import student_seed as s; "
        "print(s('ps1-kl')); "
        "print(sorted(k for k in os.environ if k in "
        "('CPUGRPO_STUDENT_KEY', 'CPUGRPO_COURSE_SECRET')))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CPUGRPO_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | settings, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(done.stderr)
    seed, left = done.stdout.splitlines()
    return int(seed), left


def test_key_is_reproducible_and_differs() -> None:
    pairs = [("s", "ada"), ("s", "alan"), ("t", "ada")]
    keys = [student_seeds.student_key(*pair) for pair in pairs]
    assert keys == [student_seeds.student_key(*pair) for pair in pairs]
    assert all(a != b for a, b in combinations(keys, 2))
    assert len(bytes.fromhex(keys[0])) == 32


@pytest.mark.parametrize("pair", [("", "ada"), ("s", "")])
def test_empty_secret_or_student(pair: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="must not be empty"):
        student_seeds.student_key(*pair)


def test_seeds_differ_by_label_and_student(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for who in ("ada", "alan"):
        key = bytes.fromhex(student_seeds.student_key("s", who))
        monkeypatch.setattr(student_seeds, "_key", key)
        seeds += [student_seeds.student_seed(label) for label in ("ps1-kl", "ps1-clip")]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_both_ways_to_set_the_key_agree_and_are_taken_away() -> None:
    by_secret = seed_of_a_process(CPUGRPO_COURSE_SECRET="s", CPUGRPO_STUDENT_ID="ada")
    by_key = seed_of_a_process(CPUGRPO_STUDENT_KEY=student_seeds.student_key("s", "ada"))
    own_run = seed_of_a_process()
    assert by_secret == by_key
    assert own_run[0] != by_key[0]
    assert {by_secret[1], own_run[1]} == {"[]"}


@pytest.mark.parametrize(
    "settings", [{"CPUGRPO_STUDENT_KEY": "xyz"}, {"CPUGRPO_COURSE_SECRET": "s"}]
)
def test_a_half_set_key_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"not hexadecimal|student id is ''"):
        seed_of_a_process(**settings)


def test_peers_review_once_and_never_themselves() -> None:
    students = [f"student{i}" for i in range(30)]
    reviews = peer_reviews(students, "secret")
    assert reviews == peer_reviews(students[::-1], "secret")
    assert sorted(r.reviewer for r in reviews) == sorted(r.author for r in reviews)
    assert len({r.reviewer for r in reviews}) == len({r.code for r in reviews}) == 30
    assert all(r.reviewer != r.author for r in reviews)
    author = {r.reviewer: r.author for r in reviews}
    assert all(author[author[who]] != who for who in students), "no two review each other"
    assert {(r.reviewer, r.author) for r in reviews} != {
        (r.reviewer, r.author) for r in peer_reviews(students, "other")
    }


@pytest.mark.parametrize("students", [["a", "b"], ["a", "b", "c", "a"]])
def test_peers_refuse_a_bad_roster(students: list[str]) -> None:
    with pytest.raises(UserError, match="fix the roster"):
        peer_reviews(students, "secret")
