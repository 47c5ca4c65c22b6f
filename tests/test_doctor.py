"""The doctor's findings, on made-up machines."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cpugrpo_edu.engine import doctor as D
from cpugrpo_edu.engine import threads as T
from cpugrpo_edu.record import machine as M

GIB = 2**30


def test_every_check_names_what_to_do():
    checks = D.examine()
    names = [c.name for c in checks]
    assert len(set(names)) == len(names) and {"limits", "BLAS", "swap", "versions"} <= set(names)
    for c in checks:
        assert c.detail and bool(c.fix) == (c.ok != "ok"), c


@pytest.mark.parametrize(
    ("quota", "ok", "words"),
    [
        (None, "ok", "no CPU quota"),
        (2.0, "ok", "a quota of 2 CPUs"),
        (0.5, "warn", "a quota of 0.5 CPUs"),
        (1.5, "warn", "a quota of 1.5 CPUs"),
    ],
)
def test_quotas(monkeypatch, quota, ok, words):
    monkeypatch.setattr(D, "cpu_quota", lambda: quota)
    monkeypatch.setattr(M, "cpu_quota", lambda **_: quota)
    found = D.check_limits()
    assert found.ok == ok and words in found.detail
    assert M.usable_cpus() >= 1 and M.usable_cores() >= 1


@pytest.mark.parametrize(
    ("flags", "ok", "words"),
    [
        ({"avx2"}, "warn", "INT8: none; bfloat16: none"),
        ({"avx512_vnni", "amx_bf16", "amx_int8"}, "ok", "INT8: AVX-512 VNNI, AMX INT8"),
        ({"asimd", "i8mm", "bf16"}, "ok", "bfloat16: ARM BF16"),
    ],
)
def test_short_numbers(monkeypatch, flags, ok, words):
    monkeypatch.setattr(M, "_cpuinfo", lambda: ("CPU", flags))
    found = D.check_numbers()
    assert found.ok == ok and words in found.detail


def test_blas(monkeypatch):
    assert D.check_blas().ok == "ok"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.__config__, "show", lambda: "BLAS_INFO=generic")
    assert D.check_blas().ok == "warn"
    monkeypatch.setattr(torch.__config__, "show", lambda: "BLAS_INFO=accelerate")
    assert "Accelerate" in D.check_blas().detail


def test_swap(monkeypatch):
    monkeypatch.setattr(D, "swap_pressure", lambda: "close other programs")
    assert D.check_swap() == D.Check("swap", "warn", D.check_swap().detail, "close other programs")
    monkeypatch.setattr(D, "swap_pressure", lambda: None)
    monkeypatch.setattr(D.psutil, "swap_memory", lambda: SimpleNamespace(used=0, total=0))
    assert D.check_swap().detail == "no swap"


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_systems_without_proc_affinity_and_topology(monkeypatch, system):
    """macOS and Windows have neither /proc nor control groups nor sched_getaffinity."""
    disk = shutil.disk_usage(Path.cwd())
    original = Path.read_text

    def read(self, *arguments, **named):
        if str(self).startswith(("/proc", "/sys")):
            raise FileNotFoundError(str(self))
        return original(self, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "statvfs", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)  # this system's own needs it
    monkeypatch.setattr(M.platform, "system", lambda: system)
    monkeypatch.setattr(M.platform, "processor", lambda: "")
    monkeypatch.setattr(M.psutil, "cpu_count", lambda logical=True: 8 if logical else None)
    from cpugrpo_edu.engine import memory
    from cpugrpo_edu.record.files import check_output_folder

    machine = M.describe_machine()
    assert machine.usable_cores >= 1 and machine.total_memory > 0
    assert M.cpu_quota() is None and M.cgroup_memory() is None
    assert memory.free_memory(2**40) > 0 and memory._own_high_water() == 0
    assert {c.ok for c in D.examine()} <= {"ok", "warn"}
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(TypeError(name)))
    assert memory.release_memory() >= 0
    assert check_output_folder(Path.cwd() / "new")


def test_one_core(monkeypatch):
    monkeypatch.setattr(M, "_affinity", lambda: [0])
    assert M.usable_cpus() == M.usable_cores() == 1
    assert {c.name: c.ok for c in D.examine()}["cores"] == "warn"


def test_without_the_bundled_model_the_doctor_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "BUNDLED_MODEL", tmp_path / "none" / "model.safetensors")
    monkeypatch.setattr(D, "usable_cores", lambda: 2)
    found = D.check_speed()
    assert found.ok == "ok" and "no readable config.json" in found.detail


# The installation


def check(name):
    (found,) = [c for c in D.installation() if c.name == name]
    return found


def test_doctor_always_says_how_to_fix_it():
    checks = D.installation()
    assert len({c.name for c in checks}) == len(checks) == 10
    for c in checks:
        assert c.ok in ("ok", "warn", "fail") and c.detail
        assert bool(c.fix) == (c.ok != "ok")


def test_doctor_on_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "BUNDLED_MODEL", tmp_path / "model.safetensors")
    assert check("bundled model").ok == "fail"
    D.BUNDLED_MODEL.write_bytes(b"x")
    assert check("bundled model").ok == "ok"


@pytest.mark.parametrize(("gib", "ok"), [(8, "ok"), (1.5, "warn"), (0.5, "fail")])
def test_doctor_on_memory_and_disk(monkeypatch, gib, ok):
    monkeypatch.setattr(M, "available_memory", lambda: int(gib * GIB))
    assert check("memory").ok == ok
    free = SimpleNamespace(free=int(gib / 4 * GIB) if ok == "fail" else gib * GIB)
    monkeypatch.setattr(D.shutil, "disk_usage", lambda _: free)
    assert check("disk").ok == ok


def test_doctor_on_one_core_and_threads(monkeypatch):
    import torch

    for module in (M, D):
        monkeypatch.setattr(module, "usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert check("cores").ok == "warn" and check("threads").ok == "ok"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert check("threads").ok == "warn"


def test_doctor_on_instruction_sets(monkeypatch):
    for flags, ok, said in (
        ({"avx2"}, "ok", "no native bfloat16"),
        ({"avx512f", "avx512_bf16"}, "ok", "; native bfloat16"),
        ({"sse2"}, "warn", "unknown"),
    ):
        monkeypatch.setattr(M, "_cpuinfo", lambda f=flags: ("CPU", f))
        found = check("instruction set")
        assert found.ok == ok and said in found.detail


def test_doctor_on_an_unwritable_temporary_folder(monkeypatch):
    monkeypatch.setattr(D.tempfile, "gettempdir", lambda: "/surely/not/there")
    assert check("temporary folder").ok == "fail"


def test_doctor_on_old_python_and_torch(monkeypatch):
    import torch

    monkeypatch.setattr(D, "MINIMUM_PYTHON", (3, 99))
    assert check("python").ok == "fail"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert check("torch").ok == "warn"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert check("torch").ok == "ok"
    monkeypatch.setitem(sys.modules, "torch", None)  # import raises ImportError
    assert D.check_torch().ok == "fail"


def test_doctor_on_packages_and_pins(monkeypatch):
    def requires(*lines):
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(lines))
        return check("packages")

    assert requires("psutil>=1", 'absent>=1; extra == "book"').ok == "ok"
    found = requires("psutil>=1", "numpy==0.1.*", "surely-not-a-package>=2")
    assert found.ok == "fail" and "psutil" not in found.detail
    assert "numpy" in found.detail and "surely-not-a-package is missing" in found.detail

    def uninstalled(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", uninstalled)
    assert check("packages").ok == "warn"
    monkeypatch.setattr(M, "CORE_PACKAGES", ("psutil", "surely-not-a-package"))
    found = check("packages")
    assert found.ok == "fail" and found.fix == "pip install surely-not-a-package"
