"""Weights in 8 bits with a scale and an offset for every 32 of them.

One scale for a whole row, let alone for a whole matrix, is set by the row's largest weight, and
the small weights lose most of their digits. Here the inputs of each output are cut into blocks of
32, and W = scale * q + offset holds within a block, with q from -128 to 127 (llama.cpp's Q4_1 does
the same in 4 bits). Activations are never rounded to 8 bits: a real chat model has a few that
are hundreds of times as large as their neighbours. The compiled kernel rounds them to 16 bits,
torch multiplies in bfloat16 or float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.c_kernel import BLOCK
from cpugrpo_edu.errors import DIVERGED, UserError
from cpugrpo_edu.record.machine import native_bfloat16

STRIP = 16
"""Outputs that lie side by side, as many as the widest registers hold."""
TILE = 4096
"""Outputs converted at a time: what lies between stays in the cache."""
MANY_ROWS = 256
"""From here on, torch's bfloat16 products may be faster than the compiled kernel."""


def usable(kernel: str) -> str:
    """The kernel that is used where "auto", "compiled" or "packed" is asked for."""
    return "packed" if kernel == "packed" or not c_kernel.available() else "compiled"


def cannot_save(*_: Any, **__: Any) -> None:
    """Takes the place of ``save_pretrained``, which would leave out INT8 layers without a word."""
    raise UserError(
        "save_pretrained does not know the layers of a rollout copy or an INT8 base; save the "
        "model it was made of, or write INT8 weights with: cpugrpo export RUN --to int8"
    )


def float16_above(x: Tensor) -> Tensor:
    """The smallest float16 numbers that are not below ``x`` > 0."""
    half = x.half()
    return torch.where(half.float() < x, (half.view(torch.int16) + 1).view(torch.half), half)


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8, scale, offset float16) of w (rows, n), n a multiple of BLOCK.

    q is (rows, n / BLOCK, BLOCK), the others (rows, n / BLOCK). No weight moves by more than half
    a scale; a scale is 1/255 of its block's range, rounded to float16 and at least the smallest
    one.
    """
    blocks = w.unflatten(1, (-1, BLOCK))
    low, high = blocks.amin(-1), blocks.amax(-1)
    if not (low.abs().maximum(high.abs()) < 65_000).all():  # NaN fails as well
        raise UserError(
            f"cannot quantize weights that are NaN, infinite or above 65000; {DIVERGED}"
        )
    offset = (low + (high - low) * (128 / 255)).half()
    up, down = high - offset.float(), offset.float() - low
    scale = float16_above(torch.maximum(up / 127, down / 128).clamp(min=2.0**-24))
    q = (blocks - offset.float()[..., None]) / scale.float()[..., None]
    return q.round_().to(torch.int8), scale, offset


class Int8Matrix:
    """A matrix W (outputs, inputs) in 8 bits, for products that keep it as it is.

    ``q`` is (strips, inputs / 2, 16, 2), ``scales`` (strips, blocks, 2, 16) in float16: scales,
    then offsets; both are filled up with zeros to whole strips and blocks. ``kernel`` is
    "compiled" (:mod:`.c_kernel`) or "packed" (torch).
    """

    def __init__(self, weight: Tensor, kernel: str = "auto"):
        self.outputs, self.inputs = weight.shape
        self.kernel = usable(kernel)
        strips, self.width = -(-self.outputs // STRIP), -(-self.inputs // BLOCK) * BLOCK
        shape = torch.Size((strips, self.width // 2, STRIP, 2))
        self.q = (
            c_kernel.in_large_pages(shape)
            if self.kernel == "compiled"
            else torch.empty(shape, dtype=torch.int8)
        )
        self.scales = torch.empty(strips, self.width // BLOCK, 2, STRIP, dtype=torch.half)
        self.kept: Tensor | None = None  # the weights as floats, see ``unpacked``
        self.store(weight)

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Take these float weights (outputs, inputs) in place of the present ones."""
        for start in range(0, self.outputs, TILE):
            rows = weight[start : start + TILE].detach().float()
            strips = -(-len(rows) // STRIP)
            if len(rows) % STRIP or self.width > self.inputs:
                filled = rows.new_zeros(strips * STRIP, self.width)
                filled[: len(rows), : self.inputs] = rows
                rows = filled
            q, *both = quantize_blocks(rows)
            into = slice(start // STRIP, start // STRIP + strips)
            self.q[into].copy_(q.view(strips, STRIP, -1, 2).transpose(1, 2))
            for part, values in enumerate(both):
                self.scales[into, :, part].copy_(values.view(strips, STRIP, -1).transpose(1, 2))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W in float32, (..., inputs), for numbers of rows (...)."""
        strip, place = ids // STRIP, ids % STRIP
        q = self.q[strip, :, place].flatten(-2).unflatten(-1, (-1, BLOCK)).float()
        scale, offset = self.scales[strip, :, :, place].float().unbind(-1)
        return (q * scale[..., None] + offset[..., None]).flatten(-2)[..., : self.inputs]

    def transposed(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows from ``start`` (a multiple of STRIP) to ``stop`` as columns, (inputs, rows)."""
        stop = self.outputs if stop is None else stop
        if self.kept is not None:
            return self.kept[:, start:stop]
        if self.kernel == "compiled":
            return c_kernel.unpack(self, start, stop, dtype)
        strips = slice(start // STRIP, -(-stop // STRIP))
        q = self.q[strips].permute(1, 3, 0, 2).reshape(self.width // BLOCK, BLOCK, -1)
        scale, offset = self.scales[strips].permute(2, 1, 0, 3).flatten(2).float()
        w = torch.addcmul(offset[:, None], q.float(), scale[:, None])
        return w.flatten(0, 1)[: self.inputs, : stop - start].to(dtype)

    def times(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        fine: bool = False,
    ) -> Tensor:
        """x W^T + bias for x (..., inputs) in float32 and the rows from ``start`` to ``stop`` of W.

        ``fine``: with an error below that of bfloat16, 2**-9 of the result, where it is at all
        possible to be faster than in float32.
        """
        few = x.numel() < MANY_ROWS * self.inputs
        if self.kernel == "compiled" and (few or fine or product_dtype() is torch.float32):
            return c_kernel.times(self, x, bias, start, stop)
        dtype = torch.float32 if fine else product_dtype()
        y = (x.to(dtype) @ self.transposed(dtype, start, stop)).float()
        return y if bias is None else y.add_(bias)

    def times_transposed(self, g: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """g W for g (..., rows of W from ``start`` to ``stop``), float32 (..., inputs)."""
        dtype = product_dtype()
        return (g.to(dtype) @ self.transposed(dtype, start, stop).t()).float()

    def dequantized(self) -> Tensor:
        """The weights it computes with, float32 (outputs, inputs)."""
        return self.transposed(torch.float32).t().contiguous()


def product_dtype() -> torch.dtype:
    """What many rows are multiplied in: bfloat16 where the processor has such products.

    They are faster than the compiled kernel then: 1.2 to 1.4 times on an AMD EPYC with AVX-512.
    """
    return torch.bfloat16 if native_bfloat16() else torch.float32


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b with a gradient for x only. Nothing is saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Int8Matrix, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        return matrix.times(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return ctx.matrix.times_transposed(gradient), None, None


class BlockInt8Linear(nn.Linear):
    """``x @ W.T + b`` with frozen weights in 8 bits, through which a gradient can pass to x.

    ``x`` is (..., in_features) in float32. It calls itself an ``nn.Linear``, so that PEFT puts
    adapters on it, but ``weight`` is empty: the weights are in ``matrix``.
    """

    def __init__(
        self, weight: Tensor | Int8Matrix, bias: Tensor | None = None, kernel: str = "auto"
    ):
        nn.Module.__init__(self)
        # An embedding and its head may share one matrix.
        self.matrix = weight if isinstance(weight, Int8Matrix) else Int8Matrix(weight, kernel)
        self.out_features, self.in_features = self.matrix.outputs, self.matrix.inputs
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.set_bias(bias)

    def set_bias(self, bias: Tensor | None) -> None:
        copied = None if bias is None else nn.Parameter(bias.detach().float().clone(), False)
        self.register_parameter("bias", copied)

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take these float weights in place of the present ones."""
        self.matrix.store(weight)
        self.set_bias(bias)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    @property
    def kernel(self) -> str:
        return self.matrix.kernel

    def dequantized(self) -> Tensor:
        """The weights it computes with, float32 (out_features, in_features)."""
        return self.matrix.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _FrozenProduct.apply(x, self.matrix, self.bias)
            return result
        return self.matrix.times(x, self.bias).to(x.dtype)  # bfloat16 beside a bfloat16 head


@contextlib.contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep the weights of layers without the compiled kernel as floats while tokens are sampled:
    to convert them for each token would take longer than to multiply."""
    layers = [m.matrix for m in model.modules() if isinstance(m, BlockInt8Linear)]
    slow = [matrix for matrix in layers if matrix.kernel != "compiled"]
    try:
        for matrix in slow:
            matrix.kept = matrix.transposed(product_dtype())
        yield
    finally:
        for matrix in slow:
            matrix.kept = None
