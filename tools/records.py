"""Repeat the headline runs and keep their records: ``make records``.

Five seeds, each with and without EWC, otherwise with default settings. Takes about a quarter of
an hour on two cores; run nothing else meanwhile, since the records hold times. Existing records
are kept, so you can interrupt the command and repeat it; --fresh measures all again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, list[str]] = {"no-ewc": [], "ewc": ["--ewc", "0.1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fresh", action="store_true", help="repeat all runs")
    arguments = parser.parse_args()
    for variant, options in VARIANTS.items():
        for seed in range(arguments.seeds):
            keep_record(f"run-seed{seed}-{variant}", seed, options, arguments.fresh)


def keep_record(name: str, seed: int, options: list[str], fresh: bool) -> None:
    """Run into ``runs/`` and keep the record, unless it exists."""
    record = ROOT / "records" / f"{name}.json"
    if record.exists() and not fresh:
        return
    folder = ROOT / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "cpugrpo_edu.cli", "run", "--seed", str(seed)]
    subprocess.run([*command, *options, "--output", str(folder)], check=True, cwd=ROOT)
    record.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "record.json", record)


if __name__ == "__main__":
    main()
