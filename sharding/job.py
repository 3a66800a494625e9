"""Plan what a sharding writes, before the first image is stored: which places make which shard.

The plan follows from the listing and from a small sample of encoded images, whose mean size gives the number of places
a shard. So a layout has the same bytes for any number of workers and after any interruption; shards only come near the
size asked for. A job's ``fingerprint`` tells whether two jobs are the same, ``Part.content`` whether a finished shard
still fits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from joblib import cpu_count

from geostream.errors import BadInput
from geostream.layout.files import shard_name, sidecar_name
from sharding.adapters import ADAPTERS
from sharding.encode import ENCODER, BrokenImage, Encoded, encode
from sharding.order import cut, storage_order
from sharding.places import Place, RawDataset, RawImage, Size

SAMPLE = 32  # tiles, and as many views, encoded to estimate sizes
HEADER_BYTES = 768  # tar header and half a block of padding
JSON_BYTES = 400
TRAINING, GALLERY, REST = range(3)  # groups of places that share no shard


@dataclass(frozen=True)
class ShardOptions:
    """Choose how a layout is written; raise BadInput for values that make no sense.

    Attributes:
        tile_size: (height, width) in pixels of stored tiles; None: as the data set is usually trained.
        view_size: the same of views.
        original: keep the bytes of every image; then no size may be given.
        quality: JPEG quality of resized images, 1 to 100.
        shard_bytes: size of a shard, about.
        max_broken: share of all images that may be broken, 0 to 1.
    """

    tile_size: Size | None = None
    view_size: Size | None = None
    original: bool = False
    quality: int = 90
    shard_bytes: int = 128 * 2**20
    max_broken: float = 0.001

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise BadInput(f"quality {self.quality}: JPEG quality lies between 1 and 100")
        if not 0 <= self.max_broken <= 1:
            raise BadInput(f"max_broken {self.max_broken}: a share lies between 0 and 1 (0.001 is 0.1 %)")
        if self.shard_bytes < 1:
            raise BadInput(f"shard_bytes {self.shard_bytes}: a shard needs a size above 0")
        for size in (self.tile_size, self.view_size):
            if size is not None and (self.original or min(size) < 1):
                raise BadInput(f"image size {size}: give height and width above 0, and none together with 'original'")


@dataclass(frozen=True)
class Broken:
    """Name an image that is left out, and why.

    Attributes:
        path: below the raw folder.
        named: the ``file:line`` that named it.
        reason: why.
    """

    path: str
    named: str
    reason: str

    def __str__(self) -> str:
        return f"{self.named}: {self.path}: {self.reason}"


@dataclass(frozen=True)
class Images:
    """Read raw images and encode them as they are stored.

    Attributes:
        root: the raw folder.
        tile_size: (height, width) in pixels of stored tiles; None: their bytes are kept.
        view_size: the same of views.
        quality: JPEG quality.
    """

    root: Path
    tile_size: Size | None
    view_size: Size | None
    quality: int

    def load(self, image: RawImage, *, is_tile: bool) -> Encoded:
        """Read and encode an image; raise BrokenImage where it is missing, unreadable or broken."""
        return encode(self.read(image), self.tile_size if is_tile else self.view_size, self.quality)

    def read(self, image: RawImage) -> bytes:
        """Read an image's file; raise BrokenImage where it is missing or unreadable."""
        if not image.present:
            raise BrokenImage("missing")
        try:
            return (self.root / image.path).read_bytes()
        except OSError as error:
            raise BrokenImage(f"cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Part:
    """Describe one shard to write.

    Attributes:
        name: "shard-00000.tar".
        places: those in it, in order.
        content: hash of all that its bytes depend on.
    """

    name: str
    places: tuple[Place, ...]
    content: str

    @property
    def sidecar(self) -> str:
        """Path of the note that this shard is whole; it is there only until the layout is committed."""
        return sidecar_name(self.name)

    @property
    def n_images(self) -> int:
        """Number of images, whole or not."""
        return sum(len(place.images()) for place in self.places)


@dataclass(frozen=True)
class ShardJob:
    """Describe a layout that is to be written.

    Attributes:
        raw: the data set.
        options: how the layout is written.
        images: how its images are read and encoded.
        fingerprint: hash of the listing and the options.
        sample: hash of the raw bytes of some images.
        parts: its shards.
        estimated_bytes: of all shards, by that sample.
    """

    raw: RawDataset
    options: ShardOptions
    images: Images
    fingerprint: str
    sample: str
    parts: tuple[Part, ...]
    estimated_bytes: int

    @property
    def n_images(self) -> int:
        """Number of images, whole or not."""
        return sum(part.n_images for part in self.parts)

    @property
    def missing(self) -> list[Broken]:
        """The images that the raw folder lacks, as its listing showed."""
        images = (image for place in self.raw.places for image in place.images())
        return [Broken(image.path, image.named, "missing") for image in images if not image.present]

    @property
    def source(self) -> dict[str, Any]:
        """What the layout is made from, for ``layout.json``."""
        return {
            "adapter": self.raw.adapter,
            "options": {**self.raw.options, "shard_bytes": self.options.shard_bytes},
            "fingerprint": self.fingerprint,
            "sample": self.sample,
        }

    def check_broken(self, broken: Sequence[Broken]) -> None:
        """Raise BadInput where more images are broken than the options allow."""
        if len(broken) > self.options.max_broken * self.n_images:
            get = ""
            if self.raw.adapter in ADAPTERS and any(one.reason == "missing" for one in broken):
                get = f". The data set is to be had at {ADAPTERS[self.raw.adapter].source}"
            first = "; ".join(str(one) for one in broken[:5]) + ("; …" if len(broken) > 5 else "")
            raise BadInput(
                f"{len(broken)} of {self.n_images} images are broken, more than the share of "
                f"{self.options.max_broken:g} that is allowed: {first}. Mend them (what is whole is kept, run again "
                f"to go on), or allow a larger share (max_broken){get}"
            )


def plan_shards(raw: RawDataset, options: ShardOptions | None = None) -> ShardJob:
    """Plan a layout's shards; read and encode a sample of 32 tiles and 32 views, and write nothing.

    Args:
        raw: the data set.
        options: how the layout is written; None: the defaults.

    Raises:
        BadInput: there is nothing to train on, or no test gallery.
    """
    options = options or ShardOptions()
    _check_places(raw)
    original = options.original
    images = Images(
        root=raw.root,
        tile_size=None if original else options.tile_size or raw.tile_size,
        view_size=None if original else options.view_size or raw.view_size,
        quality=options.quality,
    )
    tile_bytes, view_bytes, sample = _sample(raw.places, images)
    views = np.array([len(place.views) for place in raw.places])
    size = tile_bytes + JSON_BYTES + views * view_bytes + (views + 2) * HEADER_BYTES
    group = np.array([_group(place) for place in raw.places])
    areas = np.unique([place.area for place in raw.places], return_inverse=True)[1]
    position = np.array([(place.north, place.east) for place in raw.places])
    order = storage_order(group, areas.astype(np.int64), position, latlon=raw.coordinates == "latlon")
    fingerprint = _fingerprint(raw, options, images)
    parts = []
    for number, rows in enumerate(cut(size[order], group[order], options.shard_bytes)):
        places = tuple(raw.places[row] for row in order[rows])
        keys = ",".join(place.key for place in places)
        content = hashlib.sha256(f"{fingerprint} {sample} {ENCODER} {keys}".encode()).hexdigest()
        parts.append(Part(shard_name(number), places, content))
    return ShardJob(raw, options, images, fingerprint, sample, tuple(parts), round(float(size.sum())))


def _group(place: Place) -> int:
    if any(view.split == "train" for view in place.views):
        return TRAINING
    return GALLERY if "test" in place.splits else REST


def _check_places(raw: RawDataset) -> None:
    for key, count in Counter(place.key for place in raw.places).items():
        if count > 1 or not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise BadInput(f"{raw.adapter}: key {key!r} is there {count} times, or is not all letters, digits, - and _")
    if not raw.count("train"):
        raise BadInput(f"{raw.root}: no training pair under {raw.options}; name what to train on")
    if not any("test" in place.splits for place in raw.places):
        raise BadInput(f"{raw.root}: no tile in the test gallery under {raw.options}; name what to test on")


def _sample(places: Sequence[Place], images: Images) -> tuple[float, float, str]:
    """Return the mean stored bytes of a tile and of a view, and a hash of the raw bytes; leave broken images out."""
    digest = hashlib.sha256()
    means = []
    tiles = [place.tile for place in places]
    views = [view.image for place in places for view in place.views]
    with ThreadPoolExecutor(max_workers=min(8, cpu_count())) as threads:  # encoding holds no GIL
        for kind, is_tile in ((tiles, True), (views, False)):
            rows = np.unique(np.linspace(0, len(kind) - 1, SAMPLE).astype(np.int64))
            seen = threads.map(partial(_look, images, is_tile), [kind[row] for row in rows])
            known, sizes = zip(*seen, strict=True)
            digest.update(b"".join(known))
            stored = [size for size in sizes if size]
            means.append(float(np.mean(stored)) if stored else 1e5)
    return means[0], means[1], digest.hexdigest()


def _look(images: Images, is_tile: bool, image: RawImage) -> tuple[bytes, int]:
    """Return what an image adds to the hash (b"": it cannot be read), and its stored bytes (0: it is broken)."""
    known = b""
    try:
        known = image.path.encode() + hashlib.sha256(images.read(image)).digest()
        return known, len(images.load(image, is_tile=is_tile).data)
    except BrokenImage:
        return known, 0


def _fingerprint(raw: RawDataset, options: ShardOptions, images: Images) -> str:
    """Return the hash of the listing and of every option that changes what is stored, not of the raw folder's path."""
    digest = hashlib.sha256()
    head = [raw.adapter, raw.options, raw.coordinates, images.tile_size, images.view_size]
    digest.update(json.dumps([*head, options.quality, options.shard_bytes], sort_keys=True).encode())
    for place in raw.places:
        digest.update(json.dumps(_listed(place), sort_keys=True).encode())
    return digest.hexdigest()


def _listed(place: Place) -> dict[str, Any]:
    """Return what the fingerprint has of a place.

    It lacks the lines that named the images and whether they were found, so a mended folder is the same job.
    """
    views = [
        {
            "image": {"path": view.image.path},
            "split": view.split,
            "north": view.north,
            "east": view.east,
            "semi_positives": view.semi_positives,
        }
        for view in place.views
    ]
    return {
        "key": place.key,
        "area": place.area,
        "splits": place.splits,
        "tile": {"path": place.tile.path},
        "north": place.north,
        "east": place.east,
        "views": views,
    }
