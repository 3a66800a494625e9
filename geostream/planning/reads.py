"""Compute what reading a plan would cost, lane by lane.

The figures are those of a reader without a budget that reads nothing in advance: what the plan needs, not what a reader
holds. A task holds the index of one lane.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from geostream.arrays import Int16, Int32
from geostream.layout import Layout
from geostream.layout.members import MemberTable
from geostream.layout.zarr_groups import Apply
from geostream.planning.schedule import Schedule, interleaved, schedule
from geostream.settings import TrainSettings


class LaneBatches(NamedTuple):
    """A task: the batches of one lane.

    Attributes:
        number: Number of the lane.
        shards: Numbers of the shards that hold its places.
        place: (B, batch size) place ids.
        view: (B, batch size) numbers of the views within their places.
    """

    number: int
    shards: Int32
    place: Int32
    view: Int16


def reads_of(layout: Layout, place: Int32, view: Int16, settings: TrainSettings, apply: Apply = map) -> Schedule:
    """Return the schedule of a plan's reads, without the members that they fetch.

    Args:
        layout: The layout that the plan is for.
        place: (B, batch size) place ids of all batches; batch s is of lane s % lanes.
        view: (B, batch size) numbers of the views within their places.
        settings: Number of lanes, and how to read.
        apply: Applies a function to tasks.
    """
    lanes = settings.plan.lanes
    tasks = []
    for lane in range(lanes):
        of_lane = place[lane::lanes]
        shards = np.flatnonzero(np.bincount(layout.shard_of_place[of_lane.ravel()])).astype(np.int32)
        tasks.append(LaneBatches(lane, shards, of_lane, view[lane::lanes]))
    work = partial(lane_reads, layout, settings.read.look_ahead, settings.read.gap_kib * 2**10)
    return interleaved([made for _, made in sorted(apply(work, tasks), key=lambda one: int(one[0]))])


def lane_reads(layout: Layout, look_ahead: int, gap_bytes: int, lane: LaneBatches) -> tuple[int, Schedule]:
    """Run as a task: schedule the reads of one lane.

    Args:
        layout: The layout to read.
        look_ahead: Number of following batches whose members are merged into the same reads.
        gap_bytes: Longest stretch of unneeded bytes that is read through.
        lane: The lane's batches.

    Returns:
        The lane's number, and its schedule without the members.
    """
    members = MemberTable.of(layout, lane.shards)
    made = schedule(
        list(_images(members, lane.place, lane.view)),
        members.extents,
        members.shard_sizes,
        look_ahead=look_ahead,
        prefetch=0,
        budget_bytes=int(layout.shard_sizes.sum()),
        gap_bytes=gap_bytes,
    )
    none = np.zeros(0, dtype=np.int32)
    return lane.number, replace(made, bring=np.zeros_like(made.bring), row=none, last=none)


def _images(members: MemberTable, place: Int32, view: Int16) -> Int32:
    """Return (B, 2 · batch size) rows of the images that each batch needs: its tiles and its views."""
    lookup = members.lookup()
    tiles = lookup.rows(place.ravel()).reshape(place.shape)
    views = lookup.rows(place.ravel(), view.ravel()).reshape(place.shape)
    return np.concatenate([tiles, views], axis=1)
