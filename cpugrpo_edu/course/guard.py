"""Fingerprint of what tests rely on; this text runs inside the kernel, twice.

Once before any code of the student and once before each test: a function of a library that is
another one now, or an IPython that has been given hooks, shows. It works inside the process it
looks at, so a student who knows it can defeat it; it catches the known tricks.
"""


def cpugrpo_fingerprint(names):
    import hashlib
    import sys
    import types

    def mark(thing):
        code = getattr(thing, "__code__", None)
        parts = [
            type(thing).__name__,
            str(getattr(thing, "__module__", "")),
            str(getattr(thing, "__qualname__", "")),
        ]
        if isinstance(code, types.CodeType):
            parts += [code.co_filename, str(code.co_firstlineno), code.co_code.hex()]
        parts.append(str(id(thing)))
        return hashlib.sha1("|".join(parts).encode()).hexdigest()[:12]

    found = {}
    for name in names:
        module = sys.modules.get(name)
        if module is None:
            continue
        for key, value in list(vars(module).items()):
            if key == "input" or key.startswith("__getattr"):
                continue  # ipykernel sets input anew for each cell
            if callable(value):
                found[f"{name}.{key}"] = mark(value)
                if isinstance(value, type) and (
                    name.startswith("cpugrpo_edu") or value.__name__ in ("Tensor", "Generator")
                ):
                    for inner, member in list(vars(value).items()):
                        if callable(member):
                            found[f"{name}.{key}.{inner}"] = mark(member)
    from IPython import get_ipython

    shell = get_ipython()
    for key in ("run_cell", "run_cell_async", "run_code", "run_ast_nodes", "showtraceback"):
        found[f"shell.{key}"] = mark(getattr(type(shell), key)) + str(key in vars(shell))
    kernel = shell.kernel
    for key in ("do_execute", "execute_request", "send_response", "finish_metadata"):
        found[f"kernel.{key}"] = mark(getattr(type(kernel), key)) + str(key in vars(kernel))
    found["shell.transformers"] = repr(
        (
            shell.ast_transformers,
            [str(t) for t in shell.input_transformers_post],
            [
                getattr(t, "__qualname__", str(type(t)))
                for t in shell.input_transformer_manager.cleanup_transforms
            ],
            len(shell.input_transformer_manager.token_transformers),
            shell.custom_exceptions,
        )
    )
    hooks = [f.__module__ for kind in shell.events.callbacks.values() for f in kind]
    found["shell.events"] = str(
        sorted(
            {
                str(m)
                for m in hooks
                if str(m).split(".")[0]
                not in ("IPython", "ipykernel", "matplotlib_inline", "ipywidgets", "comm")
            }
        )
    )
    found["sys.trace"] = str((sys.gettrace() is None, sys.getprofile() is None))
    return found
