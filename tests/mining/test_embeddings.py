"""Embeddings on the store: whole Zarr shards only, and absent until they are committed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from geostream.arrays import Int32, Pairs
from geostream.errors import BadInput, GeostreamError, NotFound, StaleArtefact
from geostream.layout import Layout
from geostream.mining import embeddings as module
from geostream.mining.embeddings import (
    Embeddings,
    EmbeddingWriter,
    create_embeddings,
    open_embeddings,
    pick_rows,
    read_rows,
)
from geostream.runs.run import Run
from geostream.store import Store
from tests.cities import city

NAME = Run.embeddings_name("train", 4)
DIM = 5


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 8)
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)


def begin(run: Store, layout: Layout) -> tuple[EmbeddingWriter, Pairs, Int32]:
    pairs = layout.pairs("train")
    places = np.unique(pairs.place)
    writer = create_embeddings(
        run, NAME, layout=layout, checkpoint="checkpoints/step-00000007", split="train",
        pairs=pairs, reference_place=places, dim=DIM,
    )  # fmt: skip
    return writer, pairs, places


def fill(run: Store, layout: Layout, order_seed: int = 0, marker: float = 0.0) -> Embeddings:
    """Row r of the queries is r + marker everywhere, of the references -r; rows come in no order."""
    writer, pairs, places = begin(run, layout)
    rng = np.random.default_rng(order_seed)
    for rows in np.array_split(rng.permutation(len(pairs)), 7):
        writer.write_query(rows, np.repeat(rows[:, None] + marker, DIM, axis=1).astype(np.float32))
    for rows in np.array_split(np.arange(len(places)), 3):
        writer.write_reference(rows, np.repeat(-rows[:, None], DIM, axis=1).astype(np.float32))
    writer.commit()
    return open_embeddings(run, NAME, layout)


@pytest.mark.parametrize("held", [0, 2**20], ids=["in a file", "in memory"])
def test_rows_in_any_order_come_back_on_s3(s3_store: Store, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", held)
    layout = city(s3_store, side=5, views=3)
    embeddings = fill(s3_store.child("run"), layout)
    n = len(layout.pairs("train"))
    assert embeddings.dim == DIM
    assert read_rows(embeddings.query)[:, 0].tolist() == list(range(n))
    assert read_rows(embeddings.query, 3, 11)[:, 1].tolist() == list(range(3, 11))
    assert pick_rows(embeddings.query, np.array([0, 9, n - 1]))[:, 2].tolist() == [0, 9, n - 1]
    assert read_rows(embeddings.reference)[:, 0].tolist() == [-row for row in range(50)]
    assert np.array_equal(embeddings.pairs.place, layout.pairs("train").place)
    assert np.array_equal(embeddings.pairs.view, layout.pairs("train").view)
    assert embeddings.reference_place.tolist() == list(range(50))
    assert (embeddings.checkpoint, embeddings.split) == ("checkpoints/step-00000007", "train")


def test_one_write_a_zarr_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two partial writes of one would be a read-modify-write, which loses regions between workers."""
    layout = city(Store.open(tmp_path), side=4, views=2)
    written: list[tuple[int, int]] = []
    writer, pairs, _ = begin(Store.open(tmp_path / "run"), layout)

    class Spy:
        def __setitem__(self, rows: slice, block: object) -> None:
            written.append((rows.start, rows.stop))

    monkeypatch.setattr(writer._query, "array", Spy())
    for row in np.random.default_rng(0).permutation(len(pairs)):
        writer.write_query(np.array([row]), np.ones((1, DIM), dtype=np.float32))
    assert sorted(written) == [(start, min(start + 8, len(pairs))) for start in range(0, len(pairs), 8)]


def test_uncommitted_and_foreign_are_refused(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    layout, other = city(root, side=4), city(root, side=5, name="g1")
    run = root.child("run")
    with pytest.raises(NotFound, match="epoch-0004.zarr: not there"):
        open_embeddings(run, NAME, layout)
    fill(run, layout)
    with pytest.raises(StaleArtefact, match=r"places .*\bg1\b"):
        open_embeddings(run, NAME, other)
    begin(run, layout)  # over the committed ones, and cut off
    with pytest.raises(NotFound, match="epoch-0004.zarr: not committed"):
        open_embeddings(run, NAME, layout)
    assert read_rows(fill(run, layout, marker=0.5).query)[3, 0] == 3.5


def test_a_kill_while_the_old_ones_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Store.open(tmp_path)
    layout = city(root, side=4)
    run = root.child("run")
    fill(run, layout)

    def killed(self: Store, paths: Iterable[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "delete_all", killed)
    with pytest.raises(KeyboardInterrupt):
        begin(run, layout)
    with pytest.raises(NotFound):
        open_embeddings(run, NAME, layout)


def test_missing_doubled_and_wrong_rows(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    layout = city(root, side=4)
    writer, pairs, _ = begin(root.child("run"), layout)
    row = np.ones((1, DIM), dtype=np.float32)
    writer.write_query(np.array([0]), row)
    with pytest.raises(GeostreamError, match="twice"):
        writer.write_query(np.array([0]), row)
    with pytest.raises(GeostreamError, match="beyond"):
        writer.write_query(np.array([len(pairs) + 8]), row)
    with pytest.raises(GeostreamError, match="diverged"):
        writer.write_query(np.array([1]), row * np.nan)
    with pytest.raises(GeostreamError, match=r"\(1, 5\) .*\(1, 3\)"):
        writer.write_query(np.array([1]), row[:, :3])
    with pytest.raises(GeostreamError, match="4 Zarr shards"):
        writer.commit()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    writer, _, _ = begin(Store.open(tmp_path / "run"), city(Store.open(tmp_path), side=4))
    writer._query.waiting._file = Path("/dev/full").open("r+b", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
    with pytest.raises(GeostreamError, match=r"No space left.*TMPDIR"):
        writer.write_query(np.array([3]), np.ones((1, DIM), dtype=np.float32))


def test_nothing_to_embed(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    layout = city(root, side=2)
    with pytest.raises(BadInput, match="split 'val' of layout g0"):
        create_embeddings(
            root, NAME, layout=layout, checkpoint="", split="val",
            pairs=layout.pairs("val"), reference_place=layout.references("val"), dim=3,
        )  # fmt: skip
