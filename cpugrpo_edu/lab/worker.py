"""Call a function in a fresh process, so that its peak memory and its threads are its own."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

from cpugrpo_edu.engine.hardware import configure_threads
from cpugrpo_edu.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def silent(line: str) -> None:
    """Discard progress messages."""


def prepare() -> None:
    """In the fresh process, before it imports torch: set the threads, hush the libraries."""
    warnings.simplefilter("ignore")
    configure_threads()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_worker(function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """What ``function(*arguments, **named)`` returns in a fresh process; all of it can be pickled.

    Raises UserError: the function's own, or one that names the exception it ended with. Ctrl-C
    reaches the worker as well, and waits until it has saved its state.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare) as pool:
        try:
            return pool.submit(function, *arguments, **named).result()
        except UserError:
            raise
        except Exception as error:  # whatever a library raises; or the system killed the process
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{function.__name__} failed in its own process: {what}") from error
