"""Memory: measure what the process holds, give back what is free, and retry with less.

All sizes are bytes; GiB means 2**30.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import GIB, available_memory, usable_cpus

RESCAN = 10  # samples between two looks for new child processes
T = TypeVar("T")
log = logging.getLogger(__name__)


# --- measuring ---------------------------------------------------------------------------


def _own_high_water() -> int:
    """Largest RSS this process ever had, as the kernel keeps it; 0 where it does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    return 0


def _cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and of the children it has waited for."""
    t = process.cpu_times()
    return t.user + t.system + getattr(t, "children_user", 0) + getattr(t, "children_system", 0)


class PeakMemory:
    """Peak resident memory and CPU use of this process and all its descendants.

    ::

        with PeakMemory() as peak:
            train()
        peak.peak_rss_bytes, peak.cpu_percent, peak.seconds

    A thread samples every ``interval`` seconds. A spike of this process between
    two samples is still seen, through the kernel's own high-water mark (Linux);
    one of a child may not be. Pages that processes share are counted in each.
    ``cpu_percent`` is CPU time / wall time / usable logical CPUs, so 100 is a
    machine (or container) with nothing left to give.
    """

    def __init__(self, interval: float = 0.05) -> None:
        self.interval = interval
        self.peak_rss_bytes = 0
        self.cpu_percent = 0.0
        self.seconds = 0.0
        self._tree = [psutil.Process()]
        self._high_water = 0
        self._lock = threading.Lock()  # else a sample being taken would undo a reset
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def _rescan(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._tree = [self._tree[0], *self._tree[0].children(recursive=True)]

    def _sum(self, measure: Callable[[psutil.Process], float]) -> float:
        total = 0.0
        for process in self._tree:
            with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                total += measure(process)
        return total

    @property
    def current_rss(self) -> int:
        """Bytes resident now, the whole process tree."""
        return int(self._sum(lambda process: process.memory_info().rss))

    def _sample(self) -> None:
        with self._lock:
            self.peak_rss_bytes = max(self.peak_rss_bytes, self.current_rss)

    def _watch(self) -> None:
        count = 0
        while not self._done.wait(self.interval):
            count += 1
            if count % RESCAN == 0:  # walking the process table is the expensive part
                self._rescan()
            self._sample()

    def reset_peak(self) -> None:
        """Forget the peak so far: a new phase of the run begins."""
        with self._lock:
            self._high_water = _own_high_water()
            self.peak_rss_bytes = self.current_rss

    def __enter__(self) -> PeakMemory:
        self._rescan()
        self.reset_peak()
        self._done.clear()
        self._start = time.perf_counter()
        self._cpu_start = self._sum(_cpu_seconds)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        assert self._thread is not None
        self._thread.join()
        self._rescan()
        self._sample()
        # If the kernel's mark rose since we began, it was set inside the block.
        high = _own_high_water()
        if high > self._high_water:
            self.peak_rss_bytes = max(self.peak_rss_bytes, high)
        self.seconds = time.perf_counter() - self._start
        used = max(0.0, self._sum(_cpu_seconds) - self._cpu_start)
        self.cpu_percent = 100 * used / self.seconds / usable_cpus()


def saved_activation_bytes(model: Any, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``, counted exactly.

    Each storage counts once; the parameters and buffers of ``model`` do not count.
    Unlike the growth of RSS this does not depend on what the allocator held back
    before, so one call with one sequence is a sound measure for
    :func:`plan_micro_batch`. Call it with the model in training mode.
    """
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # holding them keeps addresses from being reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def release_memory() -> int:
    """Collect garbage and return freed heap to the system; how many bytes that were."""
    process = psutil.Process()
    before = process.memory_info().rss
    gc.collect()
    trim_heap()
    return max(0, before - process.memory_info().rss)


def trim_heap() -> None:
    """Return freed pages to the system, also those between blocks in use (glibc only)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def swap_pressure() -> str | None:
    """A warning if much is swapped out, else None. Swapping makes training crawl."""
    swap, memory = psutil.swap_memory(), psutil.virtual_memory()
    if swap.used > 0.1 * memory.total or (swap.used and memory.available < 0.05 * memory.total):
        return (
            f"{swap.used / GIB:.1f} GiB are swapped out and {memory.available / GIB:.1f} GiB are "
            "free: close other programs, or lower the micro-batch or the model's size"
        )
    return None


LAST_RESERVE = 256 * 2**20
"""With less than this left, the next allocation may end the process without a word."""


def memory_alarm() -> str | None:
    """Why a run should save itself now: memory is about to run out, or the system swaps."""
    free = available_memory()
    if free < LAST_RESERVE:
        return f"only {free / 2**20:.0f} MiB of memory are left; close other programs"
    return swap_pressure()


# --- a budget, and what happens when memory is refused -----------------------------------


def parse_bytes(text: str) -> int:
    """Bytes of "4GB" (10**9 each), "500 MiB" (2**20 each) or "4" (GiB).

    Raises ``UserError`` for anything else.
    """
    match = re.fullmatch(r"\s*([-+.\deE]+|nan|inf)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 0 < number < 2**40:
        raise UserError(
            f"cannot use a memory budget of {text!r}; give a finite size above 0, "
            "such as 4GB, 500MB or 3.5GiB"
        )
    if not match[2]:
        return int(number * GIB)
    return int(number * (1024 if match[3] else 1000) ** ("kmgt".index(match[2].lower()) + 1))


def free_memory(limit: int | None = None) -> int:
    """Bytes this process can still take: what the machine (or its control group) has left,
    and with ``limit`` no more than holds all of the process below it."""
    free = available_memory()
    if limit is not None:
        trim_heap()  # what was freed, but not given back, still counts as held
        free = min(free, max(0, limit - psutil.Process().memory_info().rss))
    return free


def allocation_failed(error: BaseException) -> bool:
    """Whether memory was refused: Python's MemoryError, or what torch says instead."""
    words = r"can't allocate memory|not enough memory|Cannot allocate memory|out of memory"
    refused = isinstance(error, RuntimeError) and re.search(words, str(error))
    return isinstance(error, MemoryError) or bool(refused)


def retry_smaller(
    attempt: Callable[[int], T], size: int, say: Callable[[str], None] = log.warning
) -> T:
    """``attempt(size)``; where memory is refused, again with half the size, down to 1.

    Each attempt starts again, so it must undo what a failed one left. Raises ``UserError`` if even
    a size of 1 is refused. (``accelerate.find_executable_batch_size`` does less: it does not know
    Python's MemoryError, says nothing, and ends with a RuntimeError.)
    """
    while True:
        try:
            return attempt(size)
        except (MemoryError, RuntimeError) as error:
            if not allocation_failed(error):
                raise
            if size == 1:
                raise UserError(
                    "the system refused memory for a single completion; free some memory, or "
                    "choose a smaller model, LoRA, checkpointing or shorter completions"
                ) from error
        # The error's traceback holds the tensors of the failed attempt: only here, where it is
        # gone, can they be freed.
        release_memory()
        size = (size + 1) // 2
        say(f"the system refused memory; trying again with {size} at a time")


def drop_input_grad_hooks(model: Any) -> None:
    """Remove the hooks by which Hugging Face makes embedding outputs require gradients.

    ``gradient_checkpointing_enable`` adds one each time it is called and forgets the earlier
    ones. Only reentrant checkpointing needs them; the trainer's is not.
    """
    if not hasattr(model, "get_input_embeddings"):
        return
    hooks = model.get_input_embeddings()._forward_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__name__", "") == "make_inputs_require_grads":
            del hooks[key]
