"""Other engines that could sample the completions, for ``cpugrpo bench rollout``.

- ``llama.cpp``: its C API through llama-cpp-python, on the same weights in its Q8_0 format
  (INT8 in blocks of 32). The prompt is read once and shared by all rows, as in ours.
- ``continuous``: transformers' continuous batching, on float32 weights.

A peer that is not installed or does not work here says why, as a UserError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError

INSTALL = "python -m pip install llama-cpp-python gguf, which needs a C++ compiler"


def need(module: str) -> Any:
    """An optional package, or one sentence on how to get it."""
    import importlib

    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{module} is not here ({error}); install it with {INSTALL}") from error


# llama.cpp

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of a Qwen2 layer, and what llama.cpp calls them."""

BLOCK = 32
"""Numbers of a row that share a scale in Q8_0."""


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def write_gguf(source: Path, target: Path) -> Path:
    """The tied Qwen2 model of a folder in Q8_0, without a tokenizer; made once."""
    if target.exists():
        return target
    gguf = need("gguf")
    from safetensors import safe_open
    from transformers import AutoConfig

    from cpugrpo_edu.run.gguf_layout import describe_qwen2

    config = AutoConfig.from_pretrained(source)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen2")
    writer.add_vocab_size(config.vocab_size)
    describe_qwen2(writer, config)
    writer.add_tokenizer_model("no_vocab")
    q8 = gguf.GGMLQuantizationType.Q8_0
    with safe_open(source / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - no mapping
            array = weights.get_tensor(name).float().numpy()
            if array.ndim == 2 and array.shape[1] % BLOCK == 0:
                packed = gguf.quants.quantize(array, q8)
                writer.add_tensor(gguf_name(name), packed, raw_dtype=q8)
            else:
                writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.replace(target)


class LlamaCpp:
    """A GGUF model in llama.cpp, with room for ``rows`` sequences of ``length`` tokens."""

    def __init__(self, path: Path, rows: int, length: int, threads: int):
        self.api = api = need("llama_cpp")
        silence = api.llama_log_callback(lambda level, text, data: None)
        self._silence = silence  # the C side keeps the pointer
        api.llama_log_set(silence, ctypes.c_void_p(0))
        api.llama_backend_init()
        how = api.llama_model_default_params()
        how.use_extra_bufts = False  # its kernels for AMX end the process on some machines
        self.model = api.llama_model_load_from_file(str(path).encode(), how)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}; delete it, to have it made again")
        settings = api.llama_context_default_params()
        settings.n_ctx = rows * length + 64
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = rows
        settings.kv_unified = True  # so that rows share the prompt's keys and values
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise UserError(f"llama.cpp makes no context of {rows} rows; give fewer")
        self.batch = api.llama_batch_init(max(512, rows), 0, 1)

    def feed(self, tokens: list[int], positions: list[int], rows: list[int]) -> None:
        """Run some tokens; the logits of the last one, or of one a row, can then be read."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        one_each = len(set(rows)) == len(rows)
        for i, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = one_each or i == len(tokens) - 1
        code = self.api.llama_decode(self.context, batch)
        if code != 0:
            raise UserError(f"llama.cpp ends a batch of {len(tokens)} tokens with code {code}")

    def logits(self, index: int, vocabulary: int) -> list[float]:
        """Logits of the fed token ``index``."""
        return list(self.api.llama_get_logits_ith(self.context, index)[:vocabulary])

    def generate(self, prompt: list[int], rows: int, tokens: int) -> list[list[int]]:
        """``rows`` completions of exactly ``tokens`` tokens at temperature 1."""
        api = self.api
        memory = api.llama_get_memory(self.context)
        api.llama_memory_clear(memory, True)
        sampler = api.llama_sampler_init_dist(0)
        self.feed(prompt, list(range(len(prompt))), [0] * len(prompt))
        for row in range(1, rows):
            api.llama_memory_seq_cp(memory, 0, row, -1, -1)
        indices = [len(prompt) - 1] * rows
        out: list[list[int]] = [[] for _ in range(rows)]
        for t in range(tokens):
            drawn = [api.llama_sampler_sample(sampler, self.context, i) for i in indices]
            for completion, token in zip(out, drawn):
                completion.append(token)
            if t + 1 < tokens:
                self.feed(drawn, [len(prompt) + t] * rows, list(range(rows)))
                indices = list(range(rows))
        api.llama_sampler_free(sampler)
        return out

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


Once = Callable[[int], list[list[int]]]


def llama_cpp(folder: Path, prompt: list[int], rows: int, longest: int) -> Once:
    """A function that samples ``rows`` completions of a number of tokens."""
    import torch

    need("llama_cpp")
    path = write_gguf(folder / "bf16", folder / "q8_0.gguf")
    model = LlamaCpp(path, rows, len(prompt) + longest, torch.get_num_threads())
    return lambda tokens: model.generate(prompt, rows, tokens)


# transformers' continuous batching


def continuous(folder: Path, prompt: list[int], rows: int, longest: int) -> Once:
    """A function that samples ``rows`` completions of a number of tokens."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder / "fp32").eval()

    # Left alone, it sizes its cache to most of the machine's memory and fills that with zeros.
    page = 256
    blocks = rows * -(-(len(prompt) + longest) // page) + 1
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=blocks, max_batch_tokens=max(page, rows * len(prompt))
    )

    def once(tokens: int) -> list[list[int]]:
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1
        )
        try:
            found = model.generate_batch(
                inputs=[list(prompt) for _ in range(rows)],
                generation_config=config,
                continuous_batching_config=batching,
                warmup=False,  # that is for CUDA
            )
        except Exception as error:  # whatever a library in motion may raise
            reason = str(error).splitlines()[0] if str(error) else "no message"
            raise UserError(
                f"transformers' continuous batching fails here: {type(error).__name__}: {reason}"
            ) from error
        errors = [str(output.error) for output in found.values() if output.error is not None]
        if errors:
            reason = errors[0].splitlines()[0]
            raise UserError(f"transformers' continuous batching fails here: {reason}")
        return [list(output.generated_tokens) for output in found.values()]

    return once


PEERS: dict[str, Callable[[Path, list[int], int, int], Once]] = {
    "llama.cpp": llama_cpp,
    "continuous": continuous,
}
