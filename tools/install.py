"""Create a virtual environment and install the project into it, with the CPU build of torch.

    python tools/install.py [--venv .venv] [--wheel dist/NAME.whl]

Needs only the standard library, on Linux, macOS and Windows. Returns at once when nothing has
changed since the last time. With --wheel it installs this wheel as learners do: from what the
wheel itself declares, with the extra notebooks, at the locked versions.

Why not plain `pip install torch`: on Linux the usual index serves a build that brings several
gigabytes of CUDA libraries. We ask pip what it *would* install; if that includes CUDA, we take
the wheel from the PyTorch project's own CPU index.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
EXTRAS = "notebooks,book,grading,dev"
# PyTorch's documented channel for CPU builds; set TORCH_INDEX to use another one, e.g. a mirror.
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
NO_CPU_TORCH = "Cannot get the CPU build of"
CUDA = re.compile(r"^(nvidia|cuda|triton)", re.IGNORECASE)


def fingerprint() -> str:
    """Changes when the pins, the dependencies or this script change, or the project moves."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pinned_torch() -> str:
    match = re.search(r"^torch==\S+", LOCK.read_text(), re.MULTILINE)
    if match is None:
        sys.exit("requirements.lock pins no torch; run `make lock`.")
    return match.group()


def create(folder: Path) -> Path:
    """Create the environment unless it exists; return its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"Creating {folder}", flush=True)
        try:
            venv.create(folder, with_pip=True)
        except (subprocess.CalledProcessError, ImportError):
            sys.exit(
                "This Python cannot create virtual environments; install its venv module "
                "(Debian and Ubuntu: apt install python3-venv) and try again."
            )
    return python


def pip(python: Path, *arguments: str, capture: bool = False) -> str:
    """Run pip in the environment; return its output if ``capture``."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE if capture else None
        )
    except subprocess.CalledProcessError:
        sys.exit(f"This step failed, see pip's message above: pip {' '.join(arguments)}")
    return done.stdout or ""


def brings_cuda(report: str) -> bool:
    """Whether pip's installation report (--report) lists a CUDA package."""
    return any(CUDA.match(item["metadata"]["name"]) for item in json.loads(report)["install"])


def install_torch(python: Path, torch: str) -> None:
    plan = ("install", "-qq", "--dry-run", "--report", "-", "--only-binary", ":all:", torch)
    if not brings_cuda(pip(python, *plan, capture=True)):
        pip(python, "install", "-qq", "--no-deps", torch)
        return
    print(
        f"The usual index offers a CUDA build; taking the CPU build from {TORCH_INDEX}", flush=True
    )
    try:
        pip(python, "install", "-qq", "--no-deps", "--index-url", TORCH_INDEX, torch)
    except SystemExit:
        sys.exit(
            f"{NO_CPU_TORCH} {torch} from {TORCH_INDEX}; check the network, or set "
            "TORCH_INDEX to a mirror or a local folder's index and try again."
        )


def check_cpu_build(python: Path) -> None:
    code = "import torch; print(torch.__version__, torch.version.cuda or 'cpu')"
    command = [str(python), "-c", code]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    version, kind = done.stdout.split()
    if kind != "cpu":
        sys.exit(
            f"torch {version} is built for CUDA {kind}, but this project uses the CPU build; "
            f"delete {python.parent.parent} and try again."
        )


def install_project(python: Path) -> None:
    print("Installing the other packages of requirements.lock", flush=True)
    pip(python, "install", "-qq", "--no-deps", "-r", str(LOCK))
    project = f"{ROOT}[{EXTRAS}]"
    pip(python, "install", "-qq", "--no-deps", "--no-build-isolation", "--editable", project)


def install_wheel(python: Path, wheel: Path) -> None:
    print(f"Installing {wheel.name} and what it needs", flush=True)
    pip(python, "install", "-qq", "--constraint", str(LOCK), f"{wheel}[notebooks]")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  people run this with whatever they have
        have = sys.version.split()[0]
        sys.exit(f"Python {have} is too old; use 3.11 or newer: make run PYTHON=python3.11")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder to install into")
    parser.add_argument("--wheel", type=Path, help="install this wheel, not the checkout")
    given = parser.parse_args()
    folder = given.venv.resolve()

    stamp = folder / "installed.txt"
    if given.wheel is None and stamp.exists() and stamp.read_text() == fingerprint():
        return
    stamp.unlink(missing_ok=True)

    python = create(folder)
    print("Installing torch (all packages take some minutes and about 2 GB of disk)", flush=True)
    # 23.3: the first pip whose --dry-run reads metadata without downloading whole wheels
    pip(python, "install", "-qq", "pip>=23.3")
    install_torch(python, pinned_torch())
    if given.wheel is None:
        install_project(python)
    else:
        install_wheel(python, given.wheel.resolve())
    pip(python, "check")
    check_cpu_build(python)
    if given.wheel is None:
        stamp.write_text(fingerprint())


if __name__ == "__main__":
    main()
