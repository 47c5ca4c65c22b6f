"""Fingerprint of what tests rely on; this text itself runs in the kernel.

It runs before any code of the student, and before and after each test: a library function that
was replaced, or an IPython that was given hooks, shows as a difference. It works inside the
process that it examines, so a student who knows it can defeat it; it catches the known tricks.
"""


def cpugrpo_fingerprint(modules):
    """Text by name, for the functions of ``modules`` and for the parts of IPython in use."""
    import sys
    import types

    from IPython import get_ipython

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
            found[f"{module}.{key}"] = mark(value)
            with_methods = module.startswith("cpugrpo_edu") or key in ("Tensor", "Generator")
            if isinstance(value, type) and with_methods:
                for name, member in list(vars(value).items()):
                    if callable(member):
                        found[f"{module}.{key}.{name}"] = mark(member)

    shell = get_ipython()
    methods = {
        "shell": "run_cell run_cell_async run_code run_ast_nodes showtraceback",
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
            shell.custom_exceptions,
        )
    )
    known = ("IPython", "ipykernel", "matplotlib_inline", "ipywidgets", "comm")
    hooks = {str(hook.__module__) for all in shell.events.callbacks.values() for hook in all}
    found["shell.events"] = str(sorted(m for m in hooks if m.split(".")[0] not in known))
    found["sys.trace"] = str((sys.gettrace() is None, sys.getprofile() is None))
    return found
