"""The command line, called as the shell would."""

from __future__ import annotations

import contextlib
import io

from cpugrpo_edu import cli


def invoke(*arguments):
    """Mistakes are turned into sentences; return code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with cli.failing_clearly():
                cli.app(list(map(str, arguments)), prog_name="cpugrpo")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()
