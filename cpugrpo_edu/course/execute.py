"""Execute one submission cell by cell, its kernel shut in, and find out which tests passed.

Started as a process of its own: ``python -m cpugrpo_edu.course.execute JOB``. The student's
code runs in the kernel alone. The notebook with the hidden tests stays in this process, a test
reaches the kernel when its turn comes, and a test counts as passed only if its last line was
reached: that line raises an error with a random word that this process waits for. Swallowed
errors, ``sys.exit``, a dead kernel or an ``assert`` without effect therefore give 0.
"""

from __future__ import annotations

import ast
import builtins
import json
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

from cpugrpo_edu.course import guard, sandbox

SUSPICIOUS = re.compile(
    r"\b(_getframe|getouterframes|inspect\.stack|currentframe|linecache|get_ipython|_ih|In\["
    r"|get_objects|get_referrers|ctypes|os\._exit|settrace|__builtins__|ast_transformers"
    r"|subprocess|os\.system|os\.fork|socket|rmtree|os\.remove|unlink|gradebook"
    r"|CPUGRPO_VARIANT_KEY|/proc/|variants\._key)"
)
"""Words that a problem set does not ask for: a reason to look, not a verdict."""

WATCHED = ("builtins", "math", "random")
WITH = {
    "numpy": ("numpy.linalg", "numpy.testing", "numpy.random"),
    "torch": ("torch.nn.functional", "torch.testing"),
}


def nbgrader_of(cell: NotebookNode) -> dict[str, Any]:
    return dict(cell.metadata.get("nbgrader", {}))


def is_test(cell: NotebookNode) -> bool:
    found = nbgrader_of(cell)
    return bool(cell.cell_type == "code" and found.get("grade") and not found.get("solution"))


def is_locked(cell: NotebookNode) -> bool:
    found = nbgrader_of(cell)
    return bool(found.get("locked") or found.get("grade")) and not found.get("solution")


def parsed(source: str) -> list[ast.stmt]:
    """Statements of a cell; none if it is not plain Python, such as with a magic."""
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError):
        return []


def locked_setup(cells: list[NotebookNode]) -> str:
    """Imports and helpers of the locked cells, to be bound again before each test."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    chosen = [
        ast.unparse(statement)
        for cell in cells
        if cell.cell_type == "code" and is_locked(cell) and not is_test(cell)
        for statement in parsed(cell.source)
        if isinstance(statement, kinds)
    ]
    return "\n".join(chosen)


def imported_modules(cells: list[NotebookNode]) -> list[str]:
    names = set(WATCHED)
    for cell in cells:
        if cell.cell_type != "code" or not is_locked(cell):
            continue
        for top in parsed(cell.source):
            for node in ast.walk(top):
                if isinstance(node, ast.Import):
                    names.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module)
    for name in list(names):
        names.update(WITH.get(name.split(".")[0], ()))
    return sorted(names - {"__future__"})


def shadowed_builtins(test: str, own: set[str]) -> list[str]:
    """Builtins that a test uses by name, less those the exercise itself asks to define."""
    used = {node.id for top in parsed(test) for node in ast.walk(top) if isinstance(node, ast.Name)}
    return sorted((used & set(dir(builtins))) - own)


def with_proof(source: str, word: str) -> str:
    """A test with a last line that only a passed test reaches."""
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


class Client(NotebookClient):
    """nbclient with a bound on what it keeps of the outputs."""

    kept = 0
    dropped = 0
    allowed = 1_000_000
    late = False

    def execute_cell(self, *args: Any, **options: Any) -> NotebookNode:
        """As nbclient's, which interrupts a cell at its time limit; ``late`` tells that it did."""
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
        """Earlier outputs stay as they were."""


def shut_in(spec: dict[str, Any]) -> type[AsyncKernelManager]:
    """A kernel manager whose kernel starts inside the sandbox, reached over local sockets."""

    class Manager(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file]
            kernel += extra_arguments or []
            if spec["level"] == "none":
                return kernel
            return [sys.executable, sandbox.__file__, json.dumps(spec), *kernel]

    return Manager


class Watch(threading.Thread):
    """Ends the kernel at the time limit, or when memory or disk of all its processes is over."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.spec, self.reason, self.done = spec, "", threading.Event()
        self.pid: int | None = None

    def processes(self) -> list[psutil.Process]:
        own = self.spec["level"] in ("namespaces+user", "user")
        found = []
        if own:
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.uids().real == self.spec["uid"]:
                        found.append(process)
        if self.pid is not None:
            with suppress(psutil.Error):
                root = psutil.Process(self.pid)
                found += [root, *root.children(recursive=True)]
        return list({process.pid: process for process in found}.values())

    def kill(self) -> None:
        for _ in range(20):  # a fork bomb makes new ones while the old ones end
            alive = self.processes()
            if not alive:
                return
            for process in alive:
                with suppress(psutil.Error, ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.02)

    def run(self) -> None:
        deadline = time.monotonic() + self.spec["seconds"]
        while not self.done.wait(0.2):
            memory = 0
            for process in self.processes():
                with suppress(psutil.Error):
                    memory += process.memory_info().rss
            disk = 0
            for path in Path(self.spec["box"]).rglob("*"):
                with suppress(OSError):
                    disk += path.lstat().st_blocks * 512
            if time.monotonic() > deadline:
                self.reason = "time limit of the notebook"
            elif memory > self.spec["memory_bytes"]:
                self.reason = "memory limit"
            elif disk > self.spec["disk_bytes"]:
                self.reason = "disk limit"
            if self.reason:
                self.kill()
                return


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Run ``job["notebook"]`` in place; returns ``{"flags": [...], "review": [...]}``."""
    path = Path(job["notebook"])
    notebook = nbformat.read(path, as_version=4)
    box = Path(tempfile.mkdtemp(prefix="cg-", dir=job["scratch"]))
    spec = {**job["sandbox"], "box": str(box), "cwd": str(box / "work")}
    work = box / "work"
    work.mkdir()
    if job["files"]:
        shutil.copytree(
            job["files"],
            work,
            dirs_exist_ok=True,
            symlinks=True,
            ignore=shutil.ignore_patterns("*.ipynb", "*.db"),
        )
    env = {
        "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin",
        "HOME": str(box),
        "LANG": "C.UTF-8",
        "PYTHONPATH": job["sandbox"]["path"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "NBGRADER_EXECUTION": "autograde",
        "CPUGRPO_STUDENT_ID": job["student"],
        "CPUGRPO_VARIANT_KEY": job["key"],
    }
    flags: list[str] = []
    watch = Watch(spec)
    client = Client(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()]),  # scratch, see run_cells
        timeout=job["cell_seconds"],
        startup_timeout=60,
        allow_errors=True,
        interrupt_on_timeout=True,
        error_on_timeout=None,
        raise_on_iopub_timeout=False,
        iopub_timeout=10,
        kernel_manager_class=shut_in(spec),
    )
    client.allowed = job["output_bytes"]
    client.comm_open_handlers = {}  # no widget of a submission acts in this process
    client.km = client.create_kernel_manager()
    client.km.connection_file = str(box / "kernel.json")
    if sys.platform != "win32":  # files instead of ports: the network may be closed in there
        client.km.transport, client.km.ip = "ipc", str(box / "s")
    try:
        with client.setup_kernel(env=env, cwd=str(work)):
            watch.pid = client.km.provisioner.pid  # type: ignore[union-attr]
            watch.start()
            run_cells(client, notebook, flags, watch)
            watch.done.set()
            watch.kill()
    except DeadKernelError:
        flags.append(watch.reason or "the kernel ended early")
        fail_rest(notebook, flags[-1])
    except Exception as problem:
        flags.append(
            watch.reason or f"the kernel did not run: {type(problem).__name__}: {problem}"[:300]
        )
        fail_rest(notebook, flags[-1])
    finally:
        watch.done.set()
        watch.kill()
        shutil.rmtree(box, ignore_errors=True)
    if client.dropped:
        flags.append(f"output limit: {client.dropped} bytes left out")
    review = sorted(
        {
            found
            for cell in notebook.cells
            if cell.cell_type == "code" and not is_locked(cell)
            for found in SUSPICIOUS.findall(cell.source)
        }
    )
    nbformat.write(notebook, path)
    return {"flags": flags, "review": review}


def fail_rest(notebook: NotebookNode, reason: str) -> None:
    for cell in notebook.cells:
        if is_test(cell) and not cell.metadata.pop("cg_done", None):
            cell.outputs = [error("NotGraded", reason)]


def fingerprint(client: Client, modules: list[str], more: str, load: bool) -> dict[str, str] | None:
    word = secrets.token_hex(8)
    source = Path(guard.__file__).read_text()
    lines = [more, source]
    if load:
        lines.append(
            "import importlib as _cg_i\n"
            f"for _cg_n in {modules!r}:\n"
            "    try:\n        _cg_i.import_module(_cg_n)\n"
            "    except Exception:\n        pass\n"
        )
    lines.append(
        f"print('{word}' + __import__('json').dumps(cpugrpo_fingerprint({modules!r})))\n"
        "del cpugrpo_fingerprint\n"
    )
    cell = nbformat.v4.new_code_cell("\n".join(lines))
    allowed, client.allowed = client.allowed, client.kept + 50_000_000
    before = client.kept
    try:
        client.execute_cell(cell, 0, store_history=False)
    finally:
        client.allowed, client.kept = allowed, before
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
    # Libraries add names while they load; these new ones only somebody who tampers adds: a
    # method to a class of ours that had none, a name that hides a builtin inside a module.
    for key in set(now) - set(before):
        owner, _, name = key.rpartition(".")
        if (owner in before and key.startswith("cpugrpo_edu")) or hasattr(builtins, name):
            changed.add(key)
    return sorted(changed)


def run_cells(client: Client, notebook: NotebookNode, flags: list[str], watch: Watch) -> None:
    """All cells in order. nbclient stores what it ran in its own notebook, so that has one slot."""
    cells = notebook.cells
    modules = imported_modules(cells)
    setup = locked_setup(cells)
    own = {
        str(name)
        for cell in cells
        if nbgrader_of(cell).get("solution")
        for statement in parsed(cell.source)
        for name in [getattr(statement, "name", None)]
        if name
    }
    limit, client.timeout = client.timeout, 60
    clean = fingerprint(client, modules, "", load=True)
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
            drop = shadowed_builtins(with_proof(cell.source, ""), own)
            more = f"for _cg_n in {drop!r}:\n    globals().pop(_cg_n, None)\n{setup}"
            tampered = look(client, clean, modules, more)
        if not tampered:
            run_test(client, cell, flags)
            tampered = look(client, clean, modules, "")
        if tampered:
            cell.outputs = [error("Tampering", tampered)]
            if tampered not in flags:
                flags.append(tampered)
        cell.metadata["cg_done"] = True
    for cell in cells:
        cell.metadata.pop("cg_done", None)


def look(client: Client, clean: dict[str, str], modules: list[str], more: str) -> str:
    changed = differences(clean, fingerprint(client, modules, more, load=False))
    if client.late:
        changed = ["the check took too long"]
    return f"changed while running: {', '.join(changed[:5])}" if changed else ""


def run_test(client: Client, cell: NotebookNode, flags: list[str]) -> None:
    """Execute a test with its proof and leave the outputs nbgrader grades from."""
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
            kept.append(
                nbformat.v4.new_output(
                    "execute_result", data={"text/plain": value}, execution_count=1
                )
            )
    cell.outputs = kept


if __name__ == "__main__":
    print(json.dumps(execute(json.loads(Path(sys.argv[1]).read_text()))))
