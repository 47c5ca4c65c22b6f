"""Check or execute the notebooks, each in its own process, and print what they took.

    python tools/notebooks.py                  # nbval over all: the table of `make notebooks`
    python tools/notebooks.py 03 07            # those whose names begin like this
    python tools/notebooks.py --execute 03     # execute in place, clean, keep the measurement

`--execute` is for authors: it stores fresh outputs and writes records/notebooks/NAME.json, which
the notebook's head quotes for time and memory. Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
from rich.console import Console
from rich.table import Table

from cpugrpo_edu.notebook import head
from cpugrpo_edu.record.run_record import new_record

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "records" / "notebooks"
CELL_TIMEOUT = 600  # seconds
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass
class Result:
    path: Path
    ok: bool
    seconds: float
    peak_rss_bytes: int
    output: str

    def row(self) -> list[str]:
        notebook = nbformat.read(self.path, 4)
        return [
            self.path.stem,
            "ok" if self.ok else "FAILED",
            f"{self.seconds:.0f}",
            f"{self.peak_rss_bytes / 2**20:.0f}",
            str(sum(cell.cell_type == "code" for cell in notebook.cells)),
            str(exercises(notebook)),
        ]


def exercises(notebook: Any) -> int:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return len(re.findall(r"^`{3,}\{exercise\}", text, re.M))


def measure(command: list[str]) -> tuple[int, float, int, str]:
    """Exit code, seconds, peak resident bytes of the process tree, and output of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            try:
                tree = psutil.Process(process.pid)
                family = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(p.memory_info().rss for p in family))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    return process.returncode, time.perf_counter() - start, peak, output


def check(path: Path) -> Result:
    """Execute with nbval: every cell must run, marked cells must reproduce their stored output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov"]
    command += ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT}"]
    code, seconds, peak, output = measure([*command, str(path)])
    return Result(path, code == 0, seconds, peak, output)


def execute(path: Path) -> Result:
    """Execute in place, record what it took and clean the metadata."""
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    command += ["--ExecutePreprocessor.record_timing=False"]
    command += [f"--ExecutePreprocessor.timeout={CELL_TIMEOUT}"]
    code, seconds, peak, output = measure([*command, str(path)])
    result = Result(path, code == 0, seconds, peak, output)
    if result.ok:
        record(result)
        clean(path)
    return result


def record(result: Result) -> None:
    new_record(
        "notebook",
        {"notebook": result.path.stem, "tier": "SMOKE"},
        {
            "seconds": round(result.seconds, 1),
            "peak_rss_bytes": result.peak_rss_bytes,
            "exercises": exercises(nbformat.read(result.path, 4)),
        },
    ).save(RECORDS / f"{result.path.stem}.json")


def clean(path: Path) -> None:
    """Keep what a reader needs (outputs, alternative texts, tags) and drop the session's traces."""
    notebook = nbformat.read(path, 4)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    number = 0
    solving = False
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        opens = "{solution-start}" in cell.source
        closes = "{solution-end}" in cell.source
        solving = (solving or opens) and not closes
        if solving and not opens:
            cell.metadata["jupyter"] = {"source_hidden": True}  # JupyterLab folds it
        if cell.cell_type != "code":
            continue
        if "hide-input" in tags:  # a quiz, whose source gives the answers away
            cell.metadata["jupyter"] = {"source_hidden": True}
        if solving:
            cell.metadata["jupyter"]["outputs_hidden"] = True
        number += 1
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            data = output.get("data", {})
            data.pop(WIDGET, None)  # without a kernel the page shows the HTML beside it
            if "application/javascript" in data:  # JupyterLab does not run stored scripts
                data["text/plain"] = "Run this cell to take the quiz."
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
            if number == 1 and "text/markdown" in data:
                data["text/markdown"] = head(path.stem)
                data.pop("text/plain", None)
        cell.outputs = merge_streams(cell.outputs)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def merge_streams(outputs: list[Any]) -> list[Any]:
    """Join neighbouring pieces of the same stream, which a kernel splits at random.

    A progress bar rewrites its line again and again; only its last state stays.
    """
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and last.output_type == output.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n\r]*\r(?=[^\n])", "", output.text).replace("\r", "")
    return merged


def take_core(cores: Iterator[int]) -> None:
    """Give this thread, and every process it starts, a core of its own.

    Notebooks that run side by side with a thread for each core would wait for each other.
    """
    os.sched_setaffinity(0, {next(cores)})  # 0: the calling thread


def pool(jobs: int) -> ThreadPoolExecutor:
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return ThreadPoolExecutor(jobs)
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(jobs, initializer=take_core, initargs=(cores,))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of notebook names; all by default")
    parser.add_argument("--execute", action="store_true", help="execute in place and record")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time, each on one core")
    arguments = parser.parse_args()
    paths = [
        path
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        if not arguments.names or path.stem.startswith(tuple(arguments.names))
    ]
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(arguments.names)}")
    console = Console()
    table = Table("notebook", "", "seconds", "peak MiB", "cells", "exercises")
    results = []
    with pool(arguments.jobs) as workers:
        for result in workers.map(execute if arguments.execute else check, paths):
            results.append(result)
            console.print(f"{len(results)}/{len(paths)} {' '.join(result.row()[:3])} s")
            if not result.ok:
                console.print(result.output[-6000:], markup=False, highlight=False)
    for result in results:
        table.add_row(*result.row())
    total = sum(result.seconds for result in results)
    table.add_row("total", "", f"{total:.0f}", "", "", "")
    console.print(table)
    return int(not all(result.ok for result in results))


if __name__ == "__main__":
    sys.exit(main())
