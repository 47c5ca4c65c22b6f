"""A rank of two: its share of the toy gradient, added up over the ranks; and some timings."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cpugrpo_edu.engine.hardware import configure_threads
from cpugrpo_edu.record.machine import usable_cores


def gradient(rank: int) -> list[list[float]]:
    """The same toy on every rank, its own tokens on each; the sum on both."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    tokens = torch.randint(6, (40,))
    advantages = torch.randn(40, dtype=torch.float64)
    weights = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    mine = slice(0, 28) if rank == 0 else slice(28, 40)
    log_p = (x[mine] @ weights).log_softmax(-1)
    chosen = log_p.gather(1, tokens[mine][:, None])[:, 0]
    [own] = torch.autograd.grad(-(advantages[mine] * chosen).sum(), weights)
    dist.all_reduce(own)  # the sum, on every rank
    found: list[list[float]] = (own / 40).tolist()
    return found


def seconds(work: Callable[[], Any], repeats: int) -> float:
    work()
    dist.barrier()  # all ranks start together
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {"inherited": torch.get_num_threads(), "gradient": gradient(rank)}
    a = torch.randn(512, 512)
    found["crowded"] = seconds(lambda: a @ a, 20)
    threads = configure_threads()["threads"]  # reads LOCAL_WORLD_SIZE
    found["fair"] = threads == max(1, usable_cores() // ranks)
    found["split"] = seconds(lambda: a @ a, 20)
    big = torch.ones(2**20)
    found["all_reduce"] = seconds(lambda: dist.all_reduce(big), 5)
    found["bytes"] = big.nbytes
    Path(folder, f"rank{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
