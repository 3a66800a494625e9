"""Writes a job's shards to the store, in parallel, and goes on where an earlier run was cut off.

Worker processes read and encode a few images at a time (:mod:`sharding.workers`); here these are joined to shards,
in order, one after the other. Each is uploaded whole while the next is made, then a sidecar is written,
``parts/shard-00000.json``, with the shard's index. A sidecar that fits the job says that its shard need not be
written again. So all workers are busy with as little as one shard, memory is bounded by two shards and a few images a
worker, an interruption costs at most two shards, and two runs at once do no harm: they write the same bytes. All
stored bytes pass through this process: enough for some fifty workers. Nothing can be read before the commit, since no
layout.json is there (:mod:`sharding.commit`). Raw files are taken to be unchanged between an interruption and the next
run, but for those found broken: these are tried again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import google_crc32c
from joblib import cpu_count

from geostream.errors import AlreadyExists, BadInput
from geostream.layout.files import JOB, object_names
from geostream.progress import Bar
from geostream.store import Store
from sharding.encode import BrokenImage, Encoded
from sharding.job import Broken, Images, Part, ShardJob
from sharding.places import Place, RawImage
from sharding.tar import Member, ShardTar
from sharding.workers import in_order, leave_a_starting_worker

UNIT = 32  # images that a worker encodes before it hands them over: half a second's work, about 5 MB


@dataclass(frozen=True)
class Unit:
    """What a worker is told: some places of one shard."""

    images: Images
    places: tuple[Place, ...]


class EncodedMember(NamedTuple):
    """A member that is to be written: its name behind the place's key, its data and their checksum."""

    name: str
    data: bytes
    crc32c: int


@dataclass(frozen=True)
class EncodedPlace:
    """A place with a whole tile. ``views``: numbers of the raw views that are whole; view-00 is the first of these."""

    key: str
    views: tuple[int, ...]
    members: tuple[EncodedMember, ...]


@dataclass(frozen=True)
class EncodedUnit:
    """What a worker made of a unit. ``broken``: images left out; ``enlarged``: how many images were made larger."""

    places: tuple[EncodedPlace, ...]
    broken: tuple[Broken, ...]
    enlarged: int


@dataclass(frozen=True)
class StoredPlace:
    """A place in its shard. ``views``: numbers of the raw views that are stored; view-00 is the first of these."""

    key: str
    views: tuple[int, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class StoredPart:
    """A whole shard's index: what a sidecar holds. ``size``: bytes of the tar; ``enlarged``: images made larger."""

    name: str
    content: str
    size: int
    places: tuple[StoredPlace, ...]
    broken: tuple[Broken, ...]
    enlarged: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StoredPart:
        places = tuple(
            StoredPlace(place["key"], tuple(place["views"]), tuple(Member(*member) for member in place["members"]))
            for place in value["places"]
        )
        broken = tuple(Broken(**one) for one in value["broken"])
        return cls(value["name"], value["content"], value["size"], places, broken, value["enlarged"])


def write_shards(job: ShardJob, folder: Store, workers: int | None = None) -> tuple[list[StoredPart], int]:
    """Write the shards of ``job`` that are not yet whole in the layout folder; returns all, and how many were.

    ``workers``: processes (default: one a core; 1: this one). Raises BadInput where a layout is committed or another
    job is under way in the folder, or where too many images are broken: what is whole is kept for the next run.
    """
    leave_a_starting_worker()
    if workers is not None and workers < 1:
        raise BadInput(f"workers {workers}: at least one process is needed")
    if folder.exists("layout.json"):
        raise BadInput(f"{folder.url}: a layout is committed here, and layouts never change; choose another name")
    _claim(job, folder)
    stored = _whole_parts(job, folder)
    todo = [part for part in job.parts if part.name not in stored]
    whole = len(stored)
    broken = [one for part in stored.values() for one in part.broken]
    started, done = time.monotonic(), 0
    total = sum(part.n_images for part in todo)
    with (
        Bar("shards", total) as bar,
        closing(_write_all(job.images, folder, todo, workers or cpu_count())) as finished,
    ):
        for part, made in finished:
            stored[part.name] = made
            broken += made.broken
            job.check_broken(broken)
            done += part.n_images
            bar.advance(part.n_images, images_per_s=round(done / (time.monotonic() - started)), shards=len(stored))
    return [stored[part.name] for part in job.parts], whole


def _claim(job: ShardJob, folder: Store) -> None:
    """Write down that the folder is this job's, and which objects in it are.

    Raises BadInput where the folder is another job's, or where an object lies there under a name that the job would
    write to.
    """
    mine = job.source | {"shards": len(job.parts)}
    foreign = foreign_objects(job, folder)
    try:
        folder.write_json(JOB, mine, if_absent=True)
    except AlreadyExists:
        other = folder.read_json(JOB)
        if other["fingerprint"] != job.fingerprint:
            raise BadInput(
                f"{folder.url}: an unfinished layout of another source or with other options is here "
                f"({other['adapter']} {other['options']}); choose another name, or delete this folder"
            ) from None
        if claimed_shards(other) < len(job.parts):  # of an earlier cut into fewer
            folder.write_json(JOB, mine)
        return
    if foreign:
        folder.delete(JOB)
    check_foreign(folder, foreign)


def foreign_objects(job: ShardJob, folder: Store) -> list[str]:
    """Objects under names that the job would write to, in a folder that nobody has claimed; sorted."""
    there = {info.path for info in folder.list()}
    found = sorted(there & set(object_names([part.name for part in job.parts])))
    return [] if not found or folder.exists(JOB) else found  # claimed meanwhile: they are that job's


def check_foreign(folder: Store, foreign: Sequence[str]) -> None:
    """Raise BadInput, naming the first, where :func:`foreign_objects` found any."""
    if foreign:
        raise BadInput(
            f"{folder.url}/{foreign[0]}: an object that no sharding has written lies where this one would write; "
            "choose another name for the layout, or move the object away"
        )


def claimed_shards(claim: dict[str, Any]) -> int:
    """Return how many shards the job whose ``parts/job.json`` this is has said it would write."""
    return int(claim.get("shards", 0))


def _whole_parts(job: ShardJob, folder: Store) -> dict[str, StoredPart]:
    """The shards that an earlier run finished and that still fit the job."""
    there = {info.path: info.size for info in folder.list()}
    stored = {}
    for part in job.parts:
        if part.sidecar in there:
            made = StoredPart.from_json(folder.read_json(part.sidecar))
            fits = made.content == part.content and there.get(part.name) == made.size
            if fits and _still_broken(job.images, part, made):
                stored[part.name] = made
    return stored


def _still_broken(images: Images, part: Part, made: StoredPart) -> bool:
    """Whether all images that were left out of a shard would be left out again."""
    left_out = {one.path for one in made.broken}
    for place in part.places:
        for image in place.images():
            if image.path in left_out and not isinstance(_load(images, image, image is place.tile), Broken):
                return False
    return True


def _write_all(
    images: Images, folder: Store, parts: Sequence[Part], workers: int
) -> Generator[tuple[Part, StoredPart], None, None]:
    """Write the parts, encoded on ``workers`` processes; yields each as it is whole, in order."""
    units = [_units(images, part) for part in parts]
    tasks = [unit for of_part in units for unit in of_part]
    workers = min(workers, max(len(tasks), 1))
    with closing(in_order(encode_places, tasks, workers)) as encoded, ThreadPoolExecutor(1) as thread:
        upload: Future[tuple[Part, StoredPart]] | None = None
        for part, of_part in zip(parts, units, strict=True):
            data, made = _shard(part, islice(encoded, len(of_part)))
            if upload is not None:
                yield upload.result()
            upload = thread.submit(write_part, folder, part, data, made)
        if upload is not None:
            yield upload.result()


def _shard(part: Part, units: Iterable[EncodedUnit]) -> tuple[bytes, StoredPart]:
    """Join what the workers encoded to a tar; return it with its index."""
    tar, places, broken, enlarged = ShardTar(), list[StoredPlace](), list[Broken](), 0
    for unit in units:
        for place in unit.places:
            members = tuple(tar.add(place.key, *member) for member in place.members)
            places.append(StoredPlace(place.key, place.views, members))
        broken += unit.broken
        enlarged += unit.enlarged
    data = tar.close()
    return data, StoredPart(part.name, part.content, len(data), tuple(places), tuple(broken), enlarged)


def _units(images: Images, part: Part) -> list[Unit]:
    """The part's places, in order, in units of no less than UNIT images."""
    units, places, count = [], list[Place](), 0
    for place in part.places:
        places.append(place)
        count += len(place.images())
        if count >= UNIT:
            units.append(Unit(images, tuple(places)))
            places, count = [], 0
    return [*units, Unit(images, tuple(places))] if places else units


def write_part(folder: Store, part: Part, data: bytes, made: StoredPart) -> tuple[Part, StoredPart]:
    """Upload one shard, then its sidecar."""
    folder.write(part.name, data)
    folder.write_json(part.sidecar, asdict(made))
    return part, made


def encode_places(unit: Unit) -> EncodedUnit:
    """Read and encode the images of some places."""
    places: list[EncodedPlace] = []
    broken: list[Broken] = []
    enlarged = 0
    for place in unit.places:
        tile = _load(unit.images, place.tile, is_tile=True)
        if isinstance(tile, Broken):
            broken.append(tile)
            continue
        members = [_member(f"tile.{tile.suffix}", tile.data)]
        enlarged += tile.enlarged
        kept: list[int] = []
        for number, view in enumerate(place.views):
            query = _load(unit.images, view.image, is_tile=False)
            if isinstance(query, Broken):
                broken.append(query)
                continue
            members.append(_member(f"{view_name(len(kept))}.{query.suffix}", query.data))
            enlarged += query.enlarged
            kept.append(number)
        members.append(_member("json", _facts(place, kept)))
        places.append(EncodedPlace(place.key, tuple(kept), tuple(members)))
    return EncodedUnit(tuple(places), tuple(broken), enlarged)


def _member(name: str, data: bytes) -> EncodedMember:
    return EncodedMember(name, data, google_crc32c.value(data))


def _load(images: Images, image: RawImage, is_tile: bool) -> Encoded | Broken:
    """The image in stored form, or why it is left out."""
    try:
        return images.load(image, is_tile=is_tile)
    except BrokenImage as error:
        return Broken(image.path, image.named, str(error))


def view_name(number: int) -> str:
    return f"view-{number:02d}"


def _facts(place: Place, kept: Sequence[int]) -> bytes:
    """The place's ``json`` member. Semi-positives are in ``places.parquet`` alone: only there is it known which tiles
    of other shards were whole.
    """
    views = [place.views[number] for number in kept]
    facts = {
        "key": place.key,
        "area": place.area,
        "splits": place.splits,
        "source": place.tile.path,
        **_where(place.north, place.east),
        "views": [
            {"name": view_name(n), "split": v.split, "source": v.image.path, **_where(v.north, v.east)}
            for n, v in enumerate(views)
        ],
    }
    return json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()


def _where(north: float, east: float) -> dict[str, float | None]:
    """Coordinates for JSON, which has no NaN."""
    return {"north": None if math.isnan(north) else north, "east": None if math.isnan(east) else east}
