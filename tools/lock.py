"""Write requirements.lock from pyproject.toml: one pin per package and Python version.

Keeps existing pins where they still fit; `--upgrade` renews them all. The solver is uv, because
it solves for every Python version and system at once. Pins only the extras that tools/install.py
installs: "benchmark" builds llama.cpp from source.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from install import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Written by `make lock` from pyproject.toml; do not edit.
# The CUDA libraries of the Linux torch wheel are left out on purpose, so install with
# tools/install.py (`make venv`), which takes the CPU build of torch.
"""
CUDA = re.compile(r"^(nvidia-|cuda-|triton)")


def main() -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet"]
    command += ["--universal", "--python-version", "3.11"]
    command += [f"--extra={extra}" for extra in EXTRAS.split(",")]
    command += ["--no-header", "--no-annotate", "--output-file", str(LOCK), *sys.argv[1:]]
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    pins = [line for line in LOCK.read_text().splitlines() if not CUDA.match(line)]
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{LOCK.name}: {len(pins)} pins")


if __name__ == "__main__":
    main()
