"""Open the index of a gallery: the vectors of its tiles, the model that made them, and when an answer is sure.

``<store>/<dataset>/indexes/<name>/`` holds

- ``settings.json`` and ``checkpoints/``: the encoder's weights, in the form of a run's folder. The copy costs one
  encoder on the store. Without it the index would be lost when its run prunes its checkpoints, or is removed itself.
- ``tiles.zarr``: ``vectors`` (N, D) and ``place`` (N,); in a large gallery also ``list`` (N,).
- ``lists.faiss``: the centroids of these lists.
- ``index.json``: written last, by a conditional put. It names the model, the layout and the threshold.

An index says whether its tiles were embedded with TTA (:mod:`geostream.evaluation.tta`). Photos are then embedded so,
too, because a photo and a tile must be changed alike. Such an index has format 2, which others before it refuse.

A reader opens ``index.json`` first, so it never sees half an index. :mod:`geostream.locating.make` writes all this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import faiss
import numpy as np
import zarr

from geostream.arrays import Float64
from geostream.errors import BadInput, LayoutNotCommitted, NotFound, StaleArtefact, StoreError
from geostream.evaluation.embed import Trained
from geostream.layout import Layout, open_layout
from geostream.layout.listing import the_dataset
from geostream.layout.zarr_groups import array_of, open_committed
from geostream.locating.search import TileSearch, fill_lists, flat
from geostream.locating.vectors import blocks
from geostream.mining.embeddings import read_rows
from geostream.mining.gps import points_in_metres
from geostream.runs.inventory import INDEX_FILE, index_names, indexes_folder
from geostream.runs.run import Run
from geostream.runs.stages import load_trained
from geostream.store import Store, check_name
from geostream.training.checkpoint_files import Damaged, crc32c_of, weights_checksum

PLAIN, WITH_TTA = FORMATS = 1, 2
TILES, LISTS = "tiles.zarr", "lists.faiss"
AGAIN = "make it again: geostream index"


@dataclass(frozen=True)
class Index:
    """A committed index. Its vectors and weights stay on the store until they are loaded.

    Attributes:
        store: The root of the store.
        folder: The index's folder.
        info: ``index.json``.
        layout: The layout of its tiles.
    """

    store: Store
    folder: Store
    info: dict[str, Any]
    layout: Layout

    @property
    def tta(self) -> bool:
        """Whether tiles were, and photos are, embedded with TTA."""
        return bool(self.info["format"] == WITH_TTA)

    def load_model(self) -> Trained:
        """Load the encoder that the index was made with.

        Raises:
            StaleArtefact: Its weights are gone, or others.
        """
        model = self.info["model"]
        run = Run(self.store, self.layout, model["run"])
        run.folder = self.folder
        try:
            if weights_checksum(self.folder, model["checkpoint"]) != model["crc32c"]:
                raise StaleArtefact(f"{self.folder.url}: holds other weights than {INDEX_FILE} names; {AGAIN}")
            return replace(load_trained(run, model["checkpoint"]), tta=self.tta)
        except (BadInput, Damaged) as error:
            raise StaleArtefact(f"{self.folder.url}: its model is gone or damaged ({error}); {AGAIN}") from error

    def load_search(self) -> TileSearch:
        """Load the vectors into memory, 4 × D bytes a tile.

        Raises:
            StaleArtefact: They are gone, or of other places.
        """
        try:
            group = open_committed(self.folder, TILES, self.layout, AGAIN)
            vectors, place = cast("zarr.Array[Any]", group["vectors"]), array_of(group, "place")
            if "nprobe" not in self.info["search"]:
                return TileSearch(place, flat(read_rows(vectors)))
            numbers = array_of(group, "list")
            data = self.folder.read(LISTS)
        except (NotFound, KeyError, FileNotFoundError) as error:
            raise StaleArtefact(f"{self.folder.url}: its vectors are gone ({error}); {AGAIN}") from error
        if crc32c_of(data) != self.info["search"]["crc32c"]:
            raise StaleArtefact(f"{self.folder.url}/{LISTS}: damaged; {AGAIN}")
        lists: Any = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
        lists.nprobe = self.info["search"]["nprobe"]
        return TileSearch(
            place, fill_lists(lists, ((block, numbers[at : at + len(block)]) for at, block in blocks(vectors)))
        )


def index_folder(store: Store, dataset: str, name: str) -> Store:
    """Return the folder of an index in the store that holds the data set."""
    return indexes_folder(store, dataset).child(check_name("index", name))


def list_indexes(store: Store, dataset: str) -> list[dict[str, Any]]:
    """Return ``index.json`` of each committed index of a data set, by name.

    Args:
        store: The root of the store.
        dataset: The data set's name.

    Raises:
        StoreError: One is damaged or of another version, or the store cannot be read.
    """
    folder = indexes_folder(store, dataset)
    return [_read(folder.child(name)) for name in index_names(folder)]


def _read(folder: Store) -> dict[str, Any]:
    info = folder.read_json(INDEX_FILE)
    if not isinstance(info, dict) or info.get("format") not in FORMATS:
        raise StoreError(f"{folder.url}/{INDEX_FILE}: written by another version of geostream, or damaged; {AGAIN}")
    return info


def open_index(store: Store, dataset: str | None = None, name: str | None = None) -> Index:
    """Open a committed index.

    Args:
        store: The root of the store.
        dataset: The data set's name; None for the only one in the store.
        name: The index's name; None for the only one of the data set.

    Raises:
        BadInput: There is no such index, or it is not clear which one is meant.
        StaleArtefact: The layout of its tiles is gone, or has other places by now.
        StoreError: ``index.json`` is damaged or of another version, or the store cannot be read.
    """
    dataset = the_dataset(store, dataset)
    if name is None:
        found = index_names(indexes_folder(store, dataset))
        if len(found) != 1:
            what = f"say which index with --index (there: {', '.join(found)})" if found else "no index yet"
            raise BadInput(f"{store.url}/{dataset}: {what}{'' if found else '; make one: geostream index STORE'}")
        [name] = found
    folder = index_folder(store, dataset, name)
    try:
        info = _read(folder)
    except NotFound as error:
        raise BadInput(f"{folder.url}: no such index, or it was never finished; {AGAIN} STORE --name {name}") from error
    return Index(store, folder, info, _own_layout(store, dataset, folder, info))


def _own_layout(store: Store, dataset: str, folder: Store, info: dict[str, Any]) -> Layout:
    name = info["layout"]["name"]
    try:
        layout = open_layout(store, dataset, name)
    except LayoutNotCommitted as error:
        raise StaleArtefact(f"{folder.url}: the layout {name} of its tiles is gone; {AGAIN}") from error
    if layout.places_id != info["layout"]["places"]:
        raise StaleArtefact(f"{folder.url}: the layout {name} has other places than its tiles; {AGAIN}")
    return layout


def tile_points(layout: Layout) -> Float64 | None:
    """Return points whose distance is that of the places' tiles in metres, NaN where unknown; None: no coordinates."""
    return None if layout.coordinates == "none" else points_in_metres(layout.position, layout.coordinates)
