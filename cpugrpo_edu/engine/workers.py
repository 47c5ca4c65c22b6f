"""Several batches at once, each on threads of its own.

A small model's operations are too short to be divided among threads: they wait for each other at
the end of each one, and for whatever else the machine does. Whole batches are long enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """``function`` of each item, in inference mode; results in the order in which they are done.

    ``workers`` threads share torch's present number of threads.
    """
    threads = torch.get_num_threads()

    def call(item: T) -> R:
        with torch.inference_mode():  # torch keeps it for each thread
            return function(item)

    pool = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
    )
    try:
        for future in as_completed([pool.submit(call, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # torch takes the latest number for new threads
