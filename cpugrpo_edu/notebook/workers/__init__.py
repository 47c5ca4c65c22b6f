"""Programs that run as ranks in chapter 16, and the two ways to start them.

A rank finds its number in the environment and writes what it found, as JSON, to the file
``rankR`` in the folder that its first argument names.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError

PATIENCE = 120.0
"""Seconds that ranks may take in all."""

Start = Callable[[Path, int, Sequence[str]], str]
"""Starts a program once for every rank and returns what the ranks said: errors, if any."""


def source(name: str) -> str:
    """The text of one of the programs here. Raises UserError if there is none of that name."""
    path = Path(__file__).with_name(f"{name}.py")
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.py") if p.stem != "__init__")
        raise UserError(f"there is no worker {name!r}; allowed are {', '.join(known)}")
    return path.read_text(encoding="utf-8")


def by_hand(path: Path, ranks: int, arguments: Sequence[str]) -> str:
    """Start a program once for every rank; their error output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared: dict[str, Any] = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(ranks):
        names = shared | {"RANK": rank, "LOCAL_RANK": rank}
        mine = os.environ | {key: str(x) for key, x in names.items()}
        command = [sys.executable, str(path), *arguments]
        started.append(subprocess.Popen(command, env=mine, stderr=subprocess.PIPE))
    try:
        return "".join(p.communicate(timeout=PATIENCE)[1].decode() for p in started)
    finally:
        for process in started:
            process.kill()


def torchrun(path: Path, ranks: int, arguments: Sequence[str]) -> str:
    """The same with PyTorch's launcher, and a clock while it works; all that the ranks said."""
    from IPython.display import clear_output

    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", f"--nproc_per_node={ranks}", str(path), *arguments]
    log = path.with_suffix(".log")
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as started:
        begun = time.monotonic()
        while started.poll() is None:
            if time.monotonic() - begun > PATIENCE:
                started.terminate()
            time.sleep(0.2)
            print(f"\r{ranks} ranks: {time.monotonic() - begun:.0f} s", end="")
    clear_output()  # type: ignore[no-untyped-call]
    return log.read_text()


def launch(program: str, ranks: int, start: Start = by_hand) -> list[Any]:
    """Run the text of a program in several processes; what each rank wrote.

    Raises RuntimeError with the end of the error output if a rank wrote nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "worker.py"
        path.write_text(program, encoding="utf-8")
        errors = start(path, ranks, [folder])
        files = [Path(folder) / f"rank{r}" for r in range(ranks)]
        if not all(file.exists() for file in files):
            raise RuntimeError(errors[-2000:])
        return [json.loads(file.read_text()) for file in files]
