"""The command line, called as the shell would."""

from __future__ import annotations

import contextlib
import io

from cpugrpo_edu import cli


def invoke(*arguments):
    """Run the command in this process; return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()
