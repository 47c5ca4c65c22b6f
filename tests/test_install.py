"""tools/install.py takes the CPU build of torch, and installs again only when something changed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import install
import pytest


def report(*names: str) -> str:
    return json.dumps({"install": [{"metadata": {"name": name}} for name in names]})


@pytest.mark.parametrize("name", ["nvidia-cublas", "nvidia_cudnn_cu13", "triton", "cuda-bindings"])
def test_cuda_packages_are_recognised(name):
    assert install.brings_cuda(report("torch", name))
    assert not install.brings_cuda(report("torch", "sympy"))


@pytest.mark.parametrize(("offered", "from_cpu_index"), [("sympy", False), ("triton", True)])
def test_torch_comes_from_the_cpu_index_only_where_needed(monkeypatch, offered, from_cpu_index):
    calls = []

    def pip(python, *arguments, capture=False):
        calls.append(arguments)
        return report("torch", offered)

    monkeypatch.setattr(install, "pip", pip)
    install.install_torch(Path("python"), install.pinned_torch())
    plan, installation = calls
    assert "--dry-run" in plan
    assert (install.TORCH_INDEX in installation) is from_cpu_index
    assert installation[-1] == install.pinned_torch()


def test_an_unreachable_cpu_index_says_how_to_fix_it(monkeypatch):
    def pip(python, *arguments, capture=False):
        if "--index-url" in arguments:
            raise SystemExit("pip failed")
        return report("triton")

    monkeypatch.setattr(install, "pip", pip)
    with pytest.raises(SystemExit, match="set TORCH_INDEX"):
        install.install_torch(Path("python"), "torch==0")


@pytest.mark.parametrize(("kind", "accepted"), [("cpu", True), ("13.0", False)])
def test_only_a_cpu_build_is_accepted(monkeypatch, kind, accepted):
    done = subprocess.CompletedProcess([], 0, stdout=f"2.13.0 {kind}\n")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: done)
    if accepted:
        install.check_cpu_build(Path("env/bin/python"))
    else:
        with pytest.raises(SystemExit, match="CUDA 13.0"):
            install.check_cpu_build(Path("env/bin/python"))


def test_installing_again_does_nothing_until_the_lock_changes(monkeypatch, tmp_path):
    def create(folder):
        raise RuntimeError("installs again")

    monkeypatch.setattr(install, "create", create)
    monkeypatch.setattr(install.sys, "argv", ["install.py", "--venv", str(tmp_path)])
    (tmp_path / "installed.txt").write_text(install.fingerprint())
    install.main()

    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==0\n")
    monkeypatch.setattr(install, "LOCK", lock)
    with pytest.raises(RuntimeError, match="installs again"):
        install.main()
    assert not (tmp_path / "installed.txt").exists()
