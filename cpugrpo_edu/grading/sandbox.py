"""Start a command shut in: limits, another user, no network, nothing of the course in sight.

Used as ``python sandbox.py SPEC COMMAND...``; imports the standard library alone. What could
not be had is left out: :func:`strongest` finds out which level works on this machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38

LEVELS = ("namespaces+user", "namespaces", "user", "limits")
"""From strongest to weakest; ``namespaces`` alone is what an ordinary user can often have."""

SCRATCH = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
"""Folders that anybody may write to: replaced by empty ones that vanish."""


def libc(name: str, *args: Any) -> int:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return 0


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    libc(
        "mount",
        source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        data.encode(),
    )


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def hide(spec: dict[str, Any]) -> None:
    """Cover the scratch folders and the course by empty ones; keep the box where it is."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    box = os.open(spec["box"], os.O_RDONLY)
    kept = [os.path.realpath(path) for path in spec["keep"]]
    if spec["level"] == "namespaces+user":
        open_way(kept)
    for folder in (*SCRATCH, *spec["hide"]):
        folder = os.path.realpath(folder)
        inside = any(Path(path).is_relative_to(folder) for path in kept)
        if os.path.isdir(folder) and not inside and folder != "/":
            options = f"size={spec['disk_bytes']},mode=1777"
            mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
    if not os.path.isdir(spec["box"]):
        os.makedirs(spec["box"])
        mount(f"/proc/self/fd/{box}", spec["box"], None, MS_BIND)
    os.close(box)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)


def open_way(kept: list[str]) -> None:
    """Make kept folders reachable for another user where they lie in a closed one (/root)."""
    handles = {path: os.open(path, os.O_RDONLY) for path in kept}
    covered: set[str] = set()
    for path, handle in handles.items():
        above = [str(parent) for parent in [*Path(path).parents][::-1]]
        shut = next((each for each in above if not os.stat(each).st_mode & 1), None)
        shut = shut or next((each for each in above if each in covered), None)
        if shut is None:
            continue
        if shut not in covered:
            mount("tmpfs", shut, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
            covered.add(shut)
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", path, None, MS_BIND | MS_REC)
    for handle in handles.values():
        os.close(handle)


def limit(spec: dict[str, Any]) -> None:
    import resource

    mine = spec["level"] in ("namespaces", "limits")
    processes = spec["processes"]
    if mine:  # the limit counts all processes of the user, so add those that are there
        uid = os.getuid()
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == uid:
                    processes += len(os.listdir(f"/proc/{entry}/task"))
            except OSError:
                continue
    for name, value in (
        ("RLIMIT_AS", spec["memory_bytes"]),
        ("RLIMIT_FSIZE", spec["file_bytes"]),
        ("RLIMIT_NPROC", processes),
        ("RLIMIT_CPU", spec["seconds"]),
        ("RLIMIT_NOFILE", 512),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (int(value), int(value)))


def enter(spec: dict[str, Any], command: list[str]) -> None:
    """The last steps, in the process that becomes the command."""
    level, uid = spec["level"], spec["uid"]
    if level.startswith("namespaces"):
        hide(spec)
    if level in ("namespaces+user", "user"):
        limit(spec)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        limit(spec)
    os.umask(0o077)
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(spec["cwd"])
    os.execv(command[0], command)


def main(spec: dict[str, Any], command: list[str]) -> int:
    level, uid = spec["level"], spec["uid"]
    if level in ("namespaces+user", "user"):
        for folder, _, files in os.walk(spec["box"]):
            os.chown(folder, uid, uid)
            for file in files:
                os.chown(os.path.join(folder, file), uid, uid, follow_symlinks=False)
    spaces = 0
    if level == "namespaces+user":
        spaces = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    elif level == "namespaces":
        me, group = os.getuid(), os.getgid()
        libc(
            "unshare",
            CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET,
        )
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{me} {me} 1")
        write("/proc/self/gid_map", f"{group} {group} 1")
    if spaces:
        libc("unshare", spaces)
    os.environ.pop("JPY_PARENT_PID", None)  # another number in there; it would end the kernel
    child = os.fork()
    if child == 0:
        try:
            libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            enter(spec, command)
        except BaseException as error:
            print(f"sandbox: {error}", file=sys.stderr, flush=True)
        os._exit(97)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the group gets it; the kernel is to act
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def strongest(spec: dict[str, Any]) -> str:
    """The strongest level at which this Python can start a kernel's modules here."""
    if sys.platform != "linux":
        return "none"
    for level in LEVELS:
        if "user" in level.split("+") and os.getuid() != 0:
            continue
        if level == "namespaces" and os.getuid() == 0:
            continue  # root in a namespace of its own gains nothing over the level before
        box = tempfile.mkdtemp(prefix="cg-")
        try:
            trial = {**spec, "level": level, "box": box, "cwd": box, "seconds": 60}
            command = [sys.executable, "-c", "import ipykernel, cpugrpo_edu"]
            env = {"PATH": os.environ.get("PATH", ""), "HOME": box, "PYTHONPATH": spec["path"]}
            done = subprocess.run(
                [sys.executable, __file__, json.dumps(trial), *command],
                capture_output=True,
                timeout=60,
                env=env,
            )
            if done.returncode == 0:
                return level
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            shutil.rmtree(box, ignore_errors=True)
    return "none"


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1]), sys.argv[2:]))
