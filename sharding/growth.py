"""Find what a raw folder has that a layout lacks: new places, changed ones, and those that are gone.

A place is the same where its area and the path of its tile are, whatever its key. A raw file is the same where size and
time, or on a server its ETag, are as noted in ``sources.parquet``; else it is read, and its checksum decides. For a
layout without that table every file is read once, encoded, and compared with the stored bytes. A file that has changed
and is broken now does not count: the stored image stays.

The test set is frozen unless it is to be extended. Its tiles and queries stay as they are, nothing joins it, and
nothing of it is trained on. What is left out for that is counted.

Memory holds all places, of the raw folder and of the layout: about 1 kB each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import google_crc32c
import numpy as np

from geostream.arrays import pair_codes
from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.layout.layout import FACTS, view_numbers
from geostream.progress import Bar
from sharding.encode import BrokenImage
from sharding.job import Images, listed
from sharding.places import (
    LONGEST_KEY,
    SPLIT_ORDER,
    Broken,
    KeptImage,
    Place,
    RawDataset,
    RawImage,
    TileImage,
    View,
)
from sharding.sources import Source, Stamp, sources_of
from sharding.workers import in_order

UNIT = 32  # images that a worker compares before it answers
STATS = 16  # files that are looked at, but not read, at the same time
SAME = -1  # in the place of a checksum
AT_ONCE = 2**16  # rows of a table that are Python objects at the same time

# What is counted, and how a note says it. None of them: nothing has changed.
NOTES = {
    "new places": "{} new places",
    "changed places": "{} places have changed, with {images} images that are new or others",
    "removed places": "{} places were removed",
    "removed views": "{} views were removed from places that stay",
    "moved views": "{} views belong to other places now",
    "missing places": "{} places are no longer in the raw folder and stay (--remove-missing removes them)",
    "missing images": "{} images are no longer in the raw folder and stay (--remove-missing removes them)",
    "broken": "{} raw files have changed and are broken now; the stored images stay",
    "left-out test tiles": "{} new tiles of the test gallery were left out: it is frozen (--extend-test takes them)",
    "left-out test views": "{} new test views were left out: the test set is frozen (--extend-test takes them)",
    "left-out test changes": "{} changes of test tiles and test views were left out (--extend-test takes them)",
    "left-out test removals": "{} removals of test places and test views were left out (--extend-test takes them)",
    "left-out training views": "{} new training views were left out: their tiles are of the test gallery alone",
}


class Stored(NamedTuple):
    """A place of a layout.

    Attributes:
        place: as it is stored; its images are those that are stored.
        removed: it has no members.
    """

    place: Place
    removed: bool


@dataclass(frozen=True)
class Growth:
    """Describe what an append adds to a layout, and what it takes away.

    Attributes:
        parent: the layout before it.
        stored: the places of that layout, by id.
        places: the places of the new layout: first those of the layout before, by id, then the new ones.
        written: ids of new and changed places, which are written to new shards.
        removed: ids of places that were removed, now or before.
        rows_changed: the table of places changes even where nothing is written, by semi-positives.
        sources: what is known of the raw files of what is stored, of new ones excepted.
        broken: raw images that are left out without being read again.
        counts: what came, changed, went and was left out, by the names in ``NOTES``; and "changed images".
        compared: raw files that were read to compare them.
        compared_bytes: of these.
        fingerprint: hash of all this, and of the layout before.
    """

    parent: Layout
    stored: tuple[Stored, ...]
    places: tuple[Place, ...]
    written: frozenset[int]
    removed: frozenset[int]
    rows_changed: bool
    sources: dict[str, Source]
    broken: tuple[Broken, ...]
    counts: Counter[str]
    compared: int
    compared_bytes: int
    fingerprint: str

    @property
    def is_nothing(self) -> bool:
        """Whether the layout before has all of it already."""
        return not (self.written or self.counts["removed places"] or self.rows_changed)

    @property
    def notes(self) -> list[str]:
        """What a person should know, a line each."""
        images = self.counts["changed images"]
        return [text.format(self.counts[name], images=images) for name, text in NOTES.items() if self.counts[name]]


@dataclass(frozen=True)
class Rules:
    """Choose what an append may take away and extend.

    Attributes:
        remove_missing: places and images that the raw folder lacks are removed.
        extend_test: the test set may change.
    """

    remove_missing: bool = False
    extend_test: bool = False


def find_growth(raw: RawDataset, parent: Layout, images: Images, rules: Rules, workers: int) -> Growth:
    """Compare a raw folder with a layout that was made from an earlier state of it.

    Args:
        raw: the data set, as it is now.
        parent: the layout.
        images: how its images are read and encoded.
        rules: what may be taken away and extended.
        workers: processes that read and encode what is compared.

    Raises:
        BadInput: two places would get one key.
    """
    stored = stored_places(parent)
    seen = _compare(raw, stored, parent, images, workers)
    return _Comparison(raw, parent, stored, seen, rules).result()


def stored_places(layout: Layout) -> tuple[Stored, ...]:
    """Return the places of a layout by id, with the images that it stores and the keys of their semi-positives."""
    number = view_numbers(layout.members["member"])
    rows = np.flatnonzero(number > FACTS)
    codes = pair_codes(layout.members["place"].to_numpy()[rows], (number[rows] + 1).astype(np.int16))
    order = np.argsort(codes)
    codes, rows = codes[order], rows[order]
    paths, keys = layout.shard_paths, layout.keys
    places = []
    for start in range(0, layout.n_places, AT_ONCE):
        some = layout.places.slice(start, AT_ONCE).to_pylist()
        first, last = np.searchsorted(codes, [start << 16, (start + len(some)) << 16])
        members = layout.members.take(rows[first:last]).to_pylist()
        of_code = dict(zip(codes[first:last].tolist(), members, strict=True))
        for place, row in enumerate(some, start):
            kept = [_kept(of_code.get(place << 16 | n), path, paths) for n, path in enumerate(_paths(row))]
            views = tuple(_view(view, image, keys) for view, image in zip(row["views"], kept[1:], strict=True))
            one = Place(row["key"], row["area"], tuple(row["splits"]), kept[0], row["north"], row["east"], views)
            places.append(Stored(one, not isinstance(kept[0], KeptImage)))
    return tuple(places)


def _paths(row: dict[str, Any]) -> list[str]:
    return [row["source"], *(view["source"] for view in row["views"])]


def _kept(member: dict[str, Any] | None, path: str, paths: Sequence[str]) -> RawImage:
    if member is None:
        return RawImage(path, "", present=False)
    where = {"offset": member["offset"], "size": member["size"], "crc32c": member["crc32c"]}
    suffix = cast(Literal["jpg", "png"], member["member"].rpartition(".")[2])
    return KeptImage(path, "", shard=paths[member["shard"]], suffix=suffix, **where)


def _view(row: dict[str, Any], image: RawImage, keys: Sequence[str]) -> View:
    semi = tuple(sorted(keys[place] for place in row["semi_positives"]))
    return View(image, row["split"], row["north"], row["east"], semi)


class Compared(NamedTuple):
    """Describe a raw file that was read to compare it.

    Attributes:
        source: what was read.
        stored: checksum of what would be stored; SAME: the file is as it was; None: it is broken.
    """

    source: Source
    stored: int | None


@dataclass(frozen=True)
class _Seen:
    """What is known of the raw files: ``known`` from the layout, ``read`` of those that were read now, by path."""

    known: dict[str, Source]
    read: dict[str, Compared]

    def is_changed(self, kept: KeptImage) -> bool:
        """Whether the raw file of a stored image is another one, and whole."""
        found = self.read.get(kept.path)
        return found is not None and found.stored not in (None, SAME, kept.crc32c)

    def broken(self, image: RawImage) -> Broken | None:
        """Return why an image that is not stored is left out without being read again; None: it is to be read."""
        if not image.present:
            return Broken(image.path, image.named, "missing")
        if found := self.read.get(image.path):
            return Broken(image.path, image.named, found.source.broken) if found.stored is None else None
        reason = self.known[image.path].broken if image.path in self.known else ""
        return Broken(image.path, image.named, reason) if reason else None


def _compare(raw: RawDataset, stored: Sequence[Stored], parent: Layout, images: Images, workers: int) -> _Seen:
    """Look at the raw files of all that is stored or was broken, and read those whose size or time is another."""
    known = sources_of(parent)
    was_broken = frozenset(text.split(": ", 2)[1] for text in parent.info["broken"] if text.count(": ") > 1)
    of_stored = {_identity(one.place): one.place for one in stored if not one.removed}
    wanted: dict[str, tuple[RawImage, bool, Source | None]] = {}
    for place in raw.places:
        old = of_stored.get(_identity(place))
        there = {image.path for image in old.images()} if old else set()
        for image in place.images():
            noted = image.path in was_broken if known is None else image.path in known
            if image.present and (noted or image.path in there):
                wanted[image.path] = image, image is place.tile, (known or {}).get(image.path)
    if known is not None:
        with ThreadPoolExecutor(STATS) as threads:
            found = list(threads.map(partial(_stamp, images), (image for image, _, _ in wanted.values())))
        stamps = dict(zip(wanted, found, strict=True))
        same = {path for path, stamp in stamps.items() if path in known and stamp and stamp.is_same(known[path].stamp)}
        wanted = {path: image for path, image in wanted.items() if path not in same}
    tasks = list(wanted.values())
    units = [(images, tasks[start : start + UNIT]) for start in range(0, len(tasks), UNIT)]
    read: dict[str, Compared] = {}
    with (
        Bar("compared", len(tasks)) as bar,
        closing(in_order(compare_images, units, min(workers, max(len(units), 1)))) as results,
    ):
        for some in results:
            read |= {one.source.path: one for one in some}
            bar.advance(len(some))
    return _Seen(known or {}, read)


def _stamp(images: Images, image: RawImage) -> Stamp | None:
    """Return what tells a raw file's version without reading it; None where it is gone, or nothing tells it."""
    return image.stamp or images.reader.stamp(image.path)


def compare_images(unit: tuple[Images, list[tuple[RawImage, bool, Source | None]]]) -> list[Compared]:
    """Read some images, and encode those that have changed; leave out those that cannot be read. A worker runs this."""
    images, some = unit
    found = []
    for image, is_tile, known in some:
        with suppress(BrokenImage):
            if not isinstance(image, TileImage):  # a tile of imagery is compared as it is stored
                data, stamp = images.read(image)
                if known and (len(data), google_crc32c.value(data)) == (known.bytes, known.crc32c):
                    found.append(Compared(known.stamped(stamp), None if known.broken else SAME))
                    continue
        stored, source = images.load(image, is_tile=is_tile)
        if source is not None:
            crc32c = None if isinstance(stored, Broken) else google_crc32c.value(stored.data)
            found.append(Compared(source, crc32c))
    return found


def _identity(place: Place) -> tuple[str, str]:
    return place.area, place.tile.path


def _is_test(place: Place) -> bool:
    return "test" in place.splits or any(view.split != "train" for view in place.views)


class _Comparison:
    """Compare place by place; everything that needs the raw files is in ``seen``."""

    def __init__(self, raw: RawDataset, parent: Layout, stored: tuple[Stored, ...], seen: _Seen, rules: Rules) -> None:
        self.raw, self.parent, self.stored, self.seen = raw, parent, stored, seen
        self.removing, self.frozen = rules.remove_missing, not rules.extend_test
        self.named = {view.image.path for place in raw.places for view in place.views}
        self.tested = {view.image.path for one in stored for view in one.place.views if view.split != "train"}
        self.ids = {_identity(one.place): number for number, one in enumerate(stored)}
        self.counts: Counter[str] = Counter()
        self.broken: list[Broken] = [*raw.left_out]
        self.changed: dict[str, int] = {}  # checksums of the raw files that have changed, by path

    def result(self) -> Growth:
        """Compare all places."""
        keys = self._keys()
        found: dict[int, Place | None] = {}  # by id; None: to be removed
        new: list[Place] = []
        for raw in self.raw.places:
            place = replace(
                raw,
                key=keys[raw.key],
                views=tuple(
                    replace(view, semi_positives=tuple(sorted(keys.get(key, key) for key in view.semi_positives)))
                    for view in raw.views
                ),
            )
            number = self.ids.get(_identity(place))
            if number is None or self.stored[number].removed:
                taken = self._new(place)
                if taken is not None and number is None:
                    new.append(taken)
                elif taken is not None and number is not None:
                    found[number] = taken
                    self.counts["new places"] += 1
            else:
                found[number] = self._again(place, self.stored[number].place)
        self.counts["new places"] += len(new)
        places, written, removed = self._rows(found)
        written |= set(range(len(places), len(places) + len(new)))
        places += sorted(new, key=lambda place: (place.area, place.key))
        places, rows_changed = self._live(places, written, removed)
        return Growth(
            parent=self.parent,
            stored=self.stored,
            places=tuple(places),
            written=frozenset(written),
            removed=frozenset(removed),
            rows_changed=rows_changed,
            sources=self._sources(places),
            broken=tuple(self.broken),
            counts=+self.counts,
            compared=len(self.seen.read),
            compared_bytes=sum(one.source.bytes for one in self.seen.read.values()),
            fingerprint=self._fingerprint(places, written, removed),
        )

    def _keys(self) -> dict[str, str]:
        """Return the key that each raw key becomes: that of the stored place, or one that no other has."""
        taken = {one.place.key for one in self.stored}
        keys = {}
        for place in self.raw.places:
            if (number := self.ids.get(_identity(place))) is not None:
                keys[place.key] = self.stored[number].place.key
                continue
            key = place.key
            if key in taken:
                suffix = google_crc32c.value("/".join(_identity(place)).encode())
                key = f"{key[: LONGEST_KEY - 9]}_{suffix:08x}"
            if key in taken:
                raise BadInput(
                    f"{place.tile.named}: {place.tile.path}: a place of the layout has its key {key}; rename it"
                )
            taken.add(key)
            keys[place.key] = key
        return keys

    def _new(self, place: Place) -> Place | None:
        """Return a place that is not stored, as it is to be written; None: not at all."""
        splits, views = place.splits, list(place.views)
        if self.frozen:
            splits = tuple(split for split in splits if split != "test")
            views = [view for view in views if view.split == "train"]
            self.counts["left-out test tiles"] += len(splits) < len(place.splits)
            self.counts["left-out test views"] += len(place.views) - len(views)
            if len(splits) < len(place.splits) and not splits:
                return None
        if broken := self.seen.broken(place.tile):
            self.broken.append(broken)
            return None
        return replace(place, splits=splits, views=self._whole(views))

    def _whole(self, views: Iterable[View]) -> tuple[View, ...]:
        """Return those of some new views that are not known to be broken, and note the others."""
        whole = []
        for view in views:
            if self.frozen and view.image.path in self.tested:  # as the query of another place
                self.counts["left-out test changes"] += 1
            elif broken := self.seen.broken(view.image):
                self.broken.append(broken)
            else:
                whole.append(view)
        return tuple(whole)

    def _again(self, place: Place, old: Place) -> Place | None:
        """Return a stored place as it is to be now; None: it is to be removed."""
        frozen = self.frozen and "test" in old.splits
        if not place.tile.present and self.removing:
            if not (self.frozen and _is_test(old)):
                return None
            self.counts["left-out test removals"] += 1
        tile = self._image(place.tile, old.tile, frozen=frozen)
        splits = place.splits
        if frozen:
            splits = old.splits
        elif self.frozen:
            self.counts["left-out test tiles"] += "test" in splits
            splits = tuple(split for split in splits if split != "test") or old.splits
        views = sorted(self._views(place, old), key=lambda view: (SPLIT_ORDER[view.split], view.image.path))
        north, east = (old.north, old.east) if frozen else (place.north, place.east)
        return Place(old.key, old.area, splits, tile, north, east, tuple(views))

    def _views(self, place: Place, old: Place) -> Iterator[View]:
        """Yield the views that a stored place is to have now."""
        before = {view.image.path: view for view in old.views}
        now = {view.image.path: view for view in place.views}
        closed = self.frozen and "test" in old.splits and "train" not in old.splits  # nothing of it is trained on
        for path, view in now.items():
            if path in before:
                was = before[path]
                if self.frozen and {view.split, was.split} != {"train"}:
                    self.counts["left-out test changes"] += view.split != was.split
                    yield replace(was, image=self._image(view.image, was.image, frozen=True))
                elif view.image.present or not self.removing:
                    yield replace(view, image=self._image(view.image, was.image, frozen=False))
                else:
                    self.counts["removed views"] += 1
            elif self.frozen and view.split != "train":
                self.counts["left-out test views"] += 1
            elif closed:
                self.counts["left-out training views"] += 1
            else:
                yield from self._whole([view])
        for path, view in before.items():
            if path in now:
                continue
            if path in self.named and not (self.frozen and view.split != "train"):
                self.counts["moved views"] += 1
                continue
            if self.removing and not (self.frozen and view.split != "train"):
                self.counts["removed views"] += 1
                continue
            self.counts["left-out test removals" if self.removing else "missing images"] += 1
            yield view

    def _image(self, image: RawImage, kept: RawImage, *, frozen: bool) -> RawImage:
        """Return where the bytes of a stored image are to come from: the raw file where it has changed."""
        assert isinstance(kept, KeptImage)
        kept = replace(kept, named=image.named)
        if not image.present:
            self.counts["missing images"] += 1
            return kept
        found = self.seen.read.get(kept.path)
        if found is not None and found.stored is None:
            self.counts["broken"] += 1
            self.broken.append(Broken(image.path, image.named, found.source.broken))
            return kept
        if not self.seen.is_changed(kept):
            return kept
        if frozen:
            self.counts["left-out test changes"] += 1
            return kept
        assert found is not None
        self.changed[kept.path] = found.source.crc32c
        return image

    def _rows(self, found: dict[int, Place | None]) -> tuple[list[Place], set[int], set[int]]:
        """Return the stored places as they are to be now, and the ids of those that are written or removed."""
        places, written, removed = [], set[int](), set[int]()
        for number, (old, gone) in enumerate(self.stored):
            place = found.get(number, old)
            if number not in found and not gone:
                if self.removing and self.frozen and _is_test(old):
                    self.counts["left-out test removals"] += 1
                elif self.removing:
                    place = None
                else:
                    self.counts["missing places"] += 1
            if place is None:
                self.counts["removed places"] += 1
            if place is None or (gone and number not in found):
                removed.add(number)
                places.append(replace(old, splits=(), views=(), tile=RawImage(old.tile.path, "", present=False)))
                continue
            places.append(place)
            if gone:
                written.add(number)
            elif _facts(place) == _facts(old) and all(isinstance(one, KeptImage) for one in place.images()):
                of_path = {view.image.path: view for view in place.views}
                views = tuple(of_path[view.image.path] for view in old.views)  # numbered as they are stored
                places[-1] = replace(place, splits=old.splits, views=views)
            else:
                written.add(number)
                self.counts["changed places"] += 1
                kept = {image.path for image in place.images() if isinstance(image, KeptImage)}
                self.counts["changed images"] += sum(image.path not in kept for image in place.images())
        return places, written, removed

    def _live(self, places: list[Place], written: set[int], removed: set[int]) -> tuple[list[Place], bool]:
        """Leave out removed semi-positives; return whether a place that is not written has others than before."""
        keys = {place.key for number, place in enumerate(places) if number not in removed}
        changed, live = False, []
        for number, place in enumerate(places):
            views = tuple(
                replace(view, semi_positives=tuple(key for key in view.semi_positives if key in keys))
                for view in place.views
            )
            live.append(replace(place, views=views))
            if number < len(self.stored) and number not in written | removed:
                old = {view.image.path: sorted(view.semi_positives) for view in self.stored[number].place.views}
                changed |= any(sorted(view.semi_positives) != old[view.image.path] for view in views)
        return live, changed

    def _sources(self, places: Iterable[Place]) -> dict[str, Source]:
        """Return what is known of the raw files of stored images; of those that have not changed, as they were seen."""
        kept = {image.path: image for place in places for image in place.images() if isinstance(image, KeptImage)}
        sources = {}
        for path in [*self.seen.known, *self.seen.read]:
            known, found = self.seen.known.get(path), self.seen.read.get(path)
            left_out = found is not None and path in kept and self.seen.is_changed(kept[path])  # frozen
            source = known if found is None or left_out else found.source
            if source is not None and (path in kept or source.broken):
                sources[path] = source
        return sources

    def _fingerprint(self, places: Sequence[Place], written: set[int], removed: set[int]) -> str:
        """Return the hash of what the new layout holds; new files count by their names, as in a first sharding."""
        digest = hashlib.sha256(self.parent.id.encode())
        digest.update(json.dumps([sorted(written), sorted(removed), sorted(self.changed.items())]).encode())
        for place in places:
            digest.update(json.dumps(listed(place), sort_keys=True).encode())
        return digest.hexdigest()


def _facts(place: Place) -> list[Any]:
    """Return what decides whether a stored place has changed: all but its key and semi-positives."""
    views = [(view.image.path, view.split, _number(view.north), _number(view.east)) for view in place.views]
    return [sorted(place.splits), _number(place.north), _number(place.east), sorted(views, key=str)]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
