"""``decode.c``, compiled: a token through all layers in one call.

Decoding with torch takes some thousand calls a token, and for a model of half a billion
parameters and two completions they take as long as reading its weights. The same arithmetic in
C is limited only by that reading. It is compiled on this machine where there is a C compiler;
otherwise a wheel for Linux brings it. It is optional: torch alone always works.
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
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpugrpo_edu.engine import kernel_builds
from cpugrpo_edu.errors import DIVERGED, UserError
from cpugrpo_edu.record.files import cache_folder
from cpugrpo_edu.record.machine import processor_flags
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.sample import draw as plain_draw

SOURCE = Path(__file__).with_name("decode.c")
SHIPPED = SOURCE.parent
"""The folder with the libraries that a wheel brings."""
FLAGS = (*kernel_builds.options(platform.machine(), ()), "-march=native")

BLOCK = 32
"""Inputs that share a scale, and activations that share a size: ``BLOCK`` in ``decode.c``."""

LARGE_PAGE = 2**21
ARENA = 64 * 2**20
"""Bytes requested from the system at a time."""

Pointer = ctypes.c_void_p


class Linear(ctypes.Structure):
    """A linear layer as the C code sees it: ``linear`` in ``decode.c``."""

    _fields_ = (
        *((name, Pointer) for name in ("q", "scales", "bias", "down", "up")),
        *((name, ctypes.c_int) for name in ("inputs", "width", "outputs", "rank")),
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


class Rounded(ctypes.Structure):
    """Room for rows of activations, rounded to 16 bits: ``rounded`` in ``decode.c``."""

    _fields_ = tuple((name, Pointer) for name in ("levels", "sizes", "sums"))

    @classmethod
    def make(cls, rows: int, width: int) -> Rounded:
        levels = torch.empty(rows * width, dtype=torch.int16)
        sizes, sums = torch.empty(2, rows * width // BLOCK)
        place = cls(address(levels, torch.int16), address(sizes), address(sums))
        place.tensors = levels, sizes, sums
        return place


BUFFERS = ("normed", "mixed", "change", "query", "key", "value", "gate", "up", "scores", "low")


class Workspace(ctypes.Structure):
    """Buffers of the C code for intermediate results of a layer."""

    _fields_ = (*((name, Pointer) for name in BUFFERS), ("rounded", Rounded))

    @classmethod
    def make(cls, layers: Any, rows: int, kv_heads: int, capacity: int, dim: int) -> Workspace:
        first = layers[0]
        hidden, attention, ffn = first.query.inputs, first.query.outputs, first.gate.outputs
        linears = [getattr(layer, name) for layer in layers for name in LINEARS]
        numbers = {
            **dict.fromkeys(("normed", "change"), hidden),
            **dict.fromkeys(("mixed", "query"), attention),
            **dict.fromkeys(("key", "value"), kv_heads * dim),
            **dict.fromkeys(("gate", "up"), ffn),
            "scores": attention // dim * capacity,
            "low": 3 * max(linear.rank for linear in linears),
        }
        tensors = [torch.empty(rows * numbers[name]) for name in BUFFERS]
        rounded = Rounded.make(rows, max(linear.width for linear in linears))
        workspace = cls(*(tensor.data_ptr() for tensor in tensors), rounded)
        workspace.tensors = tensors, rounded.tensors
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


def shipped_library() -> Path:
    """The fastest library of the wheel that this processor can run. RuntimeError if none."""
    flags = processor_flags()
    for name, needs in kernel_builds.SHIPPED.get(platform.machine(), {}).items():
        for path in SHIPPED.glob(f"_decode_{name}.*.so"):
            if flags.issuperset(needs):
                return path
    raise RuntimeError("the package brings none for this processor")


@lru_cache
def _load() -> tuple[Any, str]:
    reasons = []
    for find in (lambda: compile_library(cache_folder()), shipped_library):
        try:
            # torch has already loaded OpenMP: the library uses the same one and its threads
            functions = ctypes.CDLL(str(find()))
        except (OSError, RuntimeError) as error:
            reasons.append(str(error))
            continue
        for name in ("decode", "times", "unpack", "softmax_tile", "draw"):
            getattr(functions, name).restype = None
        return functions, ""
    return None, "; ".join(reasons)


_loading = threading.Lock()


def library() -> tuple[Any, str]:
    """The compiled functions; or None and the reason. Compiles them, or waits for who does."""
    with _loading:
        return _load()


def compile_ahead() -> None:
    """Compile in the background, while a model loads; ``library`` waits for what is left."""
    threading.Thread(target=library, daemon=True).start()


def available() -> bool:
    return library()[0] is not None


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


def address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """The tensor's address for C, which reads numbers of ``dtype`` there. The caller keeps the
    tensor alive."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.dtype is dtype, (tensor.dtype, tensor.stride())
    return tensor.data_ptr()


def describe(
    matrix: Any,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Linear:
    """The rows from ``start`` to ``stop`` of an ``Int8Matrix``, with a bias and LoRA's matrices."""
    strip = start // matrix.q.shape[2]
    stop = matrix.outputs if stop is None else stop
    return Linear(
        *(address(matrix.q[strip:], torch.int8), address(matrix.scales[strip:], torch.half)),
        *(address(tensor) for tensor in (bias, down, up)),
        *(matrix.inputs, matrix.width, stop - start, 0 if down is None else len(down)),
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


def times(
    matrix: Any,
    x: Tensor,
    bias: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """x W^T + bias, float32 (..., rows of W), for x (..., inputs); W's rows from start to stop."""
    x = x.float().contiguous()
    linear = describe(matrix, bias, start=start, stop=stop)
    rows, y = x.numel() // matrix.inputs, x.new_empty(*x.shape[:-1], linear.outputs)
    into = Rounded.make(rows, matrix.width)
    pointers = (Pointer(address(x)), rows, ctypes.byref(into), Pointer(address(y)))
    library()[0].times(ctypes.byref(linear), *pointers)
    return y


def unpack(matrix: Any, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The rows from ``start`` to ``stop`` of W as columns, (inputs, rows), float32 or bfloat16."""
    to = torch.empty(matrix.inputs, stop - start, dtype=dtype)
    linear = describe(matrix, start=start, stop=stop)
    half = int(dtype is torch.bfloat16)
    library()[0].unpack(ctypes.byref(linear), stop - start, half, Pointer(address(to, dtype)))
    return to


def softmax_tile(
    z: Tensor, temperature: float, sums: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add a tile of logits (rows, n) to a running softmax, see ``int8_base._TokenLogProbs``.

    ``sums`` are its peak, total and expected, (rows,) each, changed in place. Returns
    exp(z / temperature - peak), (rows, n) in ``dtype``, and the factor (rows,) that earlier sums
    got. ``z`` is overwritten.
    """
    shrink = torch.empty_like(sums[0])
    half = torch.empty(z.shape, dtype=dtype) if dtype is torch.bfloat16 else None
    library()[0].softmax_tile(
        Pointer(address(z)),
        *z.shape,
        ctypes.c_float(1 / temperature),
        *(Pointer(address(tensor)) for tensor in (*sums, shrink)),
        Pointer(address(half, torch.bfloat16)),
    )
    return z if half is None else half, shrink


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``cpugrpo_edu.sample.draw`` in one pass: the same tokens, but where rounding decides."""
    if sampling.temperature == 0 or sampling.top_p < 1:
        return plain_draw(logits, sampling, generator)
    logits = logits.float().contiguous()
    rows, vocabulary = logits.shape
    uniform = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    token, log_prob = torch.empty(rows, dtype=torch.long), logits.new_empty(rows)
    library()[0].draw(
        Pointer(address(logits)),
        rows,
        vocabulary,
        ctypes.c_float(1 / sampling.temperature),
        Pointer(address(uniform, torch.double)),
        Pointer(address(token, torch.long)),
        Pointer(address(log_prob)),
    )
    if not log_prob.isfinite().all():
        raise UserError(f"the model's scores are NaN or infinite; {DIVERGED}")
    return token, log_prob
