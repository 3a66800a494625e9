"""Compare two layouts of a data set: which places came, went and changed, and what the newer one holds of the older.

Places are compared by their keys, and by names and checksums of their members, so the order of shards and the numbers
of places do not matter: two generations that differ by a reclustering alone have no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geostream.layout.layout import MEMBERS_FILE, PLACES_FILE, Layout
from geostream.layout.schema import VIEW_SPLITS

SHOWN = 10  # keys that are named
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: multiplied by it, near numbers lie far apart


@dataclass(frozen=True)
class Places:
    """Some places.

    Attributes:
        count: How many there are.
        first: The first ten of their keys, sorted.
    """

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class LayoutDiff:
    """The difference between two layouts.

    Attributes:
        came: Places that the second has and the first has not.
        went: Places that the first has and the second has not, removed ones included.
        changed: Places of both, with other images or facts.
        pairs: Number of pairs of each split, before and after.
        bytes: Bytes of all shards, before and after.
        borrowed: Shards that the second layout has in common with earlier ones, and reads where they lie.
        own: Shards that lie in the second layout's own folder.
        own_bytes: Bytes of these.
        same_gallery: Whether figures on the two test sets can be compared; None: a layout does not say.
    """

    came: Places
    went: Places
    changed: Places
    pairs: dict[str, tuple[int, int]]
    bytes: tuple[int, int]
    borrowed: int
    own: int
    own_bytes: int
    same_gallery: bool | None


def diff_layouts(before: Layout, after: Layout) -> LayoutDiff:
    """Compare two layouts by their indexes.

    Memory holds the keys of both and 16 bytes a place.

    Args:
        before: The older one.
        after: The newer one.

    Raises:
        StoreError: An index cannot be read, or is damaged.
    """
    (old_keys, old), (new_keys, new) = _contents(before), _contents(after)
    at = pc.index_in(new_keys, value_set=old_keys)
    is_new = at.is_null().to_numpy(zero_copy_only=False)
    of_old = old[pc.fill_null(at, 0).to_numpy()] if len(old) else np.zeros(len(new), dtype=np.uint64)
    gone = pc.invert(pc.is_in(old_keys, value_set=new_keys))
    sizes, borrowed = after.shard_sizes, after.borrowed
    galleries = before.gallery, after.gallery
    splits = [one for one in VIEW_SPLITS if one in before.info["pairs"] or one in after.info["pairs"]]
    return LayoutDiff(
        came=_named(new_keys.filter(pa.array(is_new))),
        went=_named(old_keys.filter(gone)),
        changed=_named(new_keys.filter(pa.array(~is_new & (of_old != new)))),
        pairs={one: (before.info["pairs"].get(one, 0), after.info["pairs"].get(one, 0)) for one in splits},
        bytes=(int(before.shard_sizes.sum()), int(sizes.sum())),
        borrowed=int(borrowed.sum()),
        own=int((~borrowed).sum()),
        own_bytes=int(sizes[~borrowed].sum()),
        same_gallery=None if None in galleries else galleries[0] == galleries[1],
    )


def _contents(layout: Layout) -> tuple[pa.Array, npt.NDArray[np.uint64]]:
    """Return the keys of the places that were not removed, and a hash of each one's members, whatever their order."""
    hashes = np.zeros(layout.n_places, dtype=np.uint64)
    codes: dict[str, int] = {}
    for part in layout.index.parts(MEMBERS_FILE, ["place", "member", "crc32c"]):
        members = part["member"].combine_chunks().cast(pa.string()).dictionary_encode()
        for name in members.dictionary.to_pylist():
            codes.setdefault(name, google_crc32c.value(name.encode()))
        of_name = np.array([codes[name] for name in members.dictionary.to_pylist()], dtype=np.uint64)
        value = of_name[members.indices.to_numpy()] << np.uint64(32) | part["crc32c"].to_numpy().astype(np.uint64)
        value *= SPREAD
        value ^= value >> np.uint64(29)
        np.add.at(hashes, part["place"].to_numpy(), value * SPREAD)
    stored = layout.shard_of_place >= 0
    keys = layout.index.read(PLACES_FILE, ["key"])["key"].combine_chunks()
    return keys.filter(pa.array(stored)), hashes[stored]


def _named(keys: pa.Array) -> Places:
    return Places(len(keys), tuple(keys.take(pc.sort_indices(keys)[:SHOWN]).to_pylist()))
