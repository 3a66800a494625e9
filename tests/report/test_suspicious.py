"""Training pairs that stay at the bottom: from embeddings by hand, and after a training with mislabelled pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geostream.arrays import Float32
from geostream.layout import Layout
from geostream.mining.embeddings import create_embeddings
from geostream.report import report
from geostream.report.suspicious import find_suspicious, standings
from geostream.runs.loop import train
from geostream.runs.run import Run
from geostream.settings import TrainSettings, default_settings
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from sharding.simcity import CitySpec, render_cities
from tests.cities import unit
from tests.helpers import tiny_layout
from tests.report.self_contained import needs_nothing_else
from tests.report.test_report import result_of


def test_a_pair_stands_by_all_epochs_whatever_their_scale() -> None:
    own = np.array([[0.1, 0.5, 0.6, 0.7, 0.9], [0.80, 0.97, 0.98, 0.99, 0.90]])
    first, second = own
    assert standings(own[:1]).tolist() == pytest.approx(((first - 0.6) / 0.1).tolist())
    assert standings(own).tolist() == pytest.approx((((first - 0.6) / 0.1 + (second - 0.97) / 0.02) / 2).tolist())
    assert standings(own[:1] * 0.1 + 0.5).tolist() == pytest.approx(standings(own[:1]).tolist())
    assert standings(np.zeros((2, 3))).tolist() == [0.0, 0.0, 0.0]


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=20))
def test_in_one_epoch_the_order_is_that_of_the_similarities(row: list[float]) -> None:
    own = np.array([row])
    assert (np.diff(standings(own)[np.argsort(own[0], kind="stable")]) >= 0).all()


def embed(run: Run, layout: Layout, epoch: int, seed: int, swapped: tuple[int, ...]) -> None:
    """Embeddings in which each query is near its own tile, but the ``swapped`` pairs have one another's."""
    rng, pairs, places = np.random.default_rng(seed), layout.pairs("train"), layout.references("train")
    tiles: Float32 = unit(np.random.default_rng(0).normal(size=(len(places), 16)))
    own = np.searchsorted(places, pairs.place)
    own[list(swapped)] = own[list(swapped[1:] + swapped[:1])]
    writer = create_embeddings(
        run.folder, run.embeddings_name("train", epoch), layout=layout, checkpoint=f"step-{epoch:08d}", split="train",
        pairs=pairs, reference_place=places, dim=16,
    )  # fmt: skip
    writer.write_reference(np.arange(len(places)), tiles)
    writer.write_query(np.arange(len(pairs)), unit(tiles[own] + rng.normal(scale=0.08, size=(len(pairs), 16))))
    writer.commit()


SWAPPED = (3, 11, 20)


def test_swapped_pairs_are_at_the_top_of_the_list(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=24)
    run = Run(store, layout, "one")
    run.store_settings(TrainSettings().changed(tile_size=32, view_height=16, view_width=64))
    assert find_suspicious(run) is None
    for epoch in (1, 3, 5, 7):
        embed(run, layout, epoch, epoch, SWAPPED)
    found = find_suspicious(run)
    assert found and found.epochs == (3, 5, 7) and found.pairs == 24 and len(found.shown) == 24
    assert {pair.key for pair in found.shown[:3]} == {f"alpha-{n:04d}" for n in SWAPPED}
    assert {(pair.key, pair.other_key) for pair in found.shown[:3]} == {
        (f"alpha-{n:04d}", f"alpha-{other:04d}") for n, other in zip(SWAPPED, SWAPPED[1:] + SWAPPED[:1], strict=True)
    }, "what it resembles is the tile that was meant"
    assert found.as_strangers == 3 and found.stranger < 0.7 < found.typical
    assert max(pair.standing for pair in found.shown[:3]) < -3 < found.shown[3].standing
    page = report.publish(run, result_of(run.folder), {**report.summarise("store", layout, result_of(run.folder))})
    assert "Training pairs to look at" in page and "<b>3</b> of 24 pairs" in page
    assert page.index("alpha-0003") < page.index("What was read")
    needs_nothing_else(page)


def test_an_epoch_counts_once_the_network_knows_pairs_from_strangers(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=24)
    run = Run(store, layout, "one")
    embed(run, layout, 1, 1, tuple(range(24)))  # all pairs have another tile: nothing is learnt yet
    found = find_suspicious(run)
    assert found and found.epochs == (1,) and found.as_strangers >= 20
    embed(run, layout, 2, 2, SWAPPED)
    found = find_suspicious(run)
    assert found and found.epochs == (2,) and found.as_strangers == 3


def test_what_is_most_similar_is_no_semi_positive(tmp_path: Path) -> None:
    """A place's semi-positive is its successor: it shows the query, so it is not what the query was mixed up with."""
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=24)
    run = Run(store, layout, "one")
    embed(run, layout, 2, 0, (5, 6))
    found = find_suspicious(run)
    assert found
    (pair,) = (one for one in found.shown if one.key == "alpha-0005")
    assert pair.other_key != "alpha-0006" and pair.similarity < 0.7


def swap_labels(raw: Path, swaps: list[tuple[int, int]]) -> set[str]:
    """Give panoramas one another's tiles in the list of NewYork; their file names."""
    file = raw / "splits" / "NewYork" / "pano_label_balanced.txt"
    lines = [line.split() for line in file.read_text().splitlines()]
    for one, other in swaps:
        lines[one][1:], lines[other][1:] = lines[other][1:], lines[one][1:]
    file.write_text("\n".join(" ".join(line) for line in lines))
    return {lines[row][0] for swap in swaps for row in swap}


@pytest.mark.slow
def test_mislabelled_pairs_of_a_city_are_found_by_a_training(tmp_path: Path) -> None:
    """Five panoramas have one another's tiles: after a training on rendered streets they head the list."""
    raw = tmp_path / "raw"
    cities = [CitySpec("NewYork", 20, 20), CitySpec("Chicago", 4, 4)]
    render_cities(raw, cities, seed=2, tile_size=48, view_size=(32, 128), max_offset=0.1)
    wrong = swap_labels(raw, [(10, 200), (35, 260), (60, 310), (90, 150), (120, 340)])
    store = Store.open(tmp_path / "store")
    places = read_places("vigor", raw, train_cities=["NewYork"], test_cities=["Chicago"])
    layout = shard(places, store, "simcity", options=ShardOptions(tile_size=(48, 48), view_size=(32, 128))).layout
    settings = default_settings("simcity").changed(
        epochs=20,
        first_mining=10,
        mine_every=4,
        evaluate_every=20,
        mining_lag=0,
        recluster_below=0.0,
        rotate_probability=0.0,  # in so few steps only what is easy is learnt
        color_probability=0.0,
    )
    train(store, layout, "one", settings)
    found = find_suspicious(Run.open(store, layout, "one"))
    assert found and len(found.epochs) >= 2
    rows = {row["key"]: row for row in layout.places.to_pylist()}
    listed = [rows[pair.key]["views"][pair.view]["source"].rpartition("/")[2] for pair in found.shown]
    assert len(wrong & set(listed)) >= 7, "by chance one of ten were among 24 of 436"
    assert len(wrong & set(listed[:6])) >= 2
