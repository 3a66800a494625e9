"""The loader: the plan's batches as tensors, the same whoever makes them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from geostream.arrays import Pairs
from geostream.errors import BadInput, LayoutNotCommitted, StaleArtefact, StoreError
from geostream.layout import Layout, open_layout
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import StreamDataset, plan_dataset, scan_dataset
from geostream.streaming.decode import decode_image
from geostream.streaming.loader import Loader
from geostream.training.augment import Augmentation, Augmenter
from tests.helpers import member_of, tiny_layout, tiny_places, write_layout
from tests.streaming.plans import SIZES, assert_same, hand_made_plan


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return tiny_layout(Store.open(tmp_path_factory.mktemp("store")), places=24, places_per_shard=3)


def test_batches_are_the_plans_in_order_and_pixels_are_the_images(layout: Layout) -> None:
    plan = hand_made_plan(layout)
    batches = list(Loader(plan_dataset(layout, plan, SIZES)))
    assert len(batches) == plan.n_batches == 8
    pairs = layout.pairs("train")
    for step, batch in enumerate(batches):
        ids = batch.tensors["pair"].numpy()
        assert np.array_equal(pairs.place[ids], plan.place[step])
        assert batch.tensors["tile"].shape == (3, 3, 32, 32) and batch.tensors["view"].shape == (3, 3, 16, 64)
        assert batch.tensors["tile"].dtype == torch.uint8
        assert batch.tensors["tile"].is_contiguous(memory_format=torch.channels_last)
    member = member_of(layout, int(plan.place[2][1]))
    data = layout.store.read_range(layout.shard_names[member["shard"]], member["offset"], member["size"])
    pixels = decode_image(data, np.empty((32, 32, 3), np.uint8))
    assert np.array_equal(batches[2].tensors["tile"][1].permute(1, 2, 0).numpy(), pixels)
    assert batches[-1].stats.bytes_used > 0


def test_the_same_batches_for_any_number_of_workers(layout: Layout) -> None:
    plan = hand_made_plan(layout, lanes=2)
    settings = TrainSettings().changed(tile_size=32, view_height=16, view_width=64, seed=5)
    dataset = plan_dataset(layout, plan, SIZES, change=Augmenter(settings, 1))
    alone = list(Loader(dataset))
    assert len(alone) == plan.n_batches
    assert_same(alone, list(Loader(dataset, workers=1)))
    two = list(Loader(dataset, workers=2))
    assert_same(alone, two)
    assert [batch.worker for batch in two] == [0, 1] * (plan.n_batches // 2)
    fetched = {batch.worker: batch.stats.bytes_fetched for batch in two}
    assert sum(fetched.values()) == alone[-1].stats.bytes_fetched  # lanes share no shard


def test_an_epoch_is_augmented_otherwise_than_the_next(layout: Layout) -> None:
    plan = hand_made_plan(layout)
    settings = TrainSettings().changed(tile_size=32, view_height=16, view_width=64)
    one, again, other = (
        list(Loader(plan_dataset(layout, plan, SIZES, change=Augmenter(settings, epoch)))) for epoch in (1, 1, 2)
    )
    assert_same(one, again)
    assert not torch.equal(one[0].tensors["view"], other[0].tensors["view"])


def test_a_pair_is_augmented_the_same_in_whichever_batch(layout: Layout) -> None:
    change = Augmentation.of(TrainSettings().changed(tile_size=32, view_height=16, view_width=64), 3, 24)
    seen: list[dict[int, torch.Tensor]] = []
    for batch_size in (3, 4):
        batches = Loader(plan_dataset(layout, hand_made_plan(layout, batch_size=batch_size), SIZES, change=change))
        seen.append({int(p): v for b in batches for p, v in zip(b.tensors["pair"], b.tensors["view"], strict=True)})
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[0][pair], seen[1][pair]) for pair in seen[0])


def test_workers_must_divide_the_lanes(layout: Layout) -> None:
    with pytest.raises(BadInput, match=r"1 ranks .*2 loader workers .*3 lanes"):
        Loader(plan_dataset(layout, hand_made_plan(layout, lanes=3, batch_size=2), SIZES), workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_reads_every_image_once_and_every_shard_once(layout: Layout, workers: int) -> None:
    references, pairs = layout.references("test"), layout.pairs("test")
    dataset = scan_dataset(layout, references, pairs, SIZES, batch_size=4)
    tiles: list[int] = []
    views: list[int] = []
    for batch in Loader(dataset, workers=workers):
        tiles += batch.tensors.get("reference", torch.empty(0)).tolist()
        views += batch.tensors.get("query", torch.empty(0)).tolist()
        assert len(batch.tensors.get("tile", [])) + len(batch.tensors.get("view", [])) <= 4
    assert sorted(tiles) == list(range(len(references))) and sorted(views) == list(range(len(pairs)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_ranks_share_a_scan(layout: Layout, ranks: int) -> None:
    """Each image once, whatever their number; each rank a run of batches, and none more than one batch more."""
    references, pairs = layout.references("train"), layout.pairs("train")
    whole = [batch.step for batch in Loader(scan_dataset(layout, references, pairs, SIZES, batch_size=4))]
    parts = []
    for rank in range(ranks):
        dataset = scan_dataset(layout, references, pairs, SIZES, batch_size=4, rank=rank, ranks=ranks)
        parts.append([batch.step for batch in Loader(dataset)])
        assert len(Loader(dataset)) == len(parts[-1])
    assert [step for part in parts for step in part] == whole == list(range(12))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_loaders_of_one_machine_share_its_cores(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geostream.streaming.loader.cpu_count", lambda: 12)
    dataset = plan_dataset(layout, hand_made_plan(layout, lanes=2), SIZES)
    threads = [
        Loader(dataset, *how).dataset.threads for how in ((0,), (0, None, False, 4), (2, None, False, 4), (0, 5))
    ]
    assert threads == [8, 3, 1, 5]


def test_a_scan_is_in_physical_order(tmp_path: Path) -> None:
    places = tiny_places(places=8, test_places=0, distractors=0)
    layout = write_layout(Store.open(tmp_path), places, order=[3, 1, 7, 5, 0, 2, 6, 4], places_per_shard=2)
    batches = list(Loader(scan_dataset(layout, layout.references("train"), layout.pairs("train"), SIZES, batch_size=4)))
    assert [batch.tensors["reference"].tolist() for batch in batches] == [[3, 1], [7, 5], [0, 2], [6, 4]]
    assert batches[-1].stats.requests == 4


def test_leaving_early_leaves_no_threads(layout: Layout) -> None:
    with Loader(plan_dataset(layout, hand_made_plan(layout), SIZES)) as loader:
        next(iter(loader))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geostream")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_of_a_broken_image_names_place_member_and_shard(tmp_path: Path, workers: int) -> None:
    places = tiny_places(places=6)
    places[4].images["view-00.jpg"] = places[4].images["view-00.jpg"][:-200]
    layout = write_layout(Store.open(tmp_path), places)
    dataset = scan_dataset(layout, layout.references("train"), layout.pairs("train"), SIZES, batch_size=4)
    with pytest.raises(BadInput, match=r"^view-00.jpg of place alpha-0004 in .*shard-00001.tar: .*JPEG .*$"):
        list(Loader(dataset, workers=workers))


def test_a_damaged_shard_is_told_from_a_worker_too(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path))
    data = layout.store.read("shard-00000.tar")
    layout.store.write("shard-00000.tar", data[:-512])
    with pytest.raises(StoreError, match=r"^\S*shard-00000.tar: \d+ bytes .*index"):
        list(Loader(plan_dataset(layout, hand_made_plan(layout), SIZES), workers=1))


def test_an_uncommitted_layout_is_refused(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path))
    layout.store.delete("layout.json")
    with pytest.raises(LayoutNotCommitted):
        open_layout(Store.open(tmp_path), "tiny", "g0")


def test_a_plan_of_another_layout_is_refused(layout: Layout, tmp_path: Path) -> None:
    other = tiny_layout(Store.open(tmp_path), seed=1)
    with pytest.raises(StaleArtefact):
        plan_dataset(other, hand_made_plan(layout), SIZES)


def test_more_workers_than_batches(layout: Layout) -> None:
    pairs = layout.pairs("test")
    dataset = scan_dataset(layout, layout.references("test"), Pairs(pairs.place, pairs.view), SIZES, batch_size=100)
    assert len(dataset.steps) == 1 and isinstance(dataset, StreamDataset)
    assert len(list(Loader(dataset, workers=2))) == 1
