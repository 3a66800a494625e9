"""What the benchmark of the neighbour graphs runs, each in a process of its own, which prints one line of JSON.

The vectors are a mixture on three levels, as embeddings of places are: towns, in them districts of some two thousand
places (log-normal sizes), and within a district places that lie along eight directions of its own, all with noise in
every dimension; a query is its tile with more noise. Towns and districts grow with N: a larger dataset covers more
ground. In uniform noise no index works, and the approximate search would say so and search exactly.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from joblib import cpu_count

K = 128
EMBEDDINGS = "embeddings/epoch-0001.zarr"
GRAPH = "neighbours/visual-epoch-0001.zarr"
CHUNK = 1000  # queries at once, as in Sample4Geo's code
CHECKED = 500  # queries whose lists are compared with brute force
Vectors = npt.NDArray[np.float32]


def vectors(n: int, dim: int) -> tuple[Vectors, Vectors]:
    """(n, dim) queries and (n, dim) references, the i-th of one place."""
    rng = np.random.default_rng(n)

    def normal(*shape: int) -> Vectors:
        return rng.standard_normal(shape, dtype=np.float32)

    towns, districts = max(1, n // 20_000), max(1, n // 2_000)
    size = rng.lognormal(0, 0.5, districts)
    district = rng.choice(districts, n, p=size / size.sum())
    centre = normal(towns, dim)[rng.integers(0, towns, districts)] + normal(districts, dim)
    reference = centre[district] + 0.3 * normal(n, dim)
    for number in range(districts):
        of_it = np.flatnonzero(district == number)
        reference[of_it] += 0.3 * normal(len(of_it), 8) @ normal(8, dim)
    query = reference + 0.5 * normal(n, dim)
    for side in (query, reference):
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    return query, reference


def make(folder: Path, n: int, dim: int) -> dict[str, Any]:
    """A layout of ``n`` training places (a multiple of 10,000, or a small square) and embeddings of it."""
    from geostream.mining.embeddings import create_embeddings
    from geostream.store import Store
    from tests.cities import city

    root = Store.open(folder)
    areas = max(1, n // 10_000)
    layout = city(root, side=round((n / areas) ** 0.5), areas=areas, per_shard=1000)
    pairs = layout.pairs("train")
    places = np.unique(pairs.place)
    writer = create_embeddings(
        root.child("run"), EMBEDDINGS, layout=layout, checkpoint="", split="train", pairs=pairs,
        reference_place=places, dim=dim,
    )  # fmt: skip
    query, reference = vectors(len(places), dim)
    writer.write_query(np.arange(len(places)), query)
    writer.write_reference(np.arange(len(places)), reference)
    writer.commit()
    return {"places": len(places)}


def embeddings(folder: Path, n: int, dim: int) -> dict[str, Any]:
    """Embeddings of ``n`` places without a layout."""
    from geostream.store import Store
    from tests.mining.places import places, write_embeddings

    write_embeddings(Store.open(folder), places(n, max(1, n // 1_000_000)), dim)
    return {"places": n}


def ours(folder: Path, search: Any) -> dict[str, Any]:
    """The whole entry is timed: starting Dask, reading, searching, writing and opening the graph; imports are not."""
    import distributed  # noqa: F401
    import faiss  # noqa: F401

    from geostream.layout import open_layout
    from geostream.mining.embeddings import open_embeddings
    from geostream.mining.visual import build_visual_graph
    from geostream.store import Store

    root = Store.open(folder)
    run, layout = root.child("run"), open_layout(root)
    embeddings = open_embeddings(run, EMBEDDINGS, layout)
    begun = time.perf_counter()
    graph = build_visual_graph(run, GRAPH, layout, embeddings, K, search=search)
    return {"seconds": time.perf_counter() - begun, "search": graph.search}


def sample4geo(folder: Path) -> dict[str, Any]:
    """The whole matrix, in chunks of queries, then its top-k, without the own place; timed from reading on.

    Kinder than the original: chunks go to their place in one matrix instead of being concatenated (which holds it
    twice), and no dict of lists is made of the result, nor is it written.
    """
    import torch
    import zarr

    torch.set_num_threads(cpu_count())
    begun = time.perf_counter()
    group = zarr.open_group(folder / "run" / EMBEDDINGS, mode="r")
    query, reference = (torch.from_numpy(np.asarray(group[side][:])) for side in ("query", "reference"))  # type: ignore[index]
    labels = torch.arange(len(query))
    similarity = torch.empty(len(query), len(reference))
    for start in range(0, len(query), CHUNK):
        torch.matmul(query[start : start + CHUNK], reference.T, out=similarity[start : start + CHUNK])
    found = torch.topk(similarity, K + 1, dim=1).indices
    other = found != labels[:, None]
    nearest = [row[keep][:K] for row, keep in zip(found.numpy(), other.numpy(), strict=True)]
    return {"seconds": time.perf_counter() - begun, "rows": len(nearest)}


def recall(folder: Path) -> dict[str, Any]:
    """The share of the true neighbours of random places that are in the graph, by brute force with NumPy."""
    from geostream.layout import open_layout
    from geostream.mining.embeddings import open_embeddings
    from geostream.mining.graph import open_graph
    from geostream.store import Store

    root = Store.open(folder)
    run, layout = root.child("run"), open_layout(root)
    embeddings, graph = open_embeddings(run, EMBEDDINGS, layout), open_graph(run, GRAPH, layout)
    excluded = layout.excluded("train")
    rows = np.random.default_rng(20).choice(len(graph.places), CHECKED, replace=False)
    cosine = (
        np.asarray(embeddings.query.get_orthogonal_selection((rows, slice(None))))
        @ np.asarray(embeddings.reference[:]).T
    )
    found = []
    for row, of_row in zip(rows, cosine, strict=True):
        of_row[excluded.row(graph.places[row])] = of_row[row] = -np.inf  # place ids are rows here
        true = np.argpartition(of_row, -K)[-K:]
        found.append(np.isin(true, graph.indices[row]).mean())
    return {"recall": float(np.mean(found)), "stored": graph.search}


if __name__ == "__main__":
    name, at, *rest = sys.argv[1:]
    if name in ("make", "embeddings"):
        done = {"make": make, "embeddings": embeddings}[name](Path(at), int(rest[0]), int(rest[1]))
    elif name == "ours":
        done = ours(Path(at), rest[0])
    else:
        done = {"sample4geo": sample4geo, "recall": recall}[name](Path(at))
    print(json.dumps(done))
