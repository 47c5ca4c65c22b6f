"""Kill runs, starve them of memory and feed them nonsense; nothing may be lost.

    python tools/torture.py                                     # all checks; 3 kills
    python tools/torture.py --points 50 --default --only kill   # the default run; 50 kills

* kill: SIGKILL ends runs at random moments, then they resume. Each must do the same steps with
  one metric row each, leave no temporary and no unreadable file, and end with the weights of the
  run that was never killed, bit for bit.
* budget: runs of different models, group sizes and lengths under ``--memory-budget``. The resident
  memory of the process and its children may exceed the budget by at most 5 %.
* input: the table of malformed flags, files and data in tests/test_bad_input.py.
* ranks: the tests that two processes train as one does.

Prints one table; the exit code is 1 on any loss.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from safetensors.torch import load_file

SMALL = shlex.split(
    "--steps 2,1,1 --prompts-per-step 2 --num-generations 4 --max-completion 24 --patience 0 "
    "--fisher-examples 2 --per-cell 1 --threads 1 --save-minutes 0"
)


def command(folder: Path, options: list[str]) -> list[str]:
    resume = ["--resume"] if (folder / "state.json").exists() else []
    program = [sys.executable, "-m", "cpugrpo_edu.cli", "run", "--quiet"]
    return [*program, "--output", str(folder), *options, *resume]


def finish(folder: Path, options: list[str]) -> str:
    """Run or resume to the end; returns the error, or an empty string."""
    done = subprocess.run(command(folder, options), capture_output=True, text=True)
    return "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-300:]}"


def kill_after(seconds: float, folder: Path, options: list[str]) -> bool:
    """Start the run and kill it; returns whether it was still running."""
    process = subprocess.Popen(
        command(folder, options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def losses(folder: Path, reference: Path) -> list[str]:
    """All differences between a resumed run and the one that was never killed."""
    found = []
    for path in folder.rglob("*"):
        try:
            if path.name.endswith(".tmp"):
                found.append(f"{path.name} was left behind")
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".gz":
                json.loads(gzip.decompress(path.read_bytes()))
            elif path.suffix == ".safetensors":
                load_file(path)
        except Exception as error:
            found.append(f"{path.name} is corrupt: {error}")

    def steps(run: Path) -> list[int]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["global_step"] for line in lines]

    if steps(folder) != steps(reference):
        found.append(f"metric rows of the steps {steps(folder)}, not {steps(reference)}")
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, reference))
    largest = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    if largest > 0:
        found.append(f"weights differ by up to {largest:.1e}")
    return found


Row = tuple[str, str, str, str, bool]
"""Check, case, what was measured, result, and whether anything was lost."""


def kill_rows(points: int, seed: int, options: list[str], place: Path) -> Iterator[Row]:
    """Kill a run at each of ``points`` random moments, and resume it to its end."""
    rng = random.Random(seed)
    reference = place / "reference"
    start = time.perf_counter()
    if wrong := finish(reference, options):
        yield "kill", "the run itself", "", wrong, True
        return
    seconds = time.perf_counter() - start
    for point in range(1, points + 1):
        folder = place / str(point)
        after = rng.uniform(0.1, 1.0) * seconds
        killed = kill_after(after, folder, options)
        metrics = folder / "metrics.jsonl"
        rows = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        wrong = "" if (folder / "record.json").exists() else finish(folder, options)
        found = [wrong] if wrong else losses(folder, reference)
        when = f"after {after:.1f} s" if killed else "not killed (done before)"
        yield (
            "kill",
            f"{point}: {when}",
            f"{rows} steps",
            "; ".join(found) or "as if never killed",
            bool(found),
        )


# Memory budget

VERIFIER = """
import zlib
def grade(problem, completion):
    return zlib.crc32(completion.encode()) % 100 / 100  # grades differ, so there is a gradient
"""

SHAPES = {  # hidden, layers, feed-forward, vocabulary
    "deep": (128, 10, 512, 448),
    "wide": (384, 4, 1536, 448),
    "wordy": (128, 2, 512, 16_000),
}
BUDGETS = {"bundled": "700MB", "deep": "850MB", "wide": "1000MB", "wordy": "900MB"}


def make_shape(name: str, place: Path) -> str:
    """Make a folder with a random Qwen2 of that shape and the bundled tokenizer."""
    from transformers import AutoModelForCausalLM

    from cpugrpo_edu.models import load_policy

    bundled = load_policy("bundled")
    hidden, layers, ffn, vocabulary = SHAPES[name]
    config = bundled.model.config
    config.update(
        {
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 64,
            "vocab_size": vocabulary,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(place / name)
    bundled.tokenizer.save_pretrained(place / name)
    return str(place / name)


def budget_cases() -> list[tuple[str, str, int, int, str]]:
    """(budget, model, G, length, more options); 24 of them."""
    cases = [
        (budget, model, size, length, "")
        for model, budget in BUDGETS.items()
        for size, length in ((4, 64), (64, 64), (8, 256), (32, 256))
    ]
    for more in ("--lora 8", "--beta 0.1", "--checkpointing off", "--no-int8-rollouts"):
        cases += [("900MB", "bundled", 32, 256, more), ("1GB", "deep", 32, 256, more)]
    return cases


def measure(arguments: list[str]) -> tuple[int, int, str]:
    """Returns (exit code, peak resident bytes of the process and its children, last output)."""
    with tempfile.TemporaryFile("w+") as words:
        process = psutil.Popen(arguments, stdout=words, stderr=words)
        peak = 0
        while True:
            try:
                own = process.memory_info()
                others = [c.memory_info() for c in process.children(recursive=True)]
                # A child that was just forked still shares its parent's memory, which would
                # count twice.
                apart = [o.rss for o in others if abs(o.vms - own.vms) > 0.02 * own.vms]
                peak = max(peak, own.rss + sum(apart))
            except psutil.Error:
                pass  # a process has just ended
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                # the kernel's own high-water mark, which misses no spike
                unit = 1 if sys.platform == "darwin" else 1024
                words.seek(0)
                code = os.waitstatus_to_exitcode(status)
                return code, max(peak, unit * used.ru_maxrss), words.read().strip()[-300:]
            time.sleep(0.02)


def budget_rows(place: Path, compare: bool) -> Iterator[Row]:
    """Run every case under its budget; with ``compare`` also without one."""
    place.mkdir()
    (place / "judge.py").write_text(VERIFIER)
    prompts = [json.dumps({"prompt": f"Compute {a} + {a + 1}."}) for a in range(40)]
    (place / "prompts.jsonl").write_text("\n".join(prompts))
    models = {name: make_shape(name, place) for name in SHAPES} | {"bundled": "bundled"}

    def peak(case: tuple[str, str, int, int, str], limited: bool) -> tuple[int, int, str]:
        budget, model, size, length, more = case
        with tempfile.TemporaryDirectory(dir=place) as folder:
            options = shlex.split(
                f"--steps 1,1,0 --prompts-per-step 2 --num-generations {size} --threads 1 "
                f"--max-completion {length} --patience 0 --per-cell 1 --fisher-examples 4 {more}"
            )
            data = ["--data", str(place / "prompts.jsonl"), "--rewards", "correct_answer=1"]
            judge = ["--verifier", f"{place / 'judge.py'}:grade"]
            limit = ["--memory-budget", budget] if limited else []
            program = command(Path(folder) / "out", [*options, *data, *judge, *limit])
            return measure([*program, "--model", models[model]])

    cases = budget_cases()
    with ThreadPoolExecutor(2) as pool:
        limited = pool.map(lambda case: peak(case, True), cases)
        free = pool.map(lambda case: peak(case, False), cases if compare else [])
        for case in cases:
            budget, model, size, length, more = case
            code, most, words = next(limited)
            allowed = int(budget.removesuffix("MB").replace("GB", "000")) * 1e6
            over = most / allowed - 1
            measured = f"peak {most / 1e6:.0f} MB"
            if compare:
                measured += f", without a budget {next(free)[1] / 1e6:.0f} MB"
            if code:
                result = f"exit code {code}: {words}"
            else:
                result = "kept" if over <= 0 else f"{over:.1%} over"
            name = f"{budget}, {model}, G {size}, length {length} {more}".strip()
            yield "budget", name, measured, result, bool(code) or over > 0.05


def test_rows(check: str, case: str, arguments: list[str]) -> Iterator[Row]:
    """Run some of the tests; they make one row."""
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    root = Path(__file__).parents[1]
    done = subprocess.run(program, capture_output=True, text=True, cwd=root)
    count = re.search(r"(\d+) passed", done.stdout)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-200:]]
    result = "all as expected" if done.returncode == 0 else last[0]
    yield check, case, f"{count[1] if count else 0} passed", result, done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=3, help="moments to kill a run at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--default", action="store_true", help="kill the default run instead of a small one"
    )
    parser.add_argument("--compare", action="store_true", help="budget: also run without one")
    parser.add_argument("--only", choices=("kill", "budget", "input", "ranks"))
    asked = parser.parse_args()
    options = ["--save-minutes", "0.1"] if asked.default else SMALL
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        checks = {
            "kill": kill_rows(asked.points, asked.seed, options, place),
            "budget": budget_rows(place / "budget", asked.compare),
            "input": test_rows("input", "tests/test_bad_input.py", ["tests/test_bad_input.py"]),
            "ranks": test_rows("ranks", "two ranks equal one", ["tests", "-k", "two_ranks"]),
        }
        print("| check | case | measured | result |\n|---|---|---|---|", flush=True)
        for check, rows in checks.items():
            if asked.only in (None, check):
                for *cells, lost in rows:
                    bad += lost
                    text = " | ".join(" ".join(str(cell).split()) for cell in cells)
                    print(f"| {text} |{' LOST' if lost else ''}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
