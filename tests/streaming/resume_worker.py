"""The ranks of a training, as real processes that take the batches of a plan and say what they took.

Started as ``python -m tests.streaming.resume_worker '<Job as JSON>'``. One process imports torch and forks the ranks: R
imports would take longer than all that is tested. Each rank appends a line "<step> <hash>" to ``rank-<r>.txt`` for each
batch, on disk before it goes on; ``exits.json`` is written when all have ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from geostream.layout import Layout, open_layout
from geostream.planning.plan import EpochPlan, load_plan
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import StreamDataset, plan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import Batch
from geostream.training.augment import Augmenter
from tests.streaming.plans import SIZES

EPOCH, RUN = 1, "run"
PACE = 0.005  # seconds a step, so that a kill finds the ranks at work
HANG = timedelta(seconds=90)  # after which a collective that not all ranks come to is an error


@dataclass(frozen=True)
class Job:
    """What a group of ranks is to do."""

    store: str  # URL; the plan is that of EPOCH in the folder RUN
    folder: str  # where the group writes what it did
    ranks: int
    workers: int
    state: dict[str, Any] | None = None  # where it begins
    port: int | None = None  # of the store at which the ranks meet after every step; None: they never do
    every: int = 1  # batches of the plan between two stored states
    hold: int | None = None  # cursor at which it waits to be killed

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def dataset_of(layout: Layout, plan: EpochPlan, rank: int = 0, ranks: int = 1, **options: Any) -> StreamDataset:
    """A reader's share of the plan, augmented."""
    settings = TrainSettings().changed(tile_size=32, view_height=16, view_width=64, seed=7)
    change = Augmenter(settings, plan.epoch)
    return plan_dataset(layout, plan, SIZES, change=change, options=ReadOptions(**options), rank=rank, ranks=ranks)


def hash_of(batch: Batch) -> str:
    """sha256 of all that is in the batch's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(batch.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def work(job: Job, rank: int) -> None:
    """What one rank does."""
    group = os.getppid()
    store = Store.open(job.store)
    layout = open_layout(store)
    plan = load_plan(store.child(RUN), EPOCH, layout)
    loader = Loader(dataset_of(layout, plan, rank, job.ranks), job.workers, threads=1)
    if job.state is not None:
        loader.load_state_dict(job.state)
    if job.port is not None:
        meeting = TCPStore("127.0.0.1", job.port, is_master=False, timeout=HANG)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=job.ranks, timeout=HANG)
    with Path(job.folder, f"rank-{rank}.txt").open("ab", buffering=0) as taken, loader:
        for batch in loader:
            taken.write(f"{batch.step} {hash_of(batch)}\n".encode())
            os.fsync(taken.fileno())
            state = loader.state_dict()
            if job.port is not None:
                check_same_everywhere(state["cursor"], job.ranks)
            if (rank == 0 or job.port is None) and state["cursor"] % job.every == 0:
                new = Path(job.folder, f"state-{rank}.new")
                new.write_text(json.dumps(state))
                new.replace(new.with_suffix(".json"))
            while job.hold is not None and state["cursor"] >= job.hold and os.getppid() == group:
                time.sleep(0.05)
            time.sleep(PACE)
    if job.port is not None:
        dist.destroy_process_group()


def check_same_everywhere(cursor: int, ranks: int) -> None:
    """All ranks stand at the same place; one that has no batch would keep the others waiting here."""
    cursors = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(cursors, torch.tensor([cursor]))
    assert {int(one) for one in cursors} == {cursor}, cursors


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    ranks = []
    for rank in range(job.ranks):
        if pid := os.fork():
            ranks.append(pid)
            continue
        code = 1
        try:
            work(job, rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    exits = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    Path(job.folder, "exits.json").write_text(json.dumps(exits))


if __name__ == "__main__":
    main()
