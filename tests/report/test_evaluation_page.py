"""What evaluating leaves in a run: embeddings made once, the field's table, and pictures both ways."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from geostream.arrays import Float32
from geostream.evaluation.embed import Trained
from geostream.evaluation.metres import DEPTHS, MEDIAN, WITHIN, recall_name
from geostream.evaluation.protocols import split_pairs
from geostream.layout import PLACES, Layout, NewLayout, commit_layout
from geostream.layout.index import Index
from geostream.layout.schema import Protocol
from geostream.report.evaluation_page import metres_table, results_table, write_evaluation
from geostream.report.pages import render
from geostream.report.retrievals import retrievals
from geostream.runs.inventory import OWN
from geostream.runs.run import Run
from geostream.runs.stages import embedded, new_encoder
from geostream.store import Store
from tests.evaluation.galleries import embedded_as
from tests.helpers import member_of, tiny_layout
from tests.report.self_contained import needs_nothing_else
from tests.training.settings import TINY

PROTOCOLS: tuple[Protocol, ...] = ("paired", "within-5m", "both-ways")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Eight test places with three views each, of which the last is only a candidate; two tiles without a view."""
    store = Store.open(tmp_path)
    plain = tiny_layout(store, places=4, test_places=8, views=3, view_size=(32, 64))
    folder = store.child("tiny", "layouts", "both")
    for name in plain.shard_names:
        folder.write(name, plain.store.read(name))
    rows = plain.places.to_pylist()
    for row in rows:
        for view in row["views"][2:]:
            view["split"] = "gallery" if view["split"] == "test" else "train"
    shards = list(zip(plain.shard_names, plain.shard_sizes.tolist(), strict=True))
    return commit_layout(
        folder, NewLayout(dataset="tiny", name="both", generation=0, coordinates="latlon",
        places=pa.Table.from_pylist(rows, schema=PLACES), members=plain.members, shards=shards, source={}, images={},
        broken=[], protocols=PROTOCOLS,
    ))  # fmt: skip


@pytest.fixture
def trained() -> Trained:
    return Trained(new_encoder(TINY), TINY, "step-00000007", 3)


def stamps(run: Run) -> dict[str, int]:
    """When each file of the test embeddings was written."""
    folder = Path(run.url) / "embeddings" / "test-epoch-0003.zarr"
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_embeddings_of_the_checkpoint_are_made_once(tmp_path: Path, layout: Layout, trained: Trained) -> None:
    run = Run(Store.open(tmp_path), layout, "one")
    first = embedded(run, trained, "test")
    assert (len(first.pairs), len(first.reference_place)) == (24, 10)
    assert np.array_equal(first.pairs.view, np.tile([0, 1, 2], 8))
    once = stamps(run)
    assert embedded(run, trained, "test").checkpoint == "step-00000007"
    assert stamps(run) == once
    later = Trained(trained.encoder, trained.settings, "step-00000009", 3)
    assert embedded(run, later, "test").checkpoint == "step-00000009"
    again = stamps(run)
    assert again.keys() == once.keys() and all(again[path] > once[path] for path in once)
    mark = Path(run.url) / "embeddings" / "test-epoch-0003.zarr" / "zarr.json"
    mark.write_text(mark.read_text().replace('"committed": true', '"committed": false'))
    embedded(run, later, "test")
    assert stamps(run)[str(mark)] > again[str(mark)] and '"committed": true' in mark.read_text()


def test_an_evaluation_leaves_json_and_a_page(tmp_path: Path, layout: Layout, trained: Trained) -> None:
    run = Run(Store.open(tmp_path), layout, "one")
    record = write_evaluation(run, trained, embedded(run, trained, "test"))
    name = run.evaluation_name("test", 3)
    assert run.folder.read_json(f"{name}.json") == record
    assert (record["epoch"], record["checkpoint"], record["split"]) == (3, "step-00000007", "test")
    assert (record["queries"], record["gallery"]) == (16, 10)
    assert [(row["protocol"], row["direction"], row["queries"], row["gallery"]) for row in record["others"]] == [
        ("within-5m", "view→tile", 16, 10),
        ("both-ways", "view→tile", 16, 10),
        ("both-ways", "tile→view", 8, 24),
    ]
    page = run.folder.read(f"{name}.html").decode()
    assert page.count("<td>within-5m</td>") == 1 and page.count("<td>tile→view</td>") == 1
    assert page.count("data:image/jpeg;base64,") == (12 + 8) * (1 + 5)
    needs_nothing_else(page)


def test_an_evaluation_of_narrowed_views_is_one_of_its_own(tmp_path: Path, layout: Layout, trained: Trained) -> None:
    run = Run(Store.open(tmp_path), layout, "one")
    whole, narrow = embedded(run, trained, "test"), embedded(run, trained, "test", 90.0)
    assert narrow.name == "embeddings/test_fov90-epoch-0003.zarr" and OWN.fullmatch(f"{narrow.name}/zarr.json")
    assert np.array_equal(whole.reference[:], narrow.reference[:]), "tiles stay as they are"
    assert not np.isclose(whole.query[:], narrow.query[:], atol=1e-3).all(axis=1).any(), "no view does"
    record = write_evaluation(run, trained, narrow, 90.0)
    assert record["fov"] == 90 and run.folder.exists("evaluation-test_fov90-epoch-0003.html")
    assert not run.folder.exists("evaluation-test-epoch-0003.html")
    assert OWN.fullmatch("evaluation-test_fov90-epoch-0003.json")


def test_figures_on_the_ground_have_a_table_of_their_own() -> None:
    names = [recall_name(depth, limit) for depth in DEPTHS for limit in WITHIN]
    record = {"metres": {name: number / 10 for number, name in enumerate(names)} | {MEDIAN: 1234.56}}
    first, *_, last = metres_table(record)
    assert first == {"": "R@1", "within 25 m": "0.00", "within 50 m": "10.00", "within 100 m": "20.00",
                     "median error (m)": "1,234.6"}  # fmt: skip
    assert last["within 100 m"] == "80.00" and last["median error (m)"] == ""
    assert metres_table({"metres": {}}) == [] == metres_table({})  # no coordinates; an evaluation from before


def test_the_table_is_the_fields(layout: Layout) -> None:
    shares = {"r1": 0.77864, "r5": 0.9566, "r10": 1.0, "r1pct": 0.0}
    head = {**shares, "hit_rate": 0.89815, "queries": 52605, "gallery": 90618, "protocol": "paired"}
    back = {"protocol": "both-ways", "direction": "tile→view", **shares, "ap": 0.9139, "queries": 701, "gallery": 51355}
    rows = results_table(layout, {"epoch": 3, "split": "test", **head, "others": [back]})
    percent = {"R@1": "77.86", "R@5": "95.66", "R@10": "100.00", "R@1%": "0.00"}
    assert rows == [
        {"protocol": "paired", "direction": "view→tile", **percent, "hit rate": "89.81", "AP": "–",
         "queries": "52,605", "gallery": "90,618"},
        {"protocol": "both-ways", "direction": "tile→view", **percent, "hit rate": "–", "AP": "91.39",
         "queries": "701", "gallery": "51,355"},
    ]  # fmt: skip
    assert "AP" not in results_table(layout, {"epoch": 3, "split": "test", **head, "others": []})[0]
    plain = pa.Table.from_pylist(
        [r | {"views": [v | {"semi_positives": []} for v in r["views"]]} for r in layout.places.to_pylist()],
        schema=PLACES,
    )
    without = Layout(layout.store, layout.info, Index(layout.store, layout.info, (plain, layout.members)))
    assert "hit rate" not in results_table(without, {"epoch": 3, "split": "test", **head, "others": []})[0]


def test_pictures_frame_all_that_is_right(tmp_path: Path, layout: Layout) -> None:
    """Every tile is an axis of its own; each view is its tile's, and half of its semi-positive's."""
    pairs = split_pairs(layout, "test")
    at = np.searchsorted(layout.references("test"), pairs.place)
    reference = np.eye(10, dtype=np.float32)
    query: Float32 = reference[at] + reference[at + 1] / np.float32(2)
    query[pairs.view == 1] = reference[9]  # these look like a tile that no view is of
    embeddings = embedded_as(Store.open(tmp_path).child("run"), layout, query, reference)
    found = retrievals(layout, embeddings, count=4, best=3)
    assert [one.direction for one in found] == ["view→tile"] * 4 + ["tile→view"] * 4
    to_tile, to_view = found[:4], found[4:]
    assert {len(one.candidates) for one in found} == {3}
    assert to_tile[0].kinds == ["positive", "semi-positive", "negative"] and to_tile[0].similarities == [1, 0.5, 0]
    assert (to_tile[0].rank, to_tile[-1].kinds[0], to_tile[-1].rank) == (1, "negative", 10)
    assert to_view[0].kinds == ["positive", "positive", "negative"] and to_view[0].rank == 1
    assert to_view[1].similarities == [1, 1, 0.5]
    section = render("retrievals.html", retrievals=found)
    assert re.findall(r"rank (\d+)<", section) == [str(one.rank) for one in found]
    for kind in ("positive", "semi-positive", "negative"):
        framed = section.count(f'<figure class="{kind}">')
        assert framed == sum(one.kinds.count(kind) for one in found) > 0


def test_queries_with_a_damaged_picture_are_not_shown(tmp_path: Path, layout: Layout) -> None:
    axes = np.eye(10, dtype=np.float32)
    pairs = split_pairs(layout, "test")
    query = axes[np.searchsorted(layout.references("test"), pairs.place)]
    embeddings = embedded_as(Store.open(tmp_path).child("run"), layout, query, axes)
    row = member_of(layout, int(pairs.place[0]), int(pairs.view[0]))
    shard = Path(layout.store.url) / layout.shard_names[row["shard"]]
    data = bytearray(shard.read_bytes())
    data[row["offset"] : row["offset"] + row["size"]] = bytes(row["size"])
    shard.write_bytes(data)
    found = retrievals(layout, embeddings, count=4, best=1)
    assert [one.direction for one in found] == ["view→tile"] * 3 + ["tile→view"] * 3


def test_within_five_metres_is_amber(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    plain = tiny_layout(store, places=4, test_places=4, distractors=0)
    rows = plain.places.to_pylist()
    for row in rows:
        row["north"] = row["views"][0]["north"] = 40.0  # all at one point
        row["views"][0]["semi_positives"] = []
    info = plain.info | {"protocols": ["paired", "within-5m"]}
    tables = pa.Table.from_pylist(rows, schema=PLACES), plain.members
    layout = Layout(plain.store, info, Index(plain.store, info, tables))
    axes = np.eye(4, dtype=np.float32)
    [one, *_] = retrievals(layout, embedded_as(store.child("run"), layout, axes, axes), count=2, best=4)
    assert one.kinds == ["positive", "semi-positive", "semi-positive", "semi-positive"]
