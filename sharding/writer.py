"""Write a job's shards to the store, in parallel, and go on where an earlier run was cut off.

Worker processes read and encode a few images at a time (:mod:`sharding.workers`). This process joins them to shards,
one after the other. Each shard is uploaded whole while the next is made. Then a sidecar with its index is written,
``parts/shard-00000.json``: it says that the shard need not be written again. Memory holds two shards and a few images a
worker. An interruption costs at most two shards. Two runs at once write the same bytes. Nothing can be read before the
commit (:mod:`sharding.commit`).

All stored bytes pass through this process, which is enough for some fifty workers. Raw files are taken to be unchanged
between an interruption and the next run; images that were broken are tried again.
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
from sharding.job import Images, Part, ShardJob
from sharding.places import Broken, Place
from sharding.sources import Source
from sharding.tar import Member, ShardTar
from sharding.workers import in_order, leave_a_starting_worker

UNIT = 32  # images that a worker encodes before it hands them over: half a second's work, about 5 MB


@dataclass(frozen=True)
class Unit:
    """Tell a worker what to encode.

    Attributes:
        images: how images are stored.
        places: some places of one shard.
    """

    images: Images
    places: tuple[Place, ...]


class EncodedMember(NamedTuple):
    """Hold a member that is to be written.

    Attributes:
        name: what follows the place's key, such as "tile.jpg".
        data: its bytes.
        crc32c: their checksum.
    """

    name: str
    data: bytes
    crc32c: int


@dataclass(frozen=True)
class EncodedPlace:
    """Hold a place with a whole tile, encoded.

    Attributes:
        key: the place's key.
        views: numbers of the raw views that are whole; view-00 is the first of these.
        members: its tile, views and facts.
    """

    key: str
    views: tuple[int, ...]
    members: tuple[EncodedMember, ...]


@dataclass(frozen=True)
class EncodedUnit:
    """Hold what a worker made of a unit.

    Attributes:
        places: those with a whole tile.
        broken: images that are left out.
        enlarged: how many images are smaller than the stored size.
        sources: what was read of the raw files.
    """

    places: tuple[EncodedPlace, ...]
    broken: tuple[Broken, ...]
    enlarged: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class StoredPlace:
    """Describe a place in its shard.

    Attributes:
        key: the place's key.
        views: numbers of the raw views that are stored; view-00 is the first of these.
        members: where its members lie.
    """

    key: str
    views: tuple[int, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class StoredPart:
    """Hold the index of a shard that is whole, as its sidecar does.

    Attributes:
        name: the shard's name.
        content: hash of all that its bytes depend on, of :class:`~sharding.job.Part`.
        size: bytes of the tar.
        places: those in it, in order.
        broken: images that were left out.
        enlarged: how many images are smaller than the stored size.
        sources: what was read of the raw files.
    """

    name: str
    content: str
    size: int
    places: tuple[StoredPlace, ...]
    broken: tuple[Broken, ...]
    enlarged: int
    sources: tuple[Source, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StoredPart:
        """Return the index that a sidecar holds."""
        places = tuple(
            StoredPlace(place["key"], tuple(place["views"]), tuple(Member(*member) for member in place["members"]))
            for place in value["places"]
        )
        broken = tuple(Broken(**one) for one in value["broken"])
        sources = tuple(Source(*source) for source in value.get("sources", ()))
        return cls(value["name"], value["content"], value["size"], places, broken, value["enlarged"], sources)


def write_shards(job: ShardJob, folder: Store, workers: int | None = None) -> tuple[list[StoredPart], int]:
    """Write those shards of a job that are not yet whole.

    Args:
        job: what to write.
        folder: the layout's folder.
        workers: processes that encode; None: one a core; 1: this one.

    Returns:
        All of the job's shards, and how many of them an earlier run had finished.

    Raises:
        BadInput: a layout is committed in the folder, another job is under way there, or too many images are broken.
            What is whole is kept for the next run.
        GeostreamError: a worker process died.
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
    broken = [*job.raw.left_out, *(one for part in stored.values() for one in part.broken)]
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
    """Write down that the folder is this job's, and how many shards it will have.

    Raises BadInput where it is another job's, or where an object has a name that this job would write to.
    """
    mine = job.claim
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
    """Return the sorted names of objects that the job would overwrite, in a folder that no job has claimed."""
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
    """Return the shards that an earlier run finished and that still fit the job, by name."""
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
    """Return whether all images that were left out of a shard would be left out again."""
    left_out = {one.path for one in made.broken}
    for place in part.places:
        for image in place.images():
            if image.path in left_out and not isinstance(images.load(image, is_tile=image is place.tile)[0], Broken):
                return False
    return True


def _write_all(
    images: Images, folder: Store, parts: Sequence[Part], workers: int
) -> Generator[tuple[Part, StoredPart], None, None]:
    """Write the parts, encoded on ``workers`` processes; yield each as it is whole, in order."""
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
    tar, places, broken, sources, enlarged = ShardTar(), list[StoredPlace](), list[Broken](), list[Source](), 0
    for unit in units:
        for place in unit.places:
            members = tuple(tar.add(place.key, *member) for member in place.members)
            places.append(StoredPlace(place.key, place.views, members))
        broken += unit.broken
        sources += unit.sources
        enlarged += unit.enlarged
    data = tar.close()
    made = StoredPart(part.name, part.content, len(data), tuple(places), tuple(broken), enlarged, tuple(sources))
    return data, made


def _units(images: Images, part: Part) -> list[Unit]:
    """Return the part's places, in order, in units of no less than UNIT images."""
    units, places, count = [], list[Place](), 0
    for place in part.places:
        places.append(place)
        count += len(place.images())
        if count >= UNIT:
            units.append(Unit(images, tuple(places)))
            places, count = [], 0
    return [*units, Unit(images, tuple(places))] if places else units


def write_part(folder: Store, part: Part, data: bytes, made: StoredPart) -> tuple[Part, StoredPart]:
    """Upload one shard, then its sidecar; return the part and its index."""
    folder.write(part.name, data)
    folder.write_json(part.sidecar, asdict(made))
    return part, made


def encode_places(unit: Unit) -> EncodedUnit:
    """Read and encode the images of some places; this runs in a worker process."""
    places: list[EncodedPlace] = []
    broken: list[Broken] = []
    sources: list[Source] = []
    enlarged = 0
    wanted = [(image, image is place.tile) for place in unit.places for image in place.images()]
    loaded = unit.images.load_all(wanted)
    for place in unit.places:
        (tile, source), *views = islice(loaded, 1 + len(place.views))
        sources.extend([source] if source else [])
        if isinstance(tile, Broken):
            broken.append(tile)
            continue
        members = [_member(f"tile.{tile.suffix}", tile.data)]
        enlarged += tile.enlarged
        kept: list[int] = []
        for number, (query, source) in enumerate(views):
            sources.extend([source] if source else [])
            if isinstance(query, Broken):
                broken.append(query)
                continue
            members.append(_member(f"{view_name(len(kept))}.{query.suffix}", query.data))
            enlarged += query.enlarged
            kept.append(number)
        members.append(_member("json", _facts(place, kept)))
        places.append(EncodedPlace(place.key, tuple(kept), tuple(members)))
    return EncodedUnit(tuple(places), tuple(broken), enlarged, tuple(sources))


def _member(name: str, data: bytes) -> EncodedMember:
    return EncodedMember(name, data, google_crc32c.value(data))


def view_name(number: int) -> str:
    """Return the name of a place's view: ``view-00``."""
    return f"view-{number:02d}"


def _facts(place: Place, kept: Sequence[int]) -> bytes:
    """Return the place's ``json`` member.

    It has no semi-positives: which tiles of other shards are whole is known only at the commit.
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
            | ({} if v.heading is None else {"heading": v.heading})
            for n, v in enumerate(views)
        ],
    }
    return json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()


def _where(north: float, east: float) -> dict[str, float | None]:
    """Return coordinates for JSON, which has no NaN."""
    return {"north": None if math.isnan(north) else north, "east": None if math.isnan(east) else east}
