"""An index is whole or absent: killed anywhere, made by two at once, its layout or model gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

from geostream.errors import BadInput, StaleArtefact, StoreError
from geostream.layout import open_layout
from geostream.locating import make
from geostream.locating import vectors as reading
from geostream.locating.index import open_index
from geostream.locating.locate import Locator
from geostream.locating.make import make_index
from geostream.mining import embeddings as stored
from geostream.runs.generations import list_generations, remove
from geostream.runs.lease import Lease, RunHeld
from geostream.runs.models import open_model, promote
from geostream.runs.run import Run
from geostream.store import Store
from tests.command import said
from tests.locating.indexes import no_training_tiles, other_layout, photos_of, small_index


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


class Killed(BaseException):
    """What no code catches."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def test_an_index_names_its_model_and_layout(store: Store) -> None:
    index, _ = small_index(store)
    info = open_index(store).info
    assert info == index.info and (info["format"], info["name"], info["tiles"]) == (1, "base", 18)
    assert (info["model"]["run"], info["model"]["checkpoint"]) == ("run", "step-00000030")
    assert info["layout"] == {"name": "g0", "id": index.layout.id, "places": index.layout.places_id}
    calibration = info["calibration"]
    assert calibration["threshold"] is None and calibration["queries"] == 4, "too few photos to be sure of anything"
    run = Run.find(store, None, None, "run")
    again, already = make_index(run, None, index.layout, "base")
    assert already and again.info == info


def test_an_index_of_one_split_holds_its_gallery_alone(store: Store) -> None:
    index, _ = small_index(store)
    made, already = make_index(Run.find(store, None, None, "run"), None, index.layout, "test", split="test")
    assert not already and (made.info["split"], made.info["tiles"]) == ("test", 6)
    assert made.load_search().place.tolist() == index.layout.references("test").tolist()
    with pytest.raises(BadInput, match="no tiles of split train"):
        make_index(Run.find(store, None, None, "run"), None, no_training_tiles(store), "train", split="train")


def test_an_index_with_tta_answers_photos_with_it(store: Store) -> None:
    index, places = small_index(store)
    run = Run.find(store, None, None, "run")
    made, already = make_index(run, None, index.layout, "averaged", tta=True)
    assert not already and made.tta and not index.tta, "flips alone: training turns nothing"
    assert (made.info["format"], made.info["dim"]) == (2, 2 * index.info["dim"])
    assert make_index(run, None, index.layout, "averaged", tta=True)[1]
    images = photos_of(places)
    with_it, without = (Locator.open(store, index=name) for name in ("averaged", "base"))
    assert with_it.tta and not without.tta
    vectors, plain = with_it.embed(images), without.embed(images)
    mirrored = without.embed([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images])
    assert np.allclose(vectors * 2**0.5, np.hstack([plain, mirrored]), atol=1e-3)
    found, scores = with_it.search(vectors, 3)
    tiles = np.stack([made.load_search().tiles.reconstruct(row) for row in range(18)])
    assert np.allclose(np.sort(vectors @ tiles.T)[:, :-4:-1], scores, atol=1e-5) and found.shape == (16, 3)
    assert [one.photo for one in with_it.answer(images[:2], ["a", "b"])] == ["a", "b"]
    made, already = make_index(run, None, index.layout, "averaged")
    assert not already and not made.tta and made.info["format"] == 1, "another index of the same name"


def test_a_promoted_model_is_named_by_its_number(store: Store) -> None:
    index, _ = small_index(store)
    run = Run.find(store, None, None, "run")
    promote(run, "step-00000030", {"r1": 0.5}, over=None, by="by hand")
    source, model = open_model(store, index.layout, "current")
    made, already = make_index(source, model.checkpoint, index.layout, "base", model.number)
    assert not already and made.info["model"]["number"] == 1


def test_the_vectors_are_those_that_evaluation_compares(store: Store) -> None:
    index, places = small_index(store)
    run = Run.find(store, None, None, "run")
    tested, search = run.embeddings("test", 3), index.load_search()
    vectors = np.stack([search.tiles.reconstruct(row) for row in range(18)])
    assert search.place.tolist() == list(range(18))
    assert np.allclose(vectors[tested.reference_place], tested.reference[:], atol=1e-6)
    # A photo's own file and the layout's copy of it give nearly the same vector.
    asked = Locator.open(store).embed(photos_of(places)[12:])
    assert (np.einsum("nd,nd->n", asked, np.asarray(tested.query[:])) > 0.99).all()


@pytest.mark.parametrize("where", ["copy_weights", "embed_images", "_make_search", "commit"])
def test_killed_anywhere_it_is_absent_and_then_made_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(make, where, killed)
        with pytest.raises(Killed):
            small_index(store)
    folder = store.child("tiny", "indexes", "base")
    with pytest.raises(BadInput, match="index"):
        open_index(store)
    before = {one.path for one in folder.list()}
    run, layout = Run.find(store, None, None, "run"), open_layout(store)
    index, already = make_index(run, None, layout, "base")
    assert not already and open_index(store).info == index.info and Locator.open(store)
    after = {one.path for one in folder.list()}
    assert before - after <= {"making.json"} and "making.json" not in after
    assert not any(path.startswith("lease/") for path in after)


def test_an_index_made_again_replaces_the_one_of_another_model(store: Store) -> None:
    small_index(store)
    folder = store.child("tiny", "indexes", "base")
    folder.write("notes.txt", b"not ours")
    layout = other_layout(store, "other")
    run = Run.find(store, None, None, "run")
    index, already = make_index(run, None, layout, "base")
    assert not already and index.info["tiles"] == 11 and index.info["calibration"]["gallery"] == "test"
    assert Locator.open(store).layout.name == "other"
    assert folder.read("notes.txt") == b"not ours"
    assert [one for one in folder.folders("checkpoints")] == ["step-00000030"]


def test_two_at_once_are_one(store: Store) -> None:
    index, _ = small_index(store)
    run = Run.find(store, None, None, "run")
    with Lease(index.folder), pytest.raises(RunHeld, match=r"indexes/base: another process makes this index"):
        make_index(run, None, index.layout, "base")


def test_a_large_gallery_is_searched_in_lists(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "EXACT_ROWS", 10)
    monkeypatch.setattr(stored, "SHARD_ROWS", 8)
    monkeypatch.setattr(stored, "CHUNK_ROWS", 4)
    monkeypatch.setattr(reading, "SHARD_ROWS", 8)
    index, places = small_index(store)
    facts = index.info["search"]
    assert facts["kind"] == "lists" and facts["recall"] >= 0.99 and 1 <= facts["nprobe"] <= facts["lists"]
    monkeypatch.setattr(make, "EXACT_ROWS", 50_000)
    exact, _ = make_index(Run.find(store, None, None, "run"), None, index.layout, "exact")
    asked = Locator.open(store, index="exact").embed(photos_of(places))
    one, other = Locator.open(store, index="base").search(asked, 3), exact.load_search().nearest(asked, 3)
    assert np.array_equal(one[0], other[0]) and np.allclose(one[1], other[1], atol=1e-5)
    index.folder.write("lists.faiss", b"\0" * 100)
    with pytest.raises(StaleArtefact, match="lists.faiss: damaged"):
        Locator.open(store, index="base")


def test_what_an_index_lacks_is_said_in_one_line(store: Store) -> None:
    index, _ = small_index(store)
    folder = index.folder
    weights = folder.read("checkpoints/step-00000030/model.safetensors")
    folder.delete("checkpoints/step-00000030/model.safetensors")
    with pytest.raises(StaleArtefact, match=r"indexes/base: its model is gone"):
        Locator.open(store)
    folder.write("checkpoints/step-00000030/model.safetensors", weights[:-1] + b"!")
    with pytest.raises(StaleArtefact, match="damaged"):
        Locator.open(store)
    folder.write("checkpoints/step-00000030/model.safetensors", weights)
    group = folder.read("tiles.zarr/zarr.json")
    folder.delete("tiles.zarr/zarr.json")
    with pytest.raises(StaleArtefact, match="vectors are gone"):
        Locator.open(store)
    folder.write("tiles.zarr/zarr.json", group)
    layout = index.layout.store.read("layout.json")
    index.layout.store.delete("layout.json")
    with pytest.raises(StaleArtefact, match=r"layout g0 of its tiles is gone"):
        Locator.open(store, dataset="tiny")
    index.layout.store.write("layout.json", layout.replace(index.layout.places_id.encode(), b"0" * 64))
    with pytest.raises(StaleArtefact, match="other places"):
        Locator.open(store, dataset="tiny")
    index.layout.store.write("layout.json", layout)
    folder.write("index.json", b"{}")
    with pytest.raises(StoreError, match=r"index.json: .*damaged"):
        Locator.open(store)
    folder.write("index.json", b"[")
    with pytest.raises(StoreError, match=r"index.json"):
        Locator.open(store)


def test_which_index_is_meant(store: Store) -> None:
    small_index(store)
    make_index(Run.find(store, None, None, "run"), None, other_layout(store, "other"), "region")
    with pytest.raises(BadInput, match=r"--index .*base, region"):
        Locator.open(store)
    assert Locator.open(store, index="region").info["name"] == "region"
    with pytest.raises(BadInput, match=r"indexes/nowhere: no such index"):
        Locator.open(store, index="nowhere")


def test_the_layout_of_an_index_stays(store: Store, tmp_path: Path) -> None:
    small_index(store)
    layout = other_layout(store, "other")
    make_index(Run.find(store, None, None, "run"), None, layout, "region")
    kept = {one.name: one.keep for one in list_generations(store, "tiny")}
    assert kept["other"] == "needed by index region"
    with pytest.raises(BadInput, match="needed by index region"):
        remove(store, "tiny", "other")
    assert "region" in said("indexes", "list", str(tmp_path))
    assert "removed" in said("indexes", "remove", str(tmp_path), "region")
    assert store.child("tiny", "indexes", "region").list() == []
    with pytest.raises(BadInput, match=r"indexes/region: no such index .*base"):
        make.remove_index(store, "tiny", "region")
    assert remove(store, "tiny", "other").name == "other"


def test_vectors_on_the_store_are_plain_zarr(store: Store, tmp_path: Path) -> None:
    index, _ = small_index(store)
    group = zarr.open_group(tmp_path / "tiny/indexes/base/tiles.zarr", mode="r")
    vectors: Any = group["vectors"]
    assert vectors.shape == (18, index.info["dim"]) and np.asarray(group["place"]).tolist() == list(range(18))
