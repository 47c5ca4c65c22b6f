"""What ``cpugrpo doctor`` shows: the installation, and what in this machine decides the speed."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from cpugrpo_edu.engine.hardware import BUNDLED_MODEL
from cpugrpo_edu.engine.memory import swap_pressure
from cpugrpo_edu.engine.threads import choose, measured
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import (
    DISTRIBUTION,
    GIB,
    cgroup_memory,
    cpu_quota,
    describe_machine,
    native_bfloat16,
    usable_cores,
    usable_cpus,
    versions,
)

MINIMUM_PYTHON = (3, 11)
SHOWN = ("torch", "transformers", "trl", "peft", "datasets")


@dataclass(frozen=True)
class Check:
    """One finding of the doctor; ``fix`` says what to do and is empty when all is well."""

    name: str
    ok: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def _judge(name: str, value: float, warn: float, fail: float, detail: str, fix: str) -> Check:
    """Less than ``fail`` fails, less than ``warn`` warns."""
    if value >= warn:
        return Check(name, "ok", detail)
    return Check(name, "fail" if value < fail else "warn", detail, fix)


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
        fix = "works, but the CPU build of torch is several times smaller"
        return Check("torch", "warn", detail + ", GPU build", fix)
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
        fix = f"pip install --upgrade {DISTRIBUTION}, in a fresh environment if that conflicts"
        return Check("packages", "fail", "; ".join(wrong), fix)
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


def installation() -> list[Check]:
    """Checks of the installation and the machine's basics."""
    machine = describe_machine()
    have = f"{machine.available_memory / GIB:.1f} of {machine.total_memory / GIB:.1f} GiB available"
    fix = "close other programs, or keep to the bundled model"
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
        _judge("memory", machine.available_memory, 2 * GIB, GIB, have, fix),
        _check_isa(),
        _check_threads(),
        *_check_disk_and_temp(),
        bundled,
    ]


def examine() -> list[Check]:
    """Every check, the installation first; "fail" means that a run will not work."""
    more = [check_limits(), check_numbers(), check_speed(), check_blas(), check_swap(), which()]
    return [*installation(), *more]


def check_limits() -> Check:
    """Cores, and what a container leaves of them: a share of one makes every thread wait."""
    machine, quota, group = describe_machine(), cpu_quota(), cgroup_memory()
    detail = (
        f"{machine.physical_cores} physical and {machine.logical_cores} logical cores, "
        f"{'no CPU quota' if quota is None else f'a quota of {quota:g} CPUs'}, "
        f"{'no memory limit' if group is None else f'{group[0] / GIB:.1f} GiB at most'}"
    )
    if quota is not None and quota < 1:
        return Check("limits", "warn", detail, "allow the container a whole CPU")
    if quota is not None and quota % 1 and quota < 4:
        fix = f"{usable_cpus()} threads are used; a whole number of CPUs wastes none"
        return Check("limits", "warn", detail, fix)
    return Check("limits", "ok", detail)


def check_numbers() -> Check:
    """Which fast integer and 16-bit products the processor has."""
    isa = describe_machine().isa
    integer = [name for name in isa if "VNNI" in name or name in ("AMX INT8", "ARM I8MM")]
    half = [name for name in isa if "BF16" in name]
    detail = f"INT8: {', '.join(integer) or 'none'}; bfloat16: {', '.join(half) or 'none'}"
    if integer:
        return Check("short numbers", "ok", detail)
    fix = "INT8 rollouts work, but try --no-int8-rollouts as well: which is faster differs"
    return Check("short numbers", "warn", detail, fix)


def check_speed() -> Check:
    """The fastest number of threads for the bundled model, measured once."""
    if usable_cores() == 1:
        return Check("fastest", "ok", "one core, one thread")
    try:
        seconds = measured()
    except UserError as error:  # the check of the bundled model says what to do
        return Check("fastest", "ok", f"not measured: {error}")
    if not seconds:
        return Check("fastest", "ok", "not measured, since other programs are at work")
    shown = ", ".join(f"{threads}: {1000 * s:.0f} ms" for threads, s in sorted(seconds.items()))
    chosen = choose(seconds)
    threads = "1 thread" if chosen == 1 else f"{chosen} threads"
    return Check("fastest", "ok", f"{threads} for the bundled model ({shown})")


def check_blas() -> Check:
    """The libraries that multiply matrices for torch."""
    import torch

    libraries = {
        "MKL": torch.backends.mkl.is_available(),
        "oneDNN": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "OpenMP": torch.backends.openmp.is_available(),
        "Accelerate": "accelerate" in torch.__config__.show().lower(),
        "OpenBLAS": "open" in torch.__config__.show().lower().split("blas_info=")[-1][:8],
    }
    found = [name for name, there in libraries.items() if there]
    detail = f"{', '.join(found) or 'none'}; kernels for {torch.backends.cpu.get_cpu_capability()}"
    if set(found) - {"OpenMP"}:
        return Check("BLAS", "ok", detail)
    return Check("BLAS", "warn", detail, "reinstall torch from its own wheels: products are slow")


def check_swap() -> Check:
    """Whether the machine is swapping now, and whether it could."""
    swap, pressure = psutil.swap_memory(), swap_pressure()
    detail = f"{swap.used / GIB:.1f} of {swap.total / GIB:.1f} GiB of swap in use"
    if pressure:
        return Check("swap", "warn", detail, pressure)
    return Check("swap", "ok", detail if swap.total else "no swap")


def which() -> Check:
    """The versions that a report of trouble should name."""
    have = versions()
    shown = ", ".join(f"{name} {have[name]}" for name in SHOWN)
    return Check("versions", "ok", shown)
