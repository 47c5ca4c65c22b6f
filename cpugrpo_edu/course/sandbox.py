"""Contain a kernel: bubblewrap for what it sees, setpriv for its user, prlimit for its limits.

:func:`strongest` tries which level works on this machine; :data:`CONTAINED` says in one sentence
what each level contains. Sources: the manual pages bwrap(1), setpriv(1) and prlimit(1).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cpugrpo_edu.course.outcome import Limits

CONTAINED = {
    "namespaces+user": "limits, a user of its own, no network, no file but its own and, "
    "read-only, Python and the system",
    "namespaces": "limits, no network, no file but its own and, read-only, Python and the system; "
    "NOT contained: it is the grader's own user",
    "user": "limits and a user of its own; NOT contained: the network, and all that every user "
    "of this machine may read or write",
    "limits": "limits only; NOT contained: the network, and all that you may read or write: use "
    "bubblewrap or the container",
    "none": "the time limit only; NOT contained: anything else: use the container",
}
"""Levels from the strongest to the weakest, and what each contains."""

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/nix", "/sys")
"""Programs and libraries of the system, where they exist."""

PACKAGE = Path(__file__).resolve().parents[2]
"""The folder that holds ``cpugrpo_edu``."""


def needed_folders() -> list[str]:
    """Python, its libraries and this package, each by the path in use and by its real path.

    Of a checkout the package alone: the masters of the problem sets lie beside it.
    """
    libraries = [path for path in sys.path if Path(path).name.endswith("-packages")]
    paths = [sys.prefix, sys.base_prefix, str(PACKAGE / "cpugrpo_edu"), *libraries]
    return sorted({name(path) for path in paths for name in (os.path.abspath, os.path.realpath)})


@dataclass(frozen=True)
class Sandbox:
    """How one submission is contained; ``uid`` counts only where it has a user of its own."""

    level: str
    uid: int
    course: Path
    limits: Limits

    @property
    def own_user(self) -> bool:
        return self.level in ("namespaces+user", "user")

    def hand_over(self, box: Path) -> None:
        """Give ``box`` and what is in it to the submission's user."""
        if self.own_user:
            for path in (box, *box.rglob("*")):
                os.chown(path, self.uid, self.uid, follow_symlinks=False)

    def command(self, box: Path, program: list[str]) -> list[str]:
        """The command that starts ``program`` contained, able to write only in ``box``."""
        if self.level == "none":
            return program
        inner = [*self.as_user(), *self.limited(), *program]
        if not self.level.startswith("namespaces"):
            return inner
        # Jupyter interrupts a kernel by SIGINT to its process group, which bubblewrap must
        # survive. A shell's "ignore" is inherited; ipykernel then sets a handler of its own.
        return ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *self.walls(box), *inner]

    def walls(self, box: Path) -> list[str]:
        """bubblewrap with an empty file system, to which only what is needed is added."""
        words = ["bwrap", "--die-with-parent", "--unshare-net", "--unshare-pid", "--unshare-ipc"]
        # ipykernel would look for this process, which has another number inside, and stop
        words += ["--unsetenv", "JPY_PARENT_PID"]
        for folder in SYSTEM:
            words += ["--ro-bind-try", folder, folder]
        words += [*self.empty("/tmp", "1777"), "--proc", "/proc", "--dev", "/dev"]
        words += [*self.empty("/dev/shm", "1777"), "--remount-ro", "/dev"]
        for path in needed_folders():
            words += [*way_to(path), "--ro-bind-try", path, path]
        words += self.empty(str(self.course), "0755")  # it may lie in a folder that is needed
        return [*words, *way_to(str(box)), "--bind", str(box), str(box), "--remount-ro", "/", "--"]

    def empty(self, folder: str, mode: str) -> list[str]:
        """An empty writable folder that vanishes at the end."""
        return ["--perms", mode, "--size", str(self.limits.disk_bytes), "--tmpfs", folder]

    def as_user(self) -> list[str]:
        words = ["setpriv", "--no-new-privs", "--pdeathsig=KILL"]
        if self.own_user:
            words += [f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
            words += ["--inh-caps=-all"]
        return words

    def limited(self) -> list[str]:
        processes = self.limits.processes
        if not self.own_user:  # the limit counts all processes of a user, so add those that exist
            for process in psutil.process_iter(["uids", "num_threads"]):
                if process.info["uids"] and process.info["uids"].real == os.getuid():
                    processes += process.info["num_threads"] or 0
        return [
            "prlimit",
            f"--as={self.limits.memory_bytes}",
            f"--fsize={self.limits.file_bytes}",
            f"--nproc={processes}",
            # later than the watch of the grading process, which can name the reason
            f"--cpu={self.limits.seconds + 60}",
            "--nofile=512",
            "--core=0",
            "--",
        ]


def way_to(path: str) -> list[str]:
    """Make the folders above ``path``, which bubblewrap would otherwise close to other users."""
    return [word for folder in [*Path(path).parents][-2::-1] for word in ("--dir", str(folder))]


def strongest(sandbox: Sandbox) -> Sandbox:
    """The strongest level at which this Python can import a kernel's modules here."""
    root = hasattr(os, "getuid") and os.getuid() == 0
    for level in CONTAINED if sys.platform == "linux" else ():
        trial = replace(sandbox, level=level)
        if level == "none" or (trial.own_user and not root) or (level == "namespaces" and root):
            continue
        box = Path(tempfile.mkdtemp(prefix="cg-")).resolve()
        try:
            trial.hand_over(box)
            done = subprocess.run(
                trial.command(box, [sys.executable, "-c", "import ipykernel, cpugrpo_edu"]),
                capture_output=True,
                timeout=60,
                cwd=box,
                env={**os.environ, "HOME": str(box), "PYTHONPATH": str(PACKAGE)},
            )
            if done.returncode == 0:
                return trial
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            shutil.rmtree(box, ignore_errors=True)
    return replace(sandbox, level="none")
