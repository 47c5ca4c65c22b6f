"""Run a test and compare what it relies on before and after; this text itself runs in the kernel.

It runs in a namespace of its own (see ``execute.guarded``): a student
may call a variable ``list`` or ``print``, and this code still means the builtins. A test works on
the student's variables, but its own builtins and imports come from the module ``_cg``.

A library function that was replaced, or an IPython that was given a new way to run cells, shows
as a difference. All of this works inside the process that it examines, so a student who knows it
can defeat it; it catches the known tricks.
"""

import base64
import builtins
import contextlib
import importlib
import json
import linecache
import marshal
import numbers
import sys
import traceback
import types

from IPython import get_ipython


def fingerprint(modules):
    """Text by name, for the functions of ``modules`` and for the parts of IPython in use."""

    def mark(thing):
        """Changes if the object is replaced, or if the code of a function is."""
        code = getattr(thing, "__code__", None)
        code = hash(code) if isinstance(code, types.CodeType) else ""
        return f"{type(thing).__name__} {id(thing)} {code}"

    found = {}
    for module in sys.modules.keys() & set(modules):
        for key, value in list(vars(sys.modules[module]).items()):
            if key == "input" or key.startswith("__getattr") or not callable(value):
                continue  # ipykernel sets a new input for each cell
            if module != "builtins" and value is getattr(builtins, key, None):
                found[f"{module}.{key}"] = "builtin"  # as in `np.float = float`, for old code
                continue
            found[f"{module}.{key}"] = mark(value)
            with_methods = module.startswith("cpugrpo_edu") or key in ("Tensor", "Generator")
            if isinstance(value, type) and with_methods:
                for name, member in list(vars(value).items()):
                    if callable(member):
                        found[f"{module}.{key}.{name}"] = mark(member)

    shell = get_ipython()
    methods = {
        "shell": "run_cell run_cell_async run_code run_ast_nodes",
        "kernel": "do_execute execute_request send_response finish_metadata",
    }
    for part, owner in (("shell", shell), ("kernel", shell.kernel)):
        for key in methods[part].split():
            replaced = key in vars(owner)  # on the object, in front of its class
            found[f"{part}.{key}"] = mark(getattr(type(owner), key)) + str(replaced)

    cleanup = shell.input_transformer_manager.cleanup_transforms
    found["shell.transformers"] = repr(
        (
            shell.ast_transformers,
            [str(each) for each in shell.input_transformers_post],
            [getattr(each, "__qualname__", str(type(each))) for each in cleanup],
            len(shell.input_transformer_manager.token_transformers),
        )
    )
    found["sys.trace"] = str((sys.gettrace() is None, sys.getprofile() is None))
    return found


def give_names(imports):
    """Bind ``_cg`` for the student's namespace: the builtins, and what locked cells import."""
    given = types.ModuleType("_cg")
    vars(given).update(vars(builtins))
    for each in imports:
        with contextlib.suppress(Exception):  # the cell that imports it shows the error
            exec(each, vars(given))
    get_ipython().user_ns["_cg"] = given


def run_test(helpers, test):
    """Run compiled ``helpers`` and ``test``; what happened, for ``execute.outputs_of``."""
    space = get_ipython().user_ns
    try:
        for code in (helpers, test):
            exec(marshal.loads(base64.b64decode(code)), space)
        value = space.pop("_cg_value", None)
        if isinstance(value, bool):
            return {"passed": True, "value": None}
        return {"passed": True, "value": number_of(value)}
    except BaseException as problem:  # SystemExit and an interrupt too: the end was not reached
        return describe(problem)


def number_of(value):
    """A number as text, NumPy's too; None for anything else."""
    return repr(float(value)) if isinstance(value, numbers.Real) else None


def describe(problem):
    """Name, message and place of an error; the test's own source is not known here."""
    try:
        text = str(problem)[:2000]
    except BaseException:
        text = "(an error whose message cannot be shown)"
    line, frames = None, []
    for frame in traceback.extract_tb(problem.__traceback__)[-20:]:
        if frame.filename == "<test>":
            line = frame.lineno
        elif frame.filename != "<guard>":
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            frames.append(f"in {frame.name}, line {frame.lineno}: {code}"[:300])
    return {
        "passed": False,
        "name": type(problem).__name__,
        "text": text,
        "line": line,
        "frames": frames,
    }


def report(word, **answer):
    """To the grading process, past ``sys.stdout``, which a student may have replaced."""
    kernel = get_ipython().kernel
    content = {"name": "stdout", "text": word + json.dumps(answer)}
    kernel.send_response(kernel.iopub_socket, "stream", content)


def start(word, modules, imports):
    """Import what tests use, before any code of the student, and report what it looks like."""
    for module in modules:
        with contextlib.suppress(Exception):  # the cell that imports it shows the error
            importlib.import_module(module)
    get_ipython().ask_exit = lambda: None  # a stray exit() would end the kernel
    give_names(imports)
    report(word, before=fingerprint(modules))


def check(word, modules, imports, helpers, test):
    """Run a test between two fingerprints; one call, so that no hook of IPython comes between."""
    report(word, before=fingerprint(modules))
    give_names(imports)
    result = run_test(helpers, test)
    report(word, result=result, after=fingerprint(modules))
