"""What ``cpugrpo doctor`` shows: the installation, and what in this machine decides the speed."""

from __future__ import annotations

import psutil

from cpugrpo_edu.engine.hardware import (
    GIB,
    Check,
    cgroup_memory,
    cpu_quota,
    describe_machine,
    usable_cores,
    usable_cpus,
    versions,
)
from cpugrpo_edu.engine.hardware import doctor as installation
from cpugrpo_edu.engine.memory import swap_pressure
from cpugrpo_edu.engine.threads import choose, measured
from cpugrpo_edu.errors import UserError

SHOWN = ("torch", "transformers", "trl", "peft", "datasets")


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
        mend = f"{usable_cpus()} threads are used; a whole number of CPUs wastes none"
        return Check("limits", "warn", detail, mend)
    return Check("limits", "ok", detail)


def check_numbers() -> Check:
    """Which fast integer and 16-bit products the processor has."""
    isa = describe_machine().isa
    integer = [name for name in isa if "VNNI" in name or name in ("AMX INT8", "ARM I8MM")]
    half = [name for name in isa if "BF16" in name]
    detail = f"INT8: {', '.join(integer) or 'none'}; bfloat16: {', '.join(half) or 'none'}"
    if integer:
        return Check("short numbers", "ok", detail)
    mend = "INT8 rollouts work, but try --no-int8-rollouts as well: which is faster differs"
    return Check("short numbers", "warn", detail, mend)


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
