"""Several processes, one run: start them, let them agree, and add up what they hold.

Data parallelism through ``torch.distributed`` with gloo, its library for CPUs: every process
(rank) holds the whole model and trains its share of a step's prompts, and the gradients are
averaged in the backward pass. In a single process every function here does nothing.

All ranks must enter the same collective calls in the same order, or they wait forever. So whatever
one rank decides alone (a clock, a signal, a full disk) is shared before anyone acts on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from cpugrpo_edu.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that evaluates. One that dies is noticed at once."""

LAUNCHED = "CPUGRPO_LAUNCHED"
"""Environment variable of the ranks that ``launch`` starts: the launcher's process id. It prints
their errors."""

LOST = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|timed out", re.I)


def joined() -> bool:
    """Whether a launcher (ours or ``torchrun``) started this process as one of a group."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def join() -> None:
    """Meet the other ranks, if there are any."""
    if joined() and not dist.is_initialized():
        if LAUNCHED in os.environ:
            threading.Thread(target=end_with_launcher, daemon=True).start()
        dist.init_process_group("gloo", timeout=PATIENCE)


def end_with_launcher() -> None:
    """End this rank when its launcher is killed: it would go on writing beside a resumed run."""
    while os.getppid() == int(os.environ[LAUNCHED]):  # another process adopts orphans
        time.sleep(1)
    os._exit(1)


def size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which alone writes files and reports."""
    return rank() == 0


def local_size() -> int:
    """Processes of the group on this machine: they share its cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if size() > 1 else 1


def hosts() -> int:
    """Machines that take part."""
    return len(set(gather(socket.gethostname())))


def barrier() -> None:
    """Wait until all ranks are here."""
    if size() > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank. For small ones: they are pickled."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def agree(value: bool) -> bool:
    """True on all ranks if it is on any."""
    return any(gather(value))


def on_main(do: Callable[[], T]) -> T:
    """Have rank 0 do it while the others wait; all get its result, or raise its error.

    Meanwhile it uses the threads of the ranks beside it.
    """
    if size() == 1:
        return do()
    outcome: list[Any] = [None, None]
    if is_main():
        threads = torch.get_num_threads()
        torch.set_num_threads(threads * local_size())
        try:
            outcome[0] = do()
        except Exception as error:
            outcome[1] = error
        finally:
            torch.set_num_threads(threads)
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    done: T = result
    return done


def share(items: Sequence[T]) -> list[T]:
    """This rank's part of the items; all of them where there are fewer than ranks."""
    return list(items[rank() :: size()] if len(items) >= size() else items)


def average(tensors: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """The mean over ranks of each tensor, by their weights; bitwise the same on all of them."""
    if size() == 1:
        return tensors
    whole = sum(gather(weight))
    mean = {name: (tensors[name] * (weight / whole)).contiguous() for name in sorted(tensors)}
    for tensor in mean.values():
        dist.all_reduce(tensor)
    return {name: mean[name] for name in tensors}


def prompts_per_process(prompts: int, processes: int) -> int:
    """A step's prompts, divided among processes. Raises ``UserError`` if that leaves a rest."""
    if prompts % processes:
        fitting = [n for n in range(1, prompts + 1) if prompts % n == 0]
        raise UserError(
            f"{prompts} prompts a step cannot be shared equally by {processes} processes; "
            f"choose a multiple of {processes} for --prompts-per-step, "
            f"or --nproc from {', '.join(map(str, fitting))}"
        )
    return prompts // processes


# --- What crosses the wire -----------------------------------------------------


class Traffic:
    """Counts the gradient bytes that are all-reduced, as DistributedDataParallel hands them over.

    A ring sends 2 (N - 1) / N times as many from each of N ranks.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.steps = 0

    def watch(self, model: Any) -> None:
        """Call it with the wrapped model, before the first backward pass."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def counted(state: Any, bucket: dist.GradBucket) -> Any:
            self.bytes += bucket.buffer().nbytes
            self.steps += bucket.is_last()
            return allreduce_hook(state, bucket)

        # DDP compares annotations with classes, and in this module annotations are strings.
        counted.__annotations__ = {
            "bucket": dist.GradBucket,
            "return": torch.futures.Future[Tensor],
        }
        model.register_comm_hook(None, counted)

    @property
    def bytes_per_step(self) -> float:
        return self.bytes / self.steps if self.steps else 0.0


def ring_bytes(gradient: float, processes: int) -> float:
    """Bytes each process sends when a ring adds up ``gradient`` bytes (Patarasuk, Yuan 2009)."""
    return 2 * (processes - 1) / processes * gradient


# --- Starting and ending -------------------------------------------------------


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank has gone."""
    return size() > 1 and isinstance(error, RuntimeError) and bool(LOST.search(str(error)))


def leave_word(error: UserError) -> bool:
    """Leave a mistake's sentence to the launcher, which prints it once; False if there is none."""
    if LAUNCHED not in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True


def launch(processes: int, arguments: Sequence[str], go_on: str) -> int:
    """Start ``cpugrpo ARGUMENTS`` as so many ranks on this machine; returns their exit code.

    The first rank that fails ends the others. ``go_on`` tells how to go on after that. This is
    what ``torchrun`` does, by the same functions, but without its pages of messages: on failure
    the user sees one sentence.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.pop(name, None)  # this process's; each rank takes its part of the cores
    os.environ[LAUNCHED] = str(os.getpid())
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="cpugrpo-ranks-") as logs, passing_on_interrupts():
        others = {i: Std.ALL for i in range(1, processes)}  # only rank 0 may write to the terminal
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="cpugrpo",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=10,
            signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=others),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "cpugrpo_edu.cli", *arguments)
        except ChildFailedError as failed:
            return explain(failed.failures, Path(logs), go_on)
        except SignalException as ended:
            return 128 + int(ended.sigval)
        finally:
            logging.disable(logging.NOTSET)
            del os.environ[LAUNCHED]
    return 0


@contextlib.contextmanager
def passing_on_interrupts() -> Iterator[None]:
    """Pass Ctrl-C on to the ranks: they have sessions of their own, so it reaches only this."""

    def pass_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGINT, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def explain(failures: dict[int, Any], logs: Path, go_on: str) -> int:
    """Print one sentence for the failure that came first, in rank 0's name; returns its exit code.

    ``failures`` are the launcher's, by rank, ``logs`` the folder with what the ranks printed.
    """

    def order(failure: Any) -> tuple[bool, bool, bool, bool, int]:
        """Killed, stopped on request, or with a sentence; last those that the launcher ended."""
        code = failure.exitcode
        ended = code == -signal.SIGTERM
        return ended, code >= 0, code != 130, not sentence_of(failure), failure.local_rank

    first = min(failures.values(), key=order)
    if first.exitcode == 130:
        return 130  # it has said so itself
    mistake = sentence_of(first)
    how = f"so the others stopped too; what was complete is saved, {go_on}"
    if mistake:
        sentence = mistake
    elif first.exitcode < 0:
        sentence = (
            f"process {first.local_rank} was ended by {first.signal_name()} (killed, or out of "
            f"memory), {how}"
        )
    else:
        for log in sorted(logs.rglob(f"{first.local_rank}/stderr.log")):
            sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])
        sentence = f"process {first.local_rank} failed, {how}"
    print(f"cpugrpo: {' '.join(sentence.split())}", file=sys.stderr)
    return 2 if mistake else 1


def sentence_of(failure: Any) -> str:
    """What a rank left by ``leave_word``; empty if it left nothing."""
    data = failure.error_file_data
    left = data.get("message") if isinstance(data, dict) else None
    text = str(left["message"] if isinstance(left, dict) else left)
    return text.removeprefix("UserError: ") if "UserError" in text else ""
