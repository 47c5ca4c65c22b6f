"""GSM8K-format and custom prompts: what loads, how steps are checked, what is refused."""

import json
import sys
from dataclasses import replace
from fractions import Fraction

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpugrpo_edu.data import Episode, Group, Problem
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.rewards import Reward, correct_answer, give_rewards, parse_rewards, valid_steps
from cpugrpo_edu.tasks import get_task
from cpugrpo_edu.tasks.answers import exact_match
from cpugrpo_edu.tasks.custom import Custom, CustomProblem, load_custom
from cpugrpo_edu.tasks.gsm8k import GSM8K, load_gsm8k
from cpugrpo_edu.tasks.prose import _evaluate, check_prose
from cpugrpo_edu.tasks.rows import read_jsonl
from cpugrpo_edu.tasks.verifiers import load_verifier

ROWS = [
    {
        "question": "Ana fills 4 jars with 6 plums each and eats 5. How many plums are left?",
        "answer": "She fills the jars with 4*6=<<4*6=24>>24 plums.\n"
        "Then 24-5=<<24-5=19>>19 plums are left.\n#### 19",
    },
    {
        "question": "A van rents for $450 a day. What do 3 days cost after a coupon of $350?",
        "answer": "The days cost 450*3=$<<450*3=1350>>1,350.\nThe coupon takes off $350.\n"
        "So she pays 1350-350=$<<1350-350=1000>>1,000.\n#### 1,000",
    },
    {
        "question": "Half of a class of 30 walks, a third of the rest cycles. How many cycle?",
        "answer": "30/2=<<30/2=15>>15 walk.\n30-15=<<30-15=15>>15 are left.\nA third cycles.\n"
        "15/3=<<15/3=5>>5\nSo 5 children cycle.\n#### 5",
    },
]


def score(function, problem, *completions):
    """What each completion of the problem earns."""
    reward = Reward(function.__name__, function)
    return [reward(problem, Episode(text=completion)) for completion in completions]


def write_jsonl(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# --- GSM8K ----------------------------------------------------------------------------


def test_gsm8k_problems(tmp_path):
    problems = load_gsm8k(write_jsonl(tmp_path / "plums.jsonl", ROWS))
    assert [p.id for p in problems] == ["gsm8k/test/1", "gsm8k/test/2", "gsm8k/test/3"]
    assert [p.answer for p in problems] == ["19", "1,000", "5"]
    assert [p.difficulty for p in problems] == ["basic", "intermediate", "advanced"]
    assert {p.domain for p in problems} == {"gsm8k"}
    assert problems[0].solution == (
        "She fills the jars with 4*6=24 plums.\nThen 24-5=19 plums are left.\n#### 19"
    )
    assert problems[0].question == ROWS[0]["question"]


def test_every_layout_gives_the_same_problems(tmp_path):
    (tmp_path / "folder").mkdir()
    file = write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    expected = load_gsm8k(file, "train")
    parquet = write_parquet(tmp_path / "hub" / "main" / "train-00000-of-00001.parquet", ROWS)
    assert load_gsm8k(str(tmp_path / "folder"), "train") == expected
    assert load_gsm8k(parquet, "train") == expected
    assert load_gsm8k(tmp_path / "hub", "train") == expected


def test_shards_are_numbered_through(tmp_path):
    for i, row in enumerate(ROWS):
        write_parquet(tmp_path / "main" / f"test-0000{i}-of-00003.parquet", [row])
    problems = load_gsm8k(tmp_path)
    assert [p.id for p in problems] == ["gsm8k/test/1", "gsm8k/test/2", "gsm8k/test/3"]
    assert [p.answer for p in problems] == ["19", "1,000", "5"]


def test_limit_takes_the_first_and_reads_no_further(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"question": "", "answer": ""}])
    assert [p.answer for p in load_gsm8k(file, limit=2)] == ["19", "1,000"]
    with pytest.raises(UserError, match="limit 0"):
        load_gsm8k(file, limit=0)


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n" + json.dumps(ROWS[0]) + "\n\n", encoding="utf-8-sig")
    assert [p.id for p in load_gsm8k(file)] == ["gsm8k/test/2"]  # ids are line numbers


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2 .* is not JSON"),
        ("[" * 100_000, "line 2 .* is not JSON"),
        ("[1, 2]", "line 2 .* is not an object"),
        ({"answer": "#### 1"}, "row 2 .* 'question'"),
        ({"question": "1 + 1?"}, "row 2 .* 'answer'"),
        ({"question": "  ", "answer": "#### 1"}, "row 2 .* 'question'"),
        ({"question": "1 + 1?", "answer": None}, "row 2 .* 'answer'"),
        ({"question": "1 + 1?", "answer": "It is 2."}, "row 2 .* one answer after ####"),
        ({"question": "1 + 1?", "answer": "#### 1\n#### 2"}, "row 2 .* one answer after ####"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_gsm8k(write_jsonl(tmp_path / "a.jsonl", [ROWS[0], row, ROWS[1]]))


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}')
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source, message in [
        (tmp_path / "empty.jsonl", "no problems"),
        (tmp_path / "latin.jsonl", "UTF-8"),
        (tmp_path / "bad.parquet", "Parquet"),
        (tmp_path / "missing.jsonl", "cannot read"),
        (tmp_path / "missing.parquet", "cannot read"),
        (tmp_path, "no split 'test'"),
        (tmp_path / "missing", "not a file or folder"),
        ("data/test.jsonl", "cannot read"),
    ]:
        with pytest.raises(UserError, match=message.replace("no split", "holds no split")):
            load_gsm8k(source)


def test_a_hub_id_is_downloaded(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [p.answer for p in load_gsm8k("someone/plums", "train", limit=1)] == ["19"]
    assert asked == [(("someone/plums", "main"), {"split": "train"})]


@pytest.mark.parametrize(
    "error", [ConnectionError("interrupted\nmore"), ValueError("no config main"), TimeoutError()]
)
def test_a_failed_download_is_one_sentence(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"someone/plums.*local copy") as caught:
        load_gsm8k("someone/plums")
    assert "\n" not in str(caught.value)


def test_loaded_problems_know_their_task(tmp_path):
    problem, *_ = load_gsm8k(write_jsonl(tmp_path / "a.jsonl", ROWS))
    completions = [problem.solution, "#### 18"]
    assert score(correct_answer, problem, *completions) == [1.0, 0.0]
    assert score(valid_steps, problem, *completions) == [1.0, 0.0]
    with pytest.raises(UserError, match="not generated"):
        problem.task.generate("basic", None)
    with pytest.raises(UserError, match="unknown domain 'gsm8k'"):
        get_task("gsm8k")


# --- equations in prose -----------------------------------------------------------------


def report(completion, question="Ana has 4 jars of 6 plums and eats 5.", answer="19", solution=""):
    return check_prose(Problem("1", "gsm8k", "basic", question, answer, solution), completion)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("so 3 * 4 = 12 plums", True),
        ("3*4=<<3*4=12>>12", True),
        ("2 x 3 = 6", True),
        ("2×3=6, 6÷3 = 2", True),
        ("$1,000 - $200.50 = $799.50", True),
        ("20*.5=10", True),
        ("(3+4)*2=14", True),
        ("(that is 3+4=7)", True),
        ("(3+4=7)", True),
        ("1. 3+4 = 7", True),
        ("5 - 7 = -2", True),
        ("-3 + 5 = 2", True),
        ("1/3 + 1/3 = 2/3", True),
        ("0.1 + 0.2 = 0.3", True),  # false in floating point
        ("2 + 3 * 4 = 14", True),
        ("3 * 4 = 13", False),
        ("1/3 = 0.33", False),
        ("5/0 = 5", False),
        ("0.1 + 0.2 = 0.30000000000000004", False),
        ("2 + 3 * 4 = 20", False),
        ("(3+4)*(2 = 14", False),
    ],
)
def test_equations_in_prose_are_exact(text, valid):
    steps = report(text).steps
    assert steps
    assert all(step.valid == valid for step in steps)


@pytest.mark.parametrize(
    "text",
    ["", "x = 5", "7 = 7", "2**3 = 8", "3 + 4", "4 + 4 = 8/0", "#### 3 + 4 = 7", "a + b = c"],
)
def test_what_is_no_equation(text):
    assert report(text).steps == ()


@given(st.integers(0, 999), st.integers(0, 999), st.integers(1, 99), st.sampled_from("+-*/"))
def test_evaluation_is_exact(a, b, c, operator):
    exact = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, max(b, 1))}[operator]
    text = f"({a} {operator} {max(b, 1) if operator == '/' else b}) / {c}"
    assert _evaluate(text) == Fraction(exact) / c
    assert _evaluate("__import__('os')") is None


SOLUTION = "4*6=24\n24-5=19\n#### 19"


@pytest.mark.parametrize("solution", [SOLUTION, ""])  # with and without a worked solution
@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("4*6=24 plums, and 24-5=19 plums.\n#### 19", 1.0),
        ("", 0.0),
        ("#### 19", 0.0),
        ("first, then, so, therefore 19", 0.0),
        ("1 + 1 = 2\n2 + 2 = 4\n#### 19", 0.0),  # true but useless
        ("18 + 1 = 19\n#### 19", 0.0),  # from nowhere
        ("4*6=25\n25-6=19\n#### 19", 0.0),  # false
        ("#### 19\n4*6=24\n24-5=19", 0.0),  # after the answer
    ],
)
def test_prose_scores(completion, score, solution):
    assert report(completion, solution=solution).score == score


def test_padding_and_repetition_do_not_pay():
    half = report("4*6=24", solution=SOLUTION).score
    assert half == 0.5
    assert report("4*6=24\n" * 9, solution=SOLUTION).score == half
    assert report("4*6=24\n1+1=2\n5-4=1", solution=SOLUTION).score == half
    assert report("4*6=24\n24-5=19\n1+1=3", solution=SOLUTION).score == half  # an error costs
    full = "4*6=24\n24-5=19\n"
    assert report(full * 2).score == 0.5  # without a solution, every useless line costs
    assert report(full + "4+6=10\n").score == pytest.approx(2 / 3)
    assert report("5 - 4 = 1\n1 - 6 = -5", answer="-5").score == 1.0


def test_a_step_must_build_on_what_was_reached():
    assert report("24-5=19\n#### 19", solution=SOLUTION).score == 0.0  # where is the 24 from?


def test_givens_that_the_question_spells_in_words():
    solution = "30/2=15\n15-5=10\n#### 10"  # "half" is the 2 of the worked solution
    question = "Half of a class of 30, less 5?"
    assert report("30/2=15, 15-5=10", question, "10", solution).score == 1.0
    assert report("30/2=15, 15-5=10", question, "10").score == 0.0  # nobody vouches for the 2


def test_without_ground_truth_no_steps_are_rewarded():
    assert report(SOLUTION, answer="").score == 0.0
    assert report(SOLUTION, answer="plums").score == 0.0


@given(st.text(alphabet="0123456789.,+-*/()=$x <>\n#", max_size=80))
def test_any_working_is_handled(text):
    assert 0 <= report(text).score <= 1
    assert 0 <= report(text, solution=text).score <= 1


@pytest.mark.parametrize("text", ["1" * 10**6, "1+" * 10**6 + "=1", "(" * 10**6, "1+1=2 " * 10**5])
def test_a_million_characters_of_working_are_cut(text):
    assert len(report(text).steps) <= 10_000 / 5


# --- custom ---------------------------------------------------------------------------

VERIFIER = """
from dataclasses import dataclass

@dataclass
class Lengths:
    limit: int = 5

def verify(problem, completion):
    return len(completion) <= Lengths().limit

def grade(problem, completion):
    return min(1.0, len(completion) / 10)

def raises(problem, completion):
    raise KeyError("oh no")

def text(problem, completion):
    return "yes"

not_a_function = 3
"""


@pytest.fixture
def verifier_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(VERIFIER)
    yield file
    sys.modules.pop("cpugrpo_verifier_mine", None)


def test_custom_prompts(tmp_path, verifier_file):
    file = write_jsonl(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "Say hi."},
            {"question": "1 / 10?", "answer": 0.1, "difficulty": "advanced", "id": 7},
        ],
    )
    problems = load_custom(file, f"{verifier_file}:verify")
    assert problems == [
        CustomProblem("custom/1", "custom", "basic", "Say hi.", ""),
        CustomProblem("7", "custom", "advanced", "1 / 10?", "0.1"),
    ]
    assert score(correct_answer, problems[0], "hi", "hello there") == [1.0, 0.0]
    assert score(valid_steps, problems[0], "hi", "1 + 1 = 2") == [0.0, 0.0]
    with pytest.raises(UserError, match="not generated"):
        problems[0].task.generate("basic", None)


def test_a_graded_verifier(verifier_file):
    task = Custom(load_verifier(f"{verifier_file}:grade"))
    problem = Problem("1", "custom", "basic", "?", "", task=task)
    assert score(correct_answer, problem, "12345") == [0.5]
    assert not task.verify(problem, "12345")
    assert task.verify(problem, "1234567890")


def test_without_a_verifier_the_answer_is_matched(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "6 * 7?", "answer": 42}])
    (problem,) = load_custom(file)
    assert problem.verify("#### 42.0")
    assert not problem.verify("42")
    for row in [
        {"prompt": "?"},
        {"prompt": "?", "answer": " "},
        {"prompt": "?", "answer": "x" * 101},
    ]:
        with pytest.raises(UserError, match=r"line 1 .* no answer"):
            load_custom(write_jsonl(file, [row]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 .* is not JSON"),
        ({"answer": "1"}, "line 2 .* 'question'.*its keys are 'answer'"),
        ({"prompt": ""}, "line 2 .* empty prompt"),
        ({"prompt": ["a"]}, "line 2 .* 'a' among the messages of 'prompt'"),
        ({"prompt": "?", "answer": True}, "line 2 .* True for 'answer'"),
        ('{"prompt": "?", "answer": NaN}', "line 2 .* nan for 'answer'"),
        ({"prompt": "?", "difficulty": "hard"}, "line 2 .* 'hard'.*advanced: .* rename the column"),
        ({"prompt": "?", "id": "custom/1"}, "line 2 .* repeats the id 'custom/1'"),
    ],
)
def test_a_malformed_prompt_is_named(tmp_path, row, message):
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ok"}, row])
    with pytest.raises(UserError, match=message):
        load_custom(file, lambda problem, completion: True)


def test_a_file_without_prompts(tmp_path):
    with pytest.raises(UserError, match="no prompts"):
        load_custom(write_jsonl(tmp_path / "a.jsonl", [""]))
    with pytest.raises(UserError, match="cannot read"):
        load_custom(tmp_path / "missing.jsonl")


def test_verifiers_that_cannot_be_loaded(tmp_path, verifier_file):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "syntax.py").write_text("def")
    for spec, message in [
        ("verify", "path/to/file.py:function"),
        (f"{verifier_file}:", "path/to/file.py:function"),
        (f"{tmp_path}/missing.py:verify", "no Python file"),
        (f"{tmp_path}:verify", "no Python file"),
        (f"{tmp_path}/broken.py:verify", "ZeroDivisionError"),
        (f"{tmp_path}/syntax.py:verify", "SyntaxError"),
        (f"{verifier_file}:nothing", "no function 'nothing'"),
        (f"{verifier_file}:not_a_function", "no function 'not_a_function'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_verifier(spec)
    with pytest.raises(UserError, match="not callable"):
        load_custom(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ok"}]), 3)


def test_verifiers_that_fail_are_named_with_the_problem(verifier_file):
    problem = Problem("custom/9", "custom", "basic", "?", "")
    for name, message in [
        ("raises", r"verifier raises failed on problem 'custom/9' with KeyError"),
        ("text", r"verifier text returned 'yes' for problem 'custom/9'"),
    ]:
        task = Custom(load_verifier(f"{verifier_file}:{name}"))
        judged = replace(problem, task=task)
        for judge in (
            lambda task=task: task.verify(problem, "a"),
            lambda judged=judged: score(correct_answer, judged, "a"),
        ):
            with pytest.raises(UserError, match=message):
                judge()


def two_sets(folder):
    """Two files with the same ids and prompts, one judged by length, the other by its answer."""
    rows = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(4)]
    file = write_jsonl(folder / "both.jsonl", rows)
    short = load_custom(file, lambda problem, completion: len(completion) < 3)
    exact = load_custom(file)
    assert short == exact and short[0].task is not exact[0].task
    return short, exact


def test_two_custom_sets_are_each_judged_by_their_own_verifier(tmp_path):
    short, exact = two_sets(tmp_path)
    for number in range(4):
        completions = ["hi", f"#### {number}", "hello"]
        assert score(correct_answer, short[number], *completions) == [1.0, 0.0, 0.0]
        assert score(correct_answer, exact[number], *completions) == [0.0, 1.0, 0.0]
    groups = [Group([1], [Episode(text="hi")], problems[0]) for problems in (short, exact, short)]
    give_rewards(groups, parse_rewards("correct_answer=1"))
    assert [group.episodes[0].reward for group in groups] == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="has no task"):
        replace(short[0], task=None).verify("hi")


def test_two_trainers_each_judge_by_the_verifier_of_their_own_set(tmp_path, tiny_policy):
    """Through TRL: both trainers exist before either scores the same completions."""
    rewards = parse_rewards("correct_answer=1")
    trainers = []
    for problems in two_sets(tmp_path):
        config = cpu_config(tmp_path, prompts_per_step=1, num_generations=2)
        data = to_dataset(problems, tiny_policy.system)
        functions = trl_rewards(rewards, problems)
        trainers.append(CPUGRPOTrainer(tiny_policy, config, functions, data))
    texts = ["hi", "#### 1"]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    ids = [tiny_policy.tokenizer.encode(text) for text in texts]
    earned = []
    for trainer in trainers:
        inputs = [trainer.train_dataset[1]] * 2
        prompts = [row["prompt"] for row in inputs]
        earned.append(trainer._calculate_rewards(inputs, prompts, said, ids).flatten().tolist())
    assert earned == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("verdict", ["1", float("nan"), float("inf"), -1, 2, 1.01, [True]])
def test_a_verdict_is_a_bool_or_a_grade(verdict):
    with pytest.raises(UserError, match="True, False or a number from 0 to 1"):
        Custom(lambda *_: verdict).verify(Problem("1", "custom", "basic", "?", ""), "a")


def test_exact_match_is_the_default_verifier():
    problem = Problem("1", "custom", "basic", "?", "b d a")
    assert exact_match(problem, "#### b, d, a")
    assert Custom().verify(problem, "#### [b d a]")
    assert GSM8K().verify(problem, "#### b d a")


def test_numbers_in_json_keep_their_digits(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ['{"a": 0.10, "b": 12345678901234567890}'])
    assert list(read_jsonl(file)) == [(1, {"a": "0.10", "b": "12345678901234567890"})]
