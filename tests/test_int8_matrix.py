"""8-bit weights in blocks: close to the floats, and the same products by every way."""

from __future__ import annotations

import ctypes
import platform
import subprocess

import pytest
import torch
import torch.nn.functional as F

from cpugrpo_edu.engine import c_kernel, int8_matrix
from cpugrpo_edu.engine.int8_matrix import BLOCK, BlockInt8Linear, Int8Matrix, quantize_blocks
from cpugrpo_edu.errors import UserError

needs_compiler = pytest.mark.skipif(not c_kernel.available(), reason=c_kernel.library()[1])


@pytest.fixture(params=["packed", "compiled"])
def kernel(request):
    if request.param == "compiled" and not c_kernel.available():
        pytest.skip(c_kernel.library()[1])
    return request.param


def error(actual, expected):
    """Relative, in the Frobenius norm."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("center", [0.0, 3.0, -1000.0])
def test_no_weight_moves_by_more_than_half_a_scale(size, center):
    torch.manual_seed(0)
    w = (torch.randn(20, 4 * BLOCK) + center) * size / max(1, abs(center))
    q, scale, offset = quantize_blocks(w)
    back = q.float() * scale.float()[..., None] + offset.float()[..., None]
    step = scale.float()[..., None]
    blocks = w.unflatten(1, (-1, BLOCK))
    rounding = blocks.abs() * 2**-22  # of the float32 numbers compared here
    assert ((back - blocks).abs() <= step * 0.5001 + rounding).all()
    reach = blocks.amax(-1) - blocks.amin(-1)
    # 1/255 of the range, and what rounding the scale and the offset to float16 adds
    assert (scale.float() <= reach / 255 * 1.001 + offset.float().abs() * 2e-5 + 6e-8).all()


def test_sixteen_levels_in_a_block_are_kept():
    """255 intervals are 17 times 15: weights that were rounded to 4 bits stay what they were."""
    torch.manual_seed(0)
    levels = torch.randint(0, 16, (8, 4, BLOCK))
    levels[..., 0], levels[..., 1] = 0, 15
    w = levels * 0.0123 - 0.0456
    q, scale, offset = quantize_blocks(w.flatten(1))
    back = q.float() * scale.float()[..., None] + offset.float()[..., None]
    assert (back - w).abs().max() < 0.0123 / 17 * 0.1  # a tenth of a step, not half of it


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_weights_that_are_no_numbers_are_refused(bad):
    w = torch.randn(4, BLOCK)
    w[1, 3] = bad
    with pytest.raises(UserError, match="learning rate"):
        Int8Matrix(w)


@pytest.mark.parametrize("shape", [(40, 70), (16, 32), (5000, 33), (1, 1)])
def test_rows_and_columns_are_the_dequantized_weights(kernel, shape):
    torch.manual_seed(0)
    w = torch.randn(shape)
    matrix = Int8Matrix(w, kernel)
    dense = matrix.dequantized()
    assert dense.shape == w.shape and error(dense, w) < 0.01
    ids = torch.randint(0, shape[0], (3, 2))
    torch.testing.assert_close(matrix.rows(ids), dense[ids], rtol=1e-6, atol=1e-6)
    stop = min(shape[0], 32)
    part = matrix.transposed(torch.float32, 16, stop) if stop > 16 else dense[:0].t()
    torch.testing.assert_close(part, dense[16:stop].t(), rtol=0, atol=0)
    half = matrix.transposed(torch.bfloat16)
    torch.testing.assert_close(half, dense.t().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 40, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients(kernel, bias, rows, monkeypatch):
    """Rows and columns of very different size: no number may vanish beside another."""
    monkeypatch.setattr(int8_matrix, "native_bfloat16", lambda: False)
    torch.manual_seed(0)
    weight, b = torch.randn(130, 72), torch.randn(130) if bias else None
    layer = BlockInt8Linear(weight, b, kernel)
    outliers = 10.0 ** torch.linspace(-2, 2, 72)
    x = torch.randn(rows, 72) * outliers * 10.0 ** torch.linspace(-3, 3, rows)[:, None]
    x.requires_grad_()
    g = torch.randn(rows, 130)
    y = layer(x)
    y.backward(g)
    expected = F.linear(x.detach().double(), layer.dequantized().double())
    for got, want in zip(y.detach() - (0 if b is None else b), expected, strict=True):
        assert error(got.double(), want) < 2e-4 or (got - want).abs().max() < 1e-6
    assert error(x.grad, g @ layer.dequantized()) < 1e-5
    assert layer(x.detach()[None]).shape == (1, rows, 130)
    assert not any(p.requires_grad for p in layer.parameters())


@needs_compiler
@pytest.mark.parametrize("native", [False, True])
def test_many_rows_by_either_way(native, monkeypatch):
    """The processor decides; bfloat16 costs at most 2**-8 of a result's size."""
    monkeypatch.setattr(int8_matrix, "native_bfloat16", lambda: native)
    torch.manual_seed(0)
    layer = BlockInt8Linear(torch.randn(96, 64))
    x = torch.randn(300, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected = F.linear(x.detach(), layer.dequantized())
    assert error(y.detach(), expected) < (2**-8 if native else 1e-4)
    assert (error(y.detach(), expected) > 1e-3) == native
    assert error(x.grad, layer.dequantized().sum(0).expand(300, 64)) < 2**-8
    fine = layer.matrix.times(x.detach(), fine=True)
    assert error(fine, expected) < 1e-4


@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(kernel, rows, bad):
    layer = BlockInt8Linear(torch.randn(20, 64), kernel=kernel)
    x = torch.randn(rows, 64)
    x[1, 5] = bad
    y = layer(x)
    assert not y[1].isfinite().any() and y[0].isfinite().all()
    assert layer(torch.zeros(rows, 64)).abs().max() == 0


def test_new_weights_in_place(kernel):
    layer = BlockInt8Linear(torch.randn(8, 40), torch.zeros(8), kernel)
    place = layer.matrix.q
    weight = torch.randn(8, 40)
    layer.pack(weight, torch.ones(8))
    assert error(layer.dequantized(), weight) < 0.01 and layer.matrix.q is place
    assert (layer.bias == 1).all()


def test_kept_weights_are_used_and_dropped(monkeypatch):
    monkeypatch.setattr(int8_matrix, "native_bfloat16", lambda: False)
    layer = BlockInt8Linear(torch.randn(8, 40), kernel="packed")
    x = torch.randn(2, 40)
    before = layer(x)
    with int8_matrix.unpacked(torch.nn.Sequential(layer)):
        assert layer.matrix.kept is not None
        torch.testing.assert_close(layer(x), before)
    assert layer.matrix.kept is None


FLAGS = {"any": (), "avx2": ("-mavx2", "-mfma", "-mf16c")}


@needs_compiler
@pytest.mark.parametrize("instructions", FLAGS)
def test_older_processors_get_the_same_numbers(tmp_path, instructions, monkeypatch):
    """The code for other instruction sets, which this machine runs as well."""
    if instructions == "avx2" and platform.machine() != "x86_64":
        pytest.skip("not an x86 processor")
    library = tmp_path / "decode.so"
    flags = [f for f in c_kernel.FLAGS if not f.startswith("-m")] + list(FLAGS[instructions])
    command = ["cc", *flags, "-Wno-psabi", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(c_kernel.SOURCE), "-lm"], check=True)
    torch.manual_seed(0)
    matrix, x = Int8Matrix(torch.randn(40, 70)), torch.randn(13, 70)
    expected = c_kernel.times(matrix, x), matrix.transposed(torch.bfloat16)
    other = ctypes.CDLL(str(library))
    monkeypatch.setattr(c_kernel, "library", lambda: (other, ""))
    assert error(c_kernel.times(matrix, x), expected[0]) < 1e-5
    assert torch.equal(matrix.transposed(torch.bfloat16), expected[1])
