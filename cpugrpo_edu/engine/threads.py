"""How many threads are fastest on this machine: measured once, then remembered.

More threads are not always faster. The layers of a small model take microseconds, and the threads
synchronize after each one; cores that share a cache or a memory channel slow each other down. So
work like that of a run is timed with one thread, two, four, and so on up to all cores.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from cpugrpo_edu.engine.hardware import BUNDLED_MODEL
from cpugrpo_edu.engine.memory import trim_heap
from cpugrpo_edu.engine.sizes import Architecture
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import cache_folder, remembered
from cpugrpo_edu.record.machine import describe_machine, usable_cores

CLEARLY = 0.9
"""Use fewer threads only if they take less than this share of the time with all cores: timings
this short vary by a few per cent from one second to the next."""

BUSY = 25
"""Per cent of the machine's CPU time that other programs may use while threads are timed."""

MOST_BYTES = 64 * 2**20
"""Most weights to time with: a few layers of a large model represent the others."""


def best_of(function: Callable[[], Any], repeats: int) -> float:
    """The shortest time of ``repeats`` calls in seconds, after half as many calls to warm up."""
    for _ in range(repeats // 2):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def candidates(cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    return sorted({2**i for i in range(cores.bit_length()) if 2**i < cores} | {cores})


def choose(seconds: dict[int, float]) -> int:
    """From seconds by number of threads: all cores, unless fewer are clearly faster."""
    every = max(seconds)
    best = min(seconds, key=lambda threads: seconds[threads])
    return best if seconds[best] < CLEARLY * seconds[every] else every


def sample_work(a: Architecture) -> Callable[[], None]:
    """Work to time: decode 8 tokens of 64 completions, then one training pass over 512 tokens.

    It goes through a few layers of this shape with random weights; attention over the context is
    left out.
    """
    import torch
    import torch.nn.functional as F

    shapes = [(a.attention + 2 * a.kv, a.hidden), (a.hidden, a.attention)]
    shapes += [(2 * a.ffn, a.hidden), (a.hidden, a.ffn)]
    one = 4 * sum(out * into for out, into in shapes)
    count = max(1, min(a.layers, MOST_BYTES // one))
    layers = [[torch.randn(shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(count)]
    few, many = torch.randn(64, a.hidden), torch.randn(512, a.hidden, requires_grad=True)

    def through(x: Any) -> Any:
        for heads, output, gate_up, down in layers:
            mixed = F.linear(F.rms_norm(x, (a.hidden,)), heads)[:, : a.attention]
            x = x + F.linear(mixed, output)
            gate, up = F.linear(F.rms_norm(x, (a.hidden,)), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return x

    def work() -> None:
        with torch.inference_mode():
            for _ in range(8):
                through(few)
        through(many).sum().backward()

    return work


def time_threads(a: Architecture, counts: list[int], repeats: int = 6) -> dict[int, float]:
    """Seconds of the sample work by number of threads; torch then gets its old number back."""
    import torch

    before, work = torch.get_num_threads(), sample_work(a)
    found = {}
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            found[threads] = best_of(work, repeats)
    finally:
        torch.set_num_threads(before)
        del work
        trim_heap()
    return found


def shape_of(model: str) -> Architecture:
    """The sizes in a local model's config, read as plain numbers: no code of it is loaded or run.

    Where that config cannot be read, the bundled model's sizes.
    """
    for folder in (Path(model), BUNDLED_MODEL.parent):
        with contextlib.suppress(OSError, ValueError, TypeError, ZeroDivisionError, UserError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            usual = {"model_type": "qwen2", "tie_word_embeddings": True}
            a = Architecture.from_config(SimpleNamespace(**{**usual, **config}))
            sizes = (a.layers, a.hidden, a.ffn, a.attention, a.kv)
            if all(isinstance(n, int) and 0 < n < 2**16 for n in sizes):
                return a
    raise UserError(f"{BUNDLED_MODEL.parent} has no readable config.json; reinstall the package")


def measured(model: str = "bundled", folder: Path | None = None) -> dict[int, float]:
    """Seconds by number of threads for a model of this shape, from the cache or measured now.

    Empty, and not cached, while other programs are busy: their work would distort the timing.
    """
    import torch

    cores = usable_cores()
    counts = candidates(cores)
    a = shape_of(model)
    key = f"{describe_machine().cpu}, {cores} cores, torch {torch.__version__}, "
    key += f"{a.layers} layers of {a.hidden} and {a.ffn}"
    path = (folder or cache_folder()) / "threads.json"

    def usable(seconds: Any) -> bool:
        return sorted(map(int, seconds)) == counts and min(seconds.values()) > 0

    def measure() -> dict[int, float]:
        return {} if psutil.cpu_percent(0.1) > BUSY else time_threads(a, counts)

    found = remembered(path, key, usable, measure)
    return {int(threads): float(seconds) for threads, seconds in found.items()}


def fastest_threads(model: str = "bundled", folder: Path | None = None) -> int:
    """Threads to use for a model: all usable cores, unless fewer are clearly faster."""
    seconds = {} if usable_cores() == 1 else measured(model, folder)
    return choose(seconds) if seconds else usable_cores()
