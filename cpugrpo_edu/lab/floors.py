"""The machine's floors: how fast it can at best multiply, read memory and start a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cpugrpo_edu.engine.threads import best_of
from cpugrpo_edu.record.files import cache_folder, remembered
from cpugrpo_edu.record.machine import describe_machine

FLOORS = (
    *("float32_gflops", "bfloat16_gflops", "int8_gops", "compiled_gops"),
    *("read_gb_per_second", "int8_weight_gb_per_second", "call_seconds"),
)
"""What :func:`calibrate` measures."""


UNDISTURBED = 0.85
"""With less of a processor, other programs were busy (measured: 0.5 beside a training run)."""

T = TypeVar("T")


def machine_floors(
    rows: int = 228, layers: int = 24, numbers: int = 64 * 2**20, repeats: int = 5
) -> dict[str, float]:
    """Peak rates on products of the 494M-parameter model's shape.

    ``float32_gflops``, ``int8_gops`` (torch's kernel) and ``compiled_gops`` (the compiled
    kernel's, or what stands in for it) count 2 operations a multiply-add. ``read_gb_per_second`` is
    what summing an array of ``numbers`` reads, ``int8_weight_gb_per_second`` what the INT8 kernel
    reads of the weights of ``layers`` (more than a cache holds) for two rows, as in decoding.
    """
    import torch

    from cpugrpo_edu.engine.int8 import Int8Linear
    from cpugrpo_edu.engine.int8_matrix import Int8Matrix

    inner, outer = 896, 4864
    weight = torch.randn(outer, inner)
    x, few = torch.randn(rows, inner), torch.randn(2, inner)
    large = torch.ones(numbers)
    packed = [Int8Linear(weight) for _ in range(layers)]
    matrix, half, half_weight = Int8Matrix(weight), x.bfloat16(), weight.bfloat16()
    operations = 2.0 * rows * inner * outer
    weights = layers * inner * outer

    def decode() -> None:
        for layer in packed:
            layer(few)

    def rate(product: Callable[[], Any]) -> float:
        return operations / best_of(product, 8 * repeats) / 1e9  # milliseconds each

    with torch.inference_mode():
        return {
            "float32_gflops": rate(lambda: x @ weight.t()),
            "bfloat16_gflops": rate(lambda: half @ half_weight.t()),
            "int8_gops": rate(lambda: packed[0](x)),
            "compiled_gops": rate(lambda: matrix.times(x)),
            "read_gb_per_second": large.nbytes / best_of(large.sum, 4 * repeats) / 1e9,
            "int8_weight_gb_per_second": weights / best_of(decode, 4 * repeats) / 1e9,
        }


def calibrate(rows: int = 228) -> dict[str, float]:
    """The floors, measured in about a second on less data, and the cost of a call.

    ``call_seconds`` is one small layer: a norm and a product of a single row.
    """
    import torch
    import torch.nn.functional as F

    small, row = torch.randn(64, 64), torch.randn(1, 64)

    def calls() -> None:
        for _ in range(100):
            F.linear(F.rms_norm(row, (64,)), small)

    floors = machine_floors(rows, layers=10, numbers=32 * 2**20, repeats=3)
    with torch.inference_mode():
        return {**floors, "call_seconds": best_of(calls, 30) / 100}


def calibration(folder: Path | None = None) -> dict[str, float]:
    """This machine's floors, measured once for each processor, thread count and torch version.

    Not cached while other programs are busy: they would slow every later estimate.
    """
    import torch

    machine = describe_machine()
    key = f"{machine.cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = (folder or cache_folder()) / "calibration.json"

    def usable(floors: Any) -> bool:
        return set(floors) == set(FLOORS) and all(value > 0 for value in floors.values())

    share = 1.0

    def measure() -> dict[str, float]:
        nonlocal share
        share, found = share_of_a_core(calibrate)
        return found

    return dict(remembered(path, key, usable, measure, keep=lambda found: share > UNDISTURBED))


def share_of_a_core(call: Callable[[], T]) -> tuple[float, T]:
    """How much of the time this thread had a processor during ``call()``, and its result."""
    wall, own = time.perf_counter(), time.thread_time()
    found = call()
    return (time.thread_time() - own) / (time.perf_counter() - wall), found
