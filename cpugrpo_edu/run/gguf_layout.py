"""Names of a Qwen2 model's sizes in GGUF, the file format of llama.cpp."""

from __future__ import annotations

from typing import Any


def describe_qwen2(writer: Any, config: Any) -> None:
    """The sizes of a Qwen2 model, as GGUF names them."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
