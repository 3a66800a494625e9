"""Schedule: from a plan's batches to the reads they need, when each may come, and when each member goes.

A pure function, apart from all I/O; the executor next to it (``fetch``) only does what it says. A read is a range of a
shard, merged from the members that a bounded number of batches ahead need there, over gaps that no batch needs and that
are cheaper to read through than to ask for anew. On a plan that walks a clustered layout the reads come out as whole
shards in order; on any other plan as ranges, down to single members, and ``requests_per_gib`` says so.

A member is held from the read that brings it to its last use. Merging brings members before their first use, and first
asks whether the budget bears that: every other member must still find room for its own span, when its turn comes. So
nothing is fetched twice unless the spans from first to last use alone are more than the budget; then the members that
are needed again latest are let go between two uses (Belady's rule) and fetched again. Reads start before they are
needed as far as the budget leaves room, in order of need. ``peak_bytes`` is computed here, before the first read, and a
batch that cannot fit is refused.

Cost: a sort of what the look-ahead window needs per batch, about a millisecond for 64 batches of 128 pairs.

Source: ffcv's ``compute_schedule`` (pages by batch; neither ranges nor a budget) gave the shape.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from geostream.arrays import Bools, Int64
from geostream.errors import BadInput
from geostream.layout.members import Extents

GIB = 2**30
MAX_READ = 56 * 2**20  # longer runs are cut into about equal parts, which travel side by side: 28 MiB at least


@dataclass(frozen=True)
class Schedule:
    """R reads in order of need. A step is a batch, in the reader's order."""

    shard: Int64  # (R,)
    offset: Int64  # (R,) in bytes
    size: Int64  # (R,)
    come: Int64  # (R,) step from which the read may be under way
    first: Int64  # (R,) first step that uses it: it must be there
    bring: Int64  # (R + 1,) read i brings the members bring[i] to bring[i + 1] of the next two
    row: Int64  # (D,) in the layout's index, by read and offset
    last: Int64  # (D,) last step that uses the member: it goes after that step
    peak_bytes: int  # most bytes held at once, reads under way included
    layout_bytes: int  # of all shards that are read from: what random access would hold
    bytes_used: int  # of the members that the batches need, each counted once

    @property
    def bytes_fetched(self) -> int:
        return int(self.size.sum())

    @property
    def requests(self) -> int:
        return len(self.shard)

    @property
    def resident_share(self) -> float:
        """Peak bytes held over the bytes of all shards that the plan reads from."""
        return self.peak_bytes / self.layout_bytes if self.layout_bytes else 0.0

    @property
    def amplification(self) -> float:
        """Bytes fetched over bytes used."""
        return self.bytes_fetched / self.bytes_used if self.bytes_used else 0.0

    @property
    def requests_per_gib(self) -> float:
        return self.requests * GIB / self.bytes_fetched if self.bytes_fetched else 0.0


class _Spans(NamedTuple):
    """Members that must be held from ``first`` to ``last``, sorted by first; one let go in between has several."""

    row: Int64
    rank: Int64  # of the row among all rows that are ever needed
    first: Int64
    last: Int64


def schedule(
    batches: Sequence[Int64],
    extents: Extents,
    shard_sizes: Int64,
    *,
    look_ahead: int,
    prefetch: int,
    budget_bytes: int,
    gap_bytes: int,
) -> Schedule:
    """Reads and releases for ``batches`` (rows of the members that each needs) in the order in which they are needed.

    ``shard_sizes``: (S,) bytes. ``look_ahead``: batches whose needs are merged into one read. ``prefetch``: batches
    that a read may start before its need. ``budget_bytes``: most bytes held at once. ``gap_bytes``: longest stretch of
    unneeded bytes that is read through. Raises BadInput where batches and index contradict one another, and where a
    batch does not fit into the budget.
    """
    members = np.concatenate([np.zeros(0, dtype=np.int64), *batches])
    step = np.repeat(np.arange(len(batches), dtype=np.int64), [len(batch) for batch in batches])
    used = np.unique(members)
    _check(used, extents, shard_sizes)
    spans = _spans(members, step, extents.size, len(batches), budget_bytes)
    load, first, bring, row, last = _merge(spans, extents, len(batches), look_ahead, budget_bytes, gap_bytes)
    start, end = row[bring[:-1]], row[bring[1:] - 1]
    offset = extents.offset[start]
    size = extents.offset[end] + extents.size[end] - offset
    come = _start_early(load, first, size, prefetch, budget_bytes)
    return Schedule(
        shard=extents.shard[start],
        offset=offset,
        size=size,
        come=come,
        first=first,
        bring=bring,
        row=row,
        last=last,
        peak_bytes=int(load.max(initial=0)),
        layout_bytes=int(shard_sizes[np.unique(extents.shard[used])].sum()),
        bytes_used=int(extents.size[used].sum()),
    )


def _check(used: Int64, extents: Extents, shard_sizes: Int64) -> None:
    if not len(used):
        return
    if not 0 <= used[0] <= used[-1] < len(extents.shard):
        raise BadInput("the plan names members that the layout's index does not hold; plan anew from this layout")
    shards, offset, size = (column[used] for column in extents)
    if not 0 <= shards.min() <= shards.max() < len(shard_sizes):
        raise BadInput("the layout's index names shards that the layout does not have; shard the dataset again")
    if offset.min() < 0 or size.min() < 0 or (offset + size > shard_sizes[shards]).any():
        raise BadInput("the layout's index points past the end of a shard; shard the dataset again")


def _pieces(new: Bools) -> tuple[Int64, Int64]:
    """First and last index of each piece, where ``new`` marks the elements that begin one."""
    starts = np.flatnonzero(new)
    return starts, np.append(starts[1:], len(new))[: len(starts)] - 1


def _held(first: Int64, last: Int64, size: Int64, steps: int) -> Int64:
    """(steps,) bytes held at each step by what is held from ``first`` to ``last``."""
    change = np.zeros(steps + 1, dtype=np.int64)
    np.add.at(change, first, size)
    np.subtract.at(change, last + 1, size)
    return np.cumsum(change[:-1])


def _spans(members: Int64, step: Int64, sizes: Int64, steps: int, budget: int) -> _Spans:
    """The spans from first to last use, cut between two uses where all of them together exceed the budget."""
    order = np.lexsort((step, members))
    row, use = members[order], step[order]
    new = np.diff(row, prepend=-1) != 0
    starts, ends = _pieces(new)
    held = _held(use[starts], use[ends], sizes[row[starts]], steps)
    if held.max(initial=0) > budget:
        idle = np.flatnonzero(~new)  # uses that continue a span
        idle = idle[use[idle] - use[idle - 1] > 1]  # and wait for it
        new[_let_go(held, idle, use, sizes[row], budget)] = True
        starts, ends = _pieces(new)
    rank = np.cumsum(np.diff(row[starts], prepend=-1) != 0)
    spans = _Spans(row[starts], rank, use[starts], use[ends])
    return _Spans(*(column[np.argsort(spans.first, kind="stable")] for column in spans))


def _let_go(held: Int64, idle: Int64, use: Int64, size: Int64, budget: int) -> list[int]:
    """Which of the ``idle`` waits to cut, so that no step holds more than the budget: those that end latest, first."""
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
                raise BadInput(
                    f"batch {now} needs {int(held[now]) / 2**20:,.1f} MiB at once, more than the budget of "
                    f"{budget / 2**20:,.1f} MiB; raise buffer_mib, or plan smaller batches"
                )
            end, which = heapq.heappop(waiting)
            held[now:-end] -= size[which]
            cut.append(which)
    return cut


def _merge(
    spans: _Spans, extents: Extents, steps: int, look_ahead: int, budget: int, gap: int
) -> tuple[Int64, Int64, Int64, Int64, Int64]:
    """Reads that bring all spans: (load, first, bring, row, last).

    ``load``: (steps,) what reads and spans not yet read hold, and within the budget throughout. A merged read holds its
    members before their spans begin, and gaps until it is taken apart; where that is too much, fewer batches ahead are
    merged, down to one read a member, which holds nothing but its span.
    """
    load = _held(spans.first, spans.last, extents.size[spans.row], steps)
    bounds = np.searchsorted(spans.first, np.arange(steps + 1))
    unread = np.ones(len(spans.row), dtype=bool)
    found, counts, firsts = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    horizon = look_ahead
    for now in np.unique(spans.first).tolist():
        if not unread[bounds[now] : bounds[now + 1]].any():
            continue
        horizon = min(look_ahead, 2 * horizon + 1)  # at first as far as went before, and a little more
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
        starts, ends = _pieces(np.diff(read, prepend=-1) != 0)
        found.append(which)
        counts.append(ends + 1 - starts)
        firsts.append(np.full(len(starts), now, dtype=np.int64))
    which = np.concatenate(found)
    bring = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return load, np.concatenate(firsts), bring, spans.row[which], spans.last[which]


def _runs(spans: _Spans, ahead: Int64, now: int, extents: Extents, gap: int, *, alone: bool) -> tuple[Int64, Int64]:
    """The spans among ``ahead`` that are read now, by row, and the number of the read that brings each.

    ``alone``: each member by itself.
    """
    ahead = ahead[np.lexsort((spans.first[ahead], spans.row[ahead]))]
    row = spans.row[ahead]
    keep = np.diff(row, prepend=-1) != 0  # a member that is fetched twice: only its next span
    ahead, row = ahead[keep], row[keep]
    shard, offset = extents.shard[row], extents.offset[row]
    end = offset + extents.size[row]
    if not alone:
        # What another batch needs is no gap: read through, it would be fetched twice.
        apart = (np.diff(spans.rank[ahead]) != 1) | (np.diff(shard) != 0) | (offset[1:] - end[:-1] > gap)
        run = np.concatenate([[0], np.cumsum(apart)])
        starts, ends = _pieces(np.diff(run, prepend=-1) != 0)
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
    """What reading ``which`` now holds at each step from ``now`` on, beyond their spans: early members, and gaps."""
    row, first = spans.row[which], spans.first[which]
    size = extents.size[row]
    starts, ends = _pieces(np.diff(read, prepend=-1) != 0)
    early = _held(np.zeros(len(which), dtype=np.int64), first - now - 1, size, int(first.max()) + 1 - now)
    early[0] += int((extents.offset[row[ends]] + size[ends] - extents.offset[row[starts]]).sum() - size.sum())
    return early


def _start_early(load: Int64, first: Int64, size: Int64, prefetch: int, budget: int) -> Int64:
    """Step from which each read may be under way: in order of need, as far ahead as ``load`` (added to) leaves room."""
    come = first.copy()
    earliest = 0
    for start, end in zip(*_pieces(np.diff(first, prepend=-1) != 0), strict=True):  # those needed at the same step
        need, together = int(first[start]), int(size[start : end + 1].sum())
        earliest = max(earliest, need - prefetch)
        full = np.flatnonzero(load[earliest:need] + together > budget)
        if len(full):
            earliest += int(full[-1]) + 1
        load[earliest:need] += together
        come[start : end + 1] = earliest
    return come
