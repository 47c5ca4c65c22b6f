"""The model card: what a saved model is, how it was made and what was measured, from the record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from cpugrpo_edu.models.fetch import PACKAGED
from cpugrpo_edu.record.markdown import markdown_table
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.show.plots import before_and_after
from cpugrpo_edu.show.report import headline, limits
from cpugrpo_edu.show.text import percent

WITH_TRANSFORMERS = 'AutoModelForCausalLM.from_pretrained("this folder")'
WITH_ITS_BASE = 'cpugrpo_edu.models.load_policy("this folder")'

METHODS = {
    "run": ("trained with GRPO", ["grpo", "reinforcement-learning"]),
    "warmstart": ("fine-tuned on examples", ["sft"]),
}
PATHS = ("model", "data", "verifier")
"""Settings that may name a file or folder of this machine."""


def model_card(record: RunRecord, load_with: str, kind: str = "", note: str = "") -> str:
    """The README.md of the record's model. ``load_with`` is the code that loads it.

    ``kind`` names the format and ``note`` is a paragraph about it, for an export. Local folders
    are named without their path, since a card may be published.
    """
    how, tags = METHODS[record.kind]
    base = base_of(str(record.config.get("model", "unknown")))
    record = replace(record, config={k: public(k, v) for k, v in record.config.items()})
    data = ModelCardData(
        base_model=base.get("base_model"),
        library_name="transformers",
        license=base.get("license"),
        pipeline_tag="text-generation",
        tags=tags,
    )
    config = {k: v for k, v in record.config.items() if v not in (None, "")}
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base['name']}, {how}" + (f" ({kind})" if kind else ""),
        headline(record),
        accuracy(record),
        note,
        f"Base model: {base['name']}, licence: {base.get('license', 'see its own page')}.",
        f"Load it with `{load_with}`.",
        "## What this does not show",
        "\n".join(f"* {line}" for line in limits(record)),
        "## Settings",
        "\n".join(f"* {name}: `{json.dumps(value)}`" for name, value in config.items()),
        f"Run of {record.created}, code {record.commit[:12]}, with {versions}. The run's "
        "`record.json` holds every number.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def accuracy(record: RunRecord) -> str:
    """A table of the accuracy before and after, with intervals; empty if it was not measured."""
    tables = before_and_after(record)
    if not tables:
        return ""
    rows = []
    for table in tables:
        row = table["overall"]
        span = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        rows.append([table["label"], f"{row['n']:,}", f"{percent(row['accuracy'])} ({span})"])
    interval = f"Accuracy ({round(100 * tables[0]['confidence'])} % interval)"
    return markdown_table(["Model", "Held-out problems", interval], rows)


def base_of(model: str) -> dict[str, str]:
    """The base model's ``name``, and where known its hub id (``base_model``) and ``license``.

    A folder says them in the card that it holds, so they pass from run to run.
    """
    if model == "bundled":
        return {"name": "The bundled model of cpugrpo_edu", "license": "mit"}
    if packaged := PACKAGED.get(model):
        name = packaged.original
        return {"name": name, "base_model": name, "license": packaged.licence.lower()}
    if not Path(model).is_dir():
        return {"name": model, "base_model": model}
    try:
        said = metadata_load(Path(model) / "README.md") or {}
    except Exception:  # no card, or one that is no YAML, for which the parser has many errors
        said = {}
    known = {k: said[k] for k in ("base_model", "license") if isinstance(said.get(k), str)}
    return {"name": known.get("base_model", Path(model).name), **known}


def public(name: str, value: Any) -> Any:
    """A setting as others may read it: a path on this machine without its folders."""
    if name not in PATHS or not isinstance(value, str):
        return value
    local = value.startswith(("~", ".")) or Path(value).is_absolute() or Path(value).exists()
    return Path(value).name if local else value
