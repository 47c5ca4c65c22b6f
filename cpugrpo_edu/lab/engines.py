"""Who samples the completions, for ``cpugrpo bench rollout``: ours and other engines.

- ``generate``: Hugging Face's on float32 weights, the prompt given once a row;
- ``ours-float32``, ``ours-int8`` and ``ours-int8-compiled``: this package's;
- ``llama.cpp``: its C API through llama-cpp-python, on the same weights in its Q8_0 format
  (INT8 in blocks of 32). The prompt is read once and shared by all rows, as in ours;
- ``continuous``: transformers' continuous batching, on float32 weights.

A peer that is not installed or does not work here says why, as a UserError.
"""

from __future__ import annotations

import ctypes
import importlib
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cpugrpo_edu.engine.decode import sample
from cpugrpo_edu.engine.int8_base import load_frozen
from cpugrpo_edu.engine.memory import PeakMemory
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import replacing
from cpugrpo_edu.run.gguf_file import write_gguf
from cpugrpo_edu.sample import Sampling

Sampler = Callable[[int], list[list[int]]]
"""Samples completions of a given number of tokens: one list of token ids a row."""


def rollout_speed(
    engine: str, folder: Path, rows: int, tokens: int, prompt_tokens: int = 100
) -> dict[str, Any]:
    """Tokens a second of one engine, ``rows`` completions of one prompt, after a warm-up."""
    rng = random.Random(0)
    prompt = [rng.randrange(3, 400) for _ in range(prompt_tokens)]
    with PeakMemory() as peak:
        sampler = {**ENGINES, **PEERS}[engine](folder, prompt, rows, tokens)
        sampler(4)
        start = time.perf_counter()
        completions = sampler(tokens)
        seconds = time.perf_counter() - start
    lengths = [len(completion) for completion in completions]
    if lengths != [tokens] * rows:
        raise UserError(f"{engine} gave completions of {lengths} tokens instead of {tokens} each")
    return {
        "tokens_per_second": rows * tokens / seconds,
        "seconds": seconds,
        "peak_rss_bytes": peak.peak_rss_bytes,
    }


# Ours and transformers' generate


def in_package(
    folder: Path, prompt: list[int], rows: int, longest: int, *, engine: str, kernel: str | None
) -> Sampler:
    """``kernel`` None samples from float32 weights."""
    if kernel is None:
        model = AutoModelForCausalLM.from_pretrained(folder / "fp32")
    else:
        source = folder / "bf16"
        model = load_frozen(str(source), AutoConfig.from_pretrained(source), kernel)

    def sampler(tokens: int) -> list[list[int]]:
        sampling = Sampling(tokens, stop_at_eos=False)
        options = EngineOptions(engine)
        [group] = sample(model, [prompt], rows, sampling, eos_ids=set(), pad_id=2, options=options)
        return [episode.completion_ids for episode in group.episodes]

    return sampler


# llama.cpp


def need(module: str) -> Any:
    """An optional package, or one sentence on how to get it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{module} is not here ({error}); install it with python -m pip install "
            "llama-cpp-python gguf, which needs a C++ compiler"
        ) from error


def make_q8(source: Path, target: Path) -> Path:
    """The tied Qwen2 model of a folder in Q8_0, without a tokenizer; made once."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(source / "model.safetensors", "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                yield name, weights.get_tensor(name)

    if not target.exists():
        with replacing(target) as temporary:
            write_gguf(temporary, AutoConfig.from_pretrained(source), tensors(), q8=True)
    return target


class LlamaCpp:
    """A GGUF model in llama.cpp, with room for ``rows`` sequences of ``length`` tokens."""

    def __init__(self, path: Path, rows: int, length: int, threads: int):
        self.api = api = need("llama_cpp")
        silence = api.llama_log_callback(lambda level, text, data: None)
        self._silence = silence  # the C side keeps the pointer
        api.llama_log_set(silence, ctypes.c_void_p(0))
        api.llama_backend_init()
        how = api.llama_model_default_params()
        how.use_extra_bufts = False  # its AMX kernels crash the process on some machines
        self.model = api.llama_model_load_from_file(str(path).encode(), how)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}; delete it, and it is made again")
        settings = api.llama_context_default_params()
        settings.n_ctx = rows * length + 64
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = rows
        settings.kv_unified = True  # so that rows share the prompt's keys and values
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise UserError(f"llama.cpp cannot make a context of {rows} rows; give fewer")
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
            raise UserError(f"llama.cpp failed on a batch of {len(tokens)} tokens with code {code}")

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


def llama_cpp(folder: Path, prompt: list[int], rows: int, longest: int) -> Sampler:
    need("llama_cpp")
    path = make_q8(folder / "bf16", folder / "q8_0.gguf")
    model = LlamaCpp(path, rows, len(prompt) + longest, torch.get_num_threads())
    return lambda tokens: model.generate(prompt, rows, tokens)


# transformers' continuous batching


def continuous(folder: Path, prompt: list[int], rows: int, longest: int) -> Sampler:
    from transformers import ContinuousBatchingConfig, GenerationConfig  # not in every version

    model = AutoModelForCausalLM.from_pretrained(folder / "fp32").eval()
    # By default it sizes its cache to most of the machine's memory and fills that with zeros.
    page = 256
    blocks = rows * -(-(len(prompt) + longest) // page) + 1
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=blocks, max_batch_tokens=max(page, rows * len(prompt))
    )

    def sampler(tokens: int) -> list[list[int]]:
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
        except Exception as error:  # the interface is experimental and may raise anything
            raise broken(f"{type(error).__name__}: {error}") from error
        if errors := [output.error for output in found.values() if output.error is not None]:
            raise broken(str(errors[0]))
        return [list(output.generated_tokens) for output in found.values()]

    def broken(reason: str) -> UserError:
        first = reason.splitlines()[0]
        return UserError(f"transformers' continuous batching fails here: {first}")

    return sampler


Loader = Callable[[Path, list[int], int, int], Sampler]
"""From the folder of the model, the prompt, rows, and the most tokens of a completion."""

ENGINES: dict[str, Loader] = {
    "generate": partial(in_package, engine="generate", kernel=None),
    "ours-float32": partial(in_package, engine="fast", kernel=None),
    "ours-int8": partial(in_package, engine="fast", kernel="auto"),
    "ours-int8-packed": partial(in_package, engine="fast", kernel="packed"),
}
PEERS: dict[str, Loader] = {"llama.cpp": llama_cpp, "continuous": continuous}
