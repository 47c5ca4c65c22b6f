"""Threads are set once, before torch, and shared by the ranks of a machine."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cpugrpo_edu.engine import hardware as H
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record import machine as M


def run_python(code, **env):
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, cwd=M.PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_threads_are_set_before_torch_and_twice_is_safe():
    code = (
        "import sys, os; from cpugrpo_edu.engine import hardware as H;"
        "assert 'torch' not in sys.modules;"
        "a = H.configure_threads(1); import torch; torch.ones(4000, 4) @ torch.ones(4, 4000);"
        "b = H.configure_threads(1); assert a['before_torch'];"
        "assert a == b and os.environ['MKL_NUM_THREADS'] == '1';"
        "print(torch.get_num_threads(), torch.get_num_interop_threads(), a['mkldnn'])"
    )
    assert run_python(code, OMP_NUM_THREADS="2")[:2] == ["1", "1"]


def test_the_cache_of_shapes_is_small_unless_the_user_says_otherwise():
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    code = (
        "import os; from cpugrpo_edu.engine import hardware as H; H.configure_threads(1);"
        f"print(os.environ['{name}'])"
    )
    assert run_python(code, **{name: "7"}) == ["7"]
    given = {k: v for k, v in os.environ.items() if k != name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=given,
        cwd=M.PACKAGE.parent, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["128"]


def test_interop_threads_cannot_be_set_any_more(monkeypatch):
    import torch

    def refuse(_):
        raise RuntimeError("cannot set number of interop threads after parallel work has started")

    monkeypatch.setattr(torch, "get_num_interop_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_interop_threads", refuse)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    before = torch.get_num_threads()
    try:
        set_to = H.configure_threads(1)
    finally:
        torch.set_num_threads(before)
    assert set_to["threads"] == 1 and set_to["interop_threads"] == 7


@pytest.mark.parametrize(("ranks", "threads"), [("1", 4), ("2", 2), ("3", 1), ("9", 1)])
def test_none_takes_usable_cores_shared_by_local_ranks(monkeypatch, ranks, threads):
    torch = SimpleNamespace(
        set_num_threads=lambda n: asked.append(n),
        get_num_threads=lambda: asked[-1],
        get_num_interop_threads=lambda: 1,
        backends=SimpleNamespace(
            mkldnn=SimpleNamespace(is_available=lambda: True, enabled=False),
            mkl=SimpleNamespace(is_available=lambda: False),
        ),
    )
    asked: list[int] = []
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(H, "_before_torch", None)
    monkeypatch.setattr(H, "usable_cores", lambda: 4)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "17")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    result = H.configure_threads()
    assert result == {
        "threads": threads,
        "interop_threads": 1,
        "before_torch": False,
        "mkldnn": False,
        "mkl": False,
    }
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", True])
def test_refuses_thread_counts(bad):
    with pytest.raises(UserError, match=r"threads is .*from 1 to 1024"):
        H.configure_threads(bad)
