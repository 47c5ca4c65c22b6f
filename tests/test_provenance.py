"""A record's hash changes with what its code does, and with nothing else."""

from __future__ import annotations

import ast
import json

import pytest

from cpugrpo_edu import provenance as P
from cpugrpo_edu.hardware import code_hash
from cpugrpo_edu.types import RunRecord, UserError

SOURCES = {
    "__init__.py": '__version__ = "1"\n',
    "main.py": "from .util import add\nimport toy.extra\n\ndef run():\n    from toy import late\n",
    "util.py": "def add(a, b):\n    return a + b\n",
    "extra/__init__.py": "from . import deep\n",
    "extra/deep.py": "X = 1\n",
    "late.py": "Y = 2\n",
    "apart.py": "Z = 3\n",
}


@pytest.fixture
def toy(tmp_path):
    package = tmp_path / "toy"
    for name, text in SOURCES.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_modules_are_followed_through_every_kind_of_import(toy):
    names = ["toy", "toy.extra", "toy.extra.deep", "toy.late", "toy.main", "toy.util"]
    assert P.modules("toy.main", toy) == names
    assert P.modules("toy.apart", toy) == ["toy", "toy.apart"]
    with pytest.raises(UserError, match=r"toy\.none"):
        P.modules("toy.none", toy)


@pytest.mark.parametrize("module", ["util.py", "extra/deep.py", "late.py", "main.py"])
def test_hash_sees_what_the_code_does_wherever_it_is(toy, module):
    before = P.entry_hash("toy.main", toy)
    path = toy / module
    path.write_text('"""New words."""\n\n# a comment\n' + path.read_text() + "\n\n")
    assert P.entry_hash("toy.main", toy) == before
    path.write_text(path.read_text() + "\nW = 5\n")
    assert P.entry_hash("toy.main", toy) != before


def test_hash_leaves_alone_what_is_not_imported(toy):
    before = P.entry_hash("toy.main", toy)
    (toy / "apart.py").write_text("Z = 4\n")
    assert P.entry_hash("toy.main", toy) == before
    (toy / "util.py").rename(toy / "tool.py")
    assert P.entry_hash("toy.main", toy) != before


def test_meaning_ignores_words_and_layout_only():
    code = 'def f(a):\n    """Words."""\n    return a + 1\nx = 3\n"""About x."""\n'
    assert P.meaning(code) == P.meaning("def f(a): return (a+1)  # same\n\n\nx=3")
    for other in ("return a + 2", "return a - 1", "return 'a' + 1"):
        assert P.meaning(code) != P.meaning(code.replace("return a + 1", other))
    assert P.meaning('print("words")') != P.meaning('print("other")')
    assert P.meaning("x = 1") != P.meaning("x = 1.0")


def test_comments_and_layout_of_c_do_not_count():
    code = b"int f(int a) { /* two\n lines */\n  return a + 1; // one more\n}\n"
    assert P.c_meaning(code) == P.c_meaning(b"int f(int a) {\r\n return a + 1;\r\n}")
    assert P.c_meaning(code) != P.c_meaning(code.replace(b"a + 1", b"a + 2"))
    assert P.c_meaning(b"a = b / c; d = e * f;") != P.c_meaning(b"a = b f;")


def test_what_is_left_out_is_not_what_a_result_needs():
    for entry in ("cpugrpo_edu.pipeline", "cpugrpo_edu.bench"):
        names = P.modules(entry)
        assert {"cpugrpo_edu.trainer", "cpugrpo_edu.rollout", "cpugrpo_edu.statistics"} <= set(
            names
        )
        assert not set(names) & set(P.LEFT_OUT)
        for name in set(names) - {entry, "cpugrpo_edu.pipeline"}:
            used = P.imports(P.module_file(name), name) & set(P.LEFT_OUT) - {"cpugrpo_edu"}
            assert used <= {"cpugrpo_edu.provenance"}, f"{name} uses {used}: count it"
    assert all(P.LEFT_OUT.values())
    statements = ast.parse(P.module_file("cpugrpo_edu").read_text()).body
    assert [type(node) for node in statements] == [ast.Expr, ast.Assign]  # words, version


def test_code_hash_takes_an_entry():
    assert code_hash(entry="cpugrpo_edu.types") == P.entry_hash("cpugrpo_edu.types")
    assert code_hash(entry="cpugrpo_edu.types") != code_hash(entry="cpugrpo_edu.answers")
    with pytest.raises(UserError, match="nothing_like_it"):
        code_hash(entry="cpugrpo_edu.nothing_like_it")


def test_the_bundled_model_belongs_to_the_code(toy):
    (toy / "main.py").write_text("import toy.models\n")
    (toy / "models.py").write_text("")
    (toy / "bundled").mkdir()
    for file in P.MODEL_FILES:
        (toy / "bundled" / file).write_bytes(b"{}\r\n")
    before = P.entry_hash("toy.main", toy)
    (toy / "bundled" / "config.json").write_bytes(b"{}\n")
    assert P.entry_hash("toy.main", toy) == before
    (toy / "bundled" / "model.safetensors").write_bytes(b"other")
    assert P.entry_hash("toy.main", toy) != before


def notebook(path, *cells):
    made = [{"cell_type": kind, "source": [source], "outputs": []} for kind, source in cells]
    path.write_text(json.dumps({"cells": made}))
    return P.notebook_hash(path)


def test_notebook_hash_counts_code_cells_only(tmp_path):
    path = tmp_path / "n.ipynb"
    first = notebook(path, ("markdown", "# A"), ("code", "x = 1"), ("code", "!ls"))
    assert first == notebook(path, ("code", "x = 1  # one"), ("markdown", "B"), ("code", "!ls"))
    assert first != notebook(path, ("code", "x = 2"), ("code", "!ls"))
    assert first != notebook(path, ("code", "x = 1"), ("code", "!ls -l"))
    assert first != notebook(path, ("code", "!ls"), ("code", "x = 1"))


def record(kind, code_hash):
    return RunRecord(kind, "", 0, "", code_hash, {}, {}, {"notebook": "n"})


def test_staleness_names_the_record_and_the_mend(tmp_path, monkeypatch):
    path = tmp_path / "run-seed0.json"
    record("run", P.entry_hash("cpugrpo_edu.pipeline")).save(path)
    assert P.staleness(path) == ""
    record("run", "0" * 64).save(path)
    assert "run-seed0.json" in P.staleness(path) and "make records" in P.staleness(path)
    (tmp_path / "notebooks").mkdir()
    now = notebook(tmp_path / "notebooks" / "n.ipynb", ("code", "x = 1"))
    assert P.hash_now(record("notebook", ""), tmp_path) == now
    record("guess", "").save(path)
    with pytest.raises(UserError, match="kind 'guess'"):
        P.staleness(path)
