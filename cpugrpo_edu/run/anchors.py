"""Save and load the anchor of EWC."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.ewc import Anchor
from cpugrpo_edu.record.files import replacing


def save_anchor(anchor: Anchor, path: str | Path) -> Path:
    """Write as safetensors, tensors named ``params/<name>`` and ``fisher/<name>``."""
    tensors = {f"params/{n}": p.contiguous() for n, p in anchor.params.items()}
    tensors |= {f"fisher/{n}": f.contiguous() for n, f in anchor.fisher.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    return Path(path)


def load_anchor(path: str | Path) -> Anchor:
    """Read what ``save_anchor`` wrote; UserError if the file is not an anchor."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read an anchor from {path}: {error}; give a file that save_anchor wrote"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "fisher": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    if len(parts) != 2 or parts["params"].keys() != parts["fisher"].keys():
        raise UserError(
            f"{path} is not an anchor: its tensors must be params/<name> and fisher/<name> in "
            "pairs; give a file that save_anchor wrote"
        )
    return Anchor(**parts)
