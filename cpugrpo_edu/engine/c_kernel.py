"""``decode.c``, compiled on this machine: a token through all layers in one call.

Decoding with torch takes some thousand calls a token, and for a model of half a billion
parameters and two completions they take as long as reading its weights. The same arithmetic in
C is limited only by that reading. It is optional and needs a C compiler; torch alone always works.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.record.files import cache_folder

SOURCE = Path(__file__).with_name("decode.c")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
FLAGS = ("-O3", "-march=native", *WIDE, "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""No flag that lets the compiler assume that NaN cannot occur."""

FEW_ROWS = 16
"""With more rows the arithmetic dominates, and torch's products are faster."""

LARGE_PAGE = 2**21
ARENA = 64 * 2**20
"""Bytes requested from the system at a time."""

Pointer = ctypes.c_void_p


class Linear(ctypes.Structure):
    """A linear layer as the C code sees it: ``linear`` in ``decode.c``."""

    _fields_ = (
        *((name, Pointer) for name in ("q", "scale", "row_sum", "bias", "down", "up")),
        *((name, ctypes.c_int) for name in ("inputs", "outputs", "rank")),
    )


LINEARS = {
    **{"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"},
    **{"output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    "down": "mlp.down_proj",
}
"""C's names for a layer's products, in its order, and their paths in the model."""


class Layer(ctypes.Structure):
    _fields_ = (
        ("before_attention", Pointer),
        ("before_mlp", Pointer),
        *((name, Linear) for name in LINEARS),
        ("keys", Pointer),
        ("values", Pointer),
    )


WORKSPACE = (
    *("normed", "mixed", "change", "query", "key", "value"),
    *("gate", "up", "scores", "low", "sizes", "levels"),
)


class Workspace(ctypes.Structure):
    """Buffers of the C code for intermediate results of a layer."""

    _fields_ = tuple((name, Pointer) for name in WORKSPACE)

    @classmethod
    def make(cls, layers: Any, rows: int, kv_heads: int, capacity: int, dim: int) -> Workspace:
        first = layers[0]
        hidden, attention, ffn = first.query.inputs, first.query.outputs, first.gate.outputs
        rank = max(getattr(layer, name).rank for layer in layers for name in LINEARS)
        numbers = {
            **dict.fromkeys(("normed", "change"), hidden),
            **dict.fromkeys(("mixed", "query"), attention),
            **dict.fromkeys(("key", "value"), kv_heads * dim),
            **dict.fromkeys(("gate", "up"), ffn),
            **{"scores": attention // dim * capacity, "low": 3 * rank, "sizes": 1},
        }
        tensors = {name: torch.empty(rows * n) for name, n in numbers.items()}
        tensors["levels"] = torch.empty(rows * max(hidden, attention, ffn), dtype=torch.uint8)
        workspace = cls(*(tensors[name].data_ptr() for name in WORKSPACE))
        workspace.tensors = tensors
        return workspace


def compile_library(folder: Path) -> Path:
    """Compile ``decode.c`` into ``folder``, once for this source, processor and compiler.

    Raises RuntimeError if there is no compiler, or if it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None:
        raise RuntimeError("it needs Linux and a C compiler (the package gcc)")
    about = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target", "--version"],
        capture_output=True,
        text=True,
    ).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((about, *FLAGS)).encode()).hexdigest()
    library = folder / f"decode-{key[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            new = Path(place) / library.name
            command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(new), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{compiler} fails: {done.stderr.strip()[-200:]}")
            new.replace(library)
    return library


@lru_cache
def library() -> tuple[Any, str]:
    """The compiled functions; or None and the reason."""
    try:
        # torch has already loaded OpenMP: the library uses the same one and its threads
        functions = ctypes.CDLL(str(compile_library(cache_folder())))
        for name in ("decode", "few_rows", "round_rows", "scale_rows"):
            getattr(functions, name).restype = None
        check(functions)
    except (OSError, RuntimeError) as error:
        return None, str(error)
    return functions, ""


def available() -> bool:
    return library()[0] is not None


def check(functions: Any) -> None:
    """Raise RuntimeError if torch's integer product, which training needs, is wrong or missing.

    Without VNNI it may add two products in 16 bits, which 2 * 127 * 127 does not fit.
    """
    q = torch.full((64, 256), 127, dtype=torch.int8)
    for matrix in (q.t(), q.t().contiguous()):
        if not bool((torch._int_mm(q, matrix) == 256 * 127 * 127).all()):
            raise RuntimeError("this processor's INT8 products are not exact")


_arena: tuple[Callable[[], mmap.mmap | None], int, int] = (lambda: None, 0, 0)
"""The last block requested, while any of it is in use, and the free part of it."""


def in_large_pages(shape: torch.Size) -> Tensor:
    """Memory for int8 weights that the system may keep in pages of 2 MiB, if it has them.

    Every token reads all weights; with pages of 4 KiB a quarter of that time goes into address
    translation.
    """
    global _arena
    size = -(-shape.numel() // 64) * 64  # the next one starts on a cache line
    pages, start, end = _arena[0](), *_arena[1:]
    if pages is None or end - start < size:
        block = max(ARENA, size)
        pages = mmap.mmap(-1, block + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        start = -torch.frombuffer(pages, dtype=torch.int8).data_ptr() % LARGE_PAGE
        end = start + block
    _arena = weakref.ref(pages), start + size, end
    place = torch.frombuffer(pages, dtype=torch.int8, count=shape.numel(), offset=start)
    return place.view(shape)


def row_sums(q: Tensor) -> Tensor:
    """Row sums (out,) of int8 weights (out, in), int32; torch's own sum is eight times slower."""
    return torch._int_mm(q, q.new_ones(q.shape[1], 8))[:, 0].contiguous()


def place(q: Tensor, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Int8 weights (out, in) in large pages, or in ``into``, and the sums of their rows."""
    placed = (in_large_pages(q.shape) if into is None else into).copy_(q)
    return placed, row_sums(placed)


def address(tensor: Tensor | None) -> int | None:
    """The tensor's address for C. The caller keeps the tensor alive."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def describe(layer: Any, down: Tensor | None = None, up: Tensor | None = None) -> Linear:
    """A frozen INT8 layer, with ``q``, ``scale``, ``row_sum`` and ``bias``, and its LoRA."""
    outputs, inputs = layer.q.shape
    return Linear(
        *(address(t) for t in (layer.q, layer.scale, layer.row_sum, layer.bias, down, up)),
        *(inputs, outputs, 0 if down is None else len(down)),
    )


def decode(
    layers: Any,
    workspace: Workspace,
    hidden: Tensor,
    shape: tuple[int, ...],
    start: int,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    epsilon: float,
) -> None:
    """One token: ``hidden`` (rows, 1, hidden) through all layers, in place.

    ``shape`` is the cache's (rows, kv heads, capacity, head dim), ``start`` the position that
    the new keys and values get; cos and sin are (rows, 1, head dim), ``bias`` (rows, start + 1).
    """
    rows, kv_heads, capacity, dim = shape
    cos, sin = (x.expand(rows, 1, dim).contiguous() for x in (cos, sin))
    heads = layers[0].query.outputs // dim
    library()[0].decode(
        layers,
        *map(ctypes.c_int, (len(layers), rows, hidden.shape[-1], heads, kv_heads, dim)),
        *map(ctypes.c_long, (capacity, start)),
        *(Pointer(address(tensor)) for tensor in (cos, sin, bias)),
        ctypes.c_float(epsilon),
        Pointer(address(hidden)),
        ctypes.byref(workspace),
    )


def product(x: Tensor, layer: Any) -> Tensor:
    """x W^T + b, float32 (..., out), for x of float32 with few or many rows."""
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return few_rows(x, layer)
    return many_rows(x, layer.q.t(), layer.scale, layer.bias)


def few_rows(x: Tensor, layer: Any) -> Tensor:
    """x W^T + b, float32 (..., out), for few rows x of float32."""
    x = x.contiguous()
    rows, y = x.numel() // x.shape[-1], x.new_empty(*x.shape[:-1], len(layer.q))
    levels, sizes = torch.empty_like(x, dtype=torch.uint8), x.new_empty(rows)
    pointers = (Pointer(address(tensor)) for tensor in (levels, sizes, y))
    library()[0].few_rows(ctypes.byref(describe(layer)), Pointer(address(x)), rows, *pointers)
    return y


def many_rows(x: Tensor, q: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x Q * scale + b for integers Q (in, out), each row of x rounded to 127 levels a side."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, inputs = flat.shape
    levels, sizes = torch.empty_like(flat, dtype=torch.int8), flat.new_empty(rows)
    functions = library()[0]
    into = (Pointer(address(tensor)) for tensor in (levels, sizes))
    functions.round_rows(Pointer(address(flat)), rows, inputs, *into)
    # Allocate directly: autograd forbids in-place writes to views.
    y = x.new_empty(*x.shape[:-1], q.shape[1])
    torch._int_mm(levels, q, out=y.view(rows, -1).view(torch.int32))
    given = (Pointer(address(tensor)) for tensor in (sizes, scale, bias))
    functions.scale_rows(Pointer(address(y)), rows, q.shape[1], *given)
    return y
