"""Export a trained model: merged weights, the adapter, INT8, or GGUF, each checked.

An export is kept only if, loaded back as its reader would load it, it gives the answers of the
model it came from. Its model card says how many agreed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpugrpo_edu.engine.decode import sample
from cpugrpo_edu.engine.int8 import dequantize, quantize_tensor
from cpugrpo_edu.engine.options import EngineOptions
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.load import Policy, load_policy
from cpugrpo_edu.record.files import check_output_folder, replacing
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.gguf_file import write_gguf
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.tasks import held_out_problems
from cpugrpo_edu.tasks.answers import answers_match, extract_answer

LEAST_AGREEMENT = {"merged": 1.0, "adapter": 0.95, "int8": 0.8, "gguf": 1.0}
"""Least share of greedy completions that must agree. The same weights give the same text; an
adapter beside its base rounds differently; INT8 is another model, so only its *answers* count."""

INT8_FORMAT = "int8 weights, one float32 scale a row: w = q * scale"


def export(run: str | Path, kind: str, output: str | Path, *, problems: int = 24) -> dict[str, Any]:
    """Write the run's model as ``kind`` into the new folder ``output``, checked.

    ``run`` is the output folder of a complete run. Returns the folder, its bytes, and how many of
    the greedy completions of held-out problems agree. If too few do, raises UserError and leaves
    nothing behind.
    """
    run, output = Path(run), check_output_folder(output)
    if kind not in LEAST_AGREEMENT:
        raise UserError(f"cannot export to {kind!r}; allowed are {', '.join(LEAST_AGREEMENT)}")
    if output.exists():
        raise UserError(f"{output} already exists; give another --output")
    if problems < 1:
        raise UserError(f"problems is {problems}; give at least 1 to compare answers on")
    record = RunRecord.load(run / "record.json")
    original = trained_policy(run, record)
    write, read = WAYS[kind]
    with replacing(output) as folder:
        folder.mkdir()
        write(original, run, record, folder)
        ours, theirs = (answers(p, problems) for p in (original, read(folder, original, record)))
        if kind == "int8":
            agree = [
                answers_match(extract_answer(b), extract_answer(a) or "") or a == b
                for a, b in zip(ours, theirs, strict=True)
            ]
        else:
            agree = [a == b for a, b in zip(ours, theirs, strict=True)]
        share = sum(agree) / len(agree)
        if share < LEAST_AGREEMENT[kind]:
            raise UserError(
                f"the exported {kind} gave other answers than the model: only {sum(agree)} of "
                f"{len(agree)} agree; it was not kept"
            )
        card = model_card(record, kind, sum(agree), len(agree))
        (folder / "README.md").write_text(card, encoding="utf-8")
        record.save(folder / "record.json")
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    return {"folder": str(output), "bytes": size, "agree": sum(agree), "compared": len(agree)}


def trained_policy(run: Path, record: RunRecord) -> Policy:
    """The model at the end of a run; an adapter is merged into the float base."""
    folder, system = run / "model", record.config.get("system")
    if (folder / "config.json").exists():
        return load_policy(folder, system=system)
    if (folder / "adapter").is_dir():
        return with_adapter(folder / "adapter", record, merge=True)
    raise UserError(f"{run} holds no trained model; give the output folder of a complete run")


def with_adapter(adapter: Path, record: RunRecord, merge: bool = False) -> Policy:
    from peft import PeftModel

    base = load_policy(str(record.config["model"]), system=record.config.get("system"))
    base.model = PeftModel.from_pretrained(base.model, str(adapter))
    if merge:
        base.model = base.model.merge_and_unload()
    return base


def answers(policy: Policy, count: int) -> list[str]:
    """Greedy completions of ``count`` held-out problems, by transformers' ``generate``."""
    problems = held_out_problems(-(-count // 12))
    problems = problems[:: max(1, len(problems) // count)][:count]
    policy = replace(policy, sampler=partial(sample, options=EngineOptions("generate")))
    groups = rollout(policy, problems, 1, Sampling(104, temperature=0))
    return [group.episodes[0].text for group in groups]


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


def read_adapter(folder: Path, original: Policy, record: RunRecord) -> Policy:
    return with_adapter(folder, record)


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
    "adapter": (write_adapter, read_adapter),
    "int8": (write_int8, read_int8),
    "gguf": (write_float_gguf, read_gguf),
}

HOW_TO_LOAD = {
    "merged": 'AutoModelForCausalLM.from_pretrained("this folder")',
    "adapter": 'PeftModel.from_pretrained(base, "this folder")',
    "int8": 'cpugrpo_edu.run.export.load_int8("this folder")',
    "gguf": 'AutoModelForCausalLM.from_pretrained("this folder", gguf_file="model.gguf")',
}


def model_card(record: RunRecord, kind: str, agree: int, compared: int) -> str:
    """What this model is and how it was made, from the run's record."""
    from cpugrpo_edu.show.report import headline

    what = "answers" if kind == "int8" else "completions"
    config = {k: v for k, v in record.config.items() if v not in (None, "")}
    versions: Sequence[str] = [f"{name} {version}" for name, version in record.versions.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"base_model: {record.config.get('model', 'unknown')}",
            "tags: [grpo]",
            "---",
            "",
            f"# A model trained with GRPO ({kind})",
            "",
            headline(record),
            "",
            f"Loaded back after the export, {agree} of {compared} greedy {what} to held-out "
            "problems were those of the trained model.",
            "",
            f"Load it with `{HOW_TO_LOAD[kind]}`.",
            "",
            "Trained and measured on the built-in arithmetic tasks or the data named below; "
            "nothing beyond that is known about it.",
            "",
            "## Settings",
            "",
            *(f"* {name}: `{json.dumps(value)}`" for name, value in config.items()),
            "",
            f"Run of {record.created}, code {record.commit[:12]}, with {', '.join(versions)}. "
            "The whole record is in `record.json`.",
            "",
        ]
    )
