"""The breaks of tools/mutations.py fit the package; `make mutations` runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from mutations import MUTATIONS  # noqa: E402


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_break_changes_one_line_that_still_compiles(mutation):
    text = (ROOT / "cpugrpo_edu" / mutation.module).read_text()
    broken = mutation.mutate(text)
    compile(broken, mutation.module, "exec")
    differing = [a for a, b in zip(text.splitlines(), broken.splitlines(), strict=True) if a != b]
    assert len(differing) == 1
    assert (ROOT / "notebooks" / f"{mutation.notebook}.ipynb").exists()
