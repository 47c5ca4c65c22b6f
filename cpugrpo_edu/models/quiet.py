"""What the libraries say while they load a model, kept out of what a command prints."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers; a download, which takes longer, keeps its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    shown, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # those of downloads, too
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Hide what PEFT makes transformers say to its developers; no user can act on it."""
    with warnings.catch_warnings():
        # PEFT asks for a name that transformers 6 will drop.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # it corrects that
        yield
