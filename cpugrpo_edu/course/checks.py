"""Questions about the cells of a notebook, and its tests compiled for the kernel.

A test works on the student's variables, but reads builtins and imports from the module ``_cg``
that ``guard`` binds: a variable called ``list`` or ``math`` neither breaks a test nor is broken
by one.
"""

from __future__ import annotations

import ast
import base64
import builtins
import marshal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nbformat import NotebookNode

WATCHED = ("builtins", "math", "random")
WITH = {
    "numpy": ("numpy.linalg", "numpy.testing", "numpy.random"),
    "torch": ("torch.nn.functional", "torch.testing"),
}
"""Modules whose functions the guard compares, always and together with an imported library."""


# Cells. nbgrader.utils has the same questions, but importing it takes seconds for each submission.


def nbgrader_of(cell: NotebookNode) -> dict[str, Any]:
    return dict(cell.metadata.get("nbgrader", {}))


def is_test(cell: NotebookNode) -> bool:
    meta = nbgrader_of(cell)
    return bool(cell.cell_type == "code" and meta.get("grade") and not meta.get("solution"))


def is_locked(cell: NotebookNode) -> bool:
    meta = nbgrader_of(cell)
    return bool(meta.get("locked") or meta.get("grade")) and not meta.get("solution")


def parsed(source: str) -> list[ast.stmt]:
    """Statements of a cell; none if it is not plain Python, such as with a magic."""
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError):
        return []


def imported_modules(cells: list[NotebookNode]) -> list[str]:
    """Modules that the locked cells import, and those that belong with them."""
    names = set(WATCHED)
    sources = [cell.source for cell in cells if cell.cell_type == "code" and is_locked(cell)]
    for node in (node for source in sources for top in parsed(source) for node in ast.walk(top)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    for name in list(names):
        names.update(WITH.get(name.split(".")[0], ()))
    return sorted(names - {"__future__"})


def bound(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that statements bind anywhere, as a variable, argument, function, class or import."""
    found: set[str] = set()
    for node in (inner for top in nodes for inner in ast.walk(top)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.add(node.name)
    return found


class OwnNames(ast.NodeTransformer):
    """Let code read the names of ``own`` from ``_cg``, see ``guard.give_names``."""

    def __init__(self, own: set[str]) -> None:
        self.own = own

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.own or not isinstance(node.ctx, ast.Load):
            return node
        place = ast.Attribute(ast.Name("_cg", ast.Load()), node.id, ast.Load())
        return ast.fix_missing_locations(ast.copy_location(place, node))


BUILTINS = {name for name in dir(builtins) if name[0] != "_"} - {"super", "exit", "quit"}
"""Builtins that tests mean. A call of ``super`` needs its name; IPython has an exit of its own."""


@dataclass
class Checks:
    """What the tests of one notebook rely on, besides the answers.

    ``own`` are the names that locked code takes from the grader, ``helpers`` the functions and
    classes of the locked cells, compiled, and ``clean`` the fingerprint before any answer ran.
    """

    modules: list[str]
    imports: list[str]
    own: set[str]
    helpers: str = ""
    clean: dict[str, str] | None = None


def checks_of(cells: list[NotebookNode], exercise: list[str]) -> Checks:
    """The checks of a notebook whose ``exercise`` asks to define these names."""
    locked = [
        statement
        for cell in cells
        if cell.cell_type == "code" and is_locked(cell) and not is_test(cell)
        for statement in parsed(cell.source)
    ]
    imports = [each for each in locked if isinstance(each, ast.Import | ast.ImportFrom)]
    kinds = ast.FunctionDef | ast.ClassDef
    helpers: list[ast.stmt] = [each for each in locked if isinstance(each, kinds)]
    own = (BUILTINS | bound(imports)) - {"*"} - set(exercise)
    found = Checks(imported_modules(cells), [ast.unparse(each) for each in imports], own)
    found.helpers = compiled(ast.Module(helpers, []), own, "<helpers>")
    return found


def compiled(code: ast.Module, own: set[str], name: str) -> str:
    """Bytecode as text, for the same Python in the kernel."""
    code = OwnNames(own - bound(code.body)).visit(code)
    return base64.b64encode(marshal.dumps(compile(code, name, "exec", dont_inherit=True))).decode()


def compiled_test(source: str, own: set[str]) -> str:
    """A test, compiled; the value of its last expression is partial credit, in ``_cg_value``.

    Raises ``SyntaxError`` and ``ValueError`` as :func:`ast.parse` does.
    """
    try:
        code = ast.parse(source)
    except SyntaxError:  # perhaps a magic
        from IPython.core.inputtransformer2 import TransformerManager

        code = ast.parse(TransformerManager().transform_cell(source))
    if code.body and isinstance(last := code.body[-1], ast.Expr):
        value = ast.Assign([ast.Name("_cg_value", ast.Store())], last.value)
        code.body[-1] = ast.fix_missing_locations(ast.copy_location(value, last))
    return compiled(code, own, "<test>")


def locked_source(source: str, own: set[str]) -> str:
    """The code of a locked cell, with the grader's builtins."""
    body = parsed(source)
    code = OwnNames(own - bound(body)).visit(ast.Module(body, []))
    return ast.unparse(code) if "_cg" in ast.unparse(code) else source


def names_of(stub: str) -> list[str]:
    """Names that a released solution cell defines: functions, classes and variables."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found: list[str] = []
    for statement in parsed(stub):
        if isinstance(statement, kinds):
            found.append(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            found += sorted(bound([statement]))
    return found
