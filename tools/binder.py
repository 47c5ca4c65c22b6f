"""Build the pip part of environment.yml from scratch, as Binder would, and start what it installed.

    python tools/binder.py

This needs no conda: pip installs what conda would have installed first (torch and numpy) into a
fresh virtual environment. Then the pip lines run as written, pip checks that all versions agree,
and the package and JupyterLab start. The environment is deleted afterwards.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

import yaml
from install import ROOT, check_cpu_build, create, install_torch, pip


def parts(environment: dict) -> tuple[dict[str, str], list[str]]:
    """What conda installs (name to version), and the lines for pip."""
    conda: dict[str, str] = {}
    lines: list[str] = []
    for entry in environment["dependencies"]:
        if isinstance(entry, dict):
            lines += entry["pip"]
        elif "=" in entry:
            name, version, *_ = entry.split("=")
            conda[name] = version
    return conda, lines


def main() -> None:
    conda, lines = parts(yaml.safe_load((ROOT / "environment.yml").read_text()))
    with tempfile.TemporaryDirectory() as scratch:
        python = create(Path(scratch) / "venv")
        install_torch(python, f"torch=={conda['pytorch']}")
        pip(python, "install", "-qq", f"numpy=={conda['numpy']}")
        arguments = [part for line in lines for part in shlex.split(line)]
        pip(python, "install", "-qq", *arguments)
        pip(python, "check")
        check_cpu_build(python)
        for command in (["cpugrpo", "--help"], ["jupyter", "lab", "--version"]):
            command[0] = str(python.with_name(command[0]))
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"environment.yml: pip installed {' '.join(lines)}; the package and JupyterLab start")


if __name__ == "__main__":
    main()
