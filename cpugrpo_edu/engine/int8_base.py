"""A frozen INT8 base under LoRA: train half a billion parameters in two gigabytes.

LoRA (Hu et al. 2021, arXiv:2106.09685) leaves the base weights W alone, so they need no
gradient, no optimizer state and no float copy. Here each W is stored as integers,
W = diag(s) Q with Q in [-127, 127] and one scale s a row, as QLoRA does in 4 bits (Dettmers
et al. 2023, arXiv:2305.14314). Both products that training needs are integer products:

    forward   y = x W^T          = (x Q^T) * s
    backward  dL/dx = g W        = (g * s) Q

The kernel quantizes x and g at every call with one scale for all rows, so every row is divided
by its largest entry first. The adapters stay in float32; the gradient reaches them through the
frozen layers.

``kernel`` says how: "packed" by torch's INT8 layers, which keep reordered copies;
"compiled" from the plain integers, one copy of them, by :mod:`.c_kernel`; "exact" by
float products of the dequantized weights: the reference in tests, and the fallback on a machine
without a working INT8 kernel.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.bf16 import product_of
from cpugrpo_edu.engine.int8 import _linear_dynamic, _pack, quantize_tensor, usable_kernel
from cpugrpo_edu.engine.memory import trim_heap
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import native_bfloat16

KERNELS = ("packed", "compiled", "exact")

ABSENT_IS_NONE = {"_raise_exceptions_for_missing_entries": False}

TILE_ROWS = 4096
"""Rows of the vocabulary converted to float at a time: they stay in the cache."""

SHARED_SCALE_ROWS = 8
"""Up to this many rows share one scale: in decoding, calls cost more than the arithmetic."""


def pack(q: Tensor, scale: Tensor) -> Any:
    """Pack integers (out, in) with one scale per row in the kernel's own order."""
    return _pack(q, scale, torch.zeros(len(q), dtype=torch.int32), None)


def rowwise(x: Tensor, packed: Any) -> Tensor:
    """x Q^T * s for x (..., in). Each row is divided by its largest entry first, since the kernel
    has one scale for all rows."""
    # Two vectorized passes: torch's infinity norm is not vectorized and 20 times slower.
    peak = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    peak.clamp_(min=torch.finfo(torch.float32).tiny)
    result: Tensor = _linear_dynamic(x / peak, packed, True).mul_(peak)
    return result


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T with a gradient for x only. Nothing is saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenInt8Linear | FrozenInt8Head) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.layer.transposed_product(gradient), None


class FrozenInt8Linear(nn.Linear):
    """``x @ W.T + b`` with frozen INT8 weights, through which a gradient can pass.

    ``x`` is (..., in_features) in float32. "packed" keeps two copies, Q and Q
    transposed: 2 bytes a weight; the other kernels one of 1 byte. It calls itself an
    ``nn.Linear``, so that PEFT puts adapters on it, but ``weight`` is empty.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, kernel: str = "packed"):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.float().clone(), False)
        )
        q, self.scale, _ = quantize_tensor(weight)
        self.kernel = usable_kernel(kernel)
        if self.kernel == "packed":
            self.packed = pack(q, self.scale)
            self.packed_transposed = pack(q.t().contiguous(), torch.ones(self.in_features))
        elif self.kernel == "compiled":
            self.q, self.row_sum = c_kernel.place(q)
        else:
            self.q = q

    def product(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.kernel == "compiled":
            return c_kernel.product(x, self)
        if self.kernel == "exact":
            y = F.linear(x, self.q.float()).mul_(self.scale)
        elif x.numel() <= SHARED_SCALE_ROWS * self.in_features:
            y = _linear_dynamic(x, self.packed, True)
        else:
            y = rowwise(x, self.packed)
        return y if self.bias is None else y.add_(self.bias)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        if self.kernel == "compiled":
            return c_kernel.many_rows(gradient * self.scale, self.q, None, None)
        if self.kernel == "exact":
            return (gradient * self.scale) @ self.q.float()
        return rowwise(gradient * self.scale, self.packed_transposed)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _FrozenProduct.apply(x, self)
            return result
        return self.product(x)

    def dequantized(self) -> Tensor:
        """The weights it computes with, float32 (out_features, in_features)."""
        if self.kernel != "packed":
            return self.q.float() * self.scale[:, None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight: Tensor = torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()
        return weight


class FrozenInt8Embedding(nn.Embedding):
    """Token embeddings as INT8 rows, (vocabulary, hidden); the head may share them."""

    def __init__(self, weight: Tensor, kernel: str = "packed"):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = None
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        large = usable_kernel(kernel) == "compiled"
        place = (
            c_kernel.in_large_pages if large else functools.partial(torch.empty, dtype=torch.int8)
        )
        self.q, self.scale = place(weight.shape), torch.empty(len(weight))
        for tile in self.tiles():
            self.q[tile], self.scale[tile], _ = quantize_tensor(weight[tile])

    def rows(self, ids: Tensor) -> Tensor:
        return self.q[ids].float() * self.scale[ids].unsqueeze(-1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)

    def tiles(self) -> Iterator[slice]:
        for start in range(0, self.num_embeddings, TILE_ROWS):
            yield slice(start, min(start + TILE_ROWS, self.num_embeddings))

    def add_weighted_sum(
        self, total: Tensor, weights: Tensor, tile: slice, bfloat16: bool = False
    ) -> None:
        """Add ``weights @ W[tile]``, weights (n, rows of the tile), to ``total`` (n, hidden).

        In ``bfloat16`` the integers stay exact; weights and sum get an error of 2**-9 each.
        """
        weights = weights * self.scale[tile]
        if bfloat16:
            total += weights.bfloat16() @ self.q[tile].bfloat16()
        else:
            total.addmm_(weights, self.q[tile].float())


class FrozenInt8Head(nn.Linear):
    """The output projection on INT8 embedding rows; "packed" has a copy of its own."""

    rows: FrozenInt8Embedding

    def __init__(self, rows: FrozenInt8Embedding, kernel: str = "packed"):
        nn.Module.__init__(self)
        self.out_features, self.in_features = rows.num_embeddings, rows.embedding_dim
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_parameter("bias", None)
        # not as a submodule: the embedding may be the same object
        object.__setattr__(self, "rows", rows)
        self.kernel = usable_kernel(kernel)
        self.rounded = self.kernel != "exact" and native_bfloat16()
        self.tiles = list(rows.tiles())
        if self.kernel == "packed":
            self.packed = [pack(rows.q[tile], rows.scale[tile]) for tile in self.tiles]
        else:
            self.q, self.scale = rows.q, rows.scale
            if self.kernel == "compiled":
                self.row_sum = c_kernel.row_sums(self.q)

    def tile_product(self, hidden: Tensor, index: int) -> Tensor:
        """Logits (..., rows of the tile) for one tile of the vocabulary."""
        if self.kernel != "packed":
            q, scale = self.q[self.tiles[index]], self.scale[self.tiles[index]]
            if self.kernel == "compiled":
                return c_kernel.many_rows(hidden, q.t(), scale, None)
            return F.linear(hidden, q.float()).mul_(scale)
        if hidden.numel() <= SHARED_SCALE_ROWS * self.in_features:
            logits: Tensor = _linear_dynamic(hidden, self.packed[index], True)
            return logits
        return rowwise(hidden, self.packed[index])

    def product(self, hidden: Tensor) -> Tensor:
        if self.kernel == "compiled" and hidden.numel() <= c_kernel.FEW_ROWS * self.in_features:
            return c_kernel.few_rows(hidden, self)
        return torch.cat([self.tile_product(hidden, i) for i in range(len(self.tiles))], -1)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(0, -2)
        total = flat.new_zeros(len(flat), self.in_features)
        for tile in self.tiles:
            self.rows.add_weighted_sum(total, flat[:, tile], tile, self.rounded)
        return total.view(*gradient.shape[:-1], self.in_features)

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            logits: Tensor = _FrozenProduct.apply(hidden, self)
            return logits
        return self.product(hidden)


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies from hidden states, one tile of the vocabulary at a time.

    With z = W h / T and p = softmax(z), the gradient of log p(y) with respect to h is
    (W_y - p W) / T. The forward pass computes it while it has p, so the backward pass only
    multiplies. The sums of the softmax grow tile by tile and are rescaled whenever a larger
    logit appears (Milakov and Gimelshein 2018, arXiv:1805.02867), so the logits
    and p exist for one tile only. The entropy gets no gradient: it is a metric here.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, head: FrozenInt8Head, temperature: float
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        peak = hidden.new_full((len(hidden),), torch.finfo(hidden.dtype).min)
        total, expected, chosen = (torch.zeros_like(peak) for _ in range(3))
        # Running sums over the tiles seen so far, relative to the largest logit seen so far
        # (peak): total = sum exp(z - peak), expected = sum exp(z - peak) (z - peak), and
        # mean = sum exp(z - peak) W, which divided by total gives p W in the end.
        mean = torch.zeros_like(hidden)
        for index, tile in enumerate(head.tiles):
            z = head.tile_product(hidden, index).div_(temperature)
            inside = ((tokens >= tile.start) & (tokens < tile.stop)).nonzero().squeeze(1)
            chosen[inside] = z[inside, tokens[inside] - tile.start]
            larger = torch.maximum(peak, z.amax(1))
            shrink = (peak - larger).exp()
            weights = z.sub_(larger[:, None]).exp()  # z is relative to the peak from here on
            # A new peak moves every earlier z by (peak - larger), so it adds total times that.
            expected.addcmul_(total, peak - larger).mul_(shrink).add_(
                torch.linalg.vecdot(weights, z)
            )
            total.mul_(shrink).add_(weights.sum(1))
            if needs_gradient:
                mean.mul_(shrink[:, None])
                head.rows.add_weighted_sum(mean, weights, tile, head.rounded)
            peak = larger
        if needs_gradient:
            slope = head.rows.rows(tokens) - mean.div_(total[:, None])
            ctx.save_for_backward(slope.div_(temperature))
        log_total = total.log()
        entropy = log_total - expected / total
        ctx.mark_non_differentiable(entropy)
        return chosen - peak - log_total, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * gradient[:, None], None, None, None


def token_log_probs(
    hidden: Tensor,
    tokens: Tensor,
    head: Any,
    temperature: float = 1.0,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs in nats and entropies, (n,) each, of ``tokens`` (n,) after ``hidden`` (n, hidden).

    ``head`` is a ``FrozenInt8Head`` or any linear layer; with the first, no logits are kept.
    ``bfloat16``: see :mod:`cpugrpo_edu.engine.bf16`.
    """
    if isinstance(head, FrozenInt8Head):
        result: tuple[Tensor, Tensor] = _TokenLogProbs.apply(hidden, tokens, head, temperature)
        return result
    product = product_of(head, bfloat16) if type(head) is nn.Linear else head
    logits = product(hidden).float()
    log_p = (logits / temperature).log_softmax(-1)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    return log_p.gather(1, tokens[:, None]).squeeze(1), entropy


# --- loading -----------------------------------------------------------------------------


def weight_files(source: str) -> dict[str, str]:
    """Tensor name to safetensors file, for a local folder or a hub id."""
    if index := cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **ABSENT_IS_NONE):
        names = json.loads(Path(index).read_text())["weight_map"]
        return {name: str(cached_file(source, file)) for name, file in names.items()}
    if file := cached_file(source, SAFE_WEIGHTS_NAME, **ABSENT_IS_NONE):
        with safe_open(file, framework="pt") as weights:
            return {name: file for name in weights.keys()}  # noqa: SIM118 (no dictionary)
    raise UserError(
        f"{source} has no {SAFE_WEIGHTS_NAME}; save the model with safetensors, "
        "or use another dtype than int8"
    )


def load_frozen(source: str, config: Any, kernel: str = "packed") -> Any:
    """A causal LM from safetensors with all linear layers and embeddings in INT8.

    One tensor is read at a time, and its file mapped anew for each, so that the float
    weights are never in memory together.
    """
    files = weight_files(source)

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(name)
        return tensor

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = config.tie_word_embeddings
    rows = FrozenInt8Embedding(read(name_of(model, embedding) + ".weight"), kernel)
    head_name = name_of(model, head)
    head_rows = rows if tied else FrozenInt8Embedding(read(head_name + ".weight"), kernel)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        new: nn.Module
        if module is embedding:
            new = rows
        elif module is head:
            new = FrozenInt8Head(head_rows, kernel)
        elif isinstance(module, nn.Linear):
            bias = read(name + ".bias") if module.bias is not None else None
            new = FrozenInt8Linear(read(name + ".weight"), bias, kernel)
        elif any(True for _ in module.buffers(recurse=False)):
            new = type(module)(config)  # the rotary tables: computed, not stored
        else:
            for own in dict(module.named_parameters(recurse=False)):
                weight = nn.Parameter(read(f"{name}.{own}").float().clone(), requires_grad=False)
                setattr(module, own, weight)
            continue
        setattr(model.get_submodule(parent), child, new)
    model.generation_config = generation_config(source, model)
    trim_heap()  # of the float weights
    return model.eval()


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def generation_config(source: str, model: Any) -> Any:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return model.generation_config


def frozen_kernel(model: Any) -> str | None:
    """The kernel of the frozen INT8 base that the model stands on, or None where there is none."""
    layers = (m for m in model.modules() if isinstance(m, FrozenInt8Linear))
    return next((layer.kernel for layer in layers), None)


def is_frozen(model: Any) -> bool:
    """Whether the model stands on a frozen INT8 base."""
    return frozen_kernel(model) is not None


def spares_memory(model: Any) -> bool:
    """Whether to compute the inside of each MLP again in the backward pass.

    A frozen base is there to save memory. With the compiled kernel it has a byte a weight
    less, and so room to keep them.
    """
    return frozen_kernel(model) not in (None, "compiled")
