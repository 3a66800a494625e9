"""Plans made by hand, and what must hold of the batches that come of one, whatever happened on the way."""

from __future__ import annotations

import io
import os
from multiprocessing import context, reduction
from typing import TypeVar

import numpy as np
import torch

from geostream.arrays import pair_codes
from geostream.layout import Layout
from geostream.planning.plan import EpochPlan
from geostream.streaming.pipeline import Batch, ImageSizes

SIZES = ImageSizes(tile=(32, 32), view=(16, 64))


def hand_made_plan(layout: Layout, lanes: int = 1, batch_size: int = 3, epoch: int = 1) -> EpochPlan:
    """Every lane walks its own part of the pairs, view by view, every second place a batch: no two semi-positives meet.

    Pairs that fill no batch are left out.
    """
    pairs = layout.pairs("train")
    parts = []
    for part in np.array_split(np.arange(len(pairs)), lanes):
        same_view = [part[pairs.view[part] == view] for view in np.unique(pairs.view[part])]
        spread = np.concatenate([half for views in same_view for half in (views[0::2], views[1::2])])
        parts.append(spread[: len(spread) // batch_size * batch_size].reshape(-1, batch_size))
    n = min(len(part) for part in parts)
    batches = np.stack([part[:n] for part in parts], axis=1).reshape(-1, batch_size)
    left_out = np.setdiff1d(np.arange(len(pairs)), batches)
    return EpochPlan(
        layout_id=layout.id,
        epoch=epoch,
        seed=0,
        strategy="by hand",
        source="random",
        graph="",
        lanes=lanes,
        batch_size=batch_size,
        place=pairs.place[batches],
        view=pairs.view[batches],
        left_out_place=pairs.place[left_out],
        left_out_view=pairs.view[left_out],
    )


Sent = TypeVar("Sent")


class Spawning:
    """What a process that is being started gets, but in this process."""

    def duplicate_for_child(self, file: int) -> int:
        return os.dup(file)

    class DupFd:
        def __init__(self, file: int) -> None:
            self.file = file

        def detach(self) -> int:
            return self.file


def as_in_a_worker(sent: Sent) -> Sent:
    """Return an object as a loader process that is started with it has it."""
    data = io.BytesIO()
    context.set_spawning_popen(Spawning())  # type: ignore[arg-type]
    try:
        reduction.dump(sent, data)
    finally:
        context.set_spawning_popen(None)
    made: Sent = reduction.ForkingPickler.loads(data.getvalue())
    return made


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    """Every tensor of every batch, bit by bit."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.step == b.step
        assert a.tensors.keys() == b.tensors.keys()
        for name in a.tensors:
            assert torch.equal(a.tensors[name], b.tensors[name]), name


def assert_as_planned(batches: list[Batch], plan: EpochPlan, layout: Layout) -> None:
    """Every pair of the plan's batches once, in the plan's order, none lost and none doubled."""
    pairs = layout.pairs("train")
    made = [batch.tensors["pair"].numpy() for batch in batches]
    assert [batch.step for batch in batches] == list(range(plan.n_batches))
    planned = pair_codes(plan.place, plan.view)
    assert [pair_codes(pairs.place[ids], pairs.view[ids]).tolist() for ids in made] == planned.tolist()
    assert len(np.unique(np.concatenate(made))) == planned.size
