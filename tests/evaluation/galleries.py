"""Indexes of test galleries by hand, and embeddings of them on a store: no images, nothing to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from geostream.arrays import Float32
from geostream.evaluation.embed import split_references
from geostream.evaluation.protocols import split_pairs
from geostream.layout import MEMBERS, PLACES, Layout
from geostream.layout.index import Index
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings
from geostream.store import Store


@dataclass(frozen=True)
class View:
    split: str = "test"
    at: tuple[float, float] = (0.0, 0.0)
    semi: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spot:
    """A place of the test gallery."""

    at: tuple[float, float] = (0.0, 0.0)
    views: tuple[View, ...] = (View(),)
    splits: tuple[str, ...] = ("test",)


def gallery_of(store: Store, spots: list[Spot], protocols: tuple[str, ...], coordinates: str = "utm") -> Layout:
    """A layout of these places, whose ids are their positions in the list."""
    rows = [
        {
            "key": f"place-{number:04d}", "area": "city", "splits": list(spot.splits), "source": "",
            "north": spot.at[0], "east": spot.at[1],
            "views": [
                {"name": f"view-{v:02d}", "split": view.split, "source": "", "north": view.at[0],
                 "east": view.at[1], "semi_positives": list(view.semi)}
                for v, view in enumerate(spot.views)
            ],
        }
        for number, spot in enumerate(spots)
    ]  # fmt: skip
    info: dict[str, Any] = {"dataset": "hand", "layout": "g0", "id": "layout", "generation": 0}
    info |= {"coordinates": coordinates, "protocols": list(protocols), "index": {"places.parquet": "places"}}
    info |= {"places": len(rows), "shards": []}
    return Layout(store, info, Index(store, info, (pa.Table.from_pylist(rows, schema=PLACES), MEMBERS.empty_table())))


def embedded_as(run: Store, layout: Layout, query: Float32, reference: Float32, split: str = "test") -> Embeddings:
    """``query``: rows of all views that are embedded for the split; ``reference``: of all its tiles."""
    pairs, places = split_pairs(layout, split), split_references(layout, split)
    writer = create_embeddings(
        run, "embeddings/test-epoch-0001.zarr", layout=layout, checkpoint="step-00000001", split=split, pairs=pairs,
        reference_place=places, dim=query.shape[1],
    )  # fmt: skip
    writer.write_query(np.arange(len(pairs)), query)
    writer.write_reference(np.arange(len(places)), reference)
    writer.commit()
    return open_embeddings(run, "embeddings/test-epoch-0001.zarr", layout)
