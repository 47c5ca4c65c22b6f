"""A rank of two that has nothing to add to the sum, and does not come to the meeting."""

import json
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    rank = dist.get_rank()
    gradient = torch.full((3,), 2.0 * (1 - rank))  # rank 1: all zero
    start, said = time.perf_counter(), "fine"
    try:
        if gradient.any():  # "no signal, nothing to do"
            dist.all_reduce(gradient)
        else:
            time.sleep(3)  # busy with its next rollouts
    except RuntimeError as error:
        said = re.sub(r"\[[^]]*\] *", "", str(error)).splitlines()[0]
    waited = time.perf_counter() - start
    found = {"said": said, "waited": waited, "gradient": gradient.tolist()}
    Path(folder, f"rank{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
