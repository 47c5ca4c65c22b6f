"""Kill a run with SIGKILL at random moments, resume it each time, and look for any loss.

    python tools/torture.py                       a small run, 3 points
    python tools/torture.py --points 50 --default  the default run of `cpugrpo run`

After its resumption every run must have done the same steps, with one metric row each,
no leftover and no unreadable file, and end with the weights of the run that was never
killed, bit for bit. Prints a table; the exit code is 1 on any difference.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    """Run or resume to the end; what went wrong, or nothing."""
    done = subprocess.run(command(folder, options), capture_output=True, text=True)
    return "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-300:]}"


def kill_after(seconds: float, folder: Path, options: list[str]) -> bool:
    """Start the run and kill it; whether it was still going on."""
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
    """Everything in which a resumed run differs from the one that was never killed."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--default", action="store_true", help="the default run, not a small one")
    asked = parser.parse_args()
    options = ["--save-minutes", "0.1"] if asked.default else SMALL
    rng = random.Random(asked.seed)
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        reference = Path(place) / "reference"
        start = time.perf_counter()
        if wrong := finish(reference, options):
            print(f"the run itself fails: {wrong}")
            return 1
        seconds = time.perf_counter() - start
        print("| point | killed after | steps done | result |\n|---|---:|---:|---|", flush=True)
        for point in range(1, asked.points + 1):
            folder = Path(place) / str(point)
            after = rng.uniform(0.1, 1.0) * seconds
            killed = kill_after(after, folder, options)
            metrics = folder / "metrics.jsonl"
            rows = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
            wrong = "" if (folder / "record.json").exists() else finish(folder, options)
            found = [wrong] if wrong else losses(folder, reference)
            bad += bool(found)
            when = f"{after:.1f} s" if killed else "not (done before)"
            print(
                f"| {point} | {when} | {rows} | {'; '.join(found) or 'as never killed'} |",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
