"""The compiled kernel: the same products as torch, or none at all and the reason."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.int8_matrix import BlockInt8Linear, usable

needs_compiler = pytest.mark.skipif(not c_kernel.available(), reason=c_kernel.library()[1])


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As on a machine where nothing was compiled yet."""
    monkeypatch.setattr(c_kernel, "cache_folder", lambda: tmp_path)
    c_kernel.library.cache_clear()
    yield tmp_path
    c_kernel.library.cache_clear()


@needs_compiler
def test_it_is_compiled_once(anew, monkeypatch):
    assert c_kernel.available()
    [library] = anew.iterdir()
    assert library.name.startswith("decode-") and library.suffix == ".so"
    c_kernel.library.cache_clear()
    real = c_kernel.subprocess.run

    def run(command, **more):
        assert "-shared" not in command, "compiled again"
        return real(command, **more)

    monkeypatch.setattr(c_kernel, "subprocess", SimpleNamespace(run=run))
    assert c_kernel.available()


def test_without_a_compiler_torch_does_it(anew, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    functions, why = c_kernel.library()
    assert functions is None and "C compiler" in why
    assert usable("compiled") == usable("auto") == "packed"
    layer = BlockInt8Linear(torch.randn(8, 16), kernel="compiled")
    assert layer.kernel == "packed" and layer(torch.randn(2, 16)).shape == (2, 8)
    assert not any(anew.iterdir())


def test_elsewhere_than_on_linux_torch_does_it(anew, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not c_kernel.available()


def test_a_compiler_that_fails_is_quoted(anew, monkeypatch):
    bad = anew / "bad.c"
    bad.write_text("this is no C")
    monkeypatch.setattr(c_kernel, "SOURCE", bad)
    if sys.platform == "linux" and c_kernel.shutil.which("cc"):
        assert "fails" in c_kernel.library()[1]
    assert not c_kernel.available()


def test_weights_in_large_pages_lie_apart_and_go_with_their_last_use():
    shapes = [torch.Size(shape) for shape in [(3, 5), (1000, 70_000), (7,)]]
    places = [c_kernel.in_large_pages(shape) for shape in shapes]
    for i, place in enumerate(places):
        assert place.shape == shapes[i] and place.data_ptr() % 64 == 0
        place.fill_(i)
    assert all((place == i).all() for i, place in enumerate(places))
    pages = c_kernel._arena[0]
    assert pages() is not None
    del place, places
    assert pages() is None
