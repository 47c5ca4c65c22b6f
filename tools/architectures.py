"""What every feature does on every kind of model, measured: `python tools/architectures.py`.

A tiny model with random weights stands for each architecture. Every feature is compared with a
plain float forward pass of transformers, one sequence at a time, without padding or cache. The
outcome is "right", with "slower" where a short cut was left out for it, or "refused" with the
sentence that a user reads. Anything else is a fault: "WRONG", or an error that is no sentence. The
table goes into ``records/architectures.json``, from
which the book prints it; ``tests/test_architectures.py`` measures it again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine.architectures import Feature, require, supports
from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.int8 import quantize_for_rollout
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.engine.trl_data import to_dataset, trl_rewards
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer, cpu_config
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.fisher import Example
from cpugrpo_edu.models.load import add_lora, check_policy, load_policy
from cpugrpo_edu.models.pretrain import train_tokenizer
from cpugrpo_edu.policy import Policy, grpo_loss
from cpugrpo_edu.record.run_record import new_record
from cpugrpo_edu.rewards import Reward
from cpugrpo_edu.run.export import WAYS
from cpugrpo_edu.sample import Sampling

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "records" / "architectures.json"

VOCABULARY, WIDTH, LAYERS, HEADS, WINDOW = 320, 32, 2, 4, 4

DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    **{key: DENSE[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
    **{"n_positions": 160, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
}
ALTERNATING = ["sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "tie_word_embeddings": False}

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("qwen2", {**DENSE, "tie_word_embeddings": True}),
    "Qwen2.5 (head of its own)": ("qwen2", {**DENSE, "tie_word_embeddings": False}),
    "Qwen2 (sliding window)": (
        "qwen2",
        {**DENSE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen2 (wide heads)": ("qwen2", {**DENSE, "head_dim": 16}),
    "Qwen3": ("qwen3", {**DENSE, "head_dim": 16}),
    "Llama": ("llama", {**DENSE, "attention_bias": True, "hidden_act": "gelu"}),
    "SmolLM3": ("smollm3", {**DENSE, "no_rope_layers": [1, 0]}),
    "Mistral": ("mistral", {**DENSE, "head_dim": 8, "sliding_window": None}),
    "Mistral (sliding window)": ("mistral", {**DENSE, "head_dim": 8, "sliding_window": WINDOW}),
    "Gemma": ("gemma", {**DENSE, "head_dim": 16}),
    "Gemma 2": (
        "gemma2",
        {
            **DENSE,
            **{"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
            **{"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
        },
    ),
    "Gemma 3": (
        "gemma3_text",
        {
            **DENSE,
            **{"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
            "layer_types": ALTERNATING,
        },
    ),
    "Phi": ("phi", {**DENSE, "embd_pdrop": 0.1}),
    "Phi-3": ("phi3", {**DENSE, "resid_pdrop": 0.1}),
    "Granite": (
        "granite",
        {
            **DENSE,
            **{"embedding_multiplier": 3.0, "logits_scaling": 2.0},
            **{"residual_multiplier": 0.5, "attention_multiplier": 0.2},
        },
    ),
    "Cohere": ("cohere", {**DENSE, "logit_scale": 0.5}),
    "OLMo 2": ("olmo2", DENSE),
    "StableLM": ("stablelm", {**DENSE, "attention_dropout": 0.1}),
    "StarCoder2": (
        "starcoder2",
        {**DENSE, "residual_dropout": 0.1, "sliding_window": None},
    ),
    "GLM-4": ("glm4", {**DENSE, "head_dim": 8}),
    "GPT-2": ("gpt2", GPT),
    "GPT-Neo": (
        "gpt_neo",
        {
            **DENSE,
            **{"num_layers": LAYERS, "num_heads": HEADS, "window_size": WINDOW},
            **{"attention_types": [[["global", "local"], 1]]},
        },
    ),
    "GPT-NeoX": ("gpt_neox", {**DENSE, "tie_word_embeddings": False}),
    "OPT": ("opt", {**DENSE, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "BLOOM": (
        "bloom",
        {**DENSE, "n_head": HEADS, "hidden_dropout": 0.1},
    ),
    "Mamba": ("mamba", {**DENSE, "state_size": 4, "time_step_rank": 2}),
    "Falcon": ("falcon", {**DENSE, "multi_query": True}),
    "GPT-J": ("gptj", {**GPT, "rotary_dim": 4}),
    "GPT-BigCode": ("gpt_bigcode", GPT),
    "OLMo": ("olmo", {**DENSE, "clip_qkv": 1.0}),
    "OLMo 3": ("olmo3", {**DENSE, "sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "EXAONE 4": ("exaone4", {**DENSE, "layer_types": ["full_attention"] * LAYERS}),
    "ERNIE 4.5": ("ernie4_5", {**DENSE, "head_dim": 8, "use_bias": True}),
    "Command R7B": (
        "cohere2",
        {**DENSE, "logit_scale": 0.5, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "Nemotron": ("nemotron", DENSE),
    "Seed-OSS": ("seed_oss", {**DENSE, "head_dim": 8}),
    "RecurrentGemma": (
        "recurrent_gemma",
        {**DENSE, "num_hidden_layers": 3, "lru_width": WIDTH, "attention_window_size": WINDOW},
    ),
    "Qwen3-MoE": ("qwen3_moe", {**DENSE, **EXPERTS, "num_experts": 4, "head_dim": 8}),
    "Mixtral": (
        "mixtral",
        {**DENSE, **EXPERTS, "num_local_experts": 4, "sliding_window": None},
    ),
    "Qwen2-MoE": (
        "qwen2_moe",
        {**DENSE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
}
"""Model type and configuration of each: whatever an architecture does beside the usual is on, at
a size that these short sequences notice."""


def random_model(name: str) -> Any:
    """A model of the zoo whose weights are random and large enough for every part to matter."""
    kind, settings = ZOO[name]
    config = type(AutoConfig.for_model(kind))(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or parameter_name.endswith("A_log"):
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


class Case:
    """A model of the zoo in a folder, and what a plain forward pass says of it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        random_model(name).save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    @cached_property
    def plain(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval()


def tokenizer() -> Any:
    return train_tokenizer(VOCABULARY, samples=200)


# What is compared

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
COMPLETIONS = [[20, 21, 22, 23, 24, 25, 26], [30, 31, 32], [40, 41, 42, 43, 44], [50, 51, 52, 53]]
ROWS = [(PROMPTS[i // 2], completion) for i, completion in enumerate(COMPLETIONS)]
"""Prompt and completion of each row: two rows share the first prompt, two the second."""


def log_probs_of(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probs in nats of a completion's tokens by a plain forward pass, (C,)."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return chosen.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def padded(rows: list[Any], left: bool = False, value: float = 0) -> Tensor:
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows)])


class Wrong(Exception):
    """A feature's result is not that of the plain forward pass."""


def require_close(what: str, ours: Tensor, theirs: Tensor, allowed: float = 1e-4) -> None:
    """Raises Wrong unless ||ours - theirs|| <= allowed ||theirs||."""
    error = float((ours - theirs).norm() / theirs.norm())
    if not error <= allowed:
        raise Wrong(f"{what}: relative error {error:.2g}")


def flat_gradient(model: Any) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    zero = torch.zeros
    return torch.cat([(zero(p.shape) if p.grad is None else p.grad).flatten() for p in trained])


def batch_for(trainer: Any) -> dict[str, Any]:
    """The rows as TRL's generation hands them to the loss: prompts padded left, completions
    right, with log-probs of an older policy."""
    generator = torch.Generator().manual_seed(0)
    masks = [[1] * len(completion) for _, completion in ROWS]
    return {
        "prompt_ids": padded([p for p, _ in ROWS], left=True),
        "prompt_mask": padded([[1] * len(p) for p, _ in ROWS], left=True),
        "completion_ids": padded([c for _, c in ROWS]),
        "completion_mask": padded(masks),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -0.9]),
        "num_items_in_batch": padded(masks).sum(),
        "old_per_token_logps": -2 + torch.randn(padded(masks).shape, generator=generator),
    }


def trainer_of(
    policy: Policy, folder: str, say: Callable[[str], None] = lambda sentence: None, **options: Any
) -> Any:
    problems = [Problem("a", "mine", "basic", "a", "")]
    trainer = CPUGRPOTrainer(
        policy,
        cpu_config(folder, prompts_per_step=2, num_generations=2, gradient_checkpointing=True),
        trl_rewards([Reward("zero", lambda problem, episode: 0.0)], problems),
        to_dataset(problems),
        EngineOptions(patience=0, **options),
        say=say,
    )
    trainer.current_gradient_accumulation_steps = 1  # what the training loop sets
    trainer.model.train()
    return trainer


def compare_training(policy: Policy, plain: Any, allowed: float = 1e-4, **options: Any) -> None:
    """Log-probs, loss and gradient of the trainer against GRPO from zero on the plain model."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(policy, folder, **options)
        batch = batch_for(trainer)
        mask = batch["completion_mask"]
        ids, attention = (
            torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask")
        )
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, mask.shape[1]
        )
        trainer.model.zero_grad()
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, dict(batch)))
    rows = [log_probs_of(plain, *row) for row in ROWS]
    expected = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    plain.zero_grad()
    grpo_loss(expected, batch["old_per_token_logps"], batch["advantages"], mask).backward()
    require_close("log-probs", found.detach()[mask.bool()], expected.detach()[mask.bool()], allowed)
    require_close("gradient", flat_gradient(policy.model), flat_gradient(plain), 10 * allowed)


@torch.no_grad()
def compare_distributions(model: Any, plain: Any, allowed: float) -> None:
    """KL(plain || model) in nats a token, which rounding may leave at ``allowed``."""
    for prompt, completion in ROWS:
        ids = torch.tensor([prompt + completion])
        p, q = (m(input_ids=ids).logits[0].float().log_softmax(-1) for m in (plain, model))
        divergence = float((p.exp() * (p - q)).sum(-1).mean())
        if not divergence <= allowed:
            raise Wrong(f"KL {divergence:.2g} nats a token")


def adapted(model: Any) -> Any:
    """Move the adapters away from zero, alike in models with the same adapters."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# The features


def rollout(case: Case) -> None:
    policy = load_policy(case.folder)
    check_policy(policy)
    sampling = Sampling(8, 1.0, stop_at_eos=False)
    groups = policy.sampler(policy.model, PROMPTS, 2, sampling, eos_ids=set(), pad_id=0)
    for group in groups:
        for episode in group.episodes:
            with torch.no_grad():
                exact = log_probs_of(case.plain, group.prompt_ids, episode.completion_ids)
            require_close("log-probs", torch.tensor(episode.logprobs), exact)


def training(case: Case) -> None:
    compare_training(load_policy(case.folder), case.plain, micro_batch=3)
    compare_training(load_policy(case.folder), case.plain)


def int8_copy(case: Case) -> None:
    require(AutoConfig.from_pretrained(case.folder), "INT8 copy")
    compare_distributions(quantize_for_rollout(load_policy(case.folder).model), case.plain, 0.02)


def lora(case: Case) -> None:
    policy = load_policy(case.folder, lora_rank=4)
    head = case.plain.get_output_embeddings()
    linear = {n for n, m in case.plain.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    linear -= {n for n, m in case.plain.named_modules() if m is head}
    base = policy.model.get_base_model()
    bare = linear - {n for n, m in base.named_modules() if hasattr(m, "lora_A")}
    experts = {n for n, p in case.plain.named_parameters() if p.dim() == 3 and "conv" not in n}
    if bare | experts:
        raise Wrong(f"without an adapter: {', '.join(sorted(bare | experts)[:3])}")
    plain = add_lora(load_policy(case.folder).model, 4)
    adapted(policy.model), adapted(plain)
    compare_training(policy, plain)
    if not all(p.grad.abs().sum() for p in plain.parameters() if p.requires_grad):
        raise Wrong("an adapter without a gradient")


def shared_prefix(case: Case) -> None:
    compare_training(load_policy(case.folder), case.plain, share_prefix=True)


def frozen_base(case: Case) -> None:
    policy = load_policy(case.folder, dtype="int8", lora_rank=4)
    plain = add_lora(load_policy(case.folder).model, 4)
    compare_distributions(policy.model, plain, 0.02)
    adapted(policy.model), adapted(plain)
    compare_training(policy, plain, 0.05, share_prefix=True)


def fisher(case: Case) -> None:
    model = load_policy(case.folder).model
    found = estimate_fisher(model, [Example(*row) for row in ROWS], batch_size=3)
    expected = {name: torch.zeros_like(p) for name, p in case.plain.named_parameters()}
    for row in ROWS:
        case.plain.zero_grad()
        log_probs_of(case.plain, *row).sum().backward()
        for name, parameter in case.plain.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.square() / len(ROWS)
    both = (torch.cat([f[name].flatten() for name in expected]) for f in (found, expected))
    require_close("Fisher", *both, 1e-3)


def exported(case: Case, kind: str) -> None:
    write, read = WAYS[kind]
    policy, record = load_policy(case.folder), new_record("run", {}, {})
    with tempfile.TemporaryDirectory() as folder:
        write(policy, case.folder, record, Path(folder))
        again = read(Path(folder), policy, record).model
        compare_distributions(again, case.plain, 0.02 if kind == "int8" else 1e-6)


FEATURES: dict[str, Callable[[Case], None]] = {
    "rollouts": rollout,
    "training": training,
    "INT8 copy": int8_copy,
    "LoRA": lora,
    "shared prefix": shared_prefix,
    "frozen INT8 base": frozen_base,
    "Fisher": fisher,
    "export": lambda case: (exported(case, "merged"), exported(case, "int8")),
    "GGUF": partial(exported, kind="gguf"),
}


SHORT_CUTS: dict[str, Feature] = {
    "rollouts": "fast engine",
    "shared prefix": "packed pass",
    "Fisher": "vmap",
}
"""Where the slower path is as right."""


def outcome(case: Case, feature: str) -> str:
    """ "right", "right, slower", "refused: ..." with the sentence, or what went wrong."""
    try:
        FEATURES[feature](case)
    except UserError as error:
        return f"refused: {error}"
    except Wrong as error:
        return f"WRONG: {error}"
    except Exception as error:  # a fault, whatever it is
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    short_cut = SHORT_CUTS.get(feature)
    return "right, slower" if short_cut and supports(case.plain.config, short_cut) else "right"


def table() -> dict[str, dict[str, str]]:
    """The outcome of every feature on every architecture; takes about a minute."""
    found: dict[str, dict[str, str]] = {}
    for name in ZOO:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(name, Path(folder))
            found[name] = {feature: outcome(case, feature) for feature in FEATURES}
    return found


def main() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found = table()
    faults = {
        f"{name}, {feature}": result
        for name, row in found.items()
        for feature, result in row.items()
        if not result.startswith(("right", "refused"))
    }
    for where, result in faults.items():
        print(f"{where}: {result}", file=sys.stderr)
    if faults:
        sys.exit("architectures: nothing was written, since not everything is right or refused")
    order = {"architectures": list(ZOO), "features": list(FEATURES)}
    new_record("architectures", order, {"table": found}).save(RECORD)
    print(f"{RECORD.name}: {len(found)} architectures")


if __name__ == "__main__":
    main()
