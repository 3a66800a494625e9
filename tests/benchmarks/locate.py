"""Where was this photo taken: ``python -m tests.benchmarks.locate --json PATH``.

1. The search in 1,000,000 vectors of 512 dimensions, against FAISS's exact one on the same threads, by turns in one
   process: queries one by one, as a page asks, and 100 at once; recall@5 against the exact finds. The vectors are
   clustered as embeddings are (:mod:`tests.benchmarks.neighbour_jobs`).
2. The model of the demo on photos of a city that it was neither trained nor calibrated on. The demo's cities are
   rendered and trained on as ``geostream demo`` does; another city is rendered from another seed, and its tiles become
   an index, whose threshold comes from the test split. Its panoramas are answered from their raw files.
3. Own photos becoming a layout (:mod:`tests.benchmarks.locate_photos`), and the page
   (:mod:`tests.benchmarks.locate_serve`), where that is there.

Takes 9 GB of memory and about half an hour on two cores, most of it the training. ``--work`` keeps what was made, so
that it is not made again. ``--quick`` takes a few minutes: does it run, not what does it give.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from joblib import cpu_count

from tests.benchmarks import locate_photos
from tests.benchmarks.measure import figure, figures_table, machine, ratio

Vectors = npt.NDArray[np.float32]
DIM, DEPTH, AT_ONCE, SINGLE = 512, 5, 100, 20
TURNS = 3
BLOCK = 2**16
CITY, CITY_SEED, SIDE = "Boston", 1, 22
WITHIN = 50.0  # metres
SERVE = "tests.benchmarks.locate_serve"  # a module of its own, with a function figures(work, *, quick)


def clustered(n: int, queries: int, dim: int) -> tuple[Vectors, Vectors]:
    """(n, dim) vectors of towns, districts and directions, and (queries, dim) that are some of them with more noise."""
    rng = np.random.default_rng(n)

    def normal(*shape: int) -> Vectors:
        return rng.standard_normal(shape, dtype=np.float32)

    towns, districts = max(1, n // 20_000), max(1, n // 2_000)
    size = rng.lognormal(0, 0.5, districts)
    centre = normal(towns, dim)[rng.integers(0, towns, districts)] + normal(districts, dim)
    along = 0.3 * normal(districts, 8, dim)
    district = rng.choice(districts, n, p=size / size.sum())
    vectors = np.empty((n, dim), dtype=np.float32)
    for start in range(0, n, BLOCK):
        of_block = district[start : start + BLOCK]
        block = centre[of_block] + 0.3 * normal(len(of_block), dim)
        for number in np.unique(of_block):
            rows = np.flatnonzero(of_block == number)
            block[rows] += normal(len(rows), 8) @ along[number]
        vectors[start : start + BLOCK] = block
    asked = vectors[rng.choice(n, queries, replace=False)] + 0.5 * normal(queries, dim)
    for some in (vectors, asked):
        for start in range(0, len(some), BLOCK):
            some[start : start + BLOCK] /= np.linalg.norm(some[start : start + BLOCK], axis=1, keepdims=True)
    return vectors, asked


def seconds(search: Callable[[Vectors], Any], queries: Vectors, at_once: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(queries), at_once):
        search(queries[start : start + at_once])
    return time.perf_counter() - began


def search_figures(n: int) -> dict[str, Any]:
    """Recall and time of the search in ``n`` vectors against the exact one."""
    import faiss

    from geostream.locating.search import TRAINED_ON, TileSearch, choose_nprobe, fill_lists, n_lists, train_lists

    def exact(query: Vectors, vectors: Vectors, k: int) -> tuple[npt.NDArray[np.int64], Vectors]:
        scores, rows = faiss.knn(query, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return rows, scores

    faiss.omp_set_num_threads(cpu_count())
    vectors, asked = clustered(n, 1_000 + AT_ONCE, DIM)
    tuned_on, queries = asked[:1_000], asked[1_000:]
    lists = n_lists(n)
    sample = np.sort(np.random.default_rng(1).choice(n, min(n, TRAINED_ON * lists), replace=False))
    began = time.perf_counter()
    index = train_lists(vectors[sample], lists)
    number = np.concatenate(
        [index.quantizer.search(vectors[at : at + BLOCK], 1)[1][:, 0] for at in range(0, n, BLOCK)]
    ).astype(np.int32)
    fill_lists(index, ((vectors[at : at + BLOCK], number[at : at + BLOCK]) for at in range(0, n, BLOCK)))
    made = time.perf_counter() - began
    nprobe, _ = choose_nprobe(index, tuned_on, exact(tuned_on, vectors, DEPTH)[0])
    search = TileSearch(np.arange(n, dtype=np.int32), index)
    print(f"{n:,} vectors in {lists:,} lists after {made:.0f} s, of which {nprobe} are searched", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in ("ours one", "exact one", "ours batch", "exact batch")}
    for _ in range(TURNS):
        for who, work in (("ours", lambda q: search.nearest(q, DEPTH)), ("exact", lambda q: exact(q, vectors, DEPTH))):
            times[f"{who} one"].append(seconds(work, queries[:SINGLE], 1))
            times[f"{who} batch"].append(seconds(work, queries, AT_ONCE))
    truth, found = exact(queries, vectors, DEPTH)[0], search.nearest(queries, DEPTH)[0]
    recall = (found[:, :, None] == truth[:, None, :]).any(axis=1).mean(axis=1)
    return {
        "search_recall_at_5": figure([float(recall.mean())], ">= 0.99"),
        "search_time_to_exact_one_by_one": ratio(times["ours one"], times["exact one"], "<= 0.1"),
        "search_time_to_exact_100_at_once": ratio(times["ours batch"], times["exact batch"], "<= 0.1"),
    }


def prepare_demo(work: Path, size: str) -> None:
    """Render, shard and train as the demo does, into the local store ``work/store``; at once where that is done."""
    from flows.rendered import TILE, dataset_name, render, shard_options
    from geostream.layout import open_layout
    from geostream.runs.loop import train
    from geostream.settings import default_settings
    from geostream.store import Store
    from sharding import ShardOptions, read_places, shard
    from sharding.simcity import CitySpec, render_cities

    store, dataset = Store.open(work / "store"), dataset_name("vigor")
    options = ShardOptions(**shard_options("vigor"))
    if not (work / "store").exists():
        render(work / "raw", "vigor", size, 0)
        shard(read_places("vigor", work / "raw"), store, dataset, options=options)
    side = SIDE if size == "demo" else 8
    render_cities(
        work / "other",
        [CitySpec(CITY, side, side)],
        seed=CITY_SEED,
        tile_size=TILE,
        view_size=(32, 128),
        max_offset=0.1,
    )
    places = read_places("vigor", work / "other", protocol="same-area", train_cities=[CITY], test_cities=[CITY])
    shard(places, store, dataset, CITY.lower(), options)
    layout = open_layout(store, dataset, "base")
    train(store, layout, "demo", default_settings(dataset).changed(epochs=9 if size == "demo" else 3))


def raw_photos(folder: Path) -> Iterator[tuple[Path, tuple[float, float]]]:
    """The panoramas of a rendered city, and where each stands, by its name."""
    for path in sorted((folder / CITY / "panorama").iterdir()):
        _, latitude, longitude, _ = path.name.split(",")
        yield path, (float(latitude), float(longitude))


def demo_figures(work: Path, size: str = "demo") -> dict[str, Any]:
    """How many photos of an unseen city are sure, and how many of these are right."""
    from flows.rendered import dataset_name
    from geostream.layout import open_layout
    from geostream.locating.locate import Locator
    from geostream.locating.make import make_index
    from geostream.locating.photos import read_photo
    from geostream.runs.run import Run
    from geostream.store import Store

    prepare_demo(work, size)
    store, dataset = Store.open(work / "store"), dataset_name("vigor")
    index, _ = make_index(
        Run.find(store, dataset, None, "demo"), None, open_layout(store, dataset, CITY.lower()), CITY.lower()
    )
    locator = Locator.open(store, dataset=dataset, index=CITY.lower())
    found = list(raw_photos(work / "other"))
    answers = locator.answer(
        [read_photo(path) for path, _ in found], [path.name for path, _ in found], truths=[at for _, at in found]
    )
    errors = np.array([answer.error_metres for answer in answers], dtype=float)
    sure = np.array([answer.sure for answer in answers])
    right = errors <= WITHIN
    print(
        f"{len(answers)} photos of {CITY} in {index.info['tiles']} tiles: {right.mean():.1%} within {WITHIN:g} m, "
        f"median {np.median(errors):.1f} m; calibrated: {index.info['calibration']['sure']:.1%} sure",
        file=sys.stderr,
    )
    return {
        "unseen_city_sure_within_50m": figure([float(right[sure].mean()) if sure.any() else 0.0], ">= 0.9"),
        "unseen_city_share_sure": figure([float(sure.mean())], ">= 0.0"),
        "unseen_city_within_50m": figure([float(right.mean())], ">= 0.0"),
    }


def figures(work: Path, *, only: str | None = None, quick: bool = False) -> dict[str, Any]:
    """The figures of one part, or of all that are there."""
    found: dict[str, Any] = {}
    if only in (None, "search"):
        found |= search_figures(60_000 if quick else 1_000_000)
    if only in (None, "demo"):
        found |= demo_figures(work, "small" if quick else "demo")
    if only in (None, "photos"):
        found |= locate_photos.figures(photos=100, repeats=1) if quick else locate_photos.figures()
    if only in (None, "serve") and find_spec(SERVE):
        found |= import_module(SERVE).figures(work, quick=quick)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Search in a large index, and photos of an unseen city")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for what is rendered and trained; default: a temporary one")
    parser.add_argument("--only", choices=["search", "demo", "photos", "serve"], help="one part alone")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not what does it give")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(options.work or Path(folder), only=options.only, quick=options.quick)
    options.json.write_text(json.dumps({"machine": machine(), "figures": found}, indent=1) + "\n")
    from rich.console import Console

    Console(width=120).print(figures_table(found))


if __name__ == "__main__":
    main()
