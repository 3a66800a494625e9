"""Make the index of a gallery: embed its tiles, sort them into lists if they are many, and calibrate the threshold.

``making.json`` in the index's folder says what is being made. An index whose making was killed is made again from the
beginning by the same command, and what was left there is removed by name. A lease keeps two processes from making the
same index. Making holds at most a few Zarr shards of vectors, and the vectors themselves once to try the search.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import faiss
import numpy as np
import zarr

from geostream.arrays import Float32, Int32, Int64, Pairs
from geostream.errors import BadInput, NotFound
from geostream.evaluation.embed import Trained, embed_images
from geostream.layout import Layout
from geostream.layout.zarr_groups import commit, new_group, remove_group
from geostream.locating.calibration import KnownPhotos
from geostream.locating.index import LISTS, PLAIN, TILES, WITH_TTA, Index, index_folder
from geostream.locating.search import (
    EXACT_ROWS,
    RECALL_AT,
    TRAINED_ON,
    TileSearch,
    choose_nprobe,
    fill_lists,
    flat,
    n_lists,
    train_lists,
)
from geostream.locating.threshold import SAME_METRES
from geostream.locating.vectors import blocks, picked
from geostream.mining.embeddings import RowWriter, read_rows
from geostream.mining.topk import References, merge, most_similar, no_finds
from geostream.runs.inventory import INDEX_FILE, indexes_folder
from geostream.runs.lease import Lease, RunHeld
from geostream.runs.run import SETTINGS, Run
from geostream.runs.stages import load_trained
from geostream.store import Store
from geostream.training.checkpoint_files import FOLDER, MODEL, STATE, copy_weights, crc32c_of, weights_checksum
from geostream.training.distributed import ProcessGroup

MAKING = "making.json"
ARRAYS = ("vectors", "place", "list")
MEASURED_ON = 1_000  # test photos that the recall of an approximate search is measured on


def make_index(
    source: Run,
    checkpoint: str | None,
    layout: Layout,
    name: str,
    model: int | None = None,
    split: str | None = None,
    tta: bool = False,
) -> tuple[Index, bool]:
    """Make an index of the tiles of a layout, and commit it. An index of the same name is replaced.

    Args:
        source: The run of the model, or a model's folder opened as a run, on the layout whose test split calibrates.
        checkpoint: Name of the checkpoint; None for the newest at an epoch's end.
        layout: The layout whose tiles are embedded.
        name: Name of the index.
        model: Number of the model; None: a run's checkpoint.
        split: "train" or "test" for the tiles of its gallery; None for all. A model knows its training tiles too well:
            they are in the way of photos from elsewhere.
        tta: Embed tiles, and later photos, with similarities averaged over flips and turns. That takes up to eight
            times as long, and as much memory.

    Returns:
        The index, and whether it was there already, of the same tiles by the same weights.

    Raises:
        RunHeld: Another process makes the same index; or the test split must be embedded first, and the run trains.
        BadInput: There is no such checkpoint, or there are no tiles of the split.
        StoreError: The store cannot be read or written.
    """
    trained = replace(load_trained(source, checkpoint), tta=tta)
    folder = index_folder(source.store, layout.dataset, name)
    wanted = {
        "format": WITH_TTA if tta else PLAIN,
        "name": name,
        "model": {
            "number": model,
            "run": source.name,
            "checkpoint": trained.checkpoint,
            "epoch": trained.epoch,
            "crc32c": weights_checksum(source.folder, trained.checkpoint),
        },
        "layout": {"name": layout.name, "id": layout.id, "places": layout.places_id},
        "split": split,
    }
    with _held(folder) as lease:
        with suppress(NotFound):
            info = folder.read_json(INDEX_FILE)
            if isinstance(info, dict) and wanted.items() <= info.items():
                return Index(source.store, folder, info, layout), True
        info = _made(source, trained, layout, folder, wanted)
        lease.check()
        folder.write_json(INDEX_FILE, info, if_absent=True)
        folder.delete(MAKING)
    return Index(source.store, folder, info, layout), False


@contextmanager
def _held(folder: Store) -> Iterator[Lease]:
    """Hold the lease of an index's folder; raise RunHeld in the words of an index where another process has it."""
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(Lease(folder))
        except RunHeld as error:
            raise RunHeld(f"{folder.url}: another process makes this index; wait, or choose another name") from error
        yield lease


def _made(source: Run, trained: Trained, layout: Layout, folder: Store, wanted: dict[str, Any]) -> dict[str, Any]:
    """Write all of an index but ``index.json``, whose content is returned."""
    place = _places(layout, wanted["split"])
    photos = KnownPhotos.of(source, trained)
    clear(folder)  # only now: what was wrong until here has cost no index
    folder.write_json(MAKING, wanted)
    folder.write_json(SETTINGS, source.settings.model_dump())
    copy_weights(source.folder, trained.checkpoint, folder)
    group = _embed_tiles(folder, layout, place, trained)
    search, facts = _make_search(folder, group, place, photos.vectors)
    commit(group)
    same = source.layout.places_id == layout.places_id
    calibration = photos.calibrate(search if same else photos.gallery())
    return wanted | {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiles": len(place),
        "dim": trained.dim,
        "source": layout.source,
        "search": facts,
        "calibration": calibration.as_json()
        | {"layout": source.layout.name, "gallery": "index" if same else "test", "metres": SAME_METRES},
    }


def _places(layout: Layout, split: str | None) -> Int32:
    """Return the places whose tiles are indexed: those of a split's gallery, or all that were not removed."""
    if split is None:
        return np.flatnonzero(layout.shard_of_place >= 0).astype(np.int32)
    place = layout.references(split)
    if not len(place):
        raise BadInput(f"layout {layout.name}: no tiles of split {split}; index another, or all")
    return place


def remove_index(store: Store, dataset: str, name: str) -> None:
    """Remove an index, so that nothing needs its layout for it any more.

    Args:
        store: The root of the store.
        dataset: The data set's name.
        name: Name of the index.

    Raises:
        BadInput: There is no such index.
        RunHeld: A process makes it just now.
    """
    folder = index_folder(store, dataset, name)
    if not any(map(folder.exists, (INDEX_FILE, MAKING))):
        there = ", ".join(indexes_folder(store, dataset).folders()) or "none"
        raise BadInput(f"{folder.url}: no such index (there: {there})")
    with _held(folder):
        clear(folder)


def clear(folder: Store) -> None:
    """Remove an index, or what is left of one, by the names of its objects. ``index.json`` goes first.

    Args:
        folder: The index's folder.
    """
    checkpoints = []
    for file in (INDEX_FILE, MAKING):
        with suppress(NotFound, KeyError, TypeError):
            checkpoints.append(str(folder.read_json(file)["model"]["checkpoint"]))
    folder.delete(INDEX_FILE)
    weights = [f"{FOLDER}/{checkpoint}/{file}" for checkpoint in checkpoints for file in (MODEL, STATE)]
    folder.delete_all([*weights, SETTINGS, LISTS])
    remove_group(folder, TILES, ARRAYS)
    folder.delete_all([MAKING])


def _embed_tiles(folder: Store, layout: Layout, place: Int32, trained: Trained) -> zarr.Group:
    """Embed the tiles of some places; return the group of their vectors, which is not yet committed."""
    group = new_group(folder, TILES, layout, ARRAYS)
    group.create_array("place", data=place)
    writer = RowWriter(group, "vectors", len(place), trained.dim)
    none = Pairs(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int16))
    batches = embed_images(layout, place, none, trained, ProcessGroup(), "embed tiles")
    for numbers, vectors in batches:
        if numbers is not None and vectors is not None:
            writer.write(numbers[numbers >= 0].numpy(), vectors[numbers >= 0].numpy())
    writer.check_complete()
    return group


def _make_search(folder: Store, group: zarr.Group, place: Int32, photos: Float32) -> tuple[TileSearch, dict[str, Any]]:
    """Sort the vectors into lists if they are many; return the search, and what ``index.json`` says of it.

    Args:
        folder: The index's folder.
        group: The group of the vectors; the number of each one's list is added.
        place: (N,) places of the vectors.
        photos: Vectors of photos, to measure the recall with; without any, tiles are searched for.
    """
    vectors = cast("zarr.Array[Any]", group["vectors"])
    if len(place) <= EXACT_ROWS:
        return TileSearch(place, flat(read_rows(vectors))), {"kind": "exact"}
    lists, rng = n_lists(len(place)), np.random.default_rng(1)
    some = np.sort(rng.choice(len(place), min(len(place), TRAINED_ON * lists), replace=False))
    index = train_lists(picked(vectors, some), lists)
    data = faiss.serialize_index(index).tobytes()
    numbers = np.concatenate([index.quantizer.search(block, 1)[1][:, 0] for _, block in blocks(vectors)])
    group.create_array("list", data=numbers.astype(np.int32))
    folder.write(LISTS, data)
    fill_lists(index, ((block, numbers[start : start + len(block)]) for start, block in blocks(vectors)))
    if not len(photos):
        photos = picked(vectors, some[:: max(1, len(some) // MEASURED_ON)])
    photos = photos[:: max(1, len(photos) // MEASURED_ON)]
    nprobe, recall = choose_nprobe(index, photos, _truly_nearest(vectors, photos, RECALL_AT))
    facts = {"kind": "lists", "lists": lists, "nprobe": nprobe, "recall": recall, "crc32c": crc32c_of(data)}
    return TileSearch(place, index), facts


def _truly_nearest(vectors: zarr.Array[Any], query: Float32, k: int) -> Int64:
    """Return the (n, k) rows of the vectors that are most similar to each query, by comparing with all."""
    best = no_finds(len(query), k)
    for start, block in blocks(vectors):
        rows = np.arange(start, start + len(block), dtype=np.int32)
        best = merge(best, most_similar(query, References(rows, block), k))
    return best.other.astype(np.int64)
