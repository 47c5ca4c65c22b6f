"""The compiled kernel: the same products as torch, or none at all and the reason."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.int8 import Int8Linear, usable_kernel
from cpugrpo_edu.engine.int8_base import FrozenInt8Linear

needs_compiler = pytest.mark.skipif(not c_kernel.available(), reason=c_kernel.library()[1])


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As on a machine where nothing was compiled yet."""
    monkeypatch.setattr(c_kernel, "cache_folder", lambda: tmp_path)
    c_kernel.library.cache_clear()
    yield tmp_path
    c_kernel.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("make", [FrozenInt8Linear, Int8Linear])
def test_products_of_few_and_many_rows(make, rows):
    torch.manual_seed(0)
    weight, bias = torch.randn(130, 72), torch.randn(130)
    layer = make(weight, bias, kernel="compiled")
    assert layer.kernel == "compiled"
    x = torch.randn(rows, 72) * 10.0 ** torch.linspace(-3, 3, rows)[:, None]
    expected = F.linear(x, layer.dequantized(), bias)
    for got, want in zip(layer(x), expected, strict=True):
        assert (got - want).norm() / (want - bias).norm() < 0.01
    assert layer(x[None]).shape == (1, rows, 130)


@needs_compiler
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(rows, bad):
    layer = FrozenInt8Linear(torch.randn(20, 64), kernel="compiled")
    x = torch.randn(rows, 64)
    x[1, 5] = bad
    y = layer(x)
    assert not y[1].isfinite().any() and y[0].isfinite().all()
    assert layer(torch.zeros(rows, 64)).abs().max() == 0


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
    assert usable_kernel("compiled") == usable_kernel("packed") != "compiled"
    layer = Int8Linear(torch.randn(8, 16), kernel="compiled")
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


def test_a_processor_whose_integer_products_saturate_is_refused(monkeypatch):
    monkeypatch.setattr(c_kernel.torch, "_int_mm", lambda a, b: torch.zeros(64, 64).int())
    with pytest.raises(RuntimeError, match="not exact"):
        c_kernel.check(None)


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


@needs_compiler
def test_sums_of_rows():
    q = torch.randint(-127, 128, (50, 3000), dtype=torch.int8)
    assert torch.equal(c_kernel.row_sums(q), q.sum(1, dtype=torch.int32))


def test_an_int8_copy_gets_new_weights_in_place():
    layer = Int8Linear(torch.randn(8, 16), kernel="compiled")
    place = getattr(layer, "q", None)
    weight = torch.randn(8, 16)
    layer.pack(weight)
    assert (layer.dequantized() - weight).abs().max() < 0.05
    assert getattr(layer, "q", None) is place
