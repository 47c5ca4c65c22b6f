"""Export a trained model: merged weights, the adapter, INT8, or GGUF, each checked.

An export is kept only if, loaded back as its reader would load it, it is close to the model it
came from: in the KL divergence of their next-token distributions, on held-out problems. Its model
card says how close. (Greedy texts are no measure: one near tie in a hundred tokens, and two models
of the same quality write on differently.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpugrpo_edu.data import DIFFICULTIES, Group, Problem
from cpugrpo_edu.engine.architectures import require
from cpugrpo_edu.engine.decode import sample
from cpugrpo_edu.engine.int8 import (
    KL_LIMIT,
    Drift,
    dequantize,
    measure_drift,
    quantize_tensor,
)
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import Policy, load_policy, read_config, resolve_source
from cpugrpo_edu.record.files import check_output_folder, replacing
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.gguf_file import write_gguf
from cpugrpo_edu.run.model_card import WITH_TRANSFORMERS, model_card
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.tasks import DOMAINS, held_out_problems

SAME = 1e-6
LARGEST_KL = {"merged": SAME, "gguf": SAME, "adapter": KL_LIMIT, "int8": KL_LIMIT}
"""Most nats a token between the model and what is loaded back. The same weights may differ by
rounding only; the base of an adapter may have been rounded in training; INT8 is another model,
which may be as far off as the copy that rolls out."""

COMPARED, LONGEST = 24, 48
"""Held-out problems on which an export is compared with its model, and the tokens of an answer."""

INT8_FORMAT = "int8 weights, one float32 scale a row: w = q * scale"


def export(
    run: str | Path,
    kind: str,
    output: str | Path,
    *,
    problems: int = COMPARED,
    on_done: Callable[[int], None] = lambda more: None,
) -> dict[str, Any]:
    """Write the run's model as ``kind`` into the new folder ``output``, checked.

    ``run`` is the output folder of a complete run. Returns the folder, its bytes, the mean KL
    divergence in nats a token and the share of tokens with the same most likely token, over the
    model's greedy completions of ``problems`` held-out problems, which ``on_done`` counts. If the
    KL is above ``LARGEST_KL``, raises UserError and leaves nothing behind.
    """
    run, output = Path(run), check_output_folder(output)
    if kind not in LARGEST_KL:
        raise UserError(f"cannot export to {kind!r}; allowed are {', '.join(LARGEST_KL)}")
    if output.exists():
        raise UserError(f"{output} already exists; give another --output")
    if problems < 1:
        raise UserError(f"problems is {problems}; give at least 1 to compare on")
    record = RunRecord.load(run / "record.json")
    if kind == "gguf":
        require(read_config(resolve_source(run / "model")), "GGUF")
    original = trained_policy(run, record)
    write, read = WAYS[kind]
    with replacing(output) as folder:
        folder.mkdir()
        write(original, run, record, folder)
        exported = read(folder, original, record)
        found = compare(original, exported, kind, questions(record, problems), on_done)
        (folder / "README.md").write_text(card(record, kind, found), encoding="utf-8")
        record.save(folder / "record.json")
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    return {"folder": str(output), "bytes": size, "kl": found.kl, "agreement": found.agreement}


def compare(
    original: Policy,
    exported: Policy,
    kind: str,
    chosen: list[Problem],
    on_done: Callable[[int], None] = lambda more: None,
) -> Drift:
    """How far the exported policy is from the original; UserError if it is too far."""
    groups = completions(original, chosen, on_done)
    for problem, group in zip(chosen, groups, strict=True):
        text = group.episodes[0].text
        ids = group.prompt_ids, original.tokenizer(text)["input_ids"]
        if (exported.encode_problem(problem), exported.tokenizer(text)["input_ids"]) != ids:
            raise UserError(
                f"the exported {kind} splits the same text into other tokens than the model, so "
                "it was not kept; export --to merged"
            )
    found = measure_drift(original.model, exported.model, groups)
    if not found.kl <= LARGEST_KL[kind]:  # NaN is too far as well
        raise UserError(
            f"the exported {kind} is another model: KL {found.kl:.2g} nats a token, where "
            f"{LARGEST_KL[kind]:g} is allowed; it was not kept: export --to merged"
        )
    return found


def questions(record: RunRecord, count: int) -> list[Problem]:
    """Held-out problems of the run's domains, or of the bundled ones where it had other data."""
    generated = record.config.get("data", "generated") == "generated"
    domains = record.config.get("domains") if generated else None
    cells = len(domains or DOMAINS) * len(DIFFICULTIES)
    chosen = held_out_problems(-(-count // cells), domains or DOMAINS)
    return chosen[:: max(1, len(chosen) // count)][:count]


def trained_policy(run: Path, record: RunRecord) -> Policy:
    """The model at the end of a run; an adapter is merged into the float base."""
    folder = run / "model"
    if not folder.is_dir():
        raise UserError(f"{run} holds no trained model; give the output folder of a complete run")
    return load_policy(
        folder, system=record.config.get("system"), answer_format=answer_format(record)
    )


def answer_format(record: RunRecord) -> str | None:
    """The run's setting; runs made before there was one read answers after ####."""
    found: str | None = record.config.get("answer_format", "hash")
    return found


def completions(
    policy: Policy,
    problems: list[Problem],
    on_done: Callable[[int], None] = lambda more: None,
) -> list[Group]:
    """Greedy completions, by transformers' ``generate``: it is independent of our sampler."""
    policy = replace(policy, sampler=partial(sample, options=EngineOptions("generate")))
    return rollout(policy, problems, 1, Sampling(LONGEST, temperature=0), on_done=on_done)


# How each kind is written, and read back


def write_merged(policy: Policy, run: Path, record: RunRecord, folder: Path) -> None:
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def read_merged(folder: Path, original: Policy, record: RunRecord) -> Policy:
    return load_policy(folder, system=original.system)


def write_adapter(policy: Policy, run: Path, record: RunRecord, folder: Path) -> None:
    source = run / "model" / "adapter"
    if not (source / "adapter_model.safetensors").exists():
        raise UserError(
            f"{run} trained all weights, so there is no adapter; export --to merged, "
            "or train with --lora 16"
        )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    policy.model.config.save_pretrained(folder)  # how to prompt it
    policy.tokenizer.save_pretrained(folder)


def write_int8(policy: Policy, run: Path, record: RunRecord, folder: Path) -> None:
    """Every matrix as int8 with one scale a row; other tensors unchanged."""
    tensors = {}
    tied = policy.model.config.tie_word_embeddings
    for name, tensor in policy.model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if tensor.dim() == 2:
            q, scale, _ = quantize_tensor(tensor)
            tensors[name], tensors[f"{name}_scale"] = q, scale
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model-int8.safetensors", {"format": INT8_FORMAT})
    policy.model.config.save_pretrained(folder)
    policy.model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def load_int8(folder: str | Path, system: str | None = None) -> Policy:
    """The policy that an INT8 export describes, its weights back in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = Path(folder)
    path = folder / "model-int8.safetensors"
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != INT8_FORMAT:
                raise ValueError("it has another format")
        stored = load_file(path)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        weights = {
            name: dequantize(tensor, stored[f"{name}_scale"], torch.zeros(()))
            if tensor.dtype == torch.int8
            else tensor
            for name, tensor in stored.items()
            if not name.endswith("_scale")
        }
        missing, unknown = model.load_state_dict(weights, strict=False)
        if unknown or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"tensors do not fit: {[*missing, *unknown][:3]}")
    except Exception as error:  # safetensors and transformers raise many kinds
        raise UserError(
            f"cannot read an INT8 export from {folder} ({error}); "
            "give a folder that cpugrpo export wrote"
        ) from error
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    return Policy(model.eval(), tokenizer, str(folder), system)


def read_int8(folder: Path, original: Policy, record: RunRecord) -> Policy:
    return load_int8(folder, original.system)


def write_float_gguf(policy: Policy, run: Path, record: RunRecord, folder: Path) -> None:
    """One float32 GGUF file with its tokenizer, by the ``gguf`` package."""
    model, target = policy.model, folder / "model.gguf"
    write_gguf(target, model.config, model.state_dict().items(), policy.tokenizer, name=run.name)


def read_gguf(folder: Path, original: Policy, record: RunRecord) -> Policy:
    """Weights and tokenizer both by the reader in ``transformers``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    tokenizer.padding_side = "left"
    return Policy(model, tokenizer, str(folder), original.system)


Writer = Callable[[Policy, Path, RunRecord, Path], None]
Reader = Callable[[Path, Policy, RunRecord], Policy]
WAYS: dict[str, tuple[Writer, Reader]] = {
    "merged": (write_merged, read_merged),
    "adapter": (write_adapter, read_merged),
    "int8": (write_int8, read_int8),
    "gguf": (write_float_gguf, read_gguf),
}

HOW_TO_LOAD = {
    "merged": WITH_TRANSFORMERS,
    "adapter": 'PeftModel.from_pretrained(base, "this folder")',
    "int8": 'cpugrpo_edu.run.export.load_int8("this folder")',
    "gguf": 'AutoModelForCausalLM.from_pretrained("this folder", gguf_file="model.gguf")',
}


def card(record: RunRecord, kind: str, found: Drift) -> str:
    """The model card, which says how close the export is to the trained model."""
    note = (
        f"Loaded back after the export, it is {found.kl:.2g} nats a token from the trained "
        f"model (KL divergence, on held-out problems; {LARGEST_KL[kind]:g} is allowed), with "
        f"the same most likely token in {found.agreement:.1%} of the places."
    )
    return model_card(record, HOW_TO_LOAD[kind], kind, note)
