"""Layouts made by hand, for tests that need real shards but no sharding."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg

from geostream.layout import MEMBERS, PLACES, Coordinates, Layout, NewLayout, commit_layout
from geostream.reclustering.rewrite import rewrite
from geostream.store import Store


@dataclass(frozen=True)
class TinyPlace:
    """A place to write: its images by member name (``tile.jpg``, ``view-00.jpg``) and what the index says of it."""

    key: str
    area: str
    splits: tuple[str, ...]
    position: tuple[float, float]
    images: dict[str, bytes]
    semi_positives: tuple[int, ...] = ()


def jpeg(pixels: npt.NDArray[np.uint8], quality: int = 95) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorspace="RGB"))


def pattern(colours: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(height, width, 3) of upright stripes in the given (n, 3) colours: what a place's tile and views share."""
    stripes = colours[np.arange(width) * len(colours) // width]
    return np.broadcast_to(stripes, (height, width, 3)).copy()


def tiny_places(
    places: int = 12,
    test_places: int = 4,
    distractors: int = 2,
    views: int = 1,
    tile_size: int = 32,
    view_size: tuple[int, int] = (16, 64),
    seed: int = 0,
) -> list[TinyPlace]:
    """Places of two areas on a line of 50 m steps: ``alpha`` is trained on, ``beta`` is the test gallery.

    A place's semi-positive is its successor in the area. The last ``distractors`` of beta have no view. Tile and
    views of a place carry its own stripes, with noise on top, so that a network can learn to match them.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(places + test_places + distractors):
        train = number < places
        colours = rng.integers(0, 256, (4, 3), dtype=np.uint8)

        def noisy(height: int, width: int, colours: npt.NDArray[np.uint8] = colours) -> bytes:
            noise = rng.integers(0, 20, (height, width, 3))
            return jpeg(np.clip(pattern(colours, height, width) + noise, 0, 255).astype(np.uint8))

        images = {"tile.jpg": noisy(tile_size, tile_size)}
        n_views = 0 if number >= places + test_places else views
        images |= {f"view-{v:02d}.jpg": noisy(*view_size) for v in range(n_views)}
        last = number in (places - 1, places + test_places + distractors - 1)
        made.append(
            TinyPlace(
                key=f"{'alpha' if train else 'beta'}-{number:04d}",
                area="alpha" if train else "beta",
                splits=("train",) if train else ("test",),
                position=(40.0 + number * 0.00045, -74.0),
                images=images,
                semi_positives=() if last else (number + 1,),
            )
        )
    return made


def write_layout(
    store: Store,
    places: list[TinyPlace],
    *,
    places_per_shard: int = 4,
    dataset: str = "tiny",
    name: str = "g0",
    order: list[int] | None = None,
    coordinates: Coordinates = "latlon",
) -> Layout:
    """Write ``places`` (their ids are their positions) as real tar shards and commit them.

    ``order``: place ids in the order of the shards; by id when None.
    """
    folder = store.child(dataset, "layouts", name)
    order = list(range(len(places))) if order is None else order
    shards, rows = [], []
    for shard, start in enumerate(range(0, len(order), places_per_shard)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for place in order[start : start + places_per_shard]:
                members = dict(places[place].images)
                members["json"] = json.dumps({"key": places[place].key}).encode()
                for member, data in members.items():
                    info = tarfile.TarInfo(f"{places[place].key}.{member}")
                    info.size = len(data)
                    rows.append((place, member, shard, tar.offset + tarfile.BLOCKSIZE, len(data), crc32c(data)))
                    tar.addfile(info, io.BytesIO(data))
        shards.append((f"shard-{shard:05d}.tar", len(buffer.getvalue())))
        folder.write(shards[-1][0], buffer.getvalue())
    return commit_layout(
        folder,
        NewLayout(
            dataset=dataset,
            name=name,
            generation=0,
            coordinates=coordinates,
            places=_places_table(places),
            members=pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=MEMBERS.names).cast(
                MEMBERS
            ),
            shards=shards,
            source={"adapter": "tiny"},
            images={},
            broken=[],
        ),
    )


def tiny_layout(
    store: Store, *, places_per_shard: int = 4, dataset: str = "tiny", name: str = "g0", **kind: object
) -> Layout:
    """The layout of :func:`tiny_places` (its arguments by name) under ``store``, committed."""
    made = tiny_places(**kind)  # type: ignore[arg-type]
    return write_layout(store, made, places_per_shard=places_per_shard, dataset=dataset, name=name)


def crc32c(data: bytes) -> int:
    import google_crc32c

    return int(google_crc32c.value(data))


def _places_table(places: list[TinyPlace]) -> pa.Table:
    rows = [
        {
            "key": place.key,
            "area": place.area,
            "splits": list(place.splits),
            "north": place.position[0],
            "east": place.position[1],
            "source": f"{place.key}.png",
            "views": [
                {
                    "name": member.removesuffix(".jpg"),
                    "split": place.splits[0],
                    "source": f"{place.key}-{member}",
                    "north": place.position[0],
                    "east": place.position[1],
                    "semi_positives": list(place.semi_positives),
                }
                for member in place.images
                if member.startswith("view-")
            ],
        }
        for place in places
    ]
    return pa.Table.from_pylist(rows, schema=PLACES)


def member_of(layout: Layout, place: int, view: int | None = None) -> dict[str, Any]:
    """The index's row of a place's tile, or of one of its views."""
    stem = "tile" if view is None else f"view-{view:02d}"
    [row] = [row for row in layout.members.to_pylist() if row["place"] == place and row["member"].split(".")[0] == stem]
    return row


def child_of(root: Store, parent: Layout, seed: int = 0) -> Layout:
    """A next generation in some order, as a reclustering that was killed right after its commit leaves it."""
    order = np.random.default_rng(seed).permutation(parent.n_places).astype(np.int32)
    return rewrite(root, parent, np.array_split(order, 3), {})
