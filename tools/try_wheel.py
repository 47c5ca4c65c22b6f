"""Build the wheel, and try it in fresh environments as a learner would, away from the checkout.

    python tools/try_wheel.py    # build it, then try each Python from 3.11 to 3.13 that is here
    python tools/try_wheel.py dist/NAME.whl --all    # a built one; no Python may be missing

In each environment: `cpugrpo doctor`, a run of one step, the learner's folder, and a chapter of
it by nbval. A Python is skipped, with a line that says why, if it is not installed or if no CPU
build of torch can be had for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from install import NO_CPU_TORCH, ROOT

PYTHONS = ("3.11", "3.12", "3.13")
SMALL = ["--steps", "1", "--per-cell", "1", "--prompts-per-step", "4", "--output", "run"]
NBVAL = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
CHAPTER = "01_policy"


class Skipped(Exception):
    """Why a Python was not tried."""


class Failed(Exception):
    """What went wrong, in one line; the output is above it."""


def build() -> Path:
    """The wheel of this checkout, in dist/, from nothing that an earlier build left."""
    for leftover in (ROOT / "build" / "lib", *ROOT.glob("build/bdist.*")):
        shutil.rmtree(leftover, ignore_errors=True)
    dist = ROOT / "dist"
    for old in dist.glob("cpugrpo_edu-*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(dist), str(ROOT)], check=True)
    (wheel,) = dist.glob("cpugrpo_edu-*.whl")
    return wheel


def find_python(version: str) -> Path:
    """An interpreter of this version: the newest of pyenv's, else by its name."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(
        pyenv.glob(f"versions/{version}.*/bin/python"),
        key=lambda path: [int(part) for part in path.parts[-3].split(".") if part.isdigit()],
    )
    if found:
        return found[-1]
    if (named := shutil.which(f"python{version}")) is None:
        raise Skipped("not installed here")
    return Path(named)


def install(version: str, wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment; its folder of programs."""
    command = [str(find_python(version)), str(ROOT / "tools" / "install.py"), "--venv", str(folder)]
    done = subprocess.run(
        [*command, "--wheel", str(wheel)], stderr=subprocess.PIPE, text=True, env=clean()
    )
    if NO_CPU_TORCH in done.stderr:
        raise Skipped(done.stderr.splitlines()[-1])
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise Failed("the installation")
    return folder / ("Scripts" if os.name == "nt" else "bin")


def clean() -> dict[str, str]:
    """Our environment, without what would let the checkout be imported."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def check(programs: Path, scratch: Path) -> None:
    """Do what a learner does in the empty folder ``scratch``; Failed names what did not work."""
    cpugrpo, python = str(programs / "cpugrpo"), str(programs / "python")
    steps = {
        "cpugrpo doctor": [cpugrpo, "doctor"],
        "cpugrpo run": [cpugrpo, "run", *SMALL],
        "cpugrpo lab": [cpugrpo, "lab", "mine", "--no-start"],
        f"chapter {CHAPTER}": [python, *NBVAL, f"mine/notebooks/{CHAPTER}.ipynb"],
    }
    for name, command in steps.items():
        done = subprocess.run(
            command,
            cwd=scratch,
            env=clean(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            print(done.stdout[-6000:])
            raise Failed(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="?", help="a built wheel; by default, build it")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this; repeatable")
    parser.add_argument("--all", action="store_true", help="fail if a Python cannot be tried")
    given = parser.parse_args()
    wheel = given.wheel.resolve() if given.wheel else build()
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    good = True
    for version in given.python or PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder, "scratch")
            scratch.mkdir()
            try:
                check(install(version, wheel, Path(folder, "venv")), scratch)
                print(f"Python {version}: good", flush=True)
            except Skipped as why:
                print(f"Python {version}: skipped: {why}", flush=True)
                good = good and not given.all
            except Failed as what:
                print(f"Python {version}: FAILED: {what}", flush=True)
                good = False
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
