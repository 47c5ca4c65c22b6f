"""Break the package on purpose: for every break, a notebook must fail.

    python tools/mutations.py             # all
    python tools/mutations.py kl-sign     # some

Each break changes one line of a copy of the package and executes one notebook against that
copy, up to the first cell that fails. It must fail by an assertion: a notebook that runs
through would teach the broken thing without noticing. A break names the line by its text, not
by its file, so that code can move.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """``old``, which occurs once in the package, becomes ``new``; ``notebook`` must then fail."""

    name: str
    old: str
    new: str
    notebook: str

    def apply(self, package: Path) -> Path:
        """Break the package in this folder; the module that was changed."""
        modules = {path: path.read_text() for path in package.rglob("*.py")}
        count = sum(text.count(self.old) for text in modules.values())
        assert count == 1, f"{self.name}: {self.old!r} is there {count} times, not once"
        [module] = [path for path, text in modules.items() if self.old in text]
        module.write_text(modules[module].replace(self.old, self.new))
        return module


MUTATIONS = [
    Mutation(
        "kl-sign",
        "    d = ref_log_probs - log_probs\n",
        "    d = log_probs - ref_log_probs\n",
        "03_grpo_from_zero",
    ),
    Mutation(
        "advantage-ddof",
        "rewards.std(dim=-1, correction=1, keepdim=True)",
        "rewards.std(dim=-1, correction=0, keepdim=True)",
        "03_grpo_from_zero",
    ),
    Mutation(
        "loss-mask",
        "    return reduce_tokens(loss * mask, mask, ",
        "    return reduce_tokens(loss * torch.ones_like(mask), mask, ",
        "03_grpo_from_zero",
    ),
    Mutation(
        "log-prob-mask",
        ".masked_fill(~mask, 0.0)",
        ".masked_fill(mask & ~mask, 0.0)",
        "01_policy",
    ),
    Mutation(
        "clip-minimum",
        "return torch.min(ratio * advantages,",
        "return torch.max(ratio * advantages,",
        "03_grpo_from_zero",
    ),
    Mutation(
        "ewc-half",
        "return strength / 2 * torch.stack(energies).sum()",
        "return strength * torch.stack(energies).sum()",
        "14_ewc",
    ),
    Mutation(
        "fisher-batch-mean",
        "fisher[name] += torch.tensordot(weights, score.float().square(), dims=1)",
        "fisher[name] += torch.tensordot(weights, score.float(), dims=1).square() / len(weights)",
        "13_fisher",
    ),
]


def copy_package(folder: Path) -> Path:
    """The package, copied into ``folder``."""
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(ROOT / "cpugrpo_edu", folder / "cpugrpo_edu", ignore=ignore))


def caught(mutation: Mutation) -> tuple[bool, str]:
    """Whether the notebook fails by an assertion on the broken package, and the error."""
    with tempfile.TemporaryDirectory() as folder:
        mutation.apply(copy_package(Path(folder)))
        shutil.copytree(ROOT / "records", Path(folder) / "records")
        notebook = ROOT / "notebooks" / f"{mutation.notebook}.ipynb"
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
        command += ["--output-dir", folder, str(notebook)]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": folder},
            cwd=folder,
            capture_output=True,
            text=True,
        )
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stderr)
    lines = [line for line in said.splitlines() if "Error" in line]
    asserted = "CellExecutionError" in said and "AssertionError" in lines[-1]
    return asserted, lines[-1][:120] if lines else "no error"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(m.name for m in MUTATIONS))
    names = parser.parse_args().names
    missed = 0
    for mutation in MUTATIONS:
        if names and mutation.name not in names:
            continue
        start = time.perf_counter()
        failed, how = caught(mutation)
        missed += not failed
        verdict = f"caught: {how}" if failed else f"NOT CAUGHT: {how}"
        seconds = time.perf_counter() - start
        print(f"{mutation.name:18} {mutation.notebook:20} {seconds:4.0f} s  {verdict}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
