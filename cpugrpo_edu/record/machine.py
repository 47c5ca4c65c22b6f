"""Where a number was measured: the machine, what a container leaves of it, versions, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

PACKAGE = Path(__file__).parent.parent
DISTRIBUTION = "cpugrpo-edu"
CORE_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "tokenizers"),
    *("safetensors", "datasets", "numpy", "scipy", "psutil"),
)
ISA_FLAGS = {  # the name shown -> the flag in /proc/cpuinfo (x86 "flags", ARM "Features")
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX-VNNI": "avx_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AMX BF16": "amx_bf16",
    "AMX INT8": "amx_int8",
    "NEON": "asimd",
    "ARM BF16": "bf16",
    "ARM I8MM": "i8mm",
}
GIB = 2**30


# --- control groups: what a container allows, whatever the hardware has ------------------


def _cgroup_folders(
    controller: str, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """Every folder whose limit binds this process: its own control group and the ones above."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # v2: one hierarchy for all controllers
            mount = root
        elif controller in controllers.split(","):  # v1: one mount per controller
            mount = root / controllers if (root / controllers).is_dir() else root / controller
        else:
            continue
        # Inside a container the path may name a folder of the host: keep what exists.
        own = Path(path.lstrip("/"))
        folders += [mount / p for p in (own, *own.parents) if (mount / p).is_dir()]
    return folders


def _read_number(path: Path) -> int | None:
    """The integer in a control file; None when absent or "max" (no limit)."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def cpu_quota(**where: Path) -> float | None:
    """CPUs' worth of time the control group allows per period; None without a limit."""
    quotas = []
    for folder in _cgroup_folders("cpu", **where):
        quota = _read_number(folder / "cpu.cfs_quota_us")
        period = _read_number(folder / "cpu.cfs_period_us")
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def cgroup_memory(**where: Path) -> tuple[int, int] | None:
    """(limit, bytes still free under it) of the tightest control group; None without a limit.

    Inactive page cache counts as free: the kernel gives it up before it kills anyone.
    """
    found = []
    for folder in _cgroup_folders("memory", **where):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read_number(folder / limit_name), _read_number(folder / usage_name)
            if limit is None or usage is None or limit >= 2**60:  # v1 writes "none" as 2**63
                continue
            cache = 0
            with contextlib.suppress(OSError, ValueError):
                stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
                cache = int(stat.get(cache_name, 0))
            found.append((limit - usage + cache, limit))
    if not found:
        return None
    free, limit = min(found)
    return limit, max(0, min(free, limit))


def available_memory() -> int:
    """Bytes this process can still take without swapping: the system's, or the container's."""
    free, group = psutil.virtual_memory().available, cgroup_memory()
    return min(free, group[1]) if group else free


# --- cores and instruction sets ----------------------------------------------------------


def _affinity() -> list[int]:
    """Logical CPUs the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cpus() -> int:
    """Logical CPUs this process may use: affinity and quota honoured, never 0."""
    return max(1, int(min(len(_affinity()), cpu_quota() or float("inf"))))


def usable_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores this process may use, never 0.

    Two hyper-threads of a core share its multipliers, so matrix products gain
    nothing from the second one.
    """
    cpus = _affinity()
    try:
        siblings = [topology / f"cpu{c}" / "topology" / "thread_siblings_list" for c in cpus]
        cores = len({s.read_text() for s in siblings})
    except OSError:
        cores = min(len(cpus), psutil.cpu_count(logical=False) or len(cpus))
    return max(1, min(cores, usable_cpus()))


@lru_cache  # asked at every matrix product
def _first_processor(path: Path) -> tuple[str, frozenset[str]]:
    """Its name and flags in /proc/cpuinfo; empty where that does not exist."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""
    return fields.get("model name", ""), frozenset(flags.split())


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """(model name, instruction-set flags); flags are empty where /proc does not exist."""
    name, flags = _first_processor(path)
    if not flags and "torch" in sys.modules:  # not Linux: torch looked for itself
        capability = sys.modules["torch"].backends.cpu.get_cpu_capability()
        flags = frozenset(capability.lower().split())
    return name or platform.processor() or platform.machine(), flags


def processor_flags() -> frozenset[str]:
    """The processor's instruction sets, as /proc/cpuinfo names them."""
    return _cpuinfo()[1]


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere it is emulated and slower than fp32."""
    return bool(processor_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Machine:
    """One computer as the run found it; memory in bytes. Goes into every RunRecord."""

    cpu: str
    architecture: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    isa: tuple[str, ...]
    native_bfloat16: bool
    total_memory: int
    available_memory: int
    os: str
    python: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "isa": list(self.isa)}


def describe_machine() -> Machine:
    """Look at the processor, the memory and the limits a container puts on both."""
    name, flags = _cpuinfo()
    total, group = psutil.virtual_memory().total, cgroup_memory()
    logical = os.cpu_count() or 1
    return Machine(
        cpu=name,
        architecture=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=usable_cores(),
        isa=tuple(shown for shown, flag in ISA_FLAGS.items() if flag in flags),
        native_bfloat16=native_bfloat16(),
        total_memory=min(total, group[0]) if group else total,
        available_memory=available_memory(),
        os=platform.platform(),
        python=platform.python_version(),
    )


# --- versions and commit -----------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of the packages whose behaviour a result depends on; "missing" if not there."""
    found = {"python": platform.python_version()}
    for name in (DISTRIBUTION, *CORE_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def git_commit(folder: str | Path = PACKAGE) -> str:
    """The commit the folder's files come from, "+dirty" if tracked ones among them differ.

    "unknown" without git, outside a repository, or where the files are not tracked
    (a package installed in an environment that happens to lie inside a repository).
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if not git("ls-files", "--", "."):
            return "unknown"
        commit = git("rev-parse", "HEAD")
        return commit + ("+dirty" if git("status", "--porcelain", "-uno", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
