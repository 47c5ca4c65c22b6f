"""How much memory a model needs, before it is loaded, and micro-batches that fit.

All sizes are bytes; GiB means 2**30. Estimates are for decoder-only transformers
with a gated feed-forward block (Llama, Qwen2, SmolLM2) in PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cpugrpo_edu.engine.hardware import BUNDLED_MODEL
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import GIB, available_memory

Mode = Literal["full", "lora"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1}
"""Of a number, by the name of its dtype."""

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
        """Read a transformers config, or a local model folder; an Architecture stays as it is.

        Raises ``UserError`` for a folder without a config, and for other kinds of models: what
        the estimates below say would not be true of them.
        """
        if isinstance(config, Architecture):
            return config
        config = _load_config(config)
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        missing = [name for name in (*names, "vocab_size") if not getattr(config, name, None)]
        experts = getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0)
        if missing or experts:
            raise UserError(
                f"cannot estimate a {config.model_type!r} model "
                f"({'mixture of experts' if experts else 'its config has no ' + missing[0]}); "
                "give a dense decoder-only transformer such as Qwen2, Llama or SmolLM2"
            )
        return cls.roughly(config)

    @classmethod
    def roughly(cls, config: Any) -> Architecture:
        """The sizes of any decoder, for bounds on its memory.

        Where a config lacks one, the most common choice stands in: a feed-forward block of 4
        ``hidden``, and keys for every head.
        """
        heads = getattr(config, "num_attention_heads", None) or 1
        return cls(
            name=getattr(config, "_name_or_path", "") or config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
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


def estimate_model_bytes(config: Any, dtype: Any = "float32") -> int:
    """Bytes of the weights alone: what loading the model for evaluation takes.

    ``config`` is an Architecture, a transformers config, or a local model folder. Raises
    ``UserError`` for a folder without a config, and for an unknown dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise UserError(f"dtype is {name!r}; choose one of {', '.join(BYTES)}")
    known = isinstance(config, Architecture)
    return BYTES[name] * (config.parameters if known else count_parameters(config))


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

    Not included: the libraries themselves (about 0.5 GiB of code) and short-lived buffers;
    :class:`.memory.PeakMemory` measures what it really came to. Raises ``ValueError`` for an
    unknown mode and for sizes below 1.
    """
    if mode not in ("full", "lora"):
        raise ValueError(f"mode is {mode!r}; choose 'full' or 'lora'")
    given = {
        "lora_rank": lora_rank,
        "dtype_bytes": dtype_bytes,
        "tokens_per_sequence": tokens_per_sequence,
        "micro_batch": micro_batch,
        "logits_tile": logits_tile,
    }
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
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

    A power of two, so that a little more or less memory draws the same completions. A row holds
    its keys and values twice, since the cache is copied when finished rows retire; a distribution
    over the vocabulary (logits, scaled logits, and 64-bit sums: 24 bytes a token); and one layer's
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
    not 20 and 12. ``must_divide`` insists on a divisor of ``sequences``. Raises ``UserError`` if
    not even one sequence fits, and ``ValueError`` for arguments that make no sense.
    """
    if per_sequence_bytes < 1 or sequences < 1 or (maximum is not None and maximum < 1):
        raise ValueError(
            f"cannot plan micro-batches for {sequences} sequences of {per_sequence_bytes} bytes "
            f"with maximum {maximum}; all of them must be at least 1"
        )
    if not 0 < safety <= 1:
        raise ValueError(f"safety is {safety}; it is a share of the memory, above 0 and at most 1")
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

    It costs about one more forward pass, so "auto" does it only when the step without it
    (``need_without`` bytes) would not fit. Raises ``ValueError`` for another mode than "auto",
    "on" and "off".
    """
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"checkpointing is {mode!r}; choose 'auto', 'on' or 'off'")
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
