"""Fill the last batches of a lane with pairs that clash with one another, by swaps with earlier batches.

On a grid of half-overlapping tiles, each tile clashes with its eight neighbours. So if 400 neighbouring pairs are left
at the end, at most about 100 of them fit into one batch. More fit after some are swapped with pairs of earlier batches
that lie elsewhere.

First, only those swaps are made that keep no shard resident for longer than the lane's last shards. If they do not
suffice, any swap is allowed, the latest batches first, because leaving out a pair costs more than keeping a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Int32

Batches = list[list[int]]


class Rules(NamedTuple):
    """Rules for swaps: the places that may not share a batch, and when each place is resident.

    Attributes:
        place: (P,) row of each pair's place.
        excluded: For each of the N places, the rows of those that may not share a batch with it.
        arrival: (N,) number of the first batch that may use the place.
        held_last: (N,) whether the place's shard is resident when the lane ends.
    """

    place: Int32
    excluded: Csr
    arrival: npt.NDArray[np.int64]
    held_last: npt.NDArray[np.bool_]

    def clashes(self, place: int) -> list[int]:
        """Return the rows of the places that a batch with ``place`` may not hold besides: itself and those excluded."""
        return [place, *self.excluded.row(place).tolist()]


def complete(batches: Batches, spare: list[int], rules: Rules, batch_size: int) -> Batches:
    """Append as many full batches of the spare pairs as swaps allow.

    Args:
        batches: The lane's batches, as lists of pair ids; they are changed in place.
        spare: Ids of the pairs in no batch.
        rules: Which places may not share a batch, and when each is resident.
        batch_size: Pairs in a batch.

    Returns:
        ``batches``, with the new ones at its end. Each pair is in at most one batch.
    """
    earlier = _Earlier(batches, rules)
    while len(spare) >= batch_size:
        made, spare = _independent(spare, rules, batch_size)
        blocked = {other for pair in made for other in rules.clashes(int(rules.place[pair]))}
        for anywhere in (False, True):
            hopeless: set[int] = set()  # places for which there is no swap
            for pair in spare.copy():
                place = int(rules.place[pair])
                if len(made) == batch_size:
                    break
                if place in hopeless:
                    continue
                swapped = earlier.swap(pair, blocked, anywhere)
                if swapped is None:
                    hopeless.add(place)
                    continue
                spare.remove(pair)
                made.append(swapped)
                blocked.update(rules.clashes(int(rules.place[swapped])))
        if len(made) < batch_size:
            break
        batches.append(made)
    return batches


def _independent(spare: list[int], rules: Rules, most: int) -> tuple[list[int], list[int]]:
    """Choose up to ``most`` pairs that do not clash, those with few clashes first; return them and the rest."""
    places = {int(rules.place[pair]) for pair in spare}
    degree = {place: len(places.intersection(rules.clashes(place))) for place in places}
    made: list[int] = []
    rest: list[int] = []
    blocked: set[int] = set()
    for pair in sorted(spare, key=lambda pair: degree[int(rules.place[pair])]):
        place = int(rules.place[pair])
        if place in blocked or len(made) == most:
            rest.append(pair)
        else:
            made.append(pair)
            blocked.update(rules.clashes(place))
    return made, rest


class _Earlier:
    """The batches that swaps are made with; each is indexed at its first use, which most batches never see."""

    def __init__(self, batches: Batches, rules: Rules) -> None:
        self.batches, self.rules = batches[:], rules  # the inner lists are shared, so swaps change ``batches``
        self.slots: dict[int, dict[int, int]] = {}  # batch → place → position in the batch

    def swap(self, pair: int, blocked: set[int], anywhere: bool) -> int | None:
        """Swap ``pair`` for one of a place outside ``blocked``, in the latest possible batch; return it or None."""
        place = int(self.rules.place[pair])
        clashes = self.rules.clashes(place)
        earliest = 0 if anywhere else int(self.rules.arrival[place])
        for number in range(len(self.batches) - 1, earliest - 1, -1):
            slots = self._slots(number)
            in_the_way = [other for other in clashes if other in slots]
            if len(in_the_way) > 1:
                continue
            for other in self._free(in_the_way or slots, blocked, anywhere):
                position = slots.pop(other)
                slots[place] = position
                swapped, self.batches[number][position] = self.batches[number][position], pair
                return swapped
        return None

    def _free(self, places: list[int] | dict[int, int], blocked: set[int], anywhere: bool) -> Iterator[int]:
        """Yield the first place that may leave its batch, if there is one."""
        for other in places:
            if other not in blocked and (anywhere or self.rules.held_last[other]):
                yield other
                return

    def _slots(self, number: int) -> dict[int, int]:
        """Return the position of each place in a batch."""
        if number not in self.slots:
            batch = self.batches[number]
            self.slots[number] = {int(self.rules.place[pair]): at for at, pair in enumerate(batch)}
        return self.slots[number]
