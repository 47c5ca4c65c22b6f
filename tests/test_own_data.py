"""Data and verifiers as other people have them: shapes of rows, habits of verifiers."""

from __future__ import annotations

import asyncio
import csv
import json
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from command_line import invoke

from cpugrpo_edu.data import Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.run.data import load_data
from cpugrpo_edu.tasks import prompt_messages
from cpugrpo_edu.tasks.answers import answers_match
from cpugrpo_edu.tasks.custom import Custom, load_custom, try_verifier
from cpugrpo_edu.tasks.rows import read_rows, splits
from cpugrpo_edu.tasks.verifiers import load_verifier

SUMS = [(a, b) for a in range(2, 12) for b in (5, 9)]


def question(a, b):
    return f"What is {a} + {b}?"


def user(text):
    return [{"role": "user", "content": text}]


def plain():
    return [{"prompt": question(a, b), "answer": str(a + b)} for a, b in SUMS]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_array(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path


def chat(a, b, **more):
    return {"prompt": user(question(a, b)), **more}


SHAPES = {
    "plain": [{"prompt": question(a, b), "answer": a + b} for a, b in SUMS],
    "question": [{"question": question(a, b), "answer": str(a + b)} for a, b in SUMS],
    "chat": [chat(a, b, answer=str(a + b)) for a, b in SUMS],
    "chat with its answer": [
        {"messages": [*user(question(a, b)), {"role": "assistant", "content": str(a + b)}]}
        for a, b in SUMS
    ],
    "Alpaca": [{"instruction": question(a, b), "input": "", "output": str(a + b)} for a, b in SUMS],
    "verl": [
        chat(a, b, data_source="sums", reward_model={"style": "rule", "ground_truth": str(a + b)})
        for a, b in SUMS
    ],
    "GSM8K under prompt": [
        {"prompt": question(a, b), "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a, b in SUMS
    ],
    "boxed": [{"prompt": question(a, b), "answer": rf"\boxed{{{a + b}}}"} for a, b in SUMS],
    "tags": [{"prompt": question(a, b), "answer": f"<answer>{a + b}</answer>"} for a, b in SUMS],
    "dollars": [{"prompt": question(a, b), "answer": f"${a + b}$"} for a, b in SUMS],
    "sentence": [{"prompt": question(a, b), "answer": f"The answer is {a + b}."} for a, b in SUMS],
    "equation": [{"question": question(a, b), "answer": f"{a}+{b}={a + b}"} for a, b in SUMS],
    "MATH": [
        {"problem": question(a, b), "solution": rf"We add. \boxed{{{a + b}}}"} for a, b in SUMS
    ],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_the_same_problems(tmp_path, name):
    problems = load_custom(write_jsonl(tmp_path / "a.jsonl", SHAPES[name]))
    assert [p.question for p in problems] == [question(a, b) for a, b in SUMS]
    for problem, (a, b) in zip(problems, SUMS, strict=True):
        assert prompt_messages(problem) == user(question(a, b))
        assert answers_match(str(a + b), problem.answer)
        assert problem.verify(f"So:\n#### {a + b}") and not problem.verify(f"So:\n#### {a - b}")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", write_array),
        ("a.json", write_jsonl),
        ("a.csv", write_csv),
        ("a.tsv", lambda path, rows: write_csv(path, rows, "\t")),
        ("a.parquet", write_parquet),
    ],
)
def test_every_file_gives_the_same_rows(tmp_path, name, write):
    wanted = load_custom(write_jsonl(tmp_path / "b.jsonl", plain()))
    assert load_custom(write(tmp_path / name, plain())) == wanted
    training, held_out = load_data(RunConfig(data=str(tmp_path / name)))
    assert {p.question for p in (*training, *held_out)} == {p.question for p in wanted}


def test_a_cell_keeps_its_commas_lines_and_zeros(tmp_path):
    rows = [{"prompt": 'Say "a, b"\nor 1.50', "answer": "007.50"}]
    (problem,) = load_custom(write_csv(tmp_path / "a.csv", rows))
    assert (problem.question, problem.answer) == (rows[0]["prompt"], "007.50")
    (tmp_path / "short.csv").write_text("prompt,answer\na,1\nb\n")
    with pytest.raises(UserError, match="row 3 of .*short.csv is not CSV"):
        load_custom(tmp_path / "short.csv")


def test_columns_can_be_named_and_an_error_names_those_that_there_are(tmp_path):
    rows = [{"Q": question(a, b), "meta": {"gold": a + b}} for a, b in SUMS]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    problems = load_custom(file, prompt_column="Q", answer_column="meta.gold")
    assert problems[0].question == question(2, 5) and problems[0].answer == "7"
    config = RunConfig(data=str(file), prompt_column="Q", answer_column="meta.gold")
    assert {p.answer for part in load_data(config) for p in part} == {p.answer for p in problems}
    with pytest.raises(UserError, match="its keys are 'Q', 'meta': name .* --prompt-column"):
        load_custom(file)
    with pytest.raises(UserError, match="nothing under 'gold'; .*'Q', 'meta': .* --answer-column"):
        load_custom(file, prompt_column="Q", answer_column="gold")
    with pytest.raises(UserError, match="no answer .*its keys are Q, meta: .* --answer-column"):
        load_custom(file, prompt_column="Q")


def test_a_conversation_reaches_the_model_whole(tmp_path):
    talk = [
        {"role": "system", "content": "Be brief."}, *user("What is 1 + 1?"),
        {"role": "assistant", "content": "2"}, *user("And one more?"),
    ]  # fmt: skip
    rows = [{"prompt": talk, "answer": 3}, {"prompt": user("Hi."), "answer": 1}]
    own, other = load_custom(write_jsonl(tmp_path / "a.jsonl", rows))
    assert own.question == "And one more?" and prompt_messages(own, "Ours.") == talk
    assert prompt_messages(other, "Ours.") == [{"role": "system", "content": "Ours."}, *user("Hi.")]


# Folders with splits


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "saved"])
@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_split_to_evaluate_on_is_left_whole(tmp_path, monkeypatch, suffix, test):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    parts = {"train": plain()[:15], test: plain()[15:]}
    if suffix == "saved":
        made = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
        datasets.DatasetDict(made).save_to_disk(folder)
    else:
        write = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[suffix]
        for name, rows in parts.items():
            write(folder / f"{name}.{suffix}", rows)
    assert sorted(splits(folder)) == sorted(parts)
    training, held_out = load_data(RunConfig(data=str(folder)))
    for problems, rows in ((training, parts["train"]), (held_out, parts[test])):
        assert [(p.question, p.answer) for p in problems] == [
            (row["prompt"], row["answer"]) for row in rows
        ]
    with pytest.raises(UserError, match=f"holds no split 'nothing'; it has .*{test}"):
        list(read_rows(folder, "nothing"))


def test_a_folder_of_one_split_is_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "data" / "train.jsonl", plain())
    training, held_out = load_data(RunConfig(data=str(tmp_path / "data")))
    assert held_out and len(training) + len(held_out) == len(SUMS)


# Verifiers of other habits

JUDGES = """
import re
from my_helpers_of_a_test import last_number

def helper(problem, completion):
    from more_of_a_test import same
    return same(last_number(completion), problem.answer)

def numpy_bool(problem, completion):
    import numpy as np
    found = last_number(completion)
    return np.isclose(float(found), float(problem.answer)) if found else np.bool_(False)

def numpy_float(problem, completion):
    import numpy as np
    return np.float32(last_number(completion) == problem.answer)

def torch_score(problem, completion):
    import torch
    return torch.tensor(1.0 if last_number(completion) == problem.answer else 0.0)

def none_if_unsure(problem, completion):
    return True if last_number(completion) == problem.answer else None

async def with_async(problem, completion):
    return last_number(completion) == problem.answer

def trl(prompts, completions, answer, **kwargs):
    assert isinstance(prompts[0], str) and isinstance(completions[0], str)
    return [float(last_number(c) == str(a)) for c, a in zip(completions, answer)]

def trl_without_prompts(completions, answer, tag):
    return [None if last_number(c) != str(a) else 1.0 for c, a in zip(completions, answer)]

async def trl_async(completions, answer, **kwargs):
    return [float(last_number(c) == str(a)) for c, a in zip(completions, answer)]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and extra_info == {"index": 0}
    return float(last_number(solution_str) == ground_truth)

def verl_dict(solution_str, ground_truth, **more):
    return {"score": float(last_number(solution_str) == ground_truth), "acc": 1}

def columns(problem, completion):
    return last_number(completion) == str(problem.target + 0) == str(sum(problem["nums"]))
"""

HELPERS = """
import re

def last_number(text):
    found = re.findall(r"-?\\d+", text)
    return found[-1] if found else None
"""


@pytest.fixture
def judges(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_helpers_of_a_test.py").write_text(HELPERS)
    (tmp_path / "more_of_a_test.py").write_text("def same(a, b):\n    return a == b\n")
    (tmp_path / "judges.py").write_text(JUDGES)
    yield tmp_path / "judges.py"
    for name in ("my_helpers_of_a_test", "more_of_a_test", "cpugrpo_verifier_judges"):
        sys.modules.pop(name, None)


def habits():
    return [line.split("(")[0].split()[-1] for line in JUDGES.splitlines() if "def " in line]


@pytest.fixture
def rows(tmp_path):
    row = {"prompt": "What is 3 + 4?", "answer": 7, "target": 7, "nums": [3, 4], "tag": "x"}
    row |= {"data_source": "sums", "extra_info": {"index": 0}}
    return write_jsonl(tmp_path / "rows.jsonl", [row])


@pytest.mark.parametrize("name", habits())
def test_every_habit_gives_the_same_grades(judges, rows, name):
    (problem,) = load_custom(rows, f"{judges}:{name}")
    try_verifier([problem])
    assert [problem.grade(text) for text in ("It is 7", "It is 8", "hm")] == [1.0, 0.0, 0.0]


def test_async_works_where_a_loop_is_running_as_in_a_notebook(judges, rows):
    (problem,) = load_custom(rows, f"{judges}:with_async")

    async def cell():
        return problem.grade("It is 7"), problem.grade("8")

    assert asyncio.run(cell()) == (1.0, 0.0)


def test_trl_functions_get_messages_where_the_data_have_them(tmp_path):
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [1.0]

    (problem,) = load_custom(write_jsonl(tmp_path / "a.jsonl", [chat(1, 2, level="easy")]), reward)
    assert problem.verify("3")
    said = [[{"role": "assistant", "content": "3"}]]
    assert seen == [([user(question(1, 2))], said, {"answer": [""], "level": ["easy"]})]


REFUSED = {
    "negative": (
        "def j(problem, completion): return 1 if '7' in completion else -1",
        "returned -1",
    ),
    "above 1": ("def j(problem, completion): return 2 * ('7' in completion)", "returned 2"),
    "a column": (
        "def j(completions, gold): return [1.0]",
        "verifier j needs gold, which the data do not have; their columns are answer, prompt",
    ),
    "no list": ("def j(completions, **kwargs): return 1.0", "returned 1.0 for one completion"),
    "two": ("def j(completions, **kwargs): return [1, 1]", "return a list with one number"),
    "one argument": ("def j(completion): return 1", "must take two arguments.*TRL.*verl"),
    "no such column": (
        "def j(problem, completion): return problem.goal",
        "no column 'goal' in the",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_grade_is_refused_before_anything_is_evaluated(name, tmp_path, tiny_folder):
    code, words = REFUSED[name]
    (tmp_path / "j.py").write_text(code)
    rows = [{"prompt": f"What is 3 + 4, {i}?", "answer": "7"} for i in range(40)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    config = RunConfig(data=str(data), verifier=f"{tmp_path / 'j.py'}:j")
    with pytest.raises(UserError, match=words):
        load_data(config)
    status, _, err = invoke(
        "run", "-q", "--model", tiny_folder, "--data", data, "--verifier", config.verifier,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_builtin_and_a_problem_without_columns():
    problem = Problem("1", "custom", "basic", "?", "7", task=Custom(lambda problem, text: True))
    assert problem.verify("anything")
    with pytest.raises(UserError, match="no Python file"):
        load_verifier("nowhere.py:judge")
