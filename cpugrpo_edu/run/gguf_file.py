"""Write a Qwen2 or Llama model as GGUF, the file format of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from cpugrpo_edu.engine.architectures import require
from cpugrpo_edu.errors import UserError

BLOCK = 32
"""Numbers of a row that share a scale in Q8_0."""

SPLITTERS = {
    ("Split", "ByteLevel"): "qwen2",
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}
"""llama.cpp's names for what cuts a text before byte pairs are merged."""


def write_gguf(
    target: Path,
    config: Any,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Any = None,
    *,
    name: str = "",
    q8: bool = False,
) -> None:
    """Write ``tensors`` by their names in transformers, as float32, or matrices as INT8 (Q8_0).

    Without a ``tokenizer`` the file takes and gives token ids only. UserError for another
    architecture than Qwen2's and Llama's usual ones.
    """
    import gguf

    require(config, "GGUF")
    writer = gguf.GGUFWriter(target, config.model_type)
    writer.add_name(name or target.stem)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kind = gguf.LlamaFileType.MOSTLY_Q8_0 if q8 else gguf.LlamaFileType.ALL_F32
    writer.add_file_type(kind)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, gguf, config, tokenizer)
    add_tensors(writer, gguf, config, tensors, q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, gguf: Any, config: Any, tokenizer: Any) -> None:
    """The vocabulary, merges and chat template of a byte-level BPE tokenizer."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    ids = range(config.vocab_size)
    kinds = [
        gguf.TokenType.UNUSED
        if index not in names
        else gguf.TokenType.CONTROL
        if index in special
        else gguf.TokenType.NORMAL
        for index in ids
    ]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merges, cut = backend["model"].get("merges"), backend["pre_tokenizer"] or {}
    parts = tuple(part["type"] for part in cut.get("pretokenizers", [cut]) if part)
    if merges is None or parts not in SPLITTERS:
        raise UserError(
            "GGUF export knows no tokenizer of this kind, only byte pairs cut as Qwen2, GPT-2 or "
            "SmolLM do; export --to merged"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITTERS[parts])
    writer.add_add_bos_token(False)
    writer.add_token_list([names.get(index, f"[unused {index}]") for index in ids])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def add_tensors(
    writer: Any, gguf: Any, config: Any, tensors: Iterable[tuple[str, Tensor]], q8: bool
) -> None:
    kind = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}[config.model_type]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    q8_type = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors:
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        stored = names.get_name(name, (".weight", ".bias"))
        if stored is None:
            raise UserError(f"GGUF has no place for the tensor {name}; export --to merged")
        array = tensor.detach().float().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            queries = name.endswith("q_proj.weight")
            heads = config.num_attention_heads if queries else config.num_key_value_heads
            array = with_pairs_together(array, heads)
        if q8 and array.ndim == 2 and array.shape[1] % BLOCK == 0:
            writer.add_tensor(stored, gguf.quants.quantize(array, q8_type), raw_dtype=q8_type)
        else:
            writer.add_tensor(stored, array)


def with_pairs_together(rows: Any, heads: int) -> Any:
    """The rows of a query or key matrix as llama.cpp turns them for Llama: neighbours as a pair.

    Transformers turns row i of a head with row i + half.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
