"""A frozen INT8 base under LoRA: train half a billion parameters in two gigabytes.

LoRA (Hu et al. 2021, arXiv:2106.09685) leaves the base weights W alone, so they need no
gradient, no optimizer state and no float copy. Here each W is stored in 8 bits
(:mod:`.int8_matrix`), as QLoRA does in 4 (Dettmers et al. 2023, arXiv:2305.14314). Training
needs two products with it, y = x W^T forwards and dL/dx = g W backwards. The adapters stay in
float32; the gradient reaches them through the frozen layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.bf16 import product_of
from cpugrpo_edu.engine.int8_matrix import (
    TILE,
    BlockInt8Linear,
    Int8Matrix,
    cannot_save,
    product_dtype,
)
from cpugrpo_edu.engine.memory import trim_heap
from cpugrpo_edu.errors import UserError

ABSENT_IS_NONE = {"_raise_exceptions_for_missing_entries": False}


class Int8Embedding(nn.Embedding):
    """Token embeddings as rows of an ``Int8Matrix`` that the head may share."""

    def __init__(self, matrix: Int8Matrix):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = matrix.outputs, matrix.inputs
        self.padding_idx = None
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids)


def softmax_tile(
    z: Tensor, temperature: float, sums: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``c_kernel.softmax_tile`` by torch."""
    peak, total, expected = sums
    larger = torch.maximum(peak, z.div_(temperature).amax(1))
    shrink = (peak - larger).exp()
    weights = z.sub_(larger[:, None]).exp()
    # A new peak moves every earlier z by (peak - larger), so it adds total times that.
    expected.addcmul_(total, peak - larger).mul_(shrink).add_(torch.linalg.vecdot(weights, z))
    total.mul_(shrink).add_(weights.sum(1))
    peak.copy_(larger)
    return weights.to(dtype), shrink


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
        ctx: Any, hidden: Tensor, tokens: Tensor, matrix: Int8Matrix, temperature: float
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        # Running sums over the tiles seen so far, relative to the largest logit seen so far
        # (peak): total = sum exp(z - peak), expected = sum exp(z - peak) (z - peak), and
        # mean = sum exp(z - peak) W, which divided by total gives p W in the end.
        peak = hidden.new_full((len(hidden),), torch.finfo(hidden.dtype).min)
        total, expected, chosen = (torch.zeros_like(peak) for _ in range(3))
        mean = torch.zeros_like(hidden)
        add_tile = c_kernel.softmax_tile if matrix.kernel == "compiled" else softmax_tile
        for start in range(0, matrix.outputs, TILE):
            stop = min(start + TILE, matrix.outputs)
            # Rounded to bfloat16, a logit of 20 would be off by up to 0.04 nats.
            z = matrix.times(hidden, None, start, stop, fine=True)
            inside = ((tokens >= start) & (tokens < stop)).nonzero().squeeze(1)
            chosen[inside] = z[inside, tokens[inside] - start] / temperature
            weights, shrink = add_tile(z, temperature, (peak, total, expected), product_dtype())
            if needs_gradient:
                mean.mul_(shrink[:, None]).add_(matrix.times_transposed(weights, start, stop))
        if needs_gradient:
            slope = matrix.rows(tokens) - mean.div_(total[:, None])
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

    ``head`` is a ``BlockInt8Linear`` or any linear layer; with the first, no logits are kept.
    ``bfloat16``: see :mod:`cpugrpo_edu.engine.bf16`.
    """
    if isinstance(head, BlockInt8Linear):
        result: tuple[Tensor, Tensor] = _TokenLogProbs.apply(
            hidden, tokens, head.matrix, temperature
        )
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


def load_frozen(source: str, config: Any, kernel: str = "auto") -> Any:
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
    rows = Int8Matrix(read(name_of(model, embedding) + ".weight"), kernel)
    head_rows = rows if tied else Int8Matrix(read(name_of(model, head) + ".weight"), kernel)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        new: nn.Module
        if module is embedding:
            new = Int8Embedding(rows)
        elif module is head:
            new = BlockInt8Linear(head_rows)
        elif isinstance(module, nn.Linear):
            bias = read(name + ".bias") if module.bias is not None else None
            new = BlockInt8Linear(read(name + ".weight"), bias, kernel)
        elif any(True for _ in module.buffers(recurse=False)):
            new = type(module)(config)  # the rotary tables: computed, not stored
        else:
            for own in dict(module.named_parameters(recurse=False)):
                weight = nn.Parameter(read(f"{name}.{own}").float().clone(), requires_grad=False)
                setattr(module, own, weight)
            continue
        setattr(model.get_submodule(parent), child, new)
    model.generation_config = generation_config(source, model)
    model.save_pretrained = cannot_save  # type: ignore[method-assign]
    trim_heap()  # of the float weights
    return model.eval()


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def generation_config(source: str, model: Any) -> Any:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return model.generation_config


def is_frozen(model: Any) -> bool:
    """Whether the model stands on a frozen INT8 base.

    It is there to save memory, so the inside of each MLP is computed again in the backward pass.
    """
    return isinstance(model.get_input_embeddings(), Int8Embedding)
