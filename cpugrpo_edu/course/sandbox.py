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
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME = 1, 2, 4, 8, 32, 1024
MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 2048, 4096, 16384, 1 << 18, 1 << 21
ST_RELATIME = 4096
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


def read_only(point: str, on: bool = True) -> None:
    """Remount with the flags a mount has: an ordinary user may add to them, not take away."""
    has = os.statvfs(point).f_flag
    kept = has & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    kept |= MS_RELATIME if has & ST_RELATIME else 0
    mount("none", point, None, MS_REMOUNT | MS_BIND | kept | (MS_RDONLY if on else 0))


def mount_points() -> list[str]:
    with open("/proc/self/mountinfo") as file:
        found = [line.split()[4].encode().decode("unicode_escape") for line in file]
    return [point for point in found if point != "/proc" and not point.startswith("/proc/")]


def hide(spec: dict[str, Any]) -> None:
    """Leave the box alone writable; cover scratch, home and course folders by empty ones."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    for point in mount_points():
        if os.path.exists(point):
            read_only(point)
    names = [name(path) for path in spec["keep"] for name in (os.path.abspath, os.path.realpath)]
    handles = {path: os.open(path, os.O_RDONLY) for path in names if os.path.isdir(path)}
    box = os.open(spec["box"], os.O_RDONLY)
    covered: list[str] = []

    def cover(folder: str, mode: str) -> None:
        if os.path.isdir(folder):
            options = f"size={spec['disk_bytes']},mode={mode}"
            mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
            covered.append(folder)

    for folder, mode in covers(spec, list(handles)):
        cover(folder, mode)
    for path, handle in handles.items():
        if any(Path(path).is_relative_to(folder) for folder in covered):
            os.makedirs(path, exist_ok=True)
            mount(f"/proc/self/fd/{handle}", path, None, MS_BIND | MS_REC)
        os.close(handle)
    for folder in spec["hide"]:  # after what is kept: a course may lie in there
        cover(folder, "755")
    os.makedirs(spec["box"], exist_ok=True)
    mount(f"/proc/self/fd/{box}", spec["box"], None, MS_BIND)
    read_only(spec["box"], on=False)
    os.close(box)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)


def covers(spec: dict[str, Any], kept: list[str]) -> list[tuple[str, str]]:
    """Folders to cover with the mode of the empty one, outer ones alone.

    Besides the scratch folders and the home folder, those that another user cannot pass on the
    way to a kept one (such as /root): in an empty folder the kept one can be reached.
    """
    found = {os.path.realpath(folder): "1777" for folder in SCRATCH}
    found.setdefault(os.path.realpath(os.path.expanduser("~")), "755")
    if spec["level"] == "namespaces+user":
        for path in kept:
            above = [str(parent) for parent in [*Path(path).parents][::-1]]
            shut = [each for each in above if not os.stat(each).st_mode & 1]
            found |= {each: "755" for each in shut[:1] if each not in found}
    found.pop("/", None)
    inner = {a for a in found for b in found if a != b and Path(a).is_relative_to(b)}
    return [(folder, mode) for folder, mode in found.items() if folder not in inner]


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
        ("RLIMIT_CPU", spec["seconds"] + 60),  # behind the watch, which can name the reason
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
