"""Memory: measure it honestly, estimate it before loading, and plan micro-batches under it.

All sizes are bytes; GiB means 2**30. Estimates are for decoder-only transformers
with a gated feed-forward block (Llama, Qwen2, SmolLM2) in PyTorch.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from cpugrpo_edu.engine.hardware import BUNDLED_MODEL
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import GIB, available_memory, usable_cpus

__all__ = [
    "Architecture",
    "PeakMemory",
    "allocation_failed",
    "available_memory",
    "checkpointing_policy",
    "count_parameters",
    "drop_input_grad_hooks",
    "ensure_fits",
    "estimate_model_bytes",
    "estimate_training_memory",
    "fits",
    "free_memory",
    "memory_alarm",
    "models_that_fit",
    "parse_bytes",
    "plan_micro_batch",
    "release_memory",
    "retry_smaller",
    "rows_that_fit",
    "saved_activation_bytes",
    "swap_pressure",
    "trim_heap",
]

Mode = Literal["full", "lora"]
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
            if count % RESCAN == 0:  # walking the process table is the dear part
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
    """Collect garbage and give freed heap back to the system; returns bytes given back."""
    process = psutil.Process()
    before = process.memory_info().rss
    gc.collect()
    trim_heap()
    return max(0, before - process.memory_info().rss)


def trim_heap() -> None:
    """Give freed pages back to the system, also those between blocks in use (glibc only)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def swap_pressure() -> str | None:
    """A warning when the system leans on its swap, else None. Swapping makes training crawl."""
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
    """Bytes of "4GB" (10**9 each), "500 MiB" (2**20 each) or "4" (GiB). UserError otherwise."""
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
    work: Callable[[int], T], size: int, say: Callable[[str], None] = log.warning
) -> T:
    """``work(size)``; where memory is refused, again with half the size, down to 1.

    ``work`` begins anew each time, so it has to undo what a failed attempt left. UserError
    when even a size of 1 is refused.
    """
    while True:
        try:
            return work(size)
        except (MemoryError, RuntimeError) as error:
            if not allocation_failed(error):
                raise
            if size == 1:
                raise UserError(
                    "the system refused memory for a single completion; free some memory, or "
                    "choose a smaller model, LoRA, checkpointing or shorter completions"
                ) from error
        # Only here, with the error gone, are the tensors of the failed attempt free as well.
        release_memory()
        size = (size + 1) // 2
        say(f"the system refused memory; trying again with {size} at a time")


# --- estimating --------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """The numbers that decide a decoder-only transformer's size."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    head_dim: int = 0  # 0: hidden // heads

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv(self) -> int:
        """Width of all key heads together, which is that of the value heads."""
        return self.attention // self.heads * self.kv_heads

    @property
    def layer_activations(self) -> int:
        """Numbers of a token that a layer keeps for its backward pass: two norms keep three times
        ``hidden`` each; q, k, v and the attention's output; gate, its SiLU, up, and their product.
        """
        return 6 * self.hidden + 4 * self.attention + 4 * self.ffn

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear maps: q, k, v, o, gate, up, down; without the head."""
        attention = 2 * self.hidden * (self.attention + self.kv)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """Embedding (+ head), and per layer the linear maps, their biases and two norms."""
        bias = (self.attention + 2 * self.kv) if self.qkv_bias else 0
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        norms = (2 * self.layers + 1) * self.hidden
        return embeddings + self.linear_parameters + self.layers * bias + norms

    def lora_parameters(self, rank: int) -> int:
        """rank * (in + out) of each of the seven linear layers in a block."""
        attention = 2 * (self.hidden + self.attention) + 2 * (self.hidden + self.kv)
        return self.layers * rank * (attention + 3 * (self.hidden + self.ffn))

    @classmethod
    def from_config(cls, config: Any) -> Architecture:
        """Read a transformers config, or a local model folder."""
        if isinstance(config, Architecture):
            return config
        config = _load_config(config)
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        missing = [name for name in (*names, "vocab_size") if not hasattr(config, name)]
        experts = getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0)
        if missing or experts:
            raise UserError(
                f"cannot estimate a {config.model_type!r} model "
                f"({'mixture of experts' if experts else 'its config has no ' + missing[0]}); "
                "give a dense decoder-only transformer such as Qwen2, Llama or SmolLM2"
            )
        heads = config.num_attention_heads
        return cls(
            name=getattr(config, "_name_or_path", "") or config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            qkv_bias=config.model_type == "qwen2",
            head_dim=getattr(config, "head_dim", None) or 0,
        )


def _load_config(config: Any) -> Any:
    """A transformers config: as given, or read from a local folder."""
    if not isinstance(config, (str, Path)):
        return config
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(config), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read a model config from {str(config)!r}; "
            "give a local folder with the config.json of a causal language model"
        ) from error


def count_parameters(config: Any) -> int:
    """Parameters of the causal LM a config (or local folder) describes; allocates no weights.

    Takes any architecture transformers knows. Tied weights count once.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_load_config(config))
    return sum(p.numel() for p in model.parameters())


def _bytes_per_number(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1}
    if name not in sizes:
        raise UserError(f"dtype is {name!r}; choose one of {', '.join(sizes)}")
    return sizes[name]


def estimate_model_bytes(config: Any, dtype: Any = "float32") -> int:
    """Bytes of the weights alone: what loading the model for evaluation takes.

    ``config`` is an Architecture, a transformers config, or a local model folder.
    """
    size = _bytes_per_number(dtype)
    known = isinstance(config, Architecture)
    return size * (config.parameters if known else count_parameters(config))


def estimate_training_memory(
    config: Any,
    *,
    mode: Mode = "full",
    lora_rank: int = 16,
    dtype_bytes: int = 4,
    tokens_per_sequence: int = 256,
    micro_batch: int = 1,
    checkpointing: bool = False,
    reference: bool = False,
    logits_tile: int | None = None,
) -> dict[str, int]:
    """Bytes that a training step holds at its peak, by part, and their total.

    * weights ``P * s``; gradients and AdamW's two moments ``3 * P * s`` for "full",
      or ``3 * 4 * P_lora`` for "lora", whose adapters (on all seven linear layers,
      added to the weights) stay in float32;
    * reference: a second ``P * s`` when a KL term needs one; LoRA switches its
      adapter off instead, for nothing;
    * activations per layer and token: ``6 hidden + 4 attention + 4 ffn`` numbers
      (``Architecture.layer_activations``). Fused attention stores no T x T scores.
      Checkpointing keeps ``hidden`` per layer and recomputes one layer at a time;
    * logits: three float32 arrays (logits, softmax, gradient) over the vocabulary,
      for all tokens or for a tile of ``logits_tile`` of them.

    Not included: the libraries themselves (about 0.5 GiB of code) and short-lived
    buffers; :class:`PeakMemory` measures what it really came to.
    """
    if mode not in ("full", "lora"):
        raise UserError(f"mode is {mode!r}; choose 'full' or 'lora'")
    for name, value in (
        ("lora_rank", lora_rank),
        ("dtype_bytes", dtype_bytes),
        ("tokens_per_sequence", tokens_per_sequence),
        ("micro_batch", micro_batch),
        ("logits_tile", 1 if logits_tile is None else logits_tile),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    a = Architecture.from_config(config)
    adapters = a.lora_parameters(lora_rank) if mode == "lora" else 0
    trained = 4 * adapters if mode == "lora" else dtype_bytes * a.parameters
    tokens = tokens_per_sequence * micro_batch
    layer = tokens * a.layer_activations * dtype_bytes
    kept = a.layers * tokens * a.hidden * dtype_bytes + layer if checkpointing else a.layers * layer
    parts = {
        "weights": dtype_bytes * a.parameters + 4 * adapters,
        "gradients": trained,
        "optimizer": 2 * trained,
        "reference": dtype_bytes * a.parameters if reference and mode == "full" else 0,
        "activations": kept,
        "logits": 3 * 4 * a.vocab * min(tokens, logits_tile or tokens),
    }
    return {**parts, "total": sum(parts.values())}


def rows_that_fit(config: Any, tokens: int, free: int, *, dtype_bytes: int = 4) -> int:
    """Completions of ``tokens`` (prompt included) to decode at a time in ``free`` bytes, >= 1.

    A power of two, so that a little more or less memory draws the same completions. A row
    holds its keys and values twice, since the cache is copied when finished rows retire;
    the distribution over the vocabulary (logits, scaled, and 64-bit sums); and one layer's
    activations of its prompt.
    """
    a = Architecture.from_config(config)
    cache = 2 * 2 * a.layers * a.kv * tokens * dtype_bytes
    prompt = tokens * a.layer_activations * dtype_bytes
    rows = max(1, int(0.8 * free) // (cache + 24 * a.vocab + prompt))
    return int(2 ** (rows.bit_length() - 1))


# --- deciding ----------------------------------------------------------------------------


def fits(need: int, available: int | None = None, *, safety: float = 0.8) -> bool:
    """Whether ``need`` bytes fit into ``safety`` times the available ones."""
    return need <= safety * (available_memory() if available is None else available)


def ensure_fits(what: str, need: int, available: int | None = None, *, safety: float = 0.8) -> None:
    """Refuse before loading: UserError with the estimate when ``need`` bytes do not fit."""
    available = available_memory() if available is None else available
    if not fits(need, available, safety=safety):
        raise UserError(
            f"{what} needs about {need / GIB:.2f} GiB, but only {safety:.0%} of the available "
            f"{available / GIB:.2f} GiB may be used; choose a smaller model, LoRA, shorter "
            "completions or a smaller micro-batch, or free some memory"
        )


def plan_micro_batch(
    available_bytes: int,
    per_sequence_bytes: int,
    sequences: int,
    *,
    safety: float = 0.8,
    maximum: int | None = None,
    must_divide: bool = False,
) -> int:
    """Sequences per micro-batch, so that as few equal micro-batches as possible fit.

    The fewest that fit are evened out: 32 sequences of which 20 fit give 16 and 16,
    not 20 and 12. ``must_divide`` insists on a divisor of ``sequences``. UserError
    when not even one sequence fits.
    """
    if per_sequence_bytes < 1 or sequences < 1 or (maximum is not None and maximum < 1):
        raise UserError(
            f"cannot plan micro-batches for {sequences} sequences of {per_sequence_bytes} bytes "
            f"with maximum {maximum}; all of them must be at least 1"
        )
    if not 0 < safety <= 1:
        raise UserError(f"safety is {safety}; it is a share of the memory, above 0 and at most 1")
    budget = int(safety * available_bytes)
    most = min(budget // per_sequence_bytes, sequences, maximum or sequences)
    if most < 1:
        raise UserError(
            f"one sequence needs {per_sequence_bytes / GIB:.2f} GiB, but the budget is "
            f"{budget / GIB:.2f} GiB ({safety:.0%} of {available_bytes / GIB:.2f} GiB); "
            "switch checkpointing on, shorten the completions, or use LoRA or a smaller model"
        )
    if must_divide:
        return next(size for size in range(most, 0, -1) if sequences % size == 0)
    return math.ceil(sequences / math.ceil(sequences / most))


def checkpointing_policy(
    mode: str, need_without: int = 0, available: int | None = None, *, safety: float = 0.8
) -> bool:
    """Whether to recompute activations in the backward pass (Chen et al. 2016, 1604.06174).

    It costs about one more forward pass, so "auto" does it only when the step
    without it (``need_without`` bytes) would not fit.
    """
    if mode not in ("auto", "on", "off"):
        raise UserError(f"checkpointing is {mode!r}; choose 'auto', 'on' or 'off'")
    return mode == "on" or (mode == "auto" and not fits(need_without, available, safety=safety))


CATALOGUE = (
    Architecture("SmolLM2-135M-Instruct", 30, 576, 1536, 9, 3, 49_152, True),
    Architecture("SmolLM2-360M-Instruct", 32, 960, 2560, 15, 5, 49_152, True),
    Architecture("Qwen2-0.5B-Instruct", 24, 896, 4864, 14, 2, 151_936, True, True),
    Architecture("TinyLlama-1.1B-Chat", 22, 2048, 5632, 32, 4, 32_000, False),
    Architecture("Qwen2.5-1.5B-Instruct", 28, 1536, 8960, 12, 2, 151_936, True, True),
)


def models_that_fit(
    available: int | None = None, *, tokens_per_sequence: int = 256, safety: float = 0.8
) -> list[dict[str, Any]]:
    """Well-known small causal LMs, smallest first, and what this memory allows with each.

    Estimates for float32 and micro-batches of one sequence, the head in tiles of
    256 tokens. ``verdict`` is "full", "lora", "evaluate" or "too big", the most that fits.
    """
    available = available_memory() if available is None else available
    models = list(CATALOGUE)
    if (BUNDLED_MODEL.parent / "config.json").exists():
        models.append(replace(Architecture.from_config(BUNDLED_MODEL.parent), name="bundled"))
    rows = []
    for model in sorted(models, key=lambda m: m.parameters):
        cache = 2 * model.layers * model.kv * tokens_per_sequence * 4
        need = {"evaluate": estimate_model_bytes(model) + cache}
        modes: tuple[Mode, ...] = ("lora", "full")
        for mode in modes:
            need[mode] = estimate_training_memory(
                model, mode=mode, tokens_per_sequence=tokens_per_sequence, logits_tile=256
            )["total"]
        able = [kind for kind, size in need.items() if fits(size, available, safety=safety)]
        rows.append(
            {
                "name": model.name,
                "parameters": model.parameters,
                **{f"{kind}_bytes": size for kind, size in need.items()},
                "verdict": able[-1] if able else "too big",
            }
        )
    return rows


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
