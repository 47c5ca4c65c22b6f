"""The command line: ``cpugrpo run | evaluate | generate | report | doctor | bench | ...``.

Results go to stdout, progress to stderr. A mistake in the input ends with one
sentence and exit code 2, an interrupted run with 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from typer.exceptions import Abort, TyperException

# Importing a module registers its commands; --help lists them in this order.
from cpugrpo_edu.cli import doctor, lab, check, run, warmstart, evaluate  # noqa: F401  # isort: skip
from cpugrpo_edu.cli import results, models, bench, study, assign  # noqa: F401  # isort: skip
from cpugrpo_edu.cli.command import app
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import write_failure

app.add_typer(assign.app, name="assign")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns known mistakes into one sentence on stderr."""
    with failing_clearly():
        arguments = sys.argv[1:] if arguments is None else arguments
        code = app(arguments, prog_name="cpugrpo", standalone_mode=False, obj=arguments)
        if code == 130:  # how typer reports Ctrl-C
            raise KeyboardInterrupt
    raise SystemExit(code or 0)


@contextmanager
def failing_clearly() -> Iterator[None]:
    """End known failures with one sentence and their exit code, without a traceback."""
    try:
        yield
    except UserError as error:
        if "LOCAL_RANK" in os.environ:  # one of several processes
            from cpugrpo_edu.engine.ranks import leave_word

            if leave_word(error):
                raise SystemExit(2) from error
        end(error, str(error))
    except TyperException as error:  # an unknown command or option, or a value it cannot read
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "cpugrpo"
        message = error.format_message().rstrip().rstrip(".")
        end(error, message and f"{message}; see {command} --help")
    except OSError as error:
        reason = write_failure(error)
        if reason is None:
            raise
        end(
            error,
            f"cannot write {error.filename or 'the output'}: {reason}; free some space, make it "
            "writable, or give another --output",
        )
    except (KeyboardInterrupt, Abort) as error:  # Abort: Ctrl-C or Ctrl-D at a question
        end(error, "interrupted; what was complete is saved", 130)
    except MemoryError as error:
        end(
            error,
            "out of memory; choose a smaller model, --lora, a smaller --micro-batch "
            "or --checkpointing on",
        )


def end(error: BaseException, sentence: str, code: int = 2) -> NoReturn:
    if sentence:
        print(f"cpugrpo: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(code) from error
