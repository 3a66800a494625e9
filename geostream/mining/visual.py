"""Build the visual neighbour graph: for each training place the K others that look most like it.

The search runs as Dask tasks that hold a few blocks of vectors each, whatever N is. Up to EXACT_UP_TO references it is
exact (:mod:`geostream.mining.exact`), and its time grows with N². With more references it uses inverted lists
(:mod:`geostream.mining.approximate`), and searches as many of them as the wanted recall needs. Where these are too
many, it falls back to the exact search. A place and its semi-positives are never among its own neighbours, and on
demand neither are likely false negatives (:mod:`geostream.mining.false_negatives`). Both modules state what they hold
in bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from geostream.arrays import distinct
from geostream.dask import connected, everywhere, results
from geostream.errors import StaleArtefact
from geostream.layout import Layout
from geostream.layout.zarr_groups import drop_scratch
from geostream.mining import exact
from geostream.mining.approximate import Approximate
from geostream.mining.embeddings import Embeddings
from geostream.mining.false_negatives import LOST
from geostream.mining.gps import build_gps_graph as build_gps_graph
from geostream.mining.gps import points_in_metres as points_in_metres
from geostream.mining.graph import GraphWriter, NeighbourGraph, open_graph
from geostream.progress import track
from geostream.store import Store

#: Number of references up to which the search is exact, which takes a minute or two. VIGOR, CVUSA and CVACT are below.
EXACT_UP_TO = 100_000
RECALL = 0.99  # that the approximate search must reach, measured on a sample of queries


def build_visual_graph(
    run: Store,
    name: str,
    layout: Layout,
    embeddings: Embeddings,
    k: int,
    cluster: str | None = None,
    search: Literal["exact", "approximate"] | None = None,
    positive_margin: float = 0.0,
) -> NeighbourGraph:
    """Build the graph of the training places' K most similar, and write it to the run.

    The similarity of a place to another is that of its most similar view.

    Args:
        run: The run's folder.
        name: Path of the graph within the run; a graph that is there is replaced.
        layout: A layout with the same places as the embeddings.
        embeddings: The embeddings of the training split.
        k: Neighbours of each place.
        cluster: URL of a Dask scheduler whose workers reach the store; None starts one within this process.
        search: The kind of search; None chooses it by the number of references.
        positive_margin: Share of a place's similarity to its own tile, above which candidates are dropped as likely
            false negatives; 0: none is.

    Raises:
        StaleArtefact: The embeddings are of other places.
        GeostreamError: The scheduler cannot be reached, or workers die again and again.
    """
    if embeddings.places_id != layout.places_id:
        raise StaleArtefact(f"{embeddings.name}: made from other places than those of {layout.name}; embed again")
    places, references = distinct(embeddings.pairs.place), len(embeddings.reference_place)
    excluded = layout.excluded(embeddings.split)
    writer = GraphWriter.create(run, name, kind="visual", layout=layout, embeddings=embeddings.name, places=places, k=k)
    job = exact.SearchJob(run, embeddings.name, name, k, positive_margin)
    how: dict[str, Any] = {"mode": "exact"}
    lost = Counter[str]()
    groups = exact.row_groups(len(places), len(embeddings.pairs), exact.QUERIES)
    with connected(cluster, len(groups) * len(exact.reference_blocks(references))) as client:
        try:
            if search == "approximate" or (search is None and references > EXACT_UP_TO):
                lists = Approximate(client, job, embeddings, excluded)
                how = lists.prepare(RECALL)
            if how["mode"] == "approximate":
                count, written = lists.search()
            else:
                writes = exact.search(client, job, embeddings, excluded)
                count, written = len(writes), results(writes)
            for part in track(written, "neighbour graph", count):
                lost.update(part)
        finally:
            everywhere(client, exact.SharedBlock.release_all)
    drop_scratch(run, name)
    if positive_margin:
        how |= {"positive_margin": positive_margin, "searched": job.k}
        how |= {name: lost[name] for name in LOST}
    writer.commit(how)
    return open_graph(run, name, layout)
