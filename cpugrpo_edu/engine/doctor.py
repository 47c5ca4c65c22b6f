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
from packaging.requirements import Requirement

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


def check(name: str, fine: bool, detail: str, fix: str, *, fails: bool = False) -> Check:
    """A finding that is well if ``fine``, else a warning, or a failure if it ``fails``."""
    if fine:
        return Check(name, "ok", detail)
    return Check(name, "fail" if fails else "warn", detail, fix)


def examine() -> list[Check]:
    """Every check, the installation first; "fail" means that a run will not work."""
    speed = (check_limits, check_numbers, check_kernel, check_speed, check_blas)
    return [*installation(), *(look() for look in (*speed, check_swap, check_versions))]


def installation() -> list[Check]:
    """Checks of the installation and the machine's basics."""
    machine, python = describe_machine(), platform.python_version()
    recent = tuple(sys.version_info) >= MINIMUM_PYTHON
    cores = f"{machine.usable_cores} usable of {machine.physical_cores} physical, {machine.cpu}"
    free, disk = machine.available_memory, shutil.disk_usage(Path.cwd()).free
    memory = f"{free / GIB:.1f} of {machine.total_memory / GIB:.1f} GiB available"
    less = "close other programs, or keep to the bundled model"
    room = f"{disk / GIB:.1f} GiB free in the working folder"
    there = BUNDLED_MODEL.exists()
    bundled = f"{BUNDLED_MODEL.name} present" if there else f"{BUNDLED_MODEL} is missing"
    again = "reinstall the package, or rebuild the model as its model card says"
    return [
        check("python", recent, python, "install Python 3.11 or newer", fails=True),
        check_torch(),
        check_packages(),
        check("cores", machine.usable_cores >= 2, cores, "allow the process a second core"),
        check("memory", free >= 2 * GIB, memory, less, fails=free < GIB),
        check_isa(),
        check_threads(),
        check("disk", disk >= 2 * GIB, room, "free some disk space", fails=disk < 0.2 * GIB),
        check_temporary_folder(),
        check("bundled model", there, bundled, again, fails=True),
    ]


def check_torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", "fail", str(error), "pip install torch")
    gpu = torch.version.cuda or getattr(torch.version, "hip", None)
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads, {'GPU' if gpu else 'CPU'}"
    fix = "works, but the CPU build of torch is several times smaller"
    return check("torch", not gpu, detail + " build", fix)


def check_packages() -> Check:
    """Whether every package is there, in a version that this one can work with."""
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
    detail = "; ".join(wrong) or f"{len(required)} requirements met"
    fix = f"pip install --upgrade {DISTRIBUTION}, in a fresh environment if that conflicts"
    return check("packages", not wrong, detail, fix, fails=True)


def check_threads() -> Check:
    cores = usable_cores()
    threads = int(sys.modules["torch"].get_num_threads()) if "torch" in sys.modules else cores
    detail = f"torch uses {threads} threads on {cores} usable cores"
    fix = "call configure_threads() before other work"
    return check("threads", threads == cores, detail, fix)


def check_isa() -> Check:
    """Whether the processor has the instructions that torch's products need to be fast."""
    isa, native = describe_machine().isa, native_bfloat16()
    fast = bool({"AVX2", "AVX-512", "NEON"} & set(isa))
    detail = ", ".join(isa) or "unknown instruction set"
    detail += "; native bfloat16" if native else "; no native bfloat16"
    if fast and not native:
        detail += ": keep float32 for training"
    return check("instruction set", native or fast, detail, "expect slow matrix products")


def check_temporary_folder() -> Check:
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Check("temporary folder", "fail", str(error), "set TMPDIR to a writable folder")
    return Check("temporary folder", "ok", f"{folder} is writable")


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
    wasteful = quota is not None and quota < 4 and quota % 1 > 0
    fix = f"{usable_cpus()} threads are used; a whole number of CPUs wastes none"
    return check("limits", not wasteful, detail, fix)


def check_numbers() -> Check:
    """Which fast integer and 16-bit products the processor has."""
    isa = describe_machine().isa
    integer = [name for name in isa if "VNNI" in name or name in ("AMX INT8", "ARM I8MM")]
    half = [name for name in isa if "BF16" in name]
    detail = f"INT8: {', '.join(integer) or 'none'}; bfloat16: {', '.join(half) or 'none'}"
    fix = "INT8 rollouts work, but try --no-int8-rollouts as well: which is faster differs"
    return check("short numbers", bool(integer), detail, fix)


def check_kernel() -> Check:
    """Where the C code for INT8 models comes from, or why torch has to do its work."""
    from cpugrpo_edu.engine import c_kernel

    functions, why = c_kernel.library()
    if functions is None:
        fix = "on Linux, install a C compiler (the package gcc; in conda c-compiler)"
        return Check("compiled kernel", "warn", f"none, so torch does its work: {why}", fix)
    path = Path(functions._name)
    origin = "brought by the package" if path.parent == c_kernel.SHIPPED else "compiled here"
    return Check("compiled kernel", "ok", f"{origin}: {path.name}")


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

    build = torch.__config__.show().lower()
    libraries = {
        "MKL": torch.backends.mkl.is_available(),
        "oneDNN": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "OpenMP": torch.backends.openmp.is_available(),
        "Accelerate": "accelerate" in build,
        "OpenBLAS": "open" in build.split("blas_info=")[-1][:8],
    }
    found = [name for name, there in libraries.items() if there]
    detail = f"{', '.join(found) or 'none'}; kernels for {torch.backends.cpu.get_cpu_capability()}"
    fix = "reinstall torch from its own wheels: products are slow"
    return check("BLAS", bool(set(found) - {"OpenMP"}), detail, fix)


def check_swap() -> Check:
    """Whether the machine is swapping now, and whether it could."""
    swap, pressure = psutil.swap_memory(), swap_pressure()
    detail = f"{swap.used / GIB:.1f} of {swap.total / GIB:.1f} GiB of swap in use"
    if not swap.total and not pressure:
        detail = "no swap"
    return check("swap", pressure is None, detail, pressure or "")


def check_versions() -> Check:
    """The versions that a report of trouble should name."""
    have = versions()
    return Check("versions", "ok", ", ".join(f"{name} {have[name]}" for name in SHOWN))
