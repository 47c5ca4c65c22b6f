"""What each feature can do with an architecture, decided from the config, before weights are read.

The short cuts of the engine compute what Qwen2 and Llama compute. An architecture that does
something beside that (a sliding window, a cap or a scale on its logits, a factor on its embeddings)
would silently get other numbers. So every short cut has a list of the model types on which it was
compared with a plain forward pass (``records/architectures.json``). Elsewhere the slower path is
taken where there is one, else the feature is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from cpugrpo_edu.errors import UserError

Feature = Literal[
    "rollouts", "fast engine", "packed pass", "frozen base", "INT8 copy", "LoRA", "GGUF", "vmap"
]

FAST = {"llama", "qwen2"}
PLAIN = FAST | {"ernie4_5", "exaone4", "glm4", "mistral", "olmo2", "phi3", "qwen3", "seed_oss"}
PLAIN |= {"smollm3", "stablelm", "starcoder2"}
"""All they do is in the weights of ``model`` and ``lm_head``, and a mask reaches every layer."""
DENSE = PLAIN | {"bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gptj"}
DENSE |= {"gpt_bigcode", "gpt_neo", "gpt_neox", "granite", "nemotron", "olmo", "olmo3", "opt"}
DENSE |= {"phi"}
"""Transformers whose weights are in linear layers, used as such."""
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe"}
"""Mixtures of experts, whose weights are in no linear layers."""

TYPES: dict[Feature, set[str]] = {
    "rollouts": DENSE | EXPERTS | {"gpt2", "mamba"},
    "fast engine": FAST,
    "packed pass": PLAIN | {"gemma", "nemotron"},
    "frozen base": PLAIN,
    "INT8 copy": DENSE | EXPERTS,
    "LoRA": DENSE | {"gpt2"},
    "GGUF": {"qwen2", "llama"},
    "vmap": DENSE - {"bloom"},
}

INSTEAD: dict[Feature, tuple[str, str]] = {
    "rollouts": ("sampling", "choose another model"),
    "fast engine": ("the fast engine", "choose the engine generate"),
    "packed pass": ("a packed pass over a group", "leave share_prefix out"),
    "frozen base": ("a frozen INT8 base", "choose another, such as --dtype float32"),
    "INT8 copy": ("an INT8 copy", "leave INT8 out (--no-int8-rollouts, --no-int8-evaluation)"),
    "LoRA": ("LoRA", "train all weights (--lora 0)"),
    "GGUF": (
        "GGUF export",
        "export --to merged and use the converter of the program that will run the model",
    ),
    "vmap": ("a batch of per-sequence gradients", "take them one by one"),
}
"""What a feature is called, and what to do without it."""


def supports(config: Any, feature: Feature) -> str | None:
    """Why the feature would not be right on models of this transformers config; None if it is."""
    if feature not in get_args(Feature):
        raise ValueError(f"feature is {feature!r}; allowed are {', '.join(get_args(Feature))}")
    text = config.get_text_config()
    if text.model_type not in TYPES[feature]:
        return "it is tested on Qwen2 and others, but not on this architecture"
    return next(peculiarities(text, feature), None)


def require(config: Any, feature: Feature) -> None:
    """Raises ``UserError`` with the reason and what to do instead, unless it is supported."""
    if reason := supports(config, feature):
        what, instead = INSTEAD[feature]
        kind = config.get_text_config().model_type
        raise UserError(f"{what} does not work on this {kind!r} model: {reason}; {instead}")


def peculiarities(config: Any, feature: Feature) -> Iterator[str]:
    """What the config switches on that the feature does not compute, whatever the model type."""
    if feature in ("fast engine", "packed pass", "frozen base", "GGUF") and has_window(config):
        yield "its attention has a sliding window"
    if feature in ("packed pass", "frozen base"):
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale"):
            if getattr(config, name, None) not in (None, 1.0):
                yield f"its config sets {name}"
    if feature == "frozen base" and getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantized already"
    if feature == "GGUF":
        usual = config.hidden_size // config.num_attention_heads
        if (getattr(config, "head_dim", None) or usual) != usual:
            yield f"its heads have a width of their own, {config.head_dim}"
        if config.rope_parameters["rope_type"] != "default" or config.hidden_act != "silu":
            yield "its rotary positions or its activation are not Qwen2's and Llama's usual ones"
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            yield "its layers have biases"


def has_window(config: Any) -> bool:
    """Whether any layer attends to less than all earlier tokens."""
    layers = getattr(config, "layer_types", None)
    if layers:
        return set(layers) != {"full_attention"}
    return bool(getattr(config, "sliding_window", None))


# The length of a sequence


def context_length(config: Any) -> int | None:
    """Positions that the model was made for, prompt and completion together; None: any number."""
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if limit is None or original is None:
        return limit
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return int(original)  # beyond it, all earlier keys would turn: not what was sampled
    return max(limit, int(original * rope.get("factor", 1)))


def require_context(config: Any, prompt: int, new: int) -> None:
    """UserError if ``prompt`` tokens and ``new`` ones after them are more than the model takes."""
    limit = context_length(config)
    if limit is not None and prompt + new > limit:
        raise UserError(
            f"a prompt of {prompt} tokens and up to {new} new ones make {prompt + new}, but this "
            f"model takes {limit} in all; give shorter prompts, or a smaller --max-completion"
        )
