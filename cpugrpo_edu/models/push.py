"""Publish a saved model on the Hugging Face hub, with its model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cpugrpo_edu.errors import UserError

FILES = [
    "*.safetensors",
    "*.gguf",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "README.md",
    "LICENSE*",
]
NOT_THESE = ["record.json", "adapter/README.md", ".*"]
"""The record tells of this machine, and so does the card that PEFT writes for the adapter."""


def push(folder: Path, target: str, *, private: bool = False, api: Any = None) -> str:
    """Upload the model in ``folder`` to the hub as ``target``, "owner/name"; returns its address.

    ``api`` is a ``huggingface_hub.HfApi``. Raises UserError for a folder without model or model
    card, before anything is sent, and if the hub refuses.
    """
    kinds = ("*.safetensors", "*.gguf", "adapter/*.safetensors")
    if not any(path for kind in kinds for path in folder.glob(kind)):
        raise UserError(f"{folder} holds no saved model; give a folder such as runs/first/model")
    if not (folder / "README.md").is_file():
        raise UserError(
            f"{folder} has no model card, README.md; write one, so that others know what it is"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", target):
        raise UserError(f"the target is {target!r}; give a hub id: owner/name")
    import httpx
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        url = api.create_repo(target, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=target,
            folder_path=folder,
            allow_patterns=FILES,
            ignore_patterns=NOT_THESE,
            commit_message="Model and model card, by cpugrpo push",
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"the hub did not take the model ({reason[0]}); log in with an account that may write "
            f"to {target} (hf auth login), check the network, then repeat the command"
        ) from error
    return str(url)
