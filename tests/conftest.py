"""Shared by the test modules: a random-weight Qwen2 of a few thousand parameters."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from cpugrpo_edu.models.load import Policy, load_policy
from cpugrpo_edu.models.pretrain import PretrainConfig, new_model, train_tokenizer

TINY = PretrainConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=64, vocabulary=320)

settings.register_profile("cpugrpo", deadline=None)
settings.load_profile("cpugrpo")
torch.set_num_threads(1)


def pytest_configure() -> None:
    """Give each test process, and all that it starts, a core of its own.

    Otherwise every run that a test starts would take a thread for each core, and they would wait
    for each other.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with random weights and the bundled model's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(TINY.vocabulary, samples=200)
    new_model(TINY, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Switch off the cycle collector, so that an object dies with its last reference."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def tiny_policy(tiny_folder: Path) -> Policy:
    """A fresh policy each time, so that a test may change its weights."""
    return load_policy(tiny_folder)
