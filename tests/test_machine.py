"""What the machine is and what it may use, against made-up machines and control groups."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cpugrpo_edu.record import machine as M
from cpugrpo_edu.record.run_record import RunRecord

GIB = 2**30


def write(folder: Path, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    return folder


def group(tmp_path, line):
    """Where a made-up control group lies: the keyword arguments of the readers."""
    write(tmp_path, membership=line)
    (tmp_path / "fs").mkdir(exist_ok=True)
    return {"root": tmp_path / "fs", "proc": tmp_path / "membership"}


# --- control groups


def test_cgroup_v2_takes_the_tightest_level(tmp_path):
    where = group(tmp_path, "0::/a/b")
    write(tmp_path / "fs" / "a", cpu__max="150000 100000", memory__max=4 * GIB)
    write(tmp_path / "fs" / "a", memory__current=3 * GIB, memory__stat=f"inactive_file {GIB}")
    write(tmp_path / "fs" / "a" / "b", cpu__max="max 100000", memory__max="max", memory__current=9)
    assert M.cpu_quota(**where) == 1.5
    assert M.cgroup_memory(**where) == (4 * GIB, 2 * GIB)  # cache counts as free
    write(tmp_path / "fs" / "a" / "b", memory__max=GIB, memory__current=GIB + 5)
    assert M.cgroup_memory(**where) == (GIB, 0)  # never negative
    write(tmp_path / "fs", cpu__max="50000 100000")
    assert M.cpu_quota(**where) == 0.5


def test_cgroup_v1(tmp_path):
    where = group(tmp_path, "4:memory:/host/path\n3:cpu,cpuacct:/\n2:pids:/")
    cpu = tmp_path / "fs" / "cpu,cpuacct"
    write(cpu, cpu__cfs_quota_us=-1)
    # In a container the host's path does not exist under the mount; the root then counts.
    memory = write(tmp_path / "fs" / "memory")
    (memory / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (memory / "memory.usage_in_bytes").write_text(str(GIB))
    (memory / "memory.stat").write_text("total_inactive_file 1024\ninactive_file 7\n")
    assert M.cgroup_memory(**where) == (2 * GIB, GIB + 1024)
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert M.cgroup_memory(**where) is None
    for name, value in (("cpu.cfs_quota_us", -1), ("cpu.cfs_period_us", 100000)):
        (cpu / name).write_text(str(value))
    assert M.cpu_quota(**where) is None
    (cpu / "cpu.cfs_quota_us").write_text("300000")
    assert M.cpu_quota(**where) == 3


def test_no_cgroups_no_limits(tmp_path):
    where = {"root": tmp_path, "proc": tmp_path / "absent"}
    assert M.cpu_quota(**where) is None and M.cgroup_memory(**where) is None
    where = group(tmp_path, "0::/")
    write(tmp_path / "fs", memory__max="", cpu__max="garbage")
    assert M.cpu_quota(**where) is None and M.cgroup_memory(**where) is None


def test_available_memory_is_the_smaller(monkeypatch):
    memory = SimpleNamespace(available=8 * GIB, total=16 * GIB)
    monkeypatch.setattr(M.psutil, "virtual_memory", lambda: memory)
    for group_memory, free in ((None, 8), ((4 * GIB, 3 * GIB), 3), ((32 * GIB, 20 * GIB), 8)):
        monkeypatch.setattr(M, "cgroup_memory", lambda g=group_memory: g)
        assert M.available_memory() == free * GIB
    monkeypatch.setattr(M, "cgroup_memory", lambda: (4 * GIB, 3 * GIB))
    assert M.describe_machine().total_memory == 4 * GIB


# --- cores


def topology(tmp_path, siblings):
    for cpu, text in enumerate(siblings):
        write(tmp_path / f"cpu{cpu}" / "topology", thread_siblings_list=text)
    return tmp_path


def test_hyperthreads_share_a_core(tmp_path, monkeypatch):
    folder = topology(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    monkeypatch.setattr(M, "cpu_quota", lambda: None)
    for affinity, cores in (([0, 1, 2, 3], 2), ([0, 2], 1), ([3], 1), ([1, 2], 2)):
        monkeypatch.setattr(M, "_affinity", lambda a=affinity: a)
        assert M.usable_cores(folder) == cores
        assert M.usable_cpus() == len(affinity)


@pytest.mark.parametrize(
    ("quota", "cores"), [(0.1, 1), (1.0, 1), (1.9, 1), (2.0, 2), (64, 4), (None, 4)]
)
def test_quota_limits_cores_but_never_to_zero(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(M, "_affinity", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(M, "cpu_quota", lambda: quota)
    assert M.usable_cores(topology(tmp_path, "0123")) == M.usable_cpus() == cores


def test_cores_without_topology_or_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(M, "cpu_quota", lambda: None)
    monkeypatch.setattr(M, "_affinity", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(M.psutil, "cpu_count", lambda logical=True: None)  # some containers
    assert M.usable_cores(tmp_path / "absent") == 4
    monkeypatch.setattr(M.psutil, "cpu_count", lambda logical=True: 2)
    assert M.usable_cores(tmp_path / "absent") == 2


def test_affinity_where_the_system_has_none(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert M._affinity() == [0, 1, 2]
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert M._affinity() == [0]


# --- instruction sets

X86 = "processor: 0\nmodel name: Some CPU @ 3 GHz\nflags: fpu avx2 {}\n\nprocessor: 1\nflags: bad\n"


@pytest.mark.parametrize(
    ("text", "native"),
    [
        (X86.format(""), False),
        (X86.format("avx512f avx512_vnni"), False),
        (X86.format("avx512f avx512_bf16"), True),
        (X86.format("amx_bf16 amx_int8"), True),
        ("Features : fp asimd bf16 i8mm", True),
        ("Features : fp asimd", False),
    ],
)
def test_native_bfloat16_needs_its_own_flag(tmp_path, monkeypatch, text, native):
    write(tmp_path, cpuinfo=text)
    info = M._cpuinfo(tmp_path / "cpuinfo")
    monkeypatch.setattr(M, "_cpuinfo", lambda: info)
    assert M.native_bfloat16() is native
    machine = M.describe_machine()
    assert machine.native_bfloat16 is native
    assert "AVX2" in machine.isa or "NEON" in machine.isa
    assert ("AVX-512" in machine.isa) == ("avx512f" in text)
    assert machine.cpu == ("Some CPU @ 3 GHz" if "model name" in text else info[0])


def test_without_proc_torch_is_asked(tmp_path, monkeypatch):
    backend = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "AVX2"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(backends=backend))
    name, flags = M._cpuinfo(tmp_path / "absent")
    assert name and flags == {"avx2"}


def test_machine_goes_into_a_record(tmp_path):
    machine = M.describe_machine()
    assert 1 <= machine.usable_cores <= machine.logical_cores
    assert 0 < machine.available_memory <= machine.total_memory
    record = RunRecord("t", "now", 0, "c", machine.to_json(), M.versions(), {})
    path = record.save(tmp_path / "record.json")
    assert RunRecord.load(path) == record


# --- provenance


def test_versions_of_what_is_and_is_not_there(monkeypatch):
    monkeypatch.setattr(M, "CORE_PACKAGES", ("psutil", "surely-not-a-package"))
    found = M.versions()
    assert found["psutil"] == importlib.metadata.version("psutil")
    assert found["surely-not-a-package"] == "missing" and found["python"].startswith("3.")


def test_git_commit(tmp_path, monkeypatch):
    assert M.git_commit(tmp_path) == "unknown"  # no repository
    assert M.git_commit(tmp_path / "absent") == "unknown"

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    write(tmp_path, code="1")
    assert M.git_commit(tmp_path) == "unknown"  # nothing committed
    git("add", "code")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert M.git_commit(tmp_path) == head
    environment = write(tmp_path / "venv", module="x")
    assert M.git_commit(tmp_path) == head  # untracked files do not make it dirty
    assert M.git_commit(environment) == "unknown"  # installed inside somebody's repository
    write(tmp_path, code="2")
    assert M.git_commit(tmp_path) == head + "+dirty"
    monkeypatch.setenv("PATH", "")
    assert M.git_commit(tmp_path) == "unknown"  # git is not installed
