"""Execute one submission cell by cell in a contained kernel, and find out which tests passed.

Runs as a process of its own, ``python -m cpugrpo_edu.course.execute``, which reads a job as JSON
from stdin and writes the result as JSON to stdout: what a submission does to it stops no other.
The student's code runs only in the kernel. The notebook with the hidden tests stays in this
process, a test reaches the kernel compiled and when its turn comes, and it counts as passed only
if its end was reached: ``guard`` then answers with a random word that this process expects.
Swallowed errors, ``sys.exit`` or a dead kernel therefore give 0.
"""

from __future__ import annotations

import builtins
import io
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
import tokenize
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
from cpugrpo_edu.course.checks import (
    Checks,
    checks_of,
    compiled_test,
    is_locked,
    is_test,
    locked_source,
    nbgrader_of,
)
from cpugrpo_edu.course.outcome import Limits
from cpugrpo_edu.course.sandbox import PACKAGE, Sandbox

SUSPICIOUS = re.compile(
    r"\b(get_ipython\(\)\.(?:kernel|input_trans)|_getframe|getouterframes|inspect\.stack"
    r"|currentframe|linecache|_ih|In\["
    r"|get_objects|get_referrers|ctypes|os\._exit|settrace|__builtins__|ast_transformers"
    r"|subprocess|os\.system|os\.fork|socket|rmtree|os\.remove|unlink|gradebook"
    r"|CPUGRPO_STUDENT_KEY|/proc/|student_seeds\._key)"
)
"""Words that no problem set asks for: a reason to look, not a verdict."""


# Cells


def without_comments(source: str) -> str:
    """The code in which ``SUSPICIOUS`` words count; all of it if it is no plain Python."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source
    lines = source.split("\n")
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(lines)


def error(name: str, text: str) -> NotebookNode:
    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])


def fail_rest(notebook: NotebookNode, reason: str) -> None:
    """Give an error to every test that was not run."""
    for cell in notebook.cells:
        if is_test(cell) and not cell.metadata.pop("cg_done", None):
            cell.outputs = [error("NotGraded", reason)]


def nobody_knows(result: dict[str, Any], reason: str) -> None:
    """Leave every test that was not run to a person: that it was not is no fault of the student."""
    for cell in result["notebook"].cells:
        if is_test(cell) and not cell.metadata.pop("cg_done", None):
            undecided(cell, result, reason)


# The kernel


class Client(NotebookClient):
    """nbclient that keeps at most ``allowed`` bytes of output and tells if a cell was ``late``.

    What the guard reports under the secret ``word`` goes to ``answer``.
    """

    allowed, kept, dropped = 0, 0, 0
    late = False
    word, answer = "", dict[str, Any]()

    def execute_cell(self, *args: Any, **options: Any) -> NotebookNode:
        self.late = False
        return super().execute_cell(*args, **options)

    async def _async_handle_timeout(
        self, timeout: int, cell: NotebookNode | None = None
    ) -> dict[str, Any] | None:
        self.late = True
        return await super()._async_handle_timeout(timeout, cell)

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "stream" and self.word:
            head, word, text = msg["content"]["text"].partition(self.word)
            if word and not head:
                self.answer.update(json.loads(text))
                return None
        if msg["msg_type"] in ("stream", "display_data", "execute_result", "update_display_data"):
            size = len(json.dumps(msg["content"], default=str))
            if self.kept + size > self.allowed:
                self.dropped += size
                return None
            self.kept += size
        return super().process_message(msg, cell, cell_index)

    def ask(self, call: str) -> tuple[dict[str, Any], list[NotebookNode]]:
        """Run a call of the guard in the kernel; its answer and the outputs of the student."""
        self.word, self.answer = secrets.token_hex(16), {}
        cell = nbformat.v4.new_code_cell(guarded(call.replace("WORD", repr(self.word))))
        try:
            self.execute_cell(cell, 0, store_history=False)
        finally:
            self.word = ""
        return self.answer, cell.outputs

    def _update_display_id(self, display_id: str, msg: Any) -> None:
        """Do nothing: a cell must not change the outputs of an earlier one, such as a test."""


def guarded(call: str) -> str:
    """A cell that runs the guard and then ``call`` in a namespace that no student's code shares."""
    source = f"{Path(guard.__file__).read_text(encoding='utf-8')}\n{call}"
    space = "{'__builtins__': _cg_b, '__name__': 'guard'}"
    return (
        "import builtins as _cg_b\n"
        f"_cg_b.exec(_cg_b.compile({source!r}, '<guard>', 'exec'), {space})"
    )


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
        self.reason, self.done, self.parent = "", threading.Event(), os.getppid()
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
            if os.getppid() != self.parent:  # it was killed: do not disturb the next one
                self.reason = "the grader ended"
            elif time.monotonic() > deadline:
                self.reason = "time limit of the notebook"
            elif memory > limits.memory_bytes:
                self.reason = "memory limit"
            elif disk > limits.disk_bytes:
                self.reason = "disk limit"
            if self.reason:
                self.kill()


# Running the cells


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Run a submission; returns its ``notebook`` with outputs, and what to say about it.

    ``flags`` and ``review`` are for a person to look at, ``notes`` are for the student too, and
    ``undecided`` names the tests that only a person can grade.

    ``job`` has the notebook, the names that its ``exercise`` asks to define, the folder ``files``
    that it may read, the student's id and key, and the fields of a :class:`Sandbox`.
    """
    notebook = nbformat.from_dict(job["notebook"])
    limits = Limits(**job["limits"])
    sandbox = Sandbox(job["level"], job["uid"], Path(job["course"]), limits)
    flags: list[str] = []
    result = {"notebook": notebook, "flags": flags, "notes": [], "undecided": []}
    box = Path(tempfile.mkdtemp(prefix="cg-")).resolve()
    watch = Watch(sandbox, box)
    client = new_client(sandbox, box)
    try:
        unneeded = shutil.ignore_patterns("*.ipynb", "*.db")
        work = shutil.copytree(job["files"], box / "work", symlinks=True, ignore=unneeded)
        with client.setup_kernel(env=environment(job, box), cwd=str(work)):
            watch.pid = client.km.provisioner.pid  # type: ignore[union-attr]
            watch.start()
            run_cells(client, result, job["exercise"], watch)
            watch.kill()  # before nbclient asks the kernel to end, which it need not obey
    except Exception as problem:
        ended = isinstance(problem, DeadKernelError)
        text = f"the kernel did not run: {type(problem).__name__}: {problem}"[:300]
        flags.append(watch.reason or ("the kernel ended early" if ended else text))
        if watch.reason or ended:
            fail_rest(notebook, flags[-1])
        else:
            nobody_knows(result, flags[-1])
    finally:
        watch.kill()
        shutil.rmtree(box, ignore_errors=True)
    if client.dropped:
        result["notes"].append(f"output limit: {client.dropped} bytes left out")
    answers = [c.source for c in notebook.cells if c.cell_type == "code" and not is_locked(c)]
    code = "\n".join(map(without_comments, answers))
    return result | {"review": sorted(set(SUSPICIOUS.findall(code)))}


def run_cells(client: Client, result: dict[str, Any], exercise: list[str], watch: Watch) -> None:
    """Run all cells in order. nbclient stores what it ran in its own notebook, in the one slot."""
    cells = result["notebook"].cells
    checks = checks_of(cells, exercise)
    limit, client.timeout = client.timeout, 60  # the first import of torch takes a while
    start = f"start(WORD, {checks.modules!r}, {checks.imports!r})"
    checks.clean = client.ask(start)[0].get("before")
    client.timeout = limit
    if checks.clean is None:
        raise RuntimeError(f"no clean fingerprint {watch.reason}")
    for cell in cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if watch.reason:
            raise DeadKernelError(watch.reason)
        if is_test(cell):
            run_test(client, cell, checks, result)
            cell.metadata["cg_done"] = True
            continue
        code = locked_source(cell.source, checks.own) if is_locked(cell) else cell.source
        trial = nbformat.v4.new_code_cell(code)
        client.execute_cell(trial, 0)
        cell.outputs = trial.outputs
        if client.late:
            cell.outputs.append(error("Timeout", f"longer than {client.timeout} s"))
            result["notes"].append(f"a cell took longer than {client.timeout} s and was stopped")
    for cell in cells:
        cell.metadata.pop("cg_done", None)


def run_test(client: Client, cell: NotebookNode, checks: Checks, result: dict[str, Any]) -> None:
    """Execute a test and leave the outputs that nbgrader grades by."""
    try:
        test = compiled_test(cell.source, checks.own)
    except (SyntaxError, ValueError) as problem:
        cell.outputs = [error(type(problem).__name__, str(problem))]
        return
    given = f"{checks.modules!r}, {checks.imports!r}, {checks.helpers!r}, {test!r}"
    answer, outputs = client.ask(f"check(WORD, {given})")
    kept = [each for each in outputs if each.output_type in ("stream", "display_data")]
    for each in kept:
        if each.output_type == "stream":
            each.name = "stdout"  # nbgrader counts a mere warning on stderr as a failed test
    happened = answer.get("result")
    stages = [answer[stage] for stage in ("before", "after") if stage in answer]
    changed = sorted({name for stage in stages for name in differences(checks.clean or {}, stage)})
    if changed:
        names = ", ".join(changed[:5])
        undecided(cell, result, f"changed while running: {names}")
        return
    if client.late:
        flag = f"a test took longer than {client.timeout} s"
        kept.append(error("Timeout", f"longer than {client.timeout} s"))
    elif happened is None or "after" not in answer:
        flag = "a test ended early without an error"
        kept.append(error("NotProven", "the test ended early"))
    else:
        flag = add_result(kept, happened, cell)
    result["flags"] += [flag] * (flag not in ("", *result["flags"]))
    cell.outputs = kept


def undecided(cell: NotebookNode, result: dict[str, Any], reason: str) -> None:
    """A test that only a person can grade: it has no points, neither full nor none."""
    text = f"{reason}. The test has no points until your instructor has looked at it."
    cell.outputs = [error("NotCounted", text)]
    result["undecided"].append(nbgrader_of(cell)["grade_id"])
    result["flags"] += [reason] * (reason not in result["flags"])


def add_result(outputs: list[NotebookNode], happened: dict[str, Any], cell: NotebookNode) -> str:
    """Add error or partial credit to a test's outputs; returns a flag, or nothing."""
    if not happened["passed"]:
        lines = [f"{happened['name']}: {happened['text']}", *happened["frames"]]
        if happened["line"] and happened["line"] <= len(rows := cell.source.split("\n")):
            lines.insert(1, f"line {happened['line']} of the test: {rows[happened['line'] - 1]}")
        failed = error(happened["name"], happened["text"])
        failed.traceback = lines
        outputs.append(failed)
        return ""
    value, points = happened["value"], float(nbgrader_of(cell).get("points", 0))
    if value and not 0 <= float(value) <= points:
        outputs.append(error("NotProven", f"the test gave {value} of {points:g} points"))
        return f"a test gave {value} of {points:g} points"
    if value:
        data = {"text/plain": value}
        outputs.append(nbformat.v4.new_output("execute_result", data=data, execution_count=1))
    return ""


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What tampering changed between two fingerprints."""
    changed = {key for key, value in before.items() if now.get(key) not in (value, "builtin")}
    # Libraries add names while they load. Only tampering adds these: a method to a class of ours
    # that had none, or a name that hides a builtin inside a module.
    for key in set(now) - set(before):
        owner, _, name = key.rpartition(".")
        ours = owner in before and key.startswith("cpugrpo_edu")
        if now[key] != "builtin" and (ours or hasattr(builtins, name)):
            changed.add(key)
    return sorted(changed)


if __name__ == "__main__":
    os.umask(0o077)  # what a submission writes is for nobody else
    print(json.dumps(execute(json.load(sys.stdin))))
