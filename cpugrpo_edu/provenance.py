"""Which code a number was measured with: hashes of what a program does, not of how it is written.

A record keeps the hash of the code that made it. Comparing it with the code at hand says
whether the number may still be quoted. Only what can change a result counts: the syntax
trees, without comments and docstrings, of the modules that the measured entry point imports,
directly or not, and the bundled model they load. What is left out is named in ``LEFT_OUT``.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from cpugrpo_edu.types import RunRecord, UserError

PACKAGE = Path(__file__).parent
NAME = PACKAGE.name

LEFT_OUT = {
    NAME: "holds the version alone, which a record states beside the hash",
    f"{NAME}.cli": "turns words of the command line into a call",
    f"{NAME}.monitor": "shows and logs what it is given",
    f"{NAME}.provenance": "is this module; it computes the hash",
    f"{NAME}.report": "writes up a finished record",
}
"""Modules that a measured program imports and that cannot change what it measures, and why."""

MODEL_FILES = (
    *("model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
"""Files of the bundled model; they count wherever ``models`` does."""

OTHER_SOURCES = {f"{NAME}.compiled": "decode.c"}
"""What a module does by means of another file than its own."""

ENTRIES = {
    "run": f"{NAME}.pipeline",
    "bench": f"{NAME}.bench",
    "orders": f"{NAME}.pipeline",
    "study-quantization": f"{NAME}.studies.quantization",
    "study-cpu-or-gpu": f"{NAME}.studies.cpu_or_gpu",
    "study-ablations": f"{NAME}.studies.ablations",
    "study-generalisation": f"{NAME}.studies.generalisation",
}
"""A record's kind, whole or up to its first hyphen, and the module that measures it."""

REFRESH = {
    "run": "make records",
    "bench": "cpugrpo bench, with the same arguments and --output records/{name}.json",
    "orders": "remake() in chapter 12",
    "study": "cpugrpo study run, with the study's name and --output records/{name}.json",
    "notebook": "python tools/notebooks.py --execute {name}",
}
"""The command that measures a record again."""


def module_file(name: str, package: Path = PACKAGE) -> Path | None:
    """The source file of a module of the package; None if there is no such module."""
    top, *rest = name.split(".")
    if top != package.name:
        return None
    place = package.joinpath(*rest)
    for path in (place / "__init__.py", place.with_suffix(".py") if rest else None):
        if path and path.is_file():
            return path
    return None


def imports(path: Path, name: str) -> set[str]:
    """Every name that may be a module in the import statements of a file, also within functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imported_names(path.read_bytes(), package)


@functools.lru_cache(maxsize=256)
def imported_names(code: bytes, package: str) -> set[str]:
    """As :func:`imports`, of a module's source within ``package``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def modules(entry: str, package: Path = PACKAGE) -> list[str]:
    """The modules of the package that ``entry`` imports, directly or not, itself included.

    Importing ``a.b`` runs ``a`` too, so parents belong to it. Modules in ``LEFT_OUT`` are
    neither listed nor followed. Raises UserError if there is no module ``entry``.
    """
    if module_file(entry, package) is None:
        raise UserError(f"there is no module {entry!r} in {package.name}; give its dotted name")
    found: set[str] = set()
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        path = module_file(name, package)
        if path is None or name in found or (name in LEFT_OUT and name != entry):
            continue
        found.add(name)
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        waiting += parents | imports(path, name)
    return sorted(found)


@functools.lru_cache(maxsize=256)  # many records rest on the same modules
def meaning(code: str | bytes) -> str:
    """Python code as a text that comments, docstrings and layout leave alone.

    The same on every Python version: fields that are empty are left out, since versions
    differ in which ones they have.
    """

    def plain(node: Any) -> Any:
        if isinstance(node, ast.AST):
            fields = [(key, plain(value)) for key, value in ast.iter_fields(node)]
            return type(node).__name__, [(key, value) for key, value in fields if value]
        if isinstance(node, list):
            return [plain(item) for item in node if not is_text(item)]
        return "" if node is None else ascii(node)

    def is_text(node: Any) -> bool:  # a docstring, of whatever: it does nothing
        return (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )

    return repr(plain(ast.parse(code)))


def c_meaning(code: bytes) -> bytes:
    """C without comments and the layout of lines."""
    return b" ".join(re.sub(rb"/\*.*?\*/|//[^\n]*", b" ", code, flags=re.DOTALL).split())


def entry_hash(entry: str, package: Path = PACKAGE) -> str:
    """SHA-256 over what the modules of ``modules(entry)`` do, and the model they load."""
    digest = hashlib.sha256()
    names = modules(entry, package)
    for name in names:
        path = module_file(name, package)
        assert path is not None
        digest.update(f"{name}\0{meaning(path.read_bytes())}\0".encode())
        if name in OTHER_SOURCES:
            digest.update(c_meaning(path.with_name(OTHER_SOURCES[name]).read_bytes()))
    if f"{package.name}.models" in names:
        for file in MODEL_FILES:
            content = (package / "bundled" / file).read_bytes()
            if not file.endswith(".safetensors"):
                content = content.replace(b"\r\n", b"\n")
            digest.update(f"{file}\0{hashlib.sha256(content).hexdigest()}\0".encode())
    return digest.hexdigest()


def notebook_hash(path: str | Path) -> str:
    """SHA-256 over what a notebook's code cells do, in order; not over outputs and prose."""
    digest = hashlib.sha256()
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        with contextlib.suppress(SyntaxError):  # a line for IPython, not for Python
            source = meaning(source)
        digest.update(f"{source}\0".encode())
    return digest.hexdigest()


def hash_now(record: RunRecord, root: Path = PACKAGE.parent) -> str:
    """The hash that the record would get today.

    A notebook's record measures the notebook; its cells are what counts. Raises UserError
    for a kind of record that nobody said the entry point of.
    """
    kind = record.kind if record.kind in ENTRIES else record.kind.split("-")[0]
    if kind == "notebook":
        return notebook_hash(root / "notebooks" / f"{record.config['notebook']}.ipynb")
    if kind not in ENTRIES:
        raise UserError(
            f"nothing says which code makes a record of kind {record.kind!r}; "
            f"add it to ENTRIES of {NAME}.provenance, which has {', '.join(ENTRIES)}"
        )
    return entry_hash(ENTRIES[kind])


def staleness(path: str | Path) -> str:
    """Why the record in a file is older than the code it measures, with the mend; else ""."""
    path = Path(path)
    record = RunRecord.load(path)
    if record.code_hash == hash_now(record):
        return ""
    command = REFRESH[record.kind.split("-")[0]].format(name=path.stem)
    return f"{path.name} was measured with other code than is here; measure again: {command}"
