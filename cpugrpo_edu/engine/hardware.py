"""What this machine is, how many threads to use, and whether the installation is sound.

Nothing here imports torch until a function needs it: thread counts are read by
OpenMP and MKL once, when torch is first imported, so :func:`configure_threads`
has to be able to speak first.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.run_record import RunRecord

PACKAGE = Path(__file__).parent.parent
DISTRIBUTION = "cpugrpo-edu"
BUNDLED_MODEL = PACKAGE / "models" / "bundled" / "model.safetensors"
MINIMUM_PYTHON = (3, 11)
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


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """(model name, instruction-set flags); flags are empty where /proc does not exist."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    if not flags and "torch" in sys.modules:  # not Linux: torch looked for itself
        flags = set(sys.modules["torch"].backends.cpu.get_cpu_capability().lower().split())
    return name, flags


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere it is emulated and slower than fp32."""
    return bool(_cpuinfo()[1] & {"avx512_bf16", "amx_bf16", "bf16"})


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


_before_torch: bool | None = None


def configure_threads(threads: int | None = None) -> dict[str, Any]:
    """Give torch its threads; call it before torch does any work. Safe to call again.

    ``None`` takes the usable physical cores, shared among the processes of this
    machine under ``torch.distributed.run``. Returns what is in force afterwards,
    and whether oneDNN (mkldnn) and MKL are there; torch uses both by itself.
    """
    if threads is None:
        threads = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise UserError(
            f"threads is {threads!r}; it must be a whole number from 1 to 1024; "
            "leave it out to use every usable core"
        )
    global _before_torch
    if _before_torch is None:  # of the first call, which is the one that counts
        _before_torch = "torch" not in sys.modules
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)  # read at import, and inherited by child processes
    # Large tensors on pages of 2 MiB where the system has them: a fresh page of 4 KiB costs a
    # trip into the kernel, and a training step of a large model needs a million of them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        # One stream of operators: a transformer's layers wait for each other anyway.
        # torch refuses once parallel work has begun, or at a second call.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "before_torch": _before_torch,
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "mkl": torch.backends.mkl.is_available(),
    }


# --- records: where and when a number was measured ------------------------------------------------


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


def new_record(
    kind: str, config: dict[str, Any], results: dict[str, Any], seed: int = 0
) -> RunRecord:
    """A record of what was just measured: date, commit, versions and machine filled in.

    ``config`` and ``results`` are kept as JSON gives them back.
    """
    return RunRecord(
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        commit=git_commit(),
        machine=describe_machine().to_json(),
        versions=versions(),
        config=json.loads(json.dumps(config)),
        results=json.loads(json.dumps(results)),
    )


# --- doctor ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One finding of the doctor; ``mend`` says what to do and is empty when all is well."""

    name: str
    ok: Literal["ok", "warn", "fail"]
    detail: str
    mend: str = ""


def _judge(name: str, value: float, warn: float, fail: float, detail: str, mend: str) -> Check:
    """Less than ``fail`` fails, less than ``warn`` warns."""
    if value >= warn:
        return Check(name, "ok", detail)
    return Check(name, "fail" if value < fail else "warn", detail, mend)


def _check_python() -> Check:
    detail = platform.python_version()
    if tuple(sys.version_info) >= MINIMUM_PYTHON:
        return Check("python", "ok", detail)
    return Check("python", "fail", detail, "install Python 3.11 or newer")


def _check_torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", "fail", str(error), "pip install torch")
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if torch.version.cuda or getattr(torch.version, "hip", None):
        mend = "works, but the CPU build of torch is several times smaller"
        return Check("torch", "warn", detail + ", GPU build", mend)
    return Check("torch", "ok", detail + ", CPU build")


def _check_packages() -> Check:
    missing = [name for name, version in versions().items() if version == "missing"]
    missing = [name for name in missing if name != DISTRIBUTION]
    if missing:
        detail = "missing: " + ", ".join(missing)
        return Check("packages", "fail", detail, "pip install " + " ".join(missing))
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        detail = "all present; the package itself runs uninstalled, so its pins are unknown"
        return Check("packages", "warn", detail, "pip install -e . in the repository")
    from packaging.requirements import Requirement

    wrong = []
    for need in map(Requirement, required):
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            have = "missing"
        if have == "missing" or not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} is {have}, needed {need.specifier or 'any'}")
    if wrong:
        mend = f"pip install --upgrade {DISTRIBUTION}, in a fresh environment if that conflicts"
        return Check("packages", "fail", "; ".join(wrong), mend)
    return Check("packages", "ok", f"{len(required)} requirements met")


def _check_threads() -> Check:
    cores = usable_cores()
    threads = int(sys.modules["torch"].get_num_threads()) if "torch" in sys.modules else cores
    detail = f"torch uses {threads} threads on {cores} usable cores"
    if threads == cores:
        return Check("threads", "ok", detail)
    return Check("threads", "warn", detail, "call configure_threads() before other work")


def _check_isa() -> Check:
    isa = describe_machine().isa
    detail = ", ".join(isa) or "unknown instruction set"
    if native_bfloat16():
        return Check("instruction set", "ok", detail + "; native bfloat16")
    detail += "; no native bfloat16"
    if {"AVX2", "AVX-512", "NEON"} & set(isa):
        return Check("instruction set", "ok", detail + ": keep float32 for training")
    return Check("instruction set", "warn", detail, "expect slow matrix products on this CPU")


def _check_disk_and_temp() -> list[Check]:
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        temp = Check("temporary folder", "ok", f"{folder} is writable")
    except OSError as error:
        temp = Check("temporary folder", "fail", str(error), "set TMPDIR to a writable folder")
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / GIB:.1f} GiB free in the working folder"
    return [_judge("disk", free, 2 * GIB, 0.2 * GIB, detail, "free some disk space"), temp]


def doctor() -> list[Check]:
    """Examine the installation; "fail" means that a run will not work, "warn" that it suffers."""
    machine = describe_machine()
    have = f"{machine.available_memory / GIB:.1f} of {machine.total_memory / GIB:.1f} GiB available"
    mend = "close other programs, or keep to the bundled model"
    bundled = Check("bundled model", "ok", f"{BUNDLED_MODEL.name} present")
    if not BUNDLED_MODEL.exists():
        how = "reinstall the package, or rebuild the model as its model card says"
        bundled = Check("bundled model", "fail", f"{BUNDLED_MODEL} is missing", how)
    cores = f"{machine.usable_cores} usable of {machine.physical_cores} physical, {machine.cpu}"
    return [
        _check_python(),
        _check_torch(),
        _check_packages(),
        _judge("cores", machine.usable_cores, 2, 1, cores, "allow the process a second core"),
        _judge("memory", machine.available_memory, 2 * GIB, GIB, have, mend),
        _check_isa(),
        _check_threads(),
        *_check_disk_and_temp(),
        bundled,
    ]
