"""INT8 from scales and zero points up, and an INT8 copy of the policy for rollouts.

A real number x is stored as the integer ``q = round(x / scale) + zero_point`` and
read back as ``(q - zero_point) * scale`` (Jacob et al. 2018, arXiv 1712.05877,
equation 1). Decoding reads every weight once per token, so a quarter of the bytes
is what makes it faster; training needs float weights and keeps them.

"Dynamic" means: weights are quantized once, activations at every call, with one
scale for the whole batch. So what a row gets depends, slightly, on its batch
mates, and INT8 log-probs are those of a *different* policy from the float one:
correct for it by importance sampling, or score the tokens with the live model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpugrpo_edu.data import Group
from cpugrpo_edu.engine.architectures import require
from cpugrpo_edu.engine.bf16 import Bf16Linear
from cpugrpo_edu.engine.int8_matrix import BlockInt8Linear, cannot_save, usable
from cpugrpo_edu.engine.memory import drop_input_grad_hooks
from cpugrpo_edu.errors import DIVERGED, UserError

_linear_dynamic = torch.ops.quantized.linear_dynamic

TILE = 256
"""Rows that are rounded at a time: what lies between stays in the cache (five times as fast)."""


# --- from zero ---------------------------------------------------------------------------


def quantize_tensor(
    w: Tensor, per_channel: bool = True, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to int8; returns (q like ``w``, scale, zero_point), see :func:`dequantize`.

    ``per_channel`` gives each row (first dimension, a linear layer's output) its
    own scale, so that one outlier spoils only its row: scale and zero_point then
    have shape (rows,), else (). Symmetric: scale = max|w| / 127, zero point 0.
    Asymmetric: scale = (max - min) / 255 over the range widened to contain 0.
    Either way ``|w - dequantize(...)| <= scale / 2``.
    """
    w = w.detach().float()
    if not w.numel() or (per_channel and w.dim() < 2):
        raise UserError(
            f"cannot quantize a tensor of shape {tuple(w.shape)}; "
            "give a matrix (out, in), or any non-empty tensor with per_channel=False"
        )
    rows = w.flatten(1) if per_channel else w.reshape(1, -1)
    low, high = rows.amin(1).double(), rows.amax(1).double()  # double: high - low may overflow
    if not (low.isfinite() & high.isfinite()).all():
        raise UserError(f"cannot quantize weights that are NaN or infinite; {DIVERGED}")
    smallest = torch.finfo(torch.float32).tiny  # an all-zero row: any scale will do
    if symmetric:
        scale = (torch.maximum(-low, high) / 127).clamp(min=smallest).float()
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / 255).clamp(min=smallest).float()
        zero_point = (-128 - (low / scale).round()).to(torch.int32)
    q = torch.empty(rows.shape, dtype=torch.int8)
    for some, into, s, z in zip(
        *(x.split(TILE) for x in (rows, q, scale, zero_point)), strict=True
    ):
        into.copy_((some / s[:, None]).round_().add_(z[:, None]).clamp_(-128, 127))
    if not per_channel:
        scale, zero_point = scale[0], zero_point[0]
    return q.view(w.shape), scale, zero_point


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The float32 tensor that :func:`quantize_tensor` stored, up to rounding."""
    shape = (-1,) + (1,) * (q.dim() - 1) if scale.dim() else ()
    return (q.float() - zero_point.reshape(shape)) * scale.reshape(shape)


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations as a dynamic layer does: unsigned, one scale for all of ``x``.

    Returns (q uint8 in [0, 2**bits - 1], scale (), zero_point ()). With 7 bits a
    pair of products fits into 16 bits, see :class:`Int8Linear`.
    """
    top = 2**bits - 1
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = (-low / scale).round()
    q = ((x / scale).round() + zero_point).clamp(0, top)
    return q.to(torch.uint8), scale, zero_point.to(torch.int32)


# --- the layer ---------------------------------------------------------------------------


def _pack(q: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Any:
    """Hand our integers to torch's kernel, which stores them in its own order."""
    with warnings.catch_warnings():
        # torch means to move int8 out to torchao, whose CPU wheel has no kernels as yet.
        warnings.simplefilter("ignore")
        if scale.dim():
            weight = torch._make_per_channel_quantized_tensor(q, scale, zero_point.long(), 0)
        else:
            weight = torch._make_per_tensor_quantized_tensor(q, float(scale), int(zero_point))
        return torch.ops.quantized.linear_prepack(weight, bias)


@lru_cache
def _kernel_works(engine: str) -> bool:
    """Whether the engine computes a product that a saturating kernel gets wrong."""
    try:
        q = torch.full((16, 64), 127, dtype=torch.int8)
        packed = _pack(q, torch.full((16,), 1 / 127), torch.zeros(16, dtype=torch.int32), None)
        got = _linear_dynamic(torch.ones(2, 64), packed, engine != "qnnpack")
        return bool((got - 64).abs().max() < 0.5)
    except (RuntimeError, AttributeError):
        return False


def quantized_engine() -> str:
    """The INT8 kernel in use: "x86", "fbgemm", "onednn" or "qnnpack", else "torch".

    "torch" is our own fallback for builds without a working kernel: the same
    numbers, four times smaller weights, but no speed.
    """
    engine = str(torch.backends.quantized.engine)
    return engine if _kernel_works(engine) else "torch"


class Int8Linear(nn.Module):
    """``x @ W.T + b`` with W in int8 and x quantized at each call; for inference only.

    ``x`` is (..., in_features) in float32 (other dtypes are converted there and
    back), the result (..., out_features). On x86 activations get 7 bits: without
    VNNI instructions the kernel adds two u8 * s8 products in 16 bits, and
    2 * 255 * 127 would saturate and give wrong sums silently; 2 * 127 * 127 fits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, per_channel: bool = True):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.per_channel = per_channel
        self.pack(weight, bias)

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantize these float weights in place of the present ones."""
        q, scale, zero_point = quantize_tensor(weight, self.per_channel)
        bias = None if bias is None else bias.detach().float().clone()
        engine = quantized_engine()
        self.reduce_range = engine != "qnnpack"
        self.packed: Any = None
        self.plain: Any = None  # what the fallback computes with
        if engine == "torch":
            self.plain = (q, scale, zero_point, bias)
        else:
            self.packed = _pack(q, scale, zero_point, bias)
        # Scale, zero point and, in the kernel, the sum of each row: 4 bytes a row each.
        self.nbytes = q.nbytes + 12 * self.out_features + (0 if bias is None else bias.nbytes)

    def dequantized(self) -> Tensor:
        """The weights it computes with, float32 (out_features, in_features)."""
        if self.plain:
            return dequantize(*self.plain[:3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight: Tensor = torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(  # torch would go on and return zero gradients
                "an INT8 layer has no gradient; train the float model and refresh() this copy"
            )
        if self.plain:
            return self._forward_plain(x)
        if x.dtype is torch.float32:  # the one path that runs at every decode step
            return _linear_dynamic(x, self.packed, self.reduce_range)
        return _linear_dynamic(x.float(), self.packed, self.reduce_range).to(x.dtype)

    def _forward_plain(self, x: Tensor) -> Tensor:
        weight, scale, _, bias = self.plain
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        q, x_scale, x_zero = quantize_activations(x.float())
        # Integers up to 2**24 are exact in float32, which has the fast matrix product.
        y = F.linear(q.float() - x_zero, weight.float()) * (x_scale * scale)
        return (y if bias is None else y + bias).to(x.dtype)

    def extra_repr(self) -> str:
        kind = "per channel" if self.per_channel else "per tensor"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


# --- the rollout copy --------------------------------------------------------------------

QUANTIZED = Int8Linear | BlockInt8Linear
"""The layers of an INT8 copy."""


def _without_peft(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel (its layers still wrapped), or the model."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError(
            "cannot quantize a model with a learned prompt, since it is no part of any layer; "
            "use LoRA or full fine-tuning"
        )
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return base


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every linear layer; one wrapped by LoRA comes as its wrapper."""
    child: Any
    for name, child in module.named_children():
        base = child.get_base_layer() if hasattr(child, "get_base_layer") else child
        if isinstance(base, nn.Linear):
            yield prefix + name, child
        else:
            yield from _linears(child, f"{prefix}{name}.")


def _float_weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the layer computes with now, its active adapters merged in."""
    if hasattr(layer, "get_base_layer"):
        if not layer.merged and not layer.disable_adapters:
            # Merge a float32 copy: peft knows DoRA, rsLoRA and the rest, and a bf16
            # weight would swallow the small difference.
            layer = copy.deepcopy(layer).float()
            layer.merge()
        layer = layer.get_base_layer()
    return layer.weight, layer.bias


@torch.no_grad()
def quantize_for_rollout(
    model: nn.Module,
    *,
    per_channel: bool = True,
    quantize_head: bool = False,
    kernel: str = "auto",
) -> nn.Module:
    """A drop-in copy of a causal LM whose linear layers are INT8, for generation and scoring.

    ``kernel`` is "compiled" (weights in blocks, :mod:`.int8_matrix`), "packed" (torch's dynamic
    INT8, :class:`Int8Linear`), "auto" for the first where there is a compiler, else the second;
    or "bf16" for bfloat16 layers: twice the bytes, and far closer than "packed" to a policy
    with outlier activations. Without ``per_channel`` it is "packed".

    LoRA is merged in, so a PeftModel gives a plain transformers model. All other
    parameters (embeddings, norms) are *shared* with the live model, not copied,
    so a rollout is of one policy only after :func:`refresh`. The head stays float
    unless asked for: with tied embeddings it then costs no memory, and the
    log-probs hang on it most directly; but with a vocabulary of 150,000 it is a
    good part of all bytes read per token. The copy is in eval mode, no parameter
    requires a gradient, and asking an INT8 layer for one raises RuntimeError. Raises UserError for
    an architecture whose weights are not all in linear layers.
    """
    live: Any = _without_peft(model)
    if hasattr(live, "config"):
        require(live.config, "INT8 copy")
    head = live.get_output_embeddings() if hasattr(live, "get_output_embeddings") else None
    make: Any = Bf16Linear
    if kernel != "bf16":
        compiled = per_channel and usable(kernel) == "compiled"
        make = BlockInt8Linear if compiled else partial(Int8Linear, per_channel=per_channel)
    memo: dict[int, Any] = {}  # deepcopy puts these in place of what they stand for
    for _, layer in _linears(live):
        if quantize_head or layer is not head:
            memo[id(layer)] = make(*_float_weights(layer))
    if not memo:
        raise UserError(
            f"{type(live).__name__} has no torch.nn.Linear layer to quantize; "
            "use an architecture built of them, such as Qwen2 or Llama"
        )
    for parameter in live.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    served = copy.deepcopy(live, memo).eval()
    # A TRL trainer leaves a forward that would call the live model's layers from the copy, and
    # accelerate, in bfloat16, the one before: then only a collection would end the copy.
    for name in ("forward", "_original_forward"):
        served.__dict__.pop(name, None)
    drop_input_grad_hooks(served)
    served.save_pretrained = cannot_save
    return served


@torch.no_grad()
def refresh(served: nn.Module, model: nn.Module) -> nn.Module:
    """Bring the copy up to the live weights, in place, after an optimizer step."""
    live = _without_peft(model)
    packed: set[str] = set()
    for name, layer in _linears(live):
        target = served.get_submodule(name)
        if isinstance(target, QUANTIZED | Bf16Linear):
            target.pack(*_float_weights(layer))
            packed.update(f"{name}.{own}" for own, _ in target.named_parameters())
    for name, parameter in served.named_parameters():
        if name not in packed:  # shared, unless the live one was replaced
            parameter.data = live.get_parameter(name).data
    return served


# --- how far the copy is from the policy ---------------------------------------------------


KL_LIMIT, OUTSIDE_LIMIT = 0.05, 0.15
"""The most that a copy may drift: KL in nats per token, and the share of importance ratios outside
[0.8, 1.2]. Beyond them it is another policy that samples, and the clip removes much of the gradient
in the first step."""


@dataclass(frozen=True)
class Drift:
    """How an INT8 copy differs from its policy, as means over sampled tokens."""

    kl: float  # KL(policy || copy), nats
    agreement: float  # share of tokens with the same most likely token
    outside: float  # share of sampled tokens with a ratio policy / copy outside [0.8, 1.2]

    @property
    def acceptable(self) -> bool:
        return self.kl <= KL_LIMIT and self.outside <= OUTSIDE_LIMIT

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.3g} nats a token, the same most likely token in {self.agreement:.0%}, "
            f"{self.outside:.0%} of the ratios outside [0.8, 1.2]"
        )


def divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of log-probs p and q (..., V): KL(p || q) in nats, and 1.0 where both have the same most
    likely token, else 0.0; (...) each."""
    return (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()


@torch.no_grad()
def measure_drift(
    model: nn.Module, copy: nn.Module, groups: Sequence[Group], temperature: float = 1.0
) -> Drift:
    """Score the completions of the groups with the policy and with its copy, and compare."""
    training = model.training
    model.eval()
    kl, same, outside = [], [], []
    try:
        for group in groups:
            for episode in group.episodes:
                ids = torch.tensor([group.prompt_ids + episode.completion_ids])
                start = len(group.prompt_ids) - 1
                p, q = (
                    (m(input_ids=ids).logits[0, start:-1].float() / temperature).log_softmax(-1)
                    for m in (model, copy)
                )
                drawn = ids[0, start + 1 :, None]
                ratio = (p - q).gather(-1, drawn).exp()
                far, agree = divergence(p, q)
                kl.append(far)
                same.append(agree)
                outside.append(((ratio < 0.8) | (ratio > 1.2)).float().flatten())
    finally:
        model.train(training)
    return Drift(
        *(torch.cat([x.flatten() for x in xs]).mean().item() for xs in (kl, same, outside))
    )


# --- report ------------------------------------------------------------------------------


def _storages(model: nn.Module) -> dict[int, int]:
    """{address: bytes} of all parameters and buffers, what is shared or tied once."""
    tensors = (*model.parameters(), *model.buffers())
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@torch.no_grad()
def quantization_report(
    model: nn.Module,
    served: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> dict[str, Any]:
    """What INT8 saves and what it costs, on ``input_ids`` (B, T).

    * ``bytes_before``, ``bytes_after``: weights of either model by itself;
      ``bytes_extra``: what the copy takes beside the live model, sharing with it;
    * ``layer_error``: ``||W - W_int8|| / ||W||`` (Frobenius) by layer name;
    * ``max_logit_error``: largest absolute difference; ``kl``: ``KL(float || int8)``, nats, mean
      over tokens; ``top1_agreement``: share of tokens with the same argmax.

    Masked positions (``attention_mask`` 0) do not count.
    """
    before, shared = _storages(model), _storages(served)
    packed = sum(m.nbytes for m in served.modules() if isinstance(m, QUANTIZED))
    errors = {}
    for name, layer in _linears(_without_peft(model)):
        target = served.get_submodule(name)
        if isinstance(target, QUANTIZED):
            weight = _float_weights(layer)[0].float()
            errors[name] = float((weight - target.dequantized()).norm() / weight.norm())
    training = model.training
    model.eval()
    try:
        ours = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    finally:
        model.train(training)
    theirs = served(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    if attention_mask is not None:
        ours, theirs = ours[attention_mask.bool()], theirs[attention_mask.bool()]
    kl, same = divergence(ours.log_softmax(-1), theirs.log_softmax(-1))
    return {
        "engine": quantized_engine(),
        "bytes_before": sum(before.values()),
        "bytes_after": packed + sum(shared.values()),
        "bytes_extra": packed + sum(n for at, n in shared.items() if at not in before),
        "layer_error": errors,
        "max_logit_error": float((ours - theirs).abs().max()),
        "kl": float(kl.mean()),
        "top1_agreement": float(same.mean()),
    }
