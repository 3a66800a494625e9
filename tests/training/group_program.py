"""What one rank of a group does: ``group_program.py FOLDER HOW``; it writes what it was told to FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from geostream.errors import BadInput, GeostreamError
from geostream.training import distributed as ranks
from geostream.training.distributed import ProcessGroup


def told(group: ProcessGroup) -> dict[str, object]:
    """By every method."""
    own = torch.full((2, 3), float(group.rank))
    gathered = group.gather(own.requires_grad_())
    collected = group.collect(torch.tensor([group.rank]))
    if not group.is_main:
        time.sleep(0.5)  # what the first rank has to wait for
    here = time.monotonic()
    group.barrier()
    return {
        "gather": [gathered[:, 0].tolist(), list(gathered.shape), gathered.requires_grad],
        "collect": None if collected is None else collected.tolist(),
        "sum": group.sum(torch.tensor([1.0, group.rank])).tolist(),
        "mean": group.mean(torch.tensor([1.0, group.rank])).tolist(),
        "most": group.most(10 * group.rank),
        "broadcast": group.broadcast_object({"rank": group.rank, "none": None}),
        "collect_objects": group.collect_objects([group.rank]),
        "waited": time.monotonic() - here,
        "device": str(group.device),
    }


def main(folder: str, how: str) -> None:
    with ProcessGroup.current() as group:
        if how == "tell":
            Path(folder, f"{group.rank}.json").write_text(json.dumps(told(group)))
        elif how == "the first, waited for":
            if group.is_main:
                raise BadInput("the disk is on fire")
            group.broadcast_object(None)
        elif how == "the other, in a step":
            if group.rank == 1:
                raise BadInput("the disk is on fire")
            group.sum(torch.ones(3))
        elif how == "all":
            raise BadInput("the disk is on fire")
        elif how == "killed":
            if group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            group.sum(torch.ones(3))
        elif how in ("silent, the first", "silent, the other"):  # as a rank whose machine is gone
            if group.is_main == (how == "silent, the first"):
                os.kill(os.getpid(), signal.SIGSTOP)
            group.sum(torch.ones(3))


if __name__ == "__main__":
    ranks.HEARTBEAT_INTERVAL, ranks.HEARTBEAT_TIMEOUT, ranks.SHUTDOWN_TIMEOUT = 0.5, 4.0, 3.0
    try:
        main(*sys.argv[1:])
    except GeostreamError as error:  # as the command does
        print(f"geostream: {error}", file=sys.stderr)
        sys.exit(1)
