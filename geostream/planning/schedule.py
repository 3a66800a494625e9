"""Schedule the reads that a plan's batches need: which ranges, when each may start, and when each member is released.

This is a pure function without I/O; :mod:`geostream.streaming.fetch` carries the schedule out. A read is a range of a
shard. It is merged from the members that the next batches need there, and includes short gaps that are cheaper to read
through than to request separately. For a plan that follows the order of a clustered layout, the reads are whole shards
in order. For other plans they are ranges, down to single members, as ``requests_per_gib`` shows.

A member is held from the read that fetches it to its last use. Merging fetches members before their first use, and is
done only if the budget still has room for the span, from first to last use, of every other member. So no member is
fetched twice, unless these spans alone exceed the budget. Then the members whose next use is latest are released
between two uses (Belady's rule) and fetched again. Reads start before they are needed as far as the budget allows, in
order of need. ``peak_bytes`` is known before the first read, and a batch that cannot fit is an error.

Lanes share no shard, so each lane is scheduled alone, with its share of the budget, and the schedules are interleaved.

Cost: for each batch a sort of the members in the look-ahead window, about a millisecond for 64 batches of 128 pairs.
Memory: 6 bytes for each member that is fetched, 8 above 65,535 batches, and while a lane is scheduled about 70 for each
of the lane's.

Source: modelled on ffcv's ``compute_schedule``, which has pages for each batch, but neither ranges nor a budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from geostream.arrays import Bools, Int32, Int64, Integers, begins, distinct
from geostream.errors import BadInput
from geostream.layout.members import Extents

GIB = 2**30
MAX_READ = 56 * 2**20  # longer runs are cut into about equal parts of at least 28 MiB, which are read in parallel


@dataclass(frozen=True)
class Schedule:
    """R reads, in order of need, that fetch D members. A step is one batch, in the reader's order.

    Attributes:
        shard: (R,) number of the shard that is read.
        offset: (R,) where the read begins in it, in bytes.
        size: (R,) length of the read in bytes.
        come: (R,) step from which the read may be under way.
        first: (R,) first step that uses the read, which must be complete by then.
        bring: (R, 2) read i fetches the members bring[i, 0] to bring[i, 1] - 1 of ``row`` and ``last``.
        row: (D,) row of each member in the table of members; those of a read lie together, sorted by offset.
        last: (D,) last step that uses the member, which is released after it; a small type, in which a sum overflows.
        held: (B,) bytes held at each step, reads under way included.
        layout_bytes: Bytes of all shards that are read from, which random access would have to hold.
        bytes_used: Bytes of the members that the batches need, each counted once.
    """

    shard: Integers
    offset: Integers
    size: Integers
    come: Int64
    first: Int64
    bring: Int64
    row: Int32
    last: Integers
    held: Int64
    layout_bytes: int
    bytes_used: int

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once, reads under way included."""
        return int(self.held.max(initial=0))

    @property
    def bytes_fetched(self) -> int:
        """Bytes of all reads."""
        return int(self.size.sum())

    @property
    def requests(self) -> int:
        """Number of reads, R."""
        return len(self.shard)

    @property
    def resident_share(self) -> float:
        """Most bytes held at once, divided by the bytes of all shards that are read from."""
        return self.peak_bytes / self.layout_bytes if self.layout_bytes else 0.0

    @property
    def amplification(self) -> float:
        """Bytes fetched, divided by bytes used."""
        return self.bytes_fetched / self.bytes_used if self.bytes_used else 0.0

    @property
    def requests_per_gib(self) -> float:
        """Number of reads for each GiB fetched."""
        return self.requests * GIB / self.bytes_fetched if self.bytes_fetched else 0.0


class _Spans(NamedTuple):
    """Members that must be held from step ``first`` to ``last``, sorted by first.

    A member that is released in between has several spans.
    """

    row: Integers
    rank: Int32  # rank of the row among all rows that are needed at all
    first: Int32
    last: Int32


def schedule(
    batches: Sequence[Integers],
    extents: Extents,
    shard_sizes: Int64,
    *,
    look_ahead: int,
    prefetch: int,
    budget_bytes: int,
    gap_bytes: int,
    lanes: int = 1,
) -> Schedule:
    """Compute the reads and releases for a sequence of batches.

    Args:
        batches: For each batch, the rows in the table of the members that it needs.
        extents: Shard, offset and size of each member in the table.
        shard_sizes: (S,) bytes of each shard.
        look_ahead: Number of following batches of a lane whose members are merged into the same reads.
        prefetch: Number of batches of its lane by which a read may start early.
        budget_bytes: Most bytes held at once; each lane has an equal share.
        gap_bytes: Longest stretch of unneeded bytes that is read through.
        lanes: Number of lanes whose batches come in turn; they share no shard.

    Raises:
        BadInput: The batches do not fit the index, the index does not fit the shards, or a batch exceeds the budget.
    """
    alone: list[Schedule] = []
    # Room for as many members as could be fetched, of which the operating system gives only what is filled. The members
    # stay together by lanes, because putting them into the order of the reads would hold all of them twice.
    most = sum(map(len, batches)) if lanes > 1 else 0
    row, last = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.min_scalar_type(len(batches)))
    stop = 0
    for lane in range(lanes):
        try:
            made = _of_lane(
                batches[lane::lanes], extents, shard_sizes, look_ahead, prefetch, budget_bytes // lanes, gap_bytes
            )
            if lanes == 1:
                return made
            start, stop = stop, stop + len(made.row)
            row[start:stop] = made.row
            last[start:stop] = made.last.astype(np.int32) * lanes + lane
            alone.append(replace(made, bring=made.bring + start, row=row[:0], last=last[:0]))
        except _TooLarge as error:
            share = f"its lane's share of the budget, {lanes} lanes of" if lanes > 1 else "the budget of"
            raise BadInput(
                f"batch {error.step * lanes + lane} needs {error.needed / 2**20:,.1f} MiB at once, more than {share} "
                f"{budget_bytes // lanes / 2**20:,.1f} MiB; raise buffer_mib, or plan smaller batches"
            ) from error
    return replace(interleaved(alone), row=row[:stop], last=last[:stop])


def interleaved(lanes: Sequence[Schedule]) -> Schedule:
    """Return the schedule of a reader that serves several lanes in turn.

    A lane stands at its next batch as soon as its last one is done, so its reads may be under way while the batches of
    the other lanes are made.

    Args:
        lanes: The schedule of each lane alone, without members. The first ones may have one batch more than the others.
    """
    if len(lanes) == 1:
        return lanes[0]
    turn, steps = len(lanes), sum(len(one.held) for one in lanes)
    held = np.zeros(steps, dtype=np.int64)
    for lane, one in enumerate(lanes):
        at = -(-(np.arange(steps) - lane) // turn)  # the lane's own batch, done or still to come, at each step
        done = at >= len(one.held)
        held += np.where(done, 0, one.held[np.minimum(at, len(one.held) - 1)]) if len(one.held) else 0
    first, come = (
        np.concatenate([column(one, lane) for lane, one in enumerate(lanes)])
        for column in (
            lambda one, lane: one.first * turn + lane,
            lambda one, lane: np.where(one.come, (one.come - 1) * turn + lane + 1, 0),
        )
    )
    order = np.lexsort((come, first))
    return Schedule(
        shard=np.concatenate([one.shard for one in lanes])[order],
        offset=np.concatenate([one.offset for one in lanes])[order],
        size=np.concatenate([one.size for one in lanes])[order],
        come=come[order],
        first=first[order],
        bring=np.concatenate([one.bring for one in lanes])[order],
        row=lanes[0].row,
        last=lanes[0].last,
        held=held,
        layout_bytes=sum(one.layout_bytes for one in lanes),
        bytes_used=sum(one.bytes_used for one in lanes),
    )


class _TooLarge(Exception):
    """A batch does not fit into the budget."""

    def __init__(self, step: int, needed: int) -> None:
        super().__init__(step, needed)
        self.step, self.needed = step, needed


def _of_lane(
    batches: Sequence[Integers],
    extents: Extents,
    shard_sizes: Int64,
    look_ahead: int,
    prefetch: int,
    budget_bytes: int,
    gap_bytes: int,
) -> Schedule:
    """Compute the schedule of one lane alone; raise _TooLarge for a batch that exceeds the budget."""
    members = np.concatenate([np.zeros(0, dtype=np.int32), *batches])
    step = np.repeat(np.arange(len(batches), dtype=np.int32), [len(batch) for batch in batches])
    used = distinct(members)
    _check(used, extents, shard_sizes)
    layout_bytes, bytes_used = int(shard_sizes[distinct(extents.shard[used])].sum()), int(extents.size[used].sum())
    del used
    spans = _spans(members, step, extents.size, len(batches), budget_bytes)
    del members, step
    load, first, bring, row, last = _merge(spans, extents, len(batches), look_ahead, budget_bytes, gap_bytes)
    start, end = extents.of(row[bring[:-1]]), extents.of(row[bring[1:] - 1])
    offset, size = start.offset, end.offset + end.size - start.offset
    come = _start_early(load, first, size, prefetch, budget_bytes)
    return Schedule(
        shard=start.shard,
        offset=offset,
        size=size,
        come=come,
        first=first,
        bring=np.stack([bring[:-1], bring[1:]], axis=1),
        row=row.astype(np.int32),
        last=last.astype(np.min_scalar_type(len(batches))),
        held=load,
        layout_bytes=layout_bytes,
        bytes_used=bytes_used,
    )


def _check(used: Integers, extents: Extents, shard_sizes: Int64) -> None:
    """Raise BadInput if members that are used are not in the index, or lie outside of the shards."""
    if not len(used):
        return
    if not 0 <= used.min() <= used.max() < len(extents.shard):
        raise BadInput("the plan names members that the layout's index does not hold; plan anew from this layout")
    shards, offset, size = extents.of(used)
    if not 0 <= shards.min() <= shards.max() < len(shard_sizes):
        raise BadInput("the layout's index names shards that the layout does not have; shard the dataset again")
    if offset.min() < 0 or size.min() < 0 or (offset + size > shard_sizes[shards]).any():
        raise BadInput("the layout's index points past the end of a shard; shard the dataset again")


def _pieces(new: Bools) -> tuple[Int64, Int64]:
    """Return the first and the last index of each piece; ``new`` marks the elements that begin one."""
    starts = np.flatnonzero(new)
    return starts, np.append(starts[1:], len(new))[: len(starts)] - 1


def _held(first: Integers, last: Integers, size: Integers, steps: int) -> Int64:
    """Return (steps,) the bytes held at each step, if each item is held from step ``first`` to ``last``."""
    change = np.zeros(steps + 1, dtype=np.int64)
    np.add.at(change, first, size)
    np.subtract.at(change, last + 1, size)
    return np.cumsum(change[:-1])


def _spans(members: Integers, step: Int32, sizes: Integers, steps: int, budget: int) -> _Spans:
    """Return the spans from first to last use; where they exceed the budget, cut some between two uses."""
    order = np.argsort(members, kind="stable")  # the steps of a member stay in order
    row, use = members[order], step[order]
    del order
    new = begins(row)
    starts, ends = _pieces(new)
    held = _held(use[starts], use[ends], sizes[row[starts]], steps)
    if held.max(initial=0) > budget:
        idle = np.flatnonzero(~new)  # uses that continue a span,
        idle = idle[use[idle] - use[idle - 1] > 1]  # with steps in between that do not use the member
        new[_let_go(held, idle, use, sizes[row], budget)] = True
        starts, ends = _pieces(new)
    spans = _Spans(row[starts], np.cumsum(begins(row[starts]), dtype=np.int32), use[starts], use[ends])
    del row, use, new, starts, ends
    order = np.argsort(spans.first, kind="stable")
    return _Spans(spans.row[order], spans.rank[order], spans.first[order], spans.last[order])


def _let_go(held: Int64, idle: Int64, use: Int32, size: Integers, budget: int) -> list[int]:
    """Choose the waits to cut, of ``idle``, so that no step exceeds the budget; those that end latest come first."""
    cut = []
    held = held.copy()
    waits = idle[np.argsort(use[idle - 1], kind="stable")].tolist()
    waiting: list[tuple[int, int]] = []  # (-end of the wait, use that ends it)
    at = 0
    for now in range(len(held)):
        while at < len(waits) and use[waits[at] - 1] < now:
            heapq.heappush(waiting, (-int(use[waits[at]]), waits[at]))
            at += 1
        while held[now] > budget:
            if not waiting or -waiting[0][0] <= now:
                raise _TooLarge(now, int(held[now]))
            end, which = heapq.heappop(waiting)
            held[now:-end] -= size[which]
            cut.append(which)
    return cut


def _merge(
    spans: _Spans, extents: Extents, steps: int, look_ahead: int, budget: int, gap: int
) -> tuple[Int64, Int64, Int64, Integers, Int32]:
    """Merge the spans into reads; return (load, first, bring, row, last).

    ``load`` (steps,) is the bytes held at each step by reads and by spans not read yet; it stays within the budget. A
    merged read holds its members before their spans begin, and its gaps until it is split into members. If that exceeds
    the budget, fewer batches are merged, down to one read for each member, which holds nothing but its span.
    """
    load = _held(spans.first, spans.last, extents.size[spans.row], steps)
    bounds = np.searchsorted(spans.first, np.arange(steps + 1))
    unread = np.ones(len(spans.row), dtype=bool)
    found, counts, firsts = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    horizon = look_ahead
    for now in distinct(spans.first).tolist():
        if not unread[bounds[now] : bounds[now + 1]].any():
            continue
        horizon = min(look_ahead, 2 * horizon + 1)  # begin slightly above the last horizon that fitted
        while True:
            until = min(now + horizon + 1, steps) if horizon >= 0 else now + 1
            ahead = np.flatnonzero(unread[bounds[now] : bounds[until]]) + bounds[now]
            which, read = _runs(spans, ahead, now, extents, gap, alone=horizon < 0)
            early = _early_load(spans, which, read, now, extents)
            if horizon < 0 or (load[now : now + len(early)] + early).max() <= budget:
                break
            horizon = horizon // 2 if horizon else -1
        load[now : now + len(early)] += early
        horizon = max(horizon, 0)
        unread[which] = False
        starts, ends = _pieces(begins(read))
        found.append(which)
        counts.append(ends + 1 - starts)
        firsts.append(np.full(len(starts), now, dtype=np.int64))
    which = np.concatenate(found)
    bring = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return load, np.concatenate(firsts), bring, spans.row[which], spans.last[which]


def _runs(spans: _Spans, ahead: Int64, now: int, extents: Extents, gap: int, *, alone: bool) -> tuple[Int64, Int64]:
    """Return the spans of ``ahead`` that are read now, sorted by row, and the number of the read that fetches each.

    With ``alone``, each member is a read of its own.
    """
    ahead = ahead[np.lexsort((spans.first[ahead], spans.row[ahead]))]
    keep = begins(spans.row[ahead])  # of a member that is fetched twice, only the next span
    ahead = ahead[keep]
    shard, offset, size = extents.of(spans.row[ahead])
    end = offset + size
    if not alone:
        # A member that another batch needs does not count as a gap: it would be fetched twice.
        apart = (np.diff(spans.rank[ahead]) != 1) | (np.diff(shard) != 0) | (offset[1:] - end[:-1] > gap)
        run = np.concatenate([[0], np.cumsum(apart)])
        starts, ends = _pieces(begins(run))
        run_bytes = (end[ends] - offset[starts])[run]
        parts = -(-run_bytes // MAX_READ)
        part = np.minimum((offset - offset[starts][run]) * parts // np.maximum(run_bytes, 1), parts - 1)
        read = np.concatenate([[0], np.cumsum((np.diff(run) != 0) | (np.diff(part) != 0))])
    else:
        read = np.arange(len(ahead))
    needed = np.zeros(read[-1] + 1, dtype=bool)
    needed[read[spans.first[ahead] == now]] = True
    return ahead[needed[read]], read[needed[read]]


def _early_load(spans: _Spans, which: Int64, read: Int64, now: int, extents: Extents) -> Int64:
    """Return the bytes at each step from ``now`` on that reading ``which`` at ``now`` holds beyond their spans."""
    first, (_, offset, size) = spans.first[which], extents.of(spans.row[which])
    starts, ends = _pieces(begins(read))
    early = _held(np.zeros(len(which), dtype=np.int64), first - now - 1, size, int(first.max()) + 1 - now)
    early[0] += int((offset[ends] + size[ends] - offset[starts]).sum() - size.sum())
    return early


def _start_early(load: Int64, first: Int64, size: Integers, prefetch: int, budget: int) -> Int64:
    """Return the step from which each read may run, as early as ``load`` leaves room; add the reads to it."""
    come = first.copy()
    earliest = 0
    for start, end in zip(*_pieces(begins(first)), strict=True):  # reads needed at the same step
        need, together = int(first[start]), int(size[start : end + 1].sum())
        earliest = max(earliest, need - prefetch)
        full = np.flatnonzero(load[earliest:need] + together > budget)
        if len(full):
            earliest += int(full[-1]) + 1
        load[earliest:need] += together
        come[start : end + 1] = earliest
    return come
