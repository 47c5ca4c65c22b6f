"""Models that are an adapter on a base: what LoRA on an INT8 base leaves, and PEFT's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.quiet import without_notices

ADAPTER_CONFIG = "adapter_config.json"


def adapter_in(folder: str | Path) -> Path | None:
    """The folder of the adapter that this model consists of; None if it has weights of its own."""
    folder = Path(folder)
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None  # an adapter beside them is merged in
    places = (folder, folder / "adapter")
    return next((place for place in places if (place / ADAPTER_CONFIG).exists()), None)


def base_of(adapter: Path) -> str:
    """The base that an adapter names; UserError if it names none, or one that is not there."""
    try:
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    name = f'"base_model_name_or_path" in {adapter / ADAPTER_CONFIG}'
    if not isinstance(base, str) or not base.strip():
        raise UserError(
            f"the adapter in {adapter} does not say which model it belongs to; write the folder "
            f"or hub id of that model as {name}"
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"the adapter in {adapter} belongs to the model {base}, which is not there; put it "
            f"back, or correct {name}"
        )
    return base


def name_base(model: Any, base: str) -> None:
    """Have the model's adapter say which base it belongs to, in a way that holds anywhere on this
    machine."""
    place = Path(base)
    model.peft_config["default"].base_model_name_or_path = (
        str(place.resolve()) if place.is_dir() else base
    )


def merged(base: Any, adapter: Path) -> Any:
    """The float base with the adapter's changes added to its weights, which can be trained."""
    from peft import PeftModel

    with without_notices():
        adapted = PeftModel.from_pretrained(base, str(adapter))
    return adapted.merge_and_unload().requires_grad_(True)
