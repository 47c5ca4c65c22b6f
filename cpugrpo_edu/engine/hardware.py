"""The threads that torch may use, and where the bundled model is.

Nothing here imports torch until a function needs it: thread counts are read by
OpenMP and MKL once, when torch is first imported, so :func:`configure_threads`
has to be able to speak first.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.machine import PACKAGE, usable_cores

BUNDLED_MODEL = PACKAGE / "models" / "bundled" / "model.safetensors"

_before_torch: bool | None = None


def configure_threads(threads: int | None = None) -> dict[str, Any]:
    """Give torch its threads; call it before torch does any work. Safe to call again.

    ``None`` takes the usable physical cores, shared among the processes of this
    machine under ``torch.distributed.run``. Returns what is in force afterwards,
    and whether oneDNN (mkldnn) and MKL are there; torch uses both by itself.
    """
    if threads is None:
        threads = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise UserError(
            f"threads is {threads!r}; it must be a whole number from 1 to 1024; "
            "leave it out to use every usable core"
        )
    global _before_torch
    if _before_torch is None:  # of the first call, which is the one that counts
        _before_torch = "torch" not in sys.modules
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)  # read at import, and inherited by child processes
    # Large tensors on pages of 2 MiB where the system has them: a fresh page of 4 KiB costs a
    # trip into the kernel, and a training step of a large model needs a million of them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # oneDNN keeps the code it makes for each shape of a product, 1024 pieces by default. Every
    # micro-batch has a shape of its own, so a run grew by 17 MB a step.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        # One stream of operators: a transformer's layers wait for each other anyway.
        # torch refuses once parallel work has begun, or at a second call.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "before_torch": _before_torch,
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "mkl": torch.backends.mkl.is_available(),
    }
