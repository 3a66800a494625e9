"""The end of a lane: full batches out of pairs that clash with one another, by swaps with earlier batches.

On a grid of half-overlapping tiles each tile clashes with its eight neighbours, so of a compact rest of 400 pairs no
more than about 100 fit one batch, however they are chosen. They fit when some of them change places with pairs of
earlier batches that lie elsewhere. First only swaps are made that hold no shard longer than the lane holds its
last ones anyway; where those do not suffice, any swap, the latest batches first, because leaving a pair out costs
more than holding a shard for longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Int32

Batches = list[list[int]]


class Rules(NamedTuple):
    """Who may not meet, and who is resident when."""

    place: Int32  # (P,) row of each pair's place
    excluded: Csr  # N rows: the places that may not share a batch with it
    arrival: npt.NDArray[np.int64]  # (N,) number of the first batch that may use the place
    held_last: npt.NDArray[np.bool_]  # (N,) its shard is held when the lane ends

    def clashes(self, place: int) -> list[int]:
        """The places that no batch with ``place`` may hold: itself and those excluded."""
        return [place, *self.excluded.row(place).tolist()]


def complete(batches: Batches, spare: list[int], rules: Rules, batch_size: int) -> Batches:
    """``batches`` and as many more as the ``spare`` pairs yield: all but less than a batch of them, where swaps allow.

    Every pair stays in at most one batch. ``batches`` is changed in place, the new ones follow at its end.
    """
    earlier = _Earlier(batches, rules)
    while len(spare) >= batch_size:
        made, spare = _independent(spare, rules, batch_size)
        blocked = {other for pair in made for other in rules.clashes(int(rules.place[pair]))}
        for anywhere in (False, True):
            hopeless: set[int] = set()  # places without a swap
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
    """Up to ``most`` of the pairs that clash with none of each other, and the rest; those with few clashes first."""
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
    """The batches that swaps are made with; indexed when a batch is first looked at, which most never are."""

    def __init__(self, batches: Batches, rules: Rules) -> None:
        self.batches, self.rules = batches[:], rules  # the lists themselves are shared: swaps show in ``batches``
        self.slots: dict[int, dict[int, int]] = {}  # batch → place → position in the batch

    def swap(self, pair: int, blocked: set[int], anywhere: bool) -> int | None:
        """Put ``pair`` into the latest batch that can take it for a pair outside ``blocked``; return the latter."""
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
        for other in places:
            if other not in blocked and (anywhere or self.rules.held_last[other]):
                yield other
                return

    def _slots(self, number: int) -> dict[int, int]:
        if number not in self.slots:
            batch = self.batches[number]
            self.slots[number] = {int(self.rules.place[pair]): at for at, pair in enumerate(batch)}
        return self.slots[number]
