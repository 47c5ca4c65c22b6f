"""Execute one submission cell by cell in a contained kernel, and find out which tests passed.

Runs as a process of its own, ``python -m cpugrpo_edu.course.execute``, which reads a job as JSON
from stdin and writes the result as JSON to stdout: what a submission does to it stops no other.
The student's code runs only in the kernel. The notebook with the hidden tests stays in this
process, a test reaches the kernel when its turn comes, and a test counts as passed only if its
last line was reached: that line raises an error with a random word that this process expects.
Swallowed errors, ``sys.exit``, a dead kernel or an ``assert`` without effect therefore give 0.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode

from cpugrpo_edu.course import guard
from cpugrpo_edu.course.outcome import Limits
from cpugrpo_edu.course.sandbox import PACKAGE, Sandbox

SUSPICIOUS = re.compile(
    r"\b(_getframe|getouterframes|inspect\.stack|currentframe|linecache|get_ipython|_ih|In\["
    r"|get_objects|get_referrers|ctypes|os\._exit|settrace|__builtins__|ast_transformers"
    r"|subprocess|os\.system|os\.fork|socket|rmtree|os\.remove|unlink|gradebook"
    r"|CPUGRPO_STUDENT_KEY|/proc/|student_seeds\._key)"
)
"""Words that no problem set asks for: a reason to look, not a verdict."""

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


def locked_statements(cells: list[NotebookNode], tests: bool) -> list[ast.stmt]:
    """Statements of the locked code cells, with or without the tests."""
    return [
        statement
        for cell in cells
        if cell.cell_type == "code" and is_locked(cell) and (tests or not is_test(cell))
        for statement in parsed(cell.source)
    ]


def locked_setup(cells: list[NotebookNode]) -> str:
    """Imports and helpers of the locked cells, which are bound again before each test."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    statements = locked_statements(cells, tests=False)
    return "\n".join(ast.unparse(each) for each in statements if isinstance(each, kinds))


def imported_modules(cells: list[NotebookNode]) -> list[str]:
    """Modules that the locked cells import, and those that belong with them."""
    names = set(WATCHED)
    for statement in locked_statements(cells, tests=True):
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    for name in list(names):
        names.update(WITH.get(name.split(".")[0], ()))
    return sorted(names - {"__future__"})


def defined(source: str) -> list[str]:
    """Names of the functions and classes that a cell defines."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [statement.name for statement in parsed(source) if isinstance(statement, kinds)]


def used_builtins(test: str, exercise: list[str]) -> list[str]:
    """Builtins that a test uses by name, except those that the exercise itself asks to define."""
    used = {node.id for top in parsed(test) for node in ast.walk(top) if isinstance(node, ast.Name)}
    return sorted((used & set(dir(builtins))).difference(exercise))


def with_proof(source: str, word: str) -> str:
    """A test with a last line that only a passed test reaches.

    It raises ``RuntimeError("WORD:VALUE")``; the value is the number that the test's last
    expression gives as partial credit, or empty.
    """
    body, value = source, "None"
    statements = parsed(source)
    if statements and isinstance(statements[-1], ast.Expr):
        last = statements[-1]
        before = "\n".join(source.split("\n")[: last.lineno - 1])
        if last.col_offset == 0:
            body = f"{before}\n_cg_value = ({ast.unparse(last.value)})"
            value = "_cg_value"
    number = secrets.randbelow(10**6)
    return (
        f"{body}\n"
        f"try:\n    assert {number} == {number + 1}\n"
        f"except AssertionError:\n    pass\n"
        f"else:\n    raise RuntimeError('assert has no effect')\n"
        f"raise RuntimeError('{word}:' + (repr(float({value})) "
        f"if isinstance({value}, __import__('numbers').Real) "
        f"and not isinstance({value}, bool) else ''))"
    )


def error(name: str, text: str) -> NotebookNode:
    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])


def fail_rest(notebook: NotebookNode, reason: str) -> None:
    """Give an error to every test that was not run."""
    for cell in notebook.cells:
        if is_test(cell) and not cell.metadata.pop("cg_done", None):
            cell.outputs = [error("NotGraded", reason)]


# The kernel


class Client(NotebookClient):
    """nbclient that keeps at most ``allowed`` bytes of output and tells if a cell was ``late``."""

    allowed, kept, dropped = 0, 0, 0
    late = False

    def execute_cell(self, *args: Any, **options: Any) -> NotebookNode:
        self.late = False
        return super().execute_cell(*args, **options)

    async def _async_handle_timeout(
        self, timeout: int, cell: NotebookNode | None = None
    ) -> dict[str, Any] | None:
        self.late = True
        return await super()._async_handle_timeout(timeout, cell)

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] in ("stream", "display_data", "execute_result", "update_display_data"):
            size = len(json.dumps(msg["content"], default=str))
            if self.kept + size > self.allowed:
                self.dropped += size
                return None
            self.kept += size
        return super().process_message(msg, cell, cell_index)

    def _update_display_id(self, display_id: str, msg: Any) -> None:
        """Do nothing: a cell must not change the outputs of an earlier one, such as a test."""


def contained_kernel(sandbox: Sandbox, box: Path) -> type[AsyncKernelManager]:
    """A kernel manager whose kernel starts inside the sandbox."""

    class Manager(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            sandbox.hand_over(box)  # now, since the connection file has just been written
            kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file]
            return sandbox.command(box, kernel + (extra_arguments or []))

    return Manager


def new_client(sandbox: Sandbox, box: Path) -> Client:
    client = Client(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()]),  # one slot, see run_cells
        timeout=sandbox.limits.cell_seconds,
        startup_timeout=60,
        allow_errors=True,
        interrupt_on_timeout=True,
        error_on_timeout=None,
        raise_on_iopub_timeout=False,
        iopub_timeout=10,
        kernel_manager_class=contained_kernel(sandbox, box),
    )
    client.allowed = sandbox.limits.output_bytes
    client.comm_open_handlers = {}  # no widget of a submission acts in this process
    client.km = client.create_kernel_manager()
    client.km.connection_file = str(box / "kernel.json")
    if sys.platform != "win32":  # sockets in the box, since the sandbox has no network
        client.km.transport, client.km.ip = "ipc", str(box / "s")
    return client


def environment(job: dict[str, Any], box: Path) -> dict[str, str]:
    """All environment variables of the kernel."""
    return {
        "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin",
        "HOME": str(box),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(PACKAGE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "NBGRADER_EXECUTION": "autograde",
        "CPUGRPO_STUDENT_ID": job["student"],
        "CPUGRPO_STUDENT_KEY": job["key"],
    }


class Watch(threading.Thread):
    """Ends the kernel at the time limit, or when all its processes use too much memory or disk."""

    def __init__(self, sandbox: Sandbox, box: Path) -> None:
        super().__init__(daemon=True)
        self.sandbox, self.box = sandbox, box
        self.reason, self.done = "", threading.Event()
        self.pid: int | None = None

    def processes(self) -> list[psutil.Process]:
        """The kernel's descendants, and all processes of the submission's own user."""
        found = []
        if self.sandbox.own_user:
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.uids().real == self.sandbox.uid:
                        found.append(process)
        if self.pid is not None:
            with suppress(psutil.Error):
                root = psutil.Process(self.pid)
                found += [root, *root.children(recursive=True)]
        return list({process.pid: process for process in found}.values())

    def kill(self) -> None:
        self.done.set()
        for _ in range(20):  # a fork bomb starts new processes while the old ones end
            alive = self.processes()
            if not alive:
                return
            for process in alive:
                with suppress(psutil.Error, ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.02)

    def run(self) -> None:
        limits = self.sandbox.limits
        deadline = time.monotonic() + limits.seconds
        while not self.done.wait(0.2):
            memory = 0
            for process in self.processes():
                with suppress(psutil.Error):
                    memory += process.memory_info().rss
            disk = 0
            for path in self.box.rglob("*"):
                with suppress(OSError):
                    disk += path.lstat().st_blocks * 512
            if time.monotonic() > deadline:
                self.reason = "time limit of the notebook"
            elif memory > limits.memory_bytes:
                self.reason = "memory limit"
            elif disk > limits.disk_bytes:
                self.reason = "disk limit"
            if self.reason:
                self.kill()


# Running the cells


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Run a submission; returns its ``notebook`` with outputs, ``flags``, and ``review``.

    ``job`` has the notebook, the names that its ``exercise`` asks to define, the folder ``files``
    that it may read, the student's id and key, and the fields of a :class:`Sandbox`.
    """
    notebook = nbformat.from_dict(job["notebook"])
    limits = Limits(**job["limits"])
    sandbox = Sandbox(job["level"], job["uid"], Path(job["course"]), limits)
    flags: list[str] = []
    box = Path(tempfile.mkdtemp(prefix="cg-")).resolve()
    watch = Watch(sandbox, box)
    client = new_client(sandbox, box)
    try:
        unneeded = shutil.ignore_patterns("*.ipynb", "*.db")
        work = shutil.copytree(job["files"], box / "work", symlinks=True, ignore=unneeded)
        with client.setup_kernel(env=environment(job, box), cwd=str(work)):
            watch.pid = client.km.provisioner.pid  # type: ignore[union-attr]
            watch.start()
            run_cells(client, notebook, job["exercise"], flags, watch)
            watch.kill()  # before nbclient asks the kernel to end, which it need not obey
    except Exception as problem:
        ended = isinstance(problem, DeadKernelError)
        text = f"the kernel did not run: {type(problem).__name__}: {problem}"[:300]
        flags.append(watch.reason or ("the kernel ended early" if ended else text))
        fail_rest(notebook, flags[-1])
    finally:
        watch.kill()
        shutil.rmtree(box, ignore_errors=True)
    if client.dropped:
        flags.append(f"output limit: {client.dropped} bytes left out")
    answers = [c.source for c in notebook.cells if c.cell_type == "code" and not is_locked(c)]
    review = sorted({word for source in answers for word in SUSPICIOUS.findall(source)})
    return {"notebook": notebook, "flags": flags, "review": review}


def run_cells(
    client: Client, notebook: NotebookNode, exercise: list[str], flags: list[str], watch: Watch
) -> None:
    """Run all cells in order. nbclient stores what it ran in its own notebook, in the one slot."""
    cells = notebook.cells
    modules, setup = imported_modules(cells), locked_setup(cells)
    limit, client.timeout = client.timeout, 60  # the first import of torch takes a while
    clean = fingerprint(client, modules, import_all(modules))
    client.timeout = limit
    if clean is None:
        raise RuntimeError(f"no clean fingerprint {watch.reason}")
    tampered = ""
    for cell in cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if watch.reason:
            raise DeadKernelError(watch.reason)
        if not is_test(cell):
            client.execute_cell(cell, 0)
            if client.late:
                cell.outputs.append(error("Timeout", f"longer than {client.timeout} s"))
                flags.append(f"a cell took longer than {client.timeout} s")
            continue
        if not tampered:
            drop = used_builtins(with_proof(cell.source, ""), exercise)
            restore = f"for _cg_n in {drop!r}:\n    globals().pop(_cg_n, None)\n{setup}"
            tampered = changes(client, clean, modules, restore)
        if not tampered:
            run_test(client, cell, flags)
            tampered = changes(client, clean, modules, "")
        if tampered:
            cell.outputs = [error("Tampering", tampered)]
            if tampered not in flags:
                flags.append(tampered)
        cell.metadata["cg_done"] = True
    for cell in cells:
        cell.metadata.pop("cg_done", None)


def run_test(client: Client, cell: NotebookNode, flags: list[str]) -> None:
    """Execute a test with its proof, and leave the outputs that nbgrader grades by."""
    word = secrets.token_hex(16)
    trial = nbformat.v4.new_code_cell(with_proof(cell.source, word))
    client.execute_cell(trial, 0, store_history=False)
    if client.late:
        flags.append(f"a test took longer than {client.timeout} s")
        trial.outputs.append(error("Timeout", f"longer than {client.timeout} s"))
    proof = ""
    kept = []
    for output in trial.outputs:
        if output.output_type == "error" and str(output.evalue).startswith(word):
            proof = output.evalue
        elif output.output_type == "stream":
            output.name = "stdout"  # nbgrader counts a mere warning on stderr as a failed test
            kept.append(output)
        elif output.output_type != "execute_result":
            kept.append(output)
    failed = any(output.output_type == "error" for output in kept)
    if not proof and not failed:
        kept.append(error("NotProven", "the test ended early"))
        flags.append("a test ended early without an error")
    if proof and not failed:
        value = proof.split(":", 1)[1]
        points = float(nbgrader_of(cell).get("points", 0))
        if value and not 0 <= float(value) <= points:
            kept.append(error("NotProven", f"the test gave {value} of {points:g} points"))
            flags.append(f"a test gave {value} of {points:g} points")
        elif value:
            data = {"text/plain": value}
            kept.append(nbformat.v4.new_output("execute_result", data=data, execution_count=1))
    cell.outputs = kept


# The guard against changed libraries


def import_all(modules: list[str]) -> str:
    """Code that imports what it can of ``modules``."""
    return (
        f"import importlib as _cg_i\nfor _cg_n in {modules!r}:\n"
        "    try:\n        _cg_i.import_module(_cg_n)\n    except Exception:\n        pass\n"
    )


def fingerprint(client: Client, modules: list[str], before: str) -> dict[str, str] | None:
    """Run ``before`` and then the guard in the kernel; None if it gave no answer."""
    word = secrets.token_hex(8)
    show = f"print('{word}' + __import__('json').dumps(cpugrpo_fingerprint({modules!r})))"
    source = [before, Path(guard.__file__).read_text(), show, "del cpugrpo_fingerprint"]
    cell = nbformat.v4.new_code_cell("\n".join(source))
    allowed, kept = client.allowed, client.kept
    client.allowed = kept + 50_000_000  # the answer does not count as the student's output
    try:
        client.execute_cell(cell, 0, store_history=False)
    finally:
        client.allowed, client.kept = allowed, kept
    text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
    match = re.search(word + r"(\{.*\})", text)
    try:
        return dict(json.loads(match.group(1))) if match else None
    except ValueError:
        return None


def differences(before: dict[str, str], now: dict[str, str] | None) -> list[str]:
    if now is None:
        return ["the check did not answer"]
    changed = {key for key, value in before.items() if now.get(key) != value}
    # Libraries add names while they load. Only tampering adds these: a method to a class of ours
    # that had none, or a name that hides a builtin inside a module.
    for key in set(now) - set(before):
        owner, _, name = key.rpartition(".")
        if (owner in before and key.startswith("cpugrpo_edu")) or hasattr(builtins, name):
            changed.add(key)
    return sorted(changed)


def changes(client: Client, clean: dict[str, str], modules: list[str], before: str) -> str:
    """What the submission changed, as a flag, or nothing."""
    changed = differences(clean, fingerprint(client, modules, before))
    if client.late:
        changed = ["the check took too long"]
    return f"changed while running: {', '.join(changed[:5])}" if changed else ""


if __name__ == "__main__":
    os.umask(0o077)  # what a submission writes is for nobody else
    print(json.dumps(execute(json.load(sys.stdin))))
