"""What a process holds, a budget for it, and memory that is refused."""

import gc
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpugrpo_edu.engine import memory as M
from cpugrpo_edu.errors import UserError

torch.set_num_threads(1)
MIB, GIB = 2**20, 2**30


# --- measuring


def test_peak_sees_memory_that_is_gone_again():
    with M.PeakMemory(interval=0.01) as peak:
        start = peak.current_rss
        block = np.ones(100 * MIB, dtype=np.uint8)
        time.sleep(0.05)
        del block
        gc.collect()
    assert 90 * MIB < peak.peak_rss_bytes - start < 300 * MIB
    assert peak.current_rss < peak.peak_rss_bytes - 50 * MIB
    assert peak.seconds >= 0.05


def test_kernel_mark_catches_a_spike_between_samples(monkeypatch):
    marks = iter([500 * GIB, 900 * GIB])
    monkeypatch.setattr(M, "_own_high_water", lambda: next(marks))
    with M.PeakMemory(interval=60) as peak:
        pass
    assert peak.peak_rss_bytes == 900 * GIB
    marks = iter([500 * GIB, 500 * GIB])  # an older spike, before the block, is not ours
    with M.PeakMemory(interval=60) as peak:
        pass
    assert peak.peak_rss_bytes < 100 * GIB


def test_own_high_water_is_at_least_the_present(monkeypatch, tmp_path):
    mark = M._own_high_water()
    assert mark == 0 or mark > 0.9 * M.psutil.Process().memory_info().rss
    monkeypatch.setattr(M, "Path", lambda _: tmp_path / "absent")
    assert M._own_high_water() == 0


def test_peak_includes_children(monkeypatch):
    monkeypatch.setattr(M, "RESCAN", 1)
    code = "x = bytearray(150 * 2**20); import time; time.sleep(0.4)"
    M.release_memory()  # what earlier tests left: given back meanwhile, it would count against
    with M.PeakMemory(interval=0.02) as peak:
        start = peak.current_rss
        subprocess.run([sys.executable, "-c", code], check=True)
    assert peak.peak_rss_bytes - start > 140 * MIB


def test_cpu_percent_counts_work_and_not_sleep(monkeypatch):
    monkeypatch.setattr(M, "usable_cpus", lambda: 4)
    with M.PeakMemory(interval=1) as idle:
        time.sleep(0.2)
    with M.PeakMemory(interval=1) as busy:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    assert idle.cpu_percent < 15
    # 0.3 s of CPU time, however long others made it take; cpu_times ticks every 10 ms.
    assert busy.cpu_percent * busy.seconds * 4 / 100 == pytest.approx(0.3, abs=0.06)


def test_reset_peak_starts_a_new_phase():
    with M.PeakMemory(interval=0.01) as peak:
        block = np.ones(100 * MIB, dtype=np.uint8)
        time.sleep(0.05)
        first = peak.peak_rss_bytes
        del block
        gc.collect()
        peak.reset_peak()
    assert peak.peak_rss_bytes < first - 50 * MIB


def test_a_process_that_ended_is_no_error():
    peak = M.PeakMemory()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    peak._tree.append(M.psutil.Process(child.pid))
    child.wait()
    assert peak.current_rss > 0


def test_release_memory(monkeypatch):
    rss = iter([300, 100, 100, 150])
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(rss)))
    monkeypatch.setattr(M.psutil, "Process", lambda: process)
    assert M.release_memory() == 200
    monkeypatch.setattr(M.ctypes, "CDLL", lambda _: SimpleNamespace())  # not glibc
    assert M.release_memory() == 0  # growth meanwhile is not a negative gift


def test_release_memory_collects_cycles(no_collection):
    class Node:
        alive = 0

        def __init__(self):
            Node.alive += 1
            self.me = self

        def __del__(self):
            Node.alive -= 1

    Node()
    assert Node.alive == 1
    M.release_memory()
    assert Node.alive == 0


@pytest.mark.parametrize(
    ("used", "free", "warns"),
    [(0, 8, False), (0, 0.1, False), (0.5, 8, False), (4, 8, True), (0.1, 0.5, True)],
)
def test_swap_pressure(monkeypatch, used, free, warns):
    swap = SimpleNamespace(used=int(used * GIB))
    memory = SimpleNamespace(total=16 * GIB, available=int(free * GIB))
    monkeypatch.setattr(M.psutil, "swap_memory", lambda: swap)
    monkeypatch.setattr(M.psutil, "virtual_memory", lambda: memory)
    said = M.swap_pressure()
    assert (said is not None) == warns
    assert not warns or "swapped out" in said


def test_saved_bytes_by_hand():
    linear = torch.nn.Linear(8, 8)
    x = torch.ones(4, 8)
    # The square keeps its input (the layer's output), the layer keeps x; the weights are its own.
    assert M.saved_activation_bytes(linear, lambda: linear(x).square().sum()) == 2 * x.nbytes
    with torch.no_grad():
        assert M.saved_activation_bytes(linear, lambda: linear(x).square()) == 0


# A budget, and memory that is refused


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("4GB", 4 * 10**9), ("500MB", 500 * 10**6), ("4", 4 * M.GIB), ("1.5GiB", 3 * 2**29)),
        *((" 2 gib ", 2 * M.GIB), ("1e3kB", 10**6), ("1t", 10**12)),
    ],
)
def test_sizes_are_read(text, size):
    assert M.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0GB", "-1GB", "nan", "inf", "4 apples", "4GBB", "1e999"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="such as 4GB"):
        M.parse_bytes(text)


def test_free_memory_is_within_the_limit(monkeypatch):
    monkeypatch.setattr(M, "available_memory", lambda: 10**12)
    assert M.free_memory() == 10**12
    assert 0 < M.free_memory(2**42) < 2**42
    assert M.free_memory(1) == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_refused_memory_halves_the_size(error):
    tried, said = [], []

    def work(size):
        tried.append(size)
        if size > 2:
            raise error
        return "done"

    assert M.retry_smaller(work, 9, said.append) == "done"
    assert tried == [9, 5, 3, 2] and len(said) == 3

    def refuse(size):
        raise error

    with pytest.raises(UserError, match="single completion"):
        M.retry_smaller(refuse, 4, said.append)


def test_a_refusal_by_torch_itself_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert M.allocation_failed(caught.value)
    assert not M.allocation_failed(RuntimeError("shapes")) and not M.allocation_failed(OSError())


def test_the_alarm(monkeypatch):
    monkeypatch.setattr(M, "swap_pressure", lambda: None)
    monkeypatch.setattr(M, "available_memory", lambda: 2**40)
    assert M.memory_alarm() is None
    monkeypatch.setattr(M, "available_memory", lambda: 2**26)
    assert "only 64 MiB of memory are left" in M.memory_alarm()
    monkeypatch.setattr(M, "available_memory", lambda: 2**40)
    monkeypatch.setattr(M, "swap_pressure", lambda: "swapped out")
    assert M.memory_alarm() == "swapped out"
