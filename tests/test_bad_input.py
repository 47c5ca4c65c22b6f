"""Two hundred and more mistakes: each ends with one sentence and code 2, and nothing is written.

Every case goes through the real command line, in this process. Its files are written
into an empty folder first; afterwards that folder must hold just these, unchanged.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from command_line import invoke
from safetensors.torch import load_file, save_file

from cpugrpo_edu.engine import hardware
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.config import RunConfig, plain
from cpugrpo_edu.tasks import custom, verifiers

Case = tuple[str, list[str], dict[str, str | bytes]]  # words of the sentence, arguments, files


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """One thread, no network, and a working folder of its own."""
    original = hardware.configure_threads
    monkeypatch.setattr(
        hardware, "configure_threads", lambda threads=None: original(threads and min(threads, 1))
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(custom, "TIME_LIMIT", 0.3)
    monkeypatch.setattr(verifiers, "IMPORT_LIMIT", 2)
    monkeypatch.chdir(tmp_path)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def write_files(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def refused(words: str, arguments: list[str], folder: Path) -> str:
    """Run the command in the folder and look at how it ended."""
    before = tree(folder)
    code, out, err = invoke(*arguments)
    assert code == 2, (code, out, err)
    assert out == "" and "Traceback" not in err, (out, err)
    sentences = [line for line in err.splitlines() if line.startswith("cpugrpo: ")]
    assert len(sentences) == 1, err
    assert words in sentences[0], sentences[0]
    assert len(sentences[0]) < 700, sentences[0]
    assert tree(folder) == before
    return sentences[0]


def named(cases: list[Case]) -> list[object]:
    return [
        pytest.param(*case, id=f"{number}-{' '.join(case[1])[:60]}")
        for number, case in enumerate(cases)
    ]


# Flags

NO_COMMAND: list[Case] = [
    ("No such command", ["dance"], {}),
    ("No such command", ["Run"], {}),
    ("No such command", ["bench", "b9"], {}),
    ("No such option: --colour", ["--colour"], {}),
    *[
        ("No such option: --colour", [command, *more, "--colour"], {})
        for command, more in (
            ("doctor", []),
            ("run", []),
            ("evaluate", []),
            ("generate", ["a"]),
            ("report", ["a"]),
            ("pretrain", []),
            ("models", []),
        )
    ],
    ("Missing argument", ["generate"], {}),
    ("Missing argument", ["report"], {}),
    ("unexpected extra argument", ["doctor", "now"], {}),
    ("unexpected extra argument", ["run", "now"], {}),
    ("unexpected extra argument", ["generate", "one", "two"], {}),
]

NO_NUMBER: list[Case] = [
    (f"Invalid value for '{option}'", [*command, option, value], {})
    for command, option, value in [
        *[
            (["run"], option, value)
            for option in (
                *("--seed", "--prompts-per-step", "--num-generations", "--max-completion"),
                *("--lora", "--micro-batch", "--threads", "--fisher-examples", "--per-cell"),
                "--patience",
            )
            for value in ("two", "1.5")
        ],
        *[
            (["run"], option, "much")
            for option in (
                *("--replay", "--temperature", "--beta", "--ewc"),
                "--save-minutes",
            )
        ],
        (["evaluate"], "--per-cell", "all"),
        (["evaluate"], "--temperature", "warm"),
        (["generate", "a"], "--n", "many"),
        (["generate", "a"], "--seed", "0x"),
        (["pretrain"], "--steps", "all"),
        (["pretrain"], "--hidden", "1e3"),
        (["models"], "--memory-gib", "8GB"),
        (["bench", "b1"], "--steps", "x"),
    ]
]

NO_VALUE: list[Case] = [
    (f"Option '{option}' requires an argument", ["run", option], {})
    for option in ("--seed", "--model", "--output", "--data", "--lr", "--rewards", "--ewc")
]

# Settings of a run

SETTINGS: list[Case] = [
    (words, ["run", "-q", "--output", "out", *arguments], {})
    for words, arguments in [
        ("--steps: cannot read ''", ["--steps", ""]),
        ("--steps: cannot read '1,2'", ["--steps", "1,2"]),
        ("--steps: cannot read '1,2,3,4'", ["--steps", "1,2,3,4"]),
        ("--steps: cannot read 'many'", ["--steps", "many"]),
        ("--steps: cannot read '1.5'", ["--steps", "1.5"]),
        ("--steps: cannot read '1;2;3'", ["--steps", "1;2;3"]),
        ("at least one step in total", ["--steps", "0"]),
        ("at least one step in total", ["--steps", "2,-1,2"]),
        ("a stage can have at most", ["--steps", "99999999999"]),
        ("--lr: cannot read '1,,2'", ["--lr", "1,,2"]),
        ("--lr: cannot read 'fast'", ["--lr", "fast"]),
        ("--lr is (nan, nan, nan)", ["--lr", "nan"]),
        ("--lr is (inf, inf, inf)", ["--lr", "inf"]),
        ("--lr is (0.0001, -0.0001, 0.0001)", ["--lr", "1e-4,-1e-4,1e-4"]),
        ("--seed is -1", ["--seed", "-1"]),
        ("--seed is 99999999999999999999", ["--seed", "99999999999999999999"]),
        ("unknown --order 'random'", ["--order", "random"]),
        ("unknown --order ''", ["--order", ""]),
        ("--replay is 1.0", ["--replay", "1"]),
        ("--replay is -0.1", ["--replay", "-0.1"]),
        ("--replay is nan", ["--replay", "nan"]),
        ("--prompts-per-step is 0", ["--prompts-per-step", "0"]),
        ("--prompts-per-step is -4", ["--prompts-per-step", "-4"]),
        ("--num-generations is 1; give at least 2", ["--num-generations", "1"]),
        ("--num-generations is 0", ["--num-generations", "0"]),
        ("--num-generations is -8", ["--num-generations", "-8"]),
        ("--max-completion is 0", ["--max-completion", "0"]),
        ("--max-completion is -1", ["--max-completion", "-1"]),
        ("--temperature is 0.0", ["--temperature", "0"]),
        ("--temperature is -1.0", ["--temperature", "-1"]),
        ("--temperature is nan", ["--temperature", "nan"]),
        ("--temperature is inf", ["--temperature", "inf"]),
        ("--beta is -0.1", ["--beta", "-0.1"]),
        ("--beta is nan", ["--beta", "nan"]),
        ("unknown --loss-type 'ppo'", ["--loss-type", "ppo"]),
        ("unknown --importance-level 'word'", ["--importance-level", "word"]),
        ("cannot read the reward ''", ["--rewards", ""]),
        ("unknown reward 'beauty'", ["--rewards", "beauty=1"]),
        ("cannot read the reward 'correct_answer'", ["--rewards", "correct_answer"]),
        ("cannot read the reward", ["--rewards", "correct_answer=much"]),
        ("weight nan of reward correct_answer", ["--rewards", "correct_answer=nan"]),
        ("weight inf of reward correct_answer", ["--rewards", "correct_answer=inf"]),
        ("weight -1.0 of reward", ["--rewards", "correct_answer=-1"]),
        ("all reward weights are zero", ["--rewards", "correct_answer=0"]),
        (
            "reward 'correct_answer' is given twice",
            ["--rewards", "correct_answer=1,correct_answer=1"],
        ),
        ("cannot read the reward", ["--rewards", "correct_answer=1,"]),
        ("--lora is -1", ["--lora", "-1"]),
        ("unknown --dtype 'float8'", ["--dtype", "float8"]),
        ("unknown --dtype ''", ["--dtype", ""]),
        ("unknown --kernel 'cuda'", ["--kernel", "cuda"]),
        ("leave out --no-int8-rollouts", ["--kernel", "compiled", "--no-int8-rollouts"]),
        ("add --lora", ["--dtype", "int8"]),
        ("unknown --checkpointing 'maybe'", ["--checkpointing", "maybe"]),
        ("--micro-batch is 0", ["--micro-batch", "0"]),
        ("--memory-budget: cannot use a memory budget of '0'", ["--memory-budget", "0"]),
        ("--memory-budget: cannot use a memory budget of '-2'", ["--memory-budget", "-2"]),
        ("--memory-budget: cannot use a memory budget of 'nan'", ["--memory-budget", "nan"]),
        ("--memory-budget: cannot use a memory budget of 'inf'", ["--memory-budget", "inf"]),
        ("--memory-budget: cannot use a memory budget of 'much'", ["--memory-budget", "much"]),
        ("needs about", ["--memory-budget", "1MB"]),
        ("--threads is 0", ["--threads", "0"]),
        ("--threads is -3", ["--threads", "-3"]),
        ("--threads is 100000", ["--threads", "100000"]),
        ("unknown --engine 'warp'", ["--engine", "warp"]),
        ("unknown --fisher 'guess'", ["--fisher", "guess"]),
        ("--fisher-examples is -1", ["--fisher-examples", "-1"]),
        ("--ewc is -1.0", ["--ewc", "-1"]),
        ("--ewc is nan", ["--ewc", "nan"]),
        ("--ewc is inf", ["--ewc", "inf"]),
        ("--per-cell is -1", ["--per-cell", "-1"]),
        ("--per-cell is 1000000", ["--per-cell", "1000000"]),
        ("--patience is -1", ["--patience", "-1"]),
        ("--save-minutes is -1.0", ["--save-minutes", "-1"]),
        ("--save-minutes is nan", ["--save-minutes", "nan"]),
        ("unknown domains poetry", ["--domains", "poetry"]),
        ("unknown domains poetry", ["--domains", "lists,poetry"]),
        ("unknown domains", ["--domains", ""]),
        ("--domains names one twice", ["--domains", ","]),
        ("--domains names one twice", ["--domains", "lists,lists"]),
        ("needs prompts to judge", ["--verifier", "judge.py:judge"]),
        ("no model folder at ./nowhere", ["--model", "./nowhere"]),
        ("no model folder at ~/nowhere", ["--model", "~/nowhere"]),
        ("no model folder at ../../etc", ["--model", "../../etc"]),
        ("no model folder at a/b/c", ["--model", "a/b/c"]),
        ("the model name is empty", ["--model", ""]),
        ("cannot load the model 'no such model'", ["--model", "no such model"]),
        ("cannot load the model 'nobody/nothing'", ["--model", "nobody/nothing"]),
        ("nowhere.jsonl", ["--data", "nowhere.jsonl"]),
        ("could not read the data set nobody/nothing", ["--data", "nobody/nothing"]),
        ("--data is empty", ["--data", ""]),
        ("is not a file or folder", ["--data", "a b"]),
    ]
]

# Rows of data: one good line first, so that the number in the sentence must be right

GOOD = '{"prompt": "What is 1 + 1?", "answer": "2"}\n'
ROWS: list[Case] = [
    (words, ["run", "-q", "--output", "out", "--data", "data.jsonl"], {"data.jsonl": content})
    for words, content in [
        ("no prompts in data.jsonl", ""),
        ("no prompts in data.jsonl", "\n\n  \n"),
        ("line 2 of data.jsonl is not JSON", GOOD + "oops"),
        ("line 2 of data.jsonl is not JSON", GOOD + '{"prompt": "a", "answer": "1"'),
        ("line 2 of data.jsonl is not JSON", GOOD + "{'prompt': 'a'}"),
        ("line 2 of data.jsonl is not JSON", GOOD + '{"prompt": "a" "answer": "1"}'),
        ("line 2 of data.jsonl is not JSON", GOOD + '{"prompt": "a", "answer": "1",}'),
        ("line 3 of data.jsonl is not JSON", GOOD + "\n" + '{"prompt": }'),
        ("line 2 of data.jsonl is not JSON", GOOD + "[" * 100_000),
        ("line 1 of data.jsonl is not JSON", "prompt,answer\na,1\n"),
        ("line 1 of data.jsonl is not", "[\n" + GOOD + "]"),
        ("line 2 of data.jsonl is not an object", GOOD + "[1, 2]"),
        ("line 2 of data.jsonl is not an object", GOOD + '"text"'),
        ("line 2 of data.jsonl is not an object", GOOD + "null"),
        ("line 2 of data.jsonl is not an object", GOOD + "12"),
        ("line 2 of data.jsonl is not an object", GOOD + "true"),
        ("line 2 of data.jsonl has nothing under 'prompt' or 'question'", GOOD + "{}"),
        (
            "its keys are 'Q', 'answer': name the right one with --prompt-column",
            GOOD + '{"Q": "a", "answer": "1"}',
        ),
        ("line 2 of data.jsonl has nothing under", GOOD + '{"prompt": null, "answer": "1"}'),
        (
            "line 2 of data.jsonl has 'a' among the messages of 'prompt'",
            GOOD + '{"prompt": ["a"], "answer": "1"}',
        ),
        ("line 2 of data.jsonl has an empty prompt", GOOD + '{"prompt": "", "answer": "1"}'),
        ("line 2 of data.jsonl has an empty prompt", GOOD + '{"prompt": " ", "answer": "1"}'),
        ("line 2 of data.jsonl has no answer", GOOD + '{"prompt": "a"}'),
        ("line 2 of data.jsonl has no answer", GOOD + '{"prompt": "a", "answer": ""}'),
        ("line 2 of data.jsonl has no answer", GOOD + '{"prompt": "a", "answer": "  "}'),
        ("has no answer", GOOD + '{"prompt": "a", "answer": null}'),
        ("no question of a user", GOOD + '{"prompt": [], "answer": "1"}'),
        ("no question of a user", GOOD + '{"prompt": [{"role": "system", "content": "a"}]}'),
        ("for 'answer'", GOOD + '{"prompt": "a", "answer": {"x": 1}}'),
        ("for 'answer'", GOOD + '{"prompt": "a", "answer": true}'),
        ("for 'answer'", GOOD + '{"prompt": "a", "answer": ["1"]}'),
        (
            "line 2 of data.jsonl has no answer",
            GOOD + f'{{"prompt": "a", "answer": "{"9" * 9999}"}}',
        ),
        (
            "has the difficulty 'hard'",
            GOOD + '{"prompt": "a", "answer": "1", "difficulty": "hard"}',
        ),
        ("for 'difficulty'", GOOD + '{"prompt": "a", "answer": "1", "difficulty": null}'),
        ("for 'id'", GOOD + '{"prompt": "a", "answer": "1", "id": []}'),
        (
            "line 3 of data.jsonl repeats the id 'x'",
            GOOD + 2 * '{"prompt":"a","answer":"1","id":"x"}\n',
        ),
        ("too few", GOOD),
        ("too few", "\ufeff" + GOOD),
        ("cannot read data.jsonl", b"\xff\xfe\x00\x01"),
        ("cannot read data.jsonl", GOOD.encode("utf-16")),
        ("cannot read data.jsonl", b'{"prompt": "\xe9", "answer": "1"}'),
        ("NUL", GOOD + '{"prompt": "a\\u0000b", "answer": "1"}'),
        ("lone surrogate", GOOD + '{"prompt": "a\\ud800b", "answer": "1"}'),
        ("longer than", GOOD + f'{{"prompt": "{"a" * 200_000}", "answer": "1"}}'),
        ("too few", GOOD + GOOD),
    ]
]

GSM8K_GOOD = '{"question": "1 + 1?", "answer": "1+1=2\\n#### 2"}\n'
GSM8K_ROWS: list[Case] = [
    (words, ["run", "-q", "--output", "out", "--data", "data.jsonl"], {"data.jsonl": content})
    for words, content in [
        ("row 2 of data.jsonl has no text under 'question'", GSM8K_GOOD + '{"answer": "#### 2"}'),
        ("row 2 of data.jsonl has no text under 'answer'", GSM8K_GOOD + '{"question": "a"}'),
        ("no text under 'question'", GSM8K_GOOD + '{"question": " ", "answer": "#### 2"}'),
        ("no text under 'answer'", GSM8K_GOOD + '{"question": "a", "answer": ["#### 2"]}'),
        ("does not state one answer", GSM8K_GOOD + '{"question": "a", "answer": "2"}'),
        ("does not state one answer", GSM8K_GOOD + '{"question": "a", "answer": "####"}'),
        ("does not state one", GSM8K_GOOD + '{"question": "a", "answer": "#### 1\\n#### 2"}'),
        ("line 2 of data.jsonl is not JSON", GSM8K_GOOD + "{"),
        ("line 2 of data.jsonl is not an object", GSM8K_GOOD + "[]"),
        ("too few", GSM8K_GOOD),
    ]
] + [
    (
        "could not read the data set d",
        ["run", "-q", "--output", "out", "--data", "d"],
        {"d/train.jsonl": ""},
    ),
    (
        "holds no split 'test'",
        ["run", "-q", "--output", "out", "--data", "d"],
        {"d/train.jsonl": GSM8K_GOOD},
    ),
    (
        "could not read the data set d",
        ["run", "-q", "--output", "out", "--data", "d"],
        {"d/train.parquet": "PAR1 no"},
    ),
    (
        "cannot read data.parquet",
        ["run", "-q", "--output", "out", "--data", "data.parquet"],
        {"data.parquet": b"\x00\x01"},
    ),
]

# Verifiers

PROMPTS = "".join(f'{{"prompt": "Say {i}.", "id": "{i}"}}\n' for i in range(40))
RUN_VERIFIER = ["run", "-q", "--output", "out", "--data", "data.jsonl", "--verifier"]
VERIFIER_FILES: list[Case] = [
    (words, [*RUN_VERIFIER, spec], {"data.jsonl": PROMPTS, "judge.py": code})
    for words, spec, code in [
        ("cannot read the verifier 'judge.py'", "judge.py", ""),
        ("cannot read the verifier ':judge'", ":judge", ""),
        ("cannot read the verifier 'judge.py:'", "judge.py:", ""),
        ("cannot read the verifier ''", "", ""),
        ("no Python file missing.py", "missing.py:judge", ""),
        ("no Python file data.jsonl", "data.jsonl:judge", ""),
        ("no Python file .", ".:judge", ""),
        ("has no function 'judge'", "judge.py:judge", ""),
        ("has no function 'judge'", "judge.py:judge", "judge = 3"),
        ("cannot be imported: SyntaxError", "judge.py:judge", "def judge(:\n"),
        ("cannot be imported: ModuleNotFoundError", "judge.py:judge", "import no_such_module"),
        ("cannot be imported: ZeroDivisionError", "judge.py:judge", "1 / 0"),
        ("cannot be imported: SystemExit", "judge.py:judge", "raise SystemExit(0)"),
        ("did not finish within", "judge.py:judge", "while True: pass"),
        ("cannot be imported", "judge.py:judge", b"\x00\xff"),
        ("must take two", "judge.py:judge", "def judge(completion): return True"),
    ]
]

EVALUATE_VERIFIER = [
    "evaluate",
    "-q",
    "--per-cell",
    "1",
    "--max-completion",
    "4",
    "--output",
    "items.json.gz",
    "--model",
    "TINY",
    "--data",
    "data.jsonl",
    "--verifier",
    "judge.py:judge",
]
VERDICTS: list[Case] = [
    (
        words,
        EVALUATE_VERIFIER,
        {"data.jsonl": PROMPTS, "judge.py": f"def judge(problem, completion):\n    {body}\n"},
    )
    for words, body in [
        ("AttributeError", "return problem.nonsense"),
        ("ValueError: no", "raise ValueError('no')"),
        ("ValueError: two lines", "raise ValueError('two\\nlines')"),
        ("SystemExit", "raise SystemExit(0)"),
        ("RecursionError", "return judge(problem, completion)"),
        ("returned [True]", "return [True]"),
        ("returned tensor([1, 1])", "import torch; return torch.tensor([1, 1])"),
        ("returned nan", "return float('nan')"),
        ("returned inf", "return float('inf')"),
        ("returned 2", "return 2"),
        ("returned -0.5", "return -0.5"),
        ("returned 'yes'", "return 'yes'"),
        ("returned [1]", "return [1]"),
        ("returned 1j", "return 1j"),
        ("took longer than", "\n        ".join(["while True:", "pass"])),
        ("took longer than", "import time; time.sleep(60)"),
        ("took longer than", "import re; return bool(re.match('(a+)+$', 'a' * 40 + 'b'))"),
        (
            "took longer than",
            "\n        ".join(["while True:", "try: x = 1", "except Exception: pass"]),
        ),
    ]
]

# Commands other than run

OTHERS: list[Case] = [
    ("the prompt is empty", ["generate", ""], {}),
    ("the prompt is empty", ["generate", " \n"], {}),
    ("--n is 0", ["generate", "a", "--n", "0"], {}),
    ("--temperature is -1.0", ["generate", "a", "--model", "TINY", "--temperature", "-1"], {}),
    ("--temperature is nan", ["generate", "a", "--model", "TINY", "--temperature", "nan"], {}),
    ("--max-completion is 0", ["generate", "a", "--model", "TINY", "--max-completion", "0"], {}),
    ("--seed is -1", ["generate", "a", "--model", "TINY", "--seed", "-1"], {}),
    ("no model folder at ./nowhere", ["generate", "a", "--model", "./nowhere"], {}),
    ("--per-cell is 0", ["evaluate", "--per-cell", "0"], {}),
    ("already exists", ["evaluate", "--output", "kept.json.gz"], {"kept.json.gz": "mine"}),
    ("already exists", ["evaluate", "--output", "kept/x.json.gz"], {"kept": "a file"}),
    ("nowhere.jsonl", ["evaluate", "--data", "nowhere.jsonl"], {}),
    (
        "--temperature is -1.0",
        ["evaluate", "-q", "--model", "TINY", "--per-cell", "1", "--temperature", "-1"],
        {},
    ),
    (
        "--max-completion is 0",
        ["evaluate", "-q", "--model", "TINY", "--per-cell", "1", "--max-completion", "0"],
        {},
    ),
    ("--memory-gib is 0.0", ["models", "--memory-gib", "0"], {}),
    ("--memory-gib is -1.0", ["models", "--memory-gib", "-1"], {}),
    ("--memory-gib is nan", ["models", "--memory-gib", "nan"], {}),
    ("--memory-gib is inf", ["models", "--memory-gib", "inf"], {}),
    ("--steps is 0", ["pretrain", "-q", "--steps", "0"], {}),
    ("--steps is -1", ["pretrain", "-q", "--steps", "-1"], {}),
    ("--layers is 0", ["pretrain", "-q", "--layers", "0", "--steps", "1"], {}),
    ("hidden is 7", ["pretrain", "-q", "--hidden", "7", "--steps", "1"], {}),
    ("--hidden is 0", ["pretrain", "-q", "--hidden", "0", "--steps", "1"], {}),
    ("--per-cell is 0", ["pretrain", "-q", "--per-cell", "0", "--steps", "1"], {}),
    ("already", ["pretrain", "-q", "--output", "old", "--steps", "1"], {"old/config.json": "{}"}),
    ("already exists", ["pretrain", "-q", "--output", "old", "--steps", "1"], {"old": "a file"}),
    ("unknown --workload 'b7'", ["bench", "b1", "--workload", "b7"], {}),
    ("--steps is 0", ["bench", "b1", "--steps", "0"], {}),
    ("--peer-steps is 0", ["bench", "b1", "--peer-steps", "0"], {}),
    ("unknown peer", ["bench", "b1", "--peers", "trl"], {}),
]

# Records and folders

RECORD = asdict(RunRecord("run", "now", 0, "c", {}, {}, {}, {}))
RECORDS: list[Case] = [
    (words, ["report", "run"], {"run/record.json": content})
    for words, content in [
        ("cannot read a run record", ""),
        ("cannot read a run record", "{"),
        ("cannot read a run record", "[]"),
        ("cannot read a run record", "null"),
        ("cannot read a run record", "3"),
        ("cannot read a run record", "{}"),
        ("cannot read a run record", b"\xff\xfe"),
        ("cannot read a run record", "[" * 100_000),
        ("cannot read a run record", json.dumps({**RECORD, "surprise": 1})),
        ("cannot read a run record", json.dumps({k: v for k, v in RECORD.items() if k != "seed"})),
        ("cannot read a run record", json.dumps({**RECORD, "results": []})),
        ("cannot read a run record", json.dumps({**RECORD, "results": None})),
        ("cannot read a run record", json.dumps({**RECORD, "machine": "fast"})),
        ("cannot read a run record", json.dumps({**RECORD, "config": 3})),
        ("cannot read a run record", json.dumps({**RECORD, "kind": None})),
    ]
] + [
    ("cannot read a run record", ["report", "nowhere"], {}),
    ("cannot read a run record", ["report", "file"], {"file": "x"}),
    (
        "line 1 of",
        ["report", "run"],
        {"run/record.json": json.dumps(RECORD), "run/metrics.jsonl": "no\n{}\n"},
    ),
]

STATE = {
    "config": plain(RunConfig()),
    "stages": [],
    "seconds": {"load": 0.0, "train": 0.0, "evaluate": 0.0, "report": 0.0},
    "seconds_before": 0.0,
}
RESUME = ["run", "-q", "--resume", "--output", "out"]
FOLDERS: list[Case] = [
    ("--resume needs the --output folder", ["run", "-q", "--resume"], {}),
    ("holds no run to resume", RESUME, {}),
    ("holds no run to resume", RESUME, {"out/notes.txt": "mine"}),
    ("already exists and is not a folder", RESUME, {"out": "a file"}),
    ("already exists and is not a folder", ["run", "-q", "--output", "out"], {"out": "a file"}),
    ("already exists and is not a folder", ["run", "-q", "--output", "out/run"], {"out": "a file"}),
    ("already exists and is not empty", ["run", "-q", "--output", "out"], {"out/x": "mine"}),
    ("already exists and is not empty", ["run", "-q", "--output", "."], {"x": "mine"}),
    ("File name too long", ["run", "-q", "--output", "x" * 300], {}),
    *[
        ("is not the state of a run", RESUME, {"out/state.json": content})
        for content in (
            "",
            "{",
            "[]",
            "null",
            "{}",
            b"\xff",
            json.dumps({**STATE, "config": 3}),
            json.dumps({**STATE, "stages": [1]}),
            json.dumps({**STATE, "stages": [{"name": "advanced"}]}),
            json.dumps({k: v for k, v in STATE.items() if k != "seconds"}),
        )
    ],
    ("other settings (seed)", [*RESUME, "--seed", "1"], {"out/state.json": json.dumps(STATE)}),
    ("other settings (steps)", [*RESUME, "--steps", "9"], {"out/state.json": json.dumps(STATE)}),
    (
        "is missing",
        RESUME,
        {"out/state.json": json.dumps({**STATE, "stages": [{"name": "basic"}]})},
    ),
    (
        "is complete; there is nothing to resume",
        RESUME,
        {"out/state.json": json.dumps(STATE), "out/record.json": "{}"},
    ),
]

TABLE = [
    *NO_COMMAND,
    *NO_NUMBER,
    *NO_VALUE,
    *SETTINGS,
    *ROWS,
    *GSM8K_ROWS,
    *VERIFIER_FILES,
    *VERDICTS,
    *OTHERS,
    *RECORDS,
    *FOLDERS,
]


@pytest.mark.parametrize(("words", "arguments", "files"), named(TABLE))
def test_a_mistake_ends_with_one_sentence(words, arguments, files, tmp_path, tiny_folder):
    write_files(tmp_path, files)
    refused(words, [str(tiny_folder) if a == "TINY" else a for a in arguments], tmp_path)


def test_the_table_is_long_and_has_no_case_twice():
    cases = [(tuple(arguments), tuple(files.items())) for _, arguments, files in TABLE]
    assert len(set(cases)) == len(cases) >= 200


# Model folders


def edit(name, **changes):
    def change(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **changes}))

    return change


def cut(name, size):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return change


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def other_shapes(folder):
    tensors = {k: v[..., :-1].clone() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def missing_tensors(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if "layers.1" not in k}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def not_a_number(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def own_code(folder):
    (folder / "evil.py").write_text("open('stolen', 'w')")
    edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})(folder)


def own_tokenizer_code(folder):
    (folder / "evil.py").write_text("open('stolen', 'w')")
    auto = {"AutoTokenizer": ["evil.T", None]}
    edit("tokenizer_config.json", tokenizer_class="Evil", auto_map=auto)(folder)
    (folder / "tokenizer.json").unlink()


MODELS = {
    "no config": ("holds no config.json", lambda folder: (folder / "config.json").unlink()),
    "empty config": ("cannot load the model", put("config.json", b"")),
    "config not JSON": ("cannot load the model", put("config.json", b"{oops")),
    "config a list": ("cannot load the model", put("config.json", b"[]")),
    "unknown type": ("cannot load the model", edit("config.json", model_type="nonsense")),
    "no type": ("cannot load the model", put("config.json", b'{"hidden_size": 8}')),
    "text for a size": ("cannot load the model", edit("config.json", hidden_size="big")),
    "no decoder": ("cannot load the model", put("config.json", b'{"model_type": "vit"}')),
    "no weights": ("cannot load the model", lambda folder: (folder / "model.safetensors").unlink()),
    "empty weights": ("cannot load the model", put("model.safetensors", b"")),
    "half a download": ("a broken download is resumed", cut("model.safetensors", 20_000)),
    "a header only": ("cannot load the model", cut("model.safetensors", 6)),
    "HTML instead": ("cannot load the model", put("model.safetensors", b"<html>404</html>")),
    "a pickle": ("safetensors", only_a_pickle),
    "other shapes": ("cannot load the model", other_shapes),
    "missing tensors": ("the weights lack", missing_tensors),
    "NaN weights": ("not finite", not_a_number),
    "code of its own": ("cannot load the model", own_code),
    "tokenizer code": ("cannot load the model", own_tokenizer_code),
    "broken tokenizer": ("cannot load the model", put("tokenizer.json", b'{"model": 3}')),
    "half a tokenizer": ("cannot load the model", cut("tokenizer.json", 100)),
    "broken template": ("chat template", put("chat_template.jinja", b"{% for %}")),
    "hostile template": ("chat template", put("chat_template.jinja", b"{{ ''.__class__.mro() }}")),
    "raising template": ("chat template", put("chat_template.jinja", b"{{ 1 / 0 }}")),
}


@pytest.mark.parametrize("command", ["generate", "run"])
@pytest.mark.parametrize("name", MODELS)
def test_a_broken_model_folder(name, command, tmp_path, tiny_folder):
    words, spoil = MODELS[name]
    shutil.copytree(tiny_folder, tmp_path / "model")
    spoil(tmp_path / "model")
    run = ["run", "-q", "--output", "out", "--lora", "0"]
    arguments = {"generate": ["generate", "a"], "run": run}[command]
    refused(words, [*arguments, "--model", "model"], tmp_path)
