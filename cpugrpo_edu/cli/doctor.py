"""``cpugrpo doctor``: does this machine have what a run needs?"""

from __future__ import annotations

from dataclasses import asdict

from cpugrpo_edu.cli.command import Call, app, command, table

MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "fail": "[red]FAIL[/]"}


@command(app)
def doctor(call: Call) -> None:
    """Check this machine: Python, packages, cores, limits, BLAS, memory, disk, the bundled model.

    Exit code 1 if something is missing that a run needs.

    Example: `cpugrpo doctor`
    """
    from cpugrpo_edu.engine.doctor import examine

    checks = examine()
    rows = [[check.name, MARKS[check.ok], check.detail, check.fix] for check in checks]
    headings = ["Check", "", "Found", "What to do"]
    call.give([asdict(check) for check in checks], table("cpugrpo doctor", headings, rows))
    if any(check.ok == "fail" for check in checks):
        raise SystemExit(1)
