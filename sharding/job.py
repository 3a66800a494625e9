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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
from joblib import cpu_count

from geostream.arrays import Float64, distinct
from geostream.errors import BadInput, StoreError
from geostream.layout.files import shard_name, sidecar_name
from geostream.store import Store
from sharding.adapters import ADAPTERS
from sharding.encode import ENCODER, BrokenImage, Encoded, encode, encode_photo, encode_pixels
from sharding.order import cut, storage_order
from sharding.places import Broken, KeptImage, Photo, Place, RawDataset, RawImage, Size, TileImage, Uncovered
from sharding.raw_reader import RawReader
from sharding.sources import Source, Stamp

QUALITY = 90  # of JPEGs, where none is given
READS = 8  # images that a process reads from a server at the same time
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
        quality: JPEG quality of resized images, 1 to 100; None: 90.
        shard_bytes: size of a shard, about.
        max_broken: share of all images that may be broken, 0 to 1.
    """

    tile_size: Size | None = None
    view_size: Size | None = None
    original: bool = False
    quality: int | None = None
    shard_bytes: int = 128 * 2**20
    max_broken: float = 0.001

    def __post_init__(self) -> None:
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise BadInput(f"quality {self.quality}: JPEG quality lies between 1 and 100")
        if not 0 <= self.max_broken <= 1:
            raise BadInput(f"max_broken {self.max_broken}: a share lies between 0 and 1 (0.001 is 0.1 %)")
        if self.shard_bytes < 1:
            raise BadInput(f"shard_bytes {self.shard_bytes}: a shard needs a size above 0")
        for size in (self.tile_size, self.view_size):
            if size is not None and (self.original or min(size) < 1):
                raise BadInput(f"image size {size}: give height and width above 0, and none together with 'original'")


@dataclass(frozen=True)
class Images:
    """Read raw images and encode them as they are stored.

    Attributes:
        reader: of the raw files.
        tile_size: (height, width) in pixels of stored tiles; None: their bytes are kept.
        view_size: the same of views.
        quality: JPEG quality.
        layouts: the data set's ``layouts`` folder, where images are taken over from; None: none are.
    """

    reader: RawReader
    tile_size: Size | None
    view_size: Size | None
    quality: int
    layouts: Store | None = None

    def load(self, image: RawImage, *, is_tile: bool) -> tuple[Encoded | Broken, Source | None]:
        """Read an image and encode it as it is stored.

        Args:
            image: the image.
            is_tile: it is a tile and no view.

        Returns:
            What is stored, or why the image is left out. What was read of the raw file; None: nothing.

        Raises:
            StoreError: an image that is taken over cannot be read, or is damaged.
        """
        if isinstance(image, KeptImage):
            return self._take_over(image), None
        source, size = None, self.tile_size if is_tile else self.view_size
        try:
            if isinstance(image, TileImage):
                return self._cut(image, size)
            data, stamp = self.read(image)
            source = Source(image.path, stamp.bytes, stamp.mtime_ns, google_crc32c.value(data), etag=stamp.etag)
            if isinstance(image, Photo):
                return encode_photo(data, size, self.quality, image.heading), source
            return encode(data, size, self.quality), source
        except BrokenImage as error:
            return Broken(image.path, image.named, str(error)), source and source._replace(broken=str(error))

    def load_all(self, images: Sequence[tuple[RawImage, bool]]) -> Iterator[tuple[Encoded | Broken, Source | None]]:
        """Yield what :meth:`load` returns of each image, of those on a server ``READS`` at a time.

        Args:
            images: each with whether it is a tile.
        """
        tasks = iter(images)
        if not any(self.reader.is_remote(image.path) for image, _ in images):
            for image, is_tile in tasks:
                yield self.load(image, is_tile=is_tile)
            return
        with ThreadPoolExecutor(READS) as threads:
            yield from threads.map(lambda task: self.load(task[0], is_tile=task[1]), tasks)

    def read(self, image: RawImage) -> tuple[bytes, Stamp]:
        """Read an image's file and its stamp.

        Raises:
            BrokenImage: it is missing or unreadable.
            StoreError: the server that holds it does not answer, or refuses the credentials.
        """
        if not image.present:
            raise BrokenImage("missing")
        return self.reader.read(image.path)

    def _cut(self, image: TileImage, size: Size | None) -> tuple[Encoded | Broken, Source]:
        try:
            pixels = image.imagery.read(image.box, *image.size(size))
        except Uncovered as error:
            source = Source(image.path, image.stamp.bytes, image.stamp.mtime_ns, 0, str(error))
            return Broken(image.path, image.named, str(error)), source
        checksum = google_crc32c.value(np.ascontiguousarray(pixels).tobytes())
        source = Source(image.path, image.stamp.bytes, image.stamp.mtime_ns, checksum)
        return encode_pixels(pixels, size, self.quality), source

    def _take_over(self, image: KeptImage) -> Encoded:
        assert self.layouts is not None, "an image can be taken over from a layout alone"
        data = self.layouts.read_range(image.shard, image.offset, image.size)
        if google_crc32c.value(data) != image.crc32c:
            raise StoreError(
                f"{self.layouts.url}/{image.shard}: the stored bytes of {image.path} differ from their checksum; look "
                "for all that is damaged with: geostream verify"
            )
        return Encoded(data, image.suffix)


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
        sampled_bytes: of these images.
        estimated_bytes: of all shards, by that sample.
        n_listed: images of the whole data set, of which a share may be broken.
        parent: id of the layout that is appended to; None: it is a first sharding.
    """

    raw: RawDataset
    options: ShardOptions
    images: Images
    fingerprint: str
    sample: str
    parts: tuple[Part, ...]
    sampled_bytes: int
    estimated_bytes: int
    n_listed: int
    parent: str | None = None

    @property
    def n_images(self) -> int:
        """Number of images, whole or not."""
        return sum(part.n_images for part in self.parts)

    @property
    def missing(self) -> list[Broken]:
        """The images that the raw folder lacks, as its listing showed, and those that no place can be made of."""
        images = (image for place in self.raw.places for image in place.images())
        return [*self.raw.left_out] + [
            Broken(image.path, image.named, "missing") for image in images if not image.present
        ]

    @property
    def source(self) -> dict[str, Any]:
        """What the layout is made from, for ``layout.json``."""
        return {
            "adapter": self.raw.adapter,
            "options": {**self.raw.options, "shard_bytes": self.options.shard_bytes},
            "fingerprint": self.fingerprint,
            "sample": self.sample,
            **(self.raw.source or {}),
        }

    @property
    def claim(self) -> dict[str, Any]:
        """What ``parts/job.json`` says, so that the folder is this job's until the commit."""
        return self.source | {"shards": len(self.parts)} | ({"parent": self.parent} if self.parent else {})

    def check_broken(self, broken: Sequence[Broken]) -> None:
        """Raise BadInput where more images are broken than the options allow."""
        if len(broken) > self.options.max_broken * self.n_listed:
            get = ""
            source = ADAPTERS[self.raw.adapter].source if self.raw.adapter in ADAPTERS else ""
            if source and any(one.reason == "missing" for one in broken):
                get = f". The data set is to be had at {source}"
            first = "; ".join(str(one) for one in broken[:5]) + ("; …" if len(broken) > 5 else "")
            raise BadInput(
                f"{len(broken)} of {self.n_listed} images are broken, more than the share of "
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
        reader=RawReader.of(raw.root),
        tile_size=None if original else options.tile_size or raw.tile_size,
        view_size=None if original else options.view_size or raw.view_size,
        quality=options.quality or QUALITY,
    )
    return cut_job(raw, options, images, _fingerprint(raw, options, images), raw.n_listed)


def cut_job(
    raw: RawDataset, options: ShardOptions, images: Images, fingerprint: str, n_listed: int, sampled: int = SAMPLE
) -> ShardJob:
    """Cut the places of a data set, of which there may be none, into shards; read and encode a sample of them.

    Args:
        raw: the data set, or those of its places that are to be written.
        options: how the layout is written.
        images: how images are read and encoded.
        fingerprint: hash of all that the job depends on.
        n_listed: images of the whole data set.
        sampled: tiles, and as many views, that are encoded to estimate sizes; they are read again to be written.
    """
    (tile_bytes, view_bytes), sample, read = _sample(raw.places, images, sampled)
    views = np.array([len(place.views) for place in raw.places], dtype=np.int64)
    kept = [[image for image in place.images() if isinstance(image, KeptImage)] for place in raw.places]
    size: Float64 = tile_bytes + JSON_BYTES + views * np.float64(view_bytes) + (views + 2) * HEADER_BYTES
    for row, of_place in enumerate(kept):  # whose size is known
        size[row] += sum(
            image.size - (tile_bytes if image is raw.places[row].tile else view_bytes) for image in of_place
        )
    group = np.array([_group(place) for place in raw.places], dtype=np.int64)
    areas = np.unique([place.area for place in raw.places], return_inverse=True)[1]
    position = np.array([(place.north, place.east) for place in raw.places]).reshape(-1, 2)
    order = storage_order(group, areas.astype(np.int64), position, latlon=raw.coordinates == "latlon")
    parts = []
    for number, rows in enumerate(cut(size[order], group[order], options.shard_bytes)):
        places = tuple(raw.places[row] for row in order[rows])
        keys = ",".join(place.key for place in places)
        content = hashlib.sha256(f"{fingerprint} {sample} {ENCODER} with sources {keys}".encode()).hexdigest()
        parts.append(Part(shard_name(number), places, content))
    return ShardJob(raw, options, images, fingerprint, sample, tuple(parts), read, round(float(size.sum())), n_listed)


def _group(place: Place) -> int:
    if any(view.split == "train" for view in place.views):
        return TRAINING
    return GALLERY if "test" in place.splits else REST


def _check_places(raw: RawDataset) -> None:
    for key, count in Counter(place.key for place in raw.places).items():
        if count > 1 or not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise BadInput(f"{raw.adapter}: key {key!r} is there {count} times, or is not all letters, digits, - and _")
    if not raw.count("train") and not raw.is_gallery:
        raise BadInput(f"{raw.root}: no training pair under {raw.options}; name what to train on")
    if not any("test" in place.splits for place in raw.places):
        raise BadInput(f"{raw.root}: no tile in the test gallery under {raw.options}; name what to test on")


def _sample(places: Sequence[Place], images: Images, sampled: int) -> tuple[list[float], str, int]:
    """Return the mean stored bytes of a tile and of a view, a hash of the raw bytes, and how many were read.

    Images that are broken, or taken over from an earlier layout, are left out.
    """
    digest, means, read = hashlib.sha256(), list[float](), 0
    tiles = [place.tile for place in places if not isinstance(place.tile, KeptImage)]
    views = [view.image for place in places for view in place.views if not isinstance(view.image, KeptImage)]
    with ThreadPoolExecutor(max_workers=min(8, cpu_count())) as threads:  # encoding holds no GIL
        for kind, is_tile in ((tiles, True), (views, False)):
            rows = distinct(np.linspace(0, len(kind) - 1, sampled).astype(np.int64)).tolist() if kind else []
            seen = list(threads.map(partial(_look, images, is_tile), [kind[row] for row in rows]))
            digest.update(b"".join(known for known, _, _ in seen))
            read += sum(raw for _, raw, _ in seen)
            stored = [size for _, _, size in seen if size]
            means.append(float(np.mean(stored)) if stored else 1e5)
    return means, digest.hexdigest(), read


def _look(images: Images, is_tile: bool, image: RawImage) -> tuple[bytes, int, int]:
    """Return what an image adds to the hash, its bytes (b"", 0: cannot be read), and those stored (0: it is broken)."""
    stored, source = images.load(image, is_tile=is_tile)
    size = 0 if isinstance(stored, Broken) else len(stored.data)
    return (f"{source.path} {source.bytes} {source.crc32c} ".encode(), source.bytes, size) if source else (b"", 0, size)


def _fingerprint(raw: RawDataset, options: ShardOptions, images: Images) -> str:
    """Return the hash of the listing and of every option that changes what is stored, not of the raw folder's path."""
    digest = hashlib.sha256()
    head = [raw.adapter, raw.options, raw.coordinates, images.tile_size, images.view_size]
    digest.update(json.dumps([*head, images.quality, options.shard_bytes], sort_keys=True).encode())
    for place in raw.places:
        digest.update(json.dumps(listed(place), sort_keys=True).encode())
    return digest.hexdigest()


def listed(place: Place) -> dict[str, Any]:
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
