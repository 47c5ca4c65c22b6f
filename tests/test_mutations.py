"""The breaks of tools/mutations.py fit the package; `make mutations` runs them."""

from __future__ import annotations

import pytest
from mutations import MUTATIONS, ROOT, copy_package


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_break_changes_one_line_that_still_compiles(mutation, tmp_path):
    package = copy_package(tmp_path)
    before = {path: path.read_text() for path in package.rglob("*.py")}
    module = mutation.apply(package)
    changed = [path for path, text in before.items() if path.read_text() != text]
    assert changed == [module]
    broken = module.read_text()
    compile(broken, str(module), "exec")
    lines = zip(before[module].splitlines(), broken.splitlines(), strict=True)
    assert sum(a != b for a, b in lines) == 1
    assert (ROOT / "notebooks" / f"{mutation.notebook}.ipynb").exists()
