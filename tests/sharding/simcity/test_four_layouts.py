"""The rendered city in each raw layout, through its adapter into a store: what the raw folder says is what arrives."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from scipy.io import loadmat
from scipy.spatial.distance import cdist

from flows import rendered
from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.layout.verify import verify_layout
from geostream.settings import default_settings
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from sharding.simcity import render_cities
from sharding.simcity import shots as simcity_shots
from sharding.simcity.gta_uav import MAP_METRES, MapCamera, overlap_of
from sharding.simcity.layouts import LAYOUTS
from sharding.simcity.map import plan_city
from sharding.simcity.plan import CitySpec
from sharding.simcity.raster import rasterise
from sharding.simcity.shots import PITCH, Look
from sharding.simcity.view import cut_tile

Table = list[dict[str, Any]]
CITIES = {
    "vigor": [CitySpec("NewYork", 3, 4), CitySpec("Chicago", 3, 3)],
    "cvusa": [CitySpec("Austin", 3, 3), CitySpec("Denver", 2, 3)],
    "cvact": [CitySpec("Canberra", 6, 6)],
    "university1652": [CitySpec("Kyoto", 4, 4), CitySpec("Leiden", 4, 4)],
    "cv-cities": [CitySpec("paris", 3, 3), CitySpec("rio", 2, 3)],
    "gta-uav": [CitySpec("Blaine", 6, 6), CitySpec("Senora", 6, 7)],
}
FLOWS = [adapter for adapter in rendered.KINDS if adapter != "photos"]  # own photos have tests of their own
OPTIONS: dict[str, dict[str, Any]] = {
    "cvact": {"twin_share": 0.5, "missing": 3},
    "university1652": {"drone_views": 4, "street_views": 2, "distractor_share": 0.2},
}
VIEW = {"cvusa": (16, 88), "university1652": (16, 16), "gta-uav": (24, 32)}
STORED = ShardOptions(tile_size=(16, 16), view_size=(16, 32), shard_bytes=2**14, max_broken=0.1)


def render(raw: Path, adapter: str, workers: int = 1, **options: Any) -> Path:
    size: dict[str, Any] = {"tile_size": 16, "view_size": VIEW.get(adapter, (16, 32))}
    options = OPTIONS.get(adapter, {}) | options
    render_cities(raw, CITIES[adapter], seed=3, adapter=adapter, workers=workers, **size, **options)
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The raw folder of an adapter, rendered once."""
    base = tmp_path_factory.mktemp("four")
    return lambda adapter: base / adapter if (base / adapter).exists() else render(base / adapter, adapter)


def sharded(raw: Path, store: Store, adapter: str, name: str = "base", **options: Any) -> Layout:
    layout = shard(read_places(adapter, raw, **options), store, adapter, name, STORED, workers=1).layout
    assert not verify_layout(layout).problems
    return layout


def places(layout: Layout) -> Table:
    table: Table = layout.places.to_pylist()
    return table


@pytest.mark.parametrize("arrangement", ["published", "arranged"])
def test_vigor(folder: Callable[[str], Path], tmp_path: Path, arrangement: str) -> None:
    raw = folder("vigor") if arrangement == "published" else render(tmp_path / "raw", "vigor", arrangement=arrangement)
    layout = sharded(
        raw, Store.open(str(tmp_path / "store")), "vigor", train_cities=["NewYork"], test_cities=["Chicago"]
    )
    assert (layout.protocols, layout.coordinates) == (("paired",), "latlon")
    by_tile = {place["source"].rpartition("/")[2]: place for place in places(layout)}
    assert len(by_tile) == 3 * 4 + 3 * 3
    for city, split in (("NewYork", "train"), ("Chicago", "test")):
        lines = (raw / "splits" / city / "pano_label_balanced.txt").read_text().splitlines()
        assert len(layout.pairs(split).place) == len(lines) > 0
        for line in lines:
            panorama, positive, *_ = line.split()
            (view,) = (view for view in by_tile[positive]["views"] if view["source"].endswith(panorama))
            assert [view["north"], view["east"]] == [float(degrees) for degrees in panorama.split(",")[1:3]]
            assert {places(layout)[at]["source"].rpartition("/")[2] for at in view["semi_positives"]} == set(
                line.split()[4::3]
            )
    same_area = {"protocol": "same-area", "train_cities": ["NewYork", "Chicago"], "test_cities": ["NewYork", "Chicago"]}
    halves = read_places("vigor", raw, **same_area)
    assert abs(halves.count("train") - halves.count("test")) <= 2
    corrected = "__corrected" if arrangement == "arranged" else ""
    named = {view.image.named.split(":")[0] for place in halves.places for view in place.views}
    assert named == {
        f"splits{corrected}/{city}/same_area_balanced_{split}{corrected}.txt"
        for city in ("NewYork", "Chicago")
        for split in ("train", "test")
    }


def test_labels_that_were_corrected_differ_in_their_offsets_alone(tmp_path: Path) -> None:
    raw = render(tmp_path / "raw", "vigor", arrangement="arranged")
    first, corrected = (
        [line.split() for line in (raw / f"splits{suffix}" / "Chicago" / f"pano_label_balanced{suffix}.txt").open()]
        for suffix in ("", "__corrected")
    )
    for one, other in zip(first, corrected, strict=True):
        assert [one[0], *one[1::3]] == [other[0], *other[1::3]] and one != other


def test_cvusa(folder: Callable[[str], Path], tmp_path: Path) -> None:
    raw = folder("cvusa")
    layout = sharded(raw, Store.open(str(tmp_path)), "cvusa")
    assert (layout.protocols, layout.coordinates) == (("paired",), "latlon")
    located = [[float(cell) for cell in row] for row in csv.reader((raw / "split_locations" / "all.csv").open())]
    found = {place["source"]: place for place in places(layout)}
    assert len(found) == len(located)
    for split, name in (("train", "train-19zl"), ("test", "val-19zl")):
        rows = list(csv.reader((raw / "splits" / f"{name}.csv").open()))
        assert len(layout.pairs(split).place) == len(rows) > 0
        for tile, panorama, annotation in rows:
            number = int(tile[-11:-4])
            assert annotation == f"streetview/annotations/{number:07d}.png"
            (view,) = found[tile]["views"]
            assert (view["source"], view["split"]) == (panorama, split)
            where = [found[tile]["north"], found[tile]["east"], view["north"], view["east"]]
            assert where == located[number - 1]
            assert np.abs(np.subtract(where[:2], where[2:])).max() < 3e-5  # degrees: about 2 metres
    assert sorted(int(tile[-11:-4]) for tile in found) == list(range(1, len(found) + 1))


@pytest.mark.parametrize("protocol", ["val", "test"])
def test_cvact(folder: Callable[[str], Path], tmp_path: Path, protocol: str) -> None:
    raw = folder("cvact")
    layout = sharded(raw, Store.open(str(tmp_path)), "cvact", protocol=protocol)
    assert layout.coordinates == "utm"
    assert layout.protocols == (("paired", "within-5m") if protocol == "test" else ("paired",))
    mat = loadmat(raw / "ACT_data.mat")
    ids, utm = mat["panoIds"], mat["utm"]
    struct = {"train": "trainSet", "test": "valSet" if protocol == "val" else "valSetAll"}
    inside = {"train": "ANU_data_small", "test": "ANU_data_small" if protocol == "val" else "ANU_data_test"}
    found = {place["source"]: place for place in places(layout)}
    for split, name in struct.items():
        indexes = mat[name][0][0][1].ravel() - 1  # as the field's code reads it: the second field, from 1
        whole = 0
        for n in indexes:
            tile = f"{inside[split]}/satview_polish/{ids[n]}_satView_polish.jpg"
            panorama = f"{inside[split]}/streetview/{ids[n]}_grdView.jpg"
            if not (raw / tile).exists() or not (raw / panorama).exists():
                assert split == "train"
                continue
            whole += 1
            (view,) = found[tile]["views"]
            assert (view["source"], view["split"]) == (panorama, split)
            assert [found[tile]["east"], found[tile]["north"]] == [view["east"], view["north"]] == utm[n].tolist()
        assert len(layout.pairs(split).place) == whole == len(indexes) - (3 if split == "train" else 0)
    gaps = cdist(*[layout.position[layout.pairs("test").place]] * 2) + 99 * np.eye(len(layout.pairs("test").place))
    assert (gaps.min() < 5) == (protocol == "test")
    assert gaps.min() > 1
    assert set(mat["valSet"]["valInd"][0, 0].ravel()) < set(mat["valSetAll"]["valInd"][0, 0].ravel())


@pytest.mark.parametrize("views", ["drone", "street"])
def test_university1652(folder: Callable[[str], Path], s3_store: Store, views: str) -> None:
    raw = folder("university1652")
    layout = sharded(raw, s3_store, "university1652", views=views)
    assert (layout.protocols, layout.coordinates) == (("both-ways",), "none")
    buildings = {
        kind: {path.name for path in (raw / kind).iterdir()}
        for kind in ("train/satellite", "test/query_satellite", "test/gallery_satellite")
    }
    assert not buildings["train/satellite"] & buildings["test/gallery_satellite"]
    distractors = buildings["test/gallery_satellite"] - buildings["test/query_satellite"]
    assert len(distractors) == -(-len(set.union(*buildings.values())) // 5)  # the share asked for
    assert len(layout.references("train")) == len(buildings["train/satellite"])
    assert len(layout.references("test")) == len(buildings["test/gallery_satellite"])
    for split, kind in (("train", f"train/{views}"), ("test", f"test/query_{views}")):
        files = {path.relative_to(raw).as_posix() for path in (raw / kind).rglob("*.jp*g")}
        assert files == {view["source"] for p in places(layout) for view in p["views"] if view["split"] == split}
    asked, only = (
        {place["source"].split("/")[2] for place in places(layout) if split in {v["split"] for v in place["views"]}}
        for split in ("test", "gallery")
    )
    assert asked == buildings["test/query_satellite"]
    assert only == {path.name for path in (raw / f"test/gallery_{views}").iterdir()} - asked > set()
    assert only <= distractors
    for place in places(layout):
        building = place["source"].split("/")[2]
        assert place["source"].endswith(f"satellite/{building}/{building}.jpg")
        assert {view["source"].split("/")[2] for view in place["views"]} <= {building}
        if views == "drone":
            assert [view["source"][-8:] for view in place["views"]] == [f"-{n:02d}.jpeg" for n in range(1, 5)]


def test_cv_cities(folder: Callable[[str], Path], tmp_path: Path) -> None:
    raw = folder("cv-cities")
    layout = sharded(raw, Store.open(str(tmp_path)), "cv-cities", train_cities=["paris"], test_cities=["rio"])
    assert (layout.protocols, layout.coordinates) == (("paired",), "latlon")
    found = {place["source"]: place for place in places(layout)}
    rows = [row for city in ("paris", "rio") for row in csv.reader((raw / city / "img_info.csv").open())]
    assert len(found) == len(rows) > 10
    for _, east, north, city, tile, panorama in rows:
        place = found[tile]
        (view,) = place["views"]
        assert (place["area"], view["source"]) == (city, panorama)
        assert view["split"] == ("train" if city == "paris" else "test")
        assert [place["north"], place["east"]] == [float(north), float(east)] == [view["north"], view["east"]]


def test_gta_uav(folder: Callable[[str], Path], tmp_path: Path) -> None:
    raw = folder("gta-uav")
    layout = sharded(raw, Store.open(str(tmp_path)), "gta-uav")
    assert (layout.protocols, layout.coordinates) == (("paired",), "utm")
    found = {place["source"]: place for place in places(layout)}
    assert len(found) == len(list((raw / "satellite").iterdir()))
    keys = [place["key"] for place in places(layout)]
    for split in ("train", "test"):
        entries = json.loads((raw / f"cross-area-drone2sate-{split}.json").read_text())
        for entry in entries:
            for name, (x, y) in zip(
                entry["pair_pos_semipos_sate_img_list"], entry["pair_pos_semipos_sate_loc_x_y_list"], strict=True
            ):
                place = found[f"satellite/{name}"]
                assert [place["east"], place["north"]] == pytest.approx([x, MAP_METRES - y]), "by its name alone"
        shown = [
            one
            for one in entries
            if one["pair_pos_sate_img_list" if split == "test" else "pair_pos_semipos_sate_img_list"]
        ]
        assert len(layout.pairs(split).place) == len(shown) > 0
        for entry in shown:
            weights = dict(
                zip(entry["pair_pos_semipos_sate_img_list"], entry["pair_pos_semipos_sate_weight_list"], strict=True)
            )
            best = max(sorted(weights), key=weights.__getitem__)
            (view,) = (
                one for one in found[f"satellite/{best}"]["views"] if one["source"].endswith(entry["drone_img_name"])
            )
            assert {keys[at].split("_", 1)[1] for at in view["semi_positives"]} == {
                Path(name).stem for name in weights if name != best
            }
    train, test = (layout.position[layout.pairs(split).place, 1] for split in ("train", "test"))
    assert train.max() < 3375 < test.min(), "the authors' line between the two"


def test_what_a_drone_shows_overlaps_with_tiles_as_it_should() -> None:
    camera = MapCamera(100.0, 50.0, 80.0, is_tile=False)  # 80 m × 60 m
    assert overlap_of(camera, 100.0, 50.0, 80.0) == pytest.approx(0.75)
    assert overlap_of(camera, 140.0, 50.0, 80.0) == pytest.approx(2400 / (4800 + 6400 - 2400), rel=0.02)
    turned = MapCamera(100.0, 50.0, 80.0, math.pi / 2, is_tile=False)  # 60 m × 80 m
    assert overlap_of(turned, 100.0, 90.0, 80.0) == pytest.approx(2400 / (4800 + 6400 - 2400), rel=0.02)
    assert overlap_of(camera, 200.0, 50.0, 80.0) == 0


def test_a_drone_sees_the_tile_below_it_turned() -> None:
    city = plan_city((-150, -150, 150, 150), np.random.default_rng(0))
    look = Look(32, (32, 32), 90)
    edge = round(150 / look.metres)
    raster = rasterise(city, -edge, -edge, 2 * edge, 2 * edge, look.metres)
    tile = MapCamera(3.0, 5.0, 86.4).take(raster, look)
    seen = MapCamera(3.0, 5.0, 86.4, is_tile=False).take(raster, look)
    east_up = MapCamera(3.0, 5.0, 86.4, math.pi / 2, is_tile=False).take(raster, look)
    assert np.array_equal(tile, seen) and tile.std() > 20
    assert np.abs(np.rot90(tile).astype(int) - east_up).mean() < 6, "east is up: north is on the left"


def test_pictures_in_queries_and_gallery_are_the_same(folder: Callable[[str], Path]) -> None:
    test = folder("university1652") / "test"
    for kind in ("drone", "satellite", "street"):
        for query in (test / f"query_{kind}").rglob("*.jp*g"):
            there = test / f"gallery_{kind}" / query.relative_to(test / f"query_{kind}")
            assert query.read_bytes() == there.read_bytes()


def colours(picture: np.ndarray) -> np.ndarray:
    """How much of a picture has each of 64 colours: the same from every side."""
    bins = (picture // 64 * np.array([16, 4, 1])).sum(axis=2)
    return np.bincount(bins.ravel(), minlength=64) / bins.size


def test_a_drone_sees_what_the_tile_of_its_building_shows(tmp_path: Path) -> None:
    """Colours alone tell most buildings: the views are of the scene that their tile is of."""
    raw = tmp_path / "raw"
    options: dict[str, Any] = {"drone_views": 2, "street_views": 1, "distractor_share": 0.0}
    render_cities(
        raw,
        [CitySpec("Kyoto", 7, 7)],
        seed=1,
        adapter="university1652",
        tile_size=32,
        view_size=(32, 32),
        workers=1,
        **options,
    )
    tiles, drones = (
        {path.parent.name: colours(simplejpeg.decode_jpeg(path.read_bytes())) for path in sorted(raw.glob(pattern))}
        for pattern in ("*/*satellite/*/*.jpg", "*/*drone/*/image-02.jpeg")
    )
    names = sorted(tiles)
    distance = cdist([drones[name] for name in names], [tiles[name] for name in names], "cityblock")
    assert len(names) > 8
    assert np.mean(distance.argmin(axis=1) == np.arange(len(names))) > 0.5


def digest(raw: Path) -> dict[str, str]:
    files = (path for path in sorted(raw.rglob("*")) if path.is_file())
    return {path.relative_to(raw).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("adapter", [name for name in CITIES if name != "university1652"])
def test_a_folder_follows_from_its_seed(folder: Callable[[str], Path], tmp_path: Path, adapter: str) -> None:
    """Byte for byte, tables included."""
    assert digest(render(tmp_path / "again", adapter)) == digest(folder(adapter))


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simcity_shots, "BLOCK", 2 * PITCH)  # enough tasks for a pool of processes
    one, two = (render(tmp_path / str(workers), "university1652", workers) for workers in (1, 2))
    assert digest(one) == digest(two)


@pytest.mark.parametrize("adapter", [name for name in FLOWS if name != "gta-uav"])  # which cuts its tiles itself
def test_what_breaks_off_is_done_again(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    raw = tmp_path / "raw"
    shots = iter(range(3))
    tile = cut_tile

    def break_off(*arguments: Any) -> np.ndarray:
        if next(shots, None) is None:
            raise KeyboardInterrupt
        return tile(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(simcity_shots, "cut_tile", break_off)
        with pytest.raises(KeyboardInterrupt):
            render(raw, adapter)
    assert not raw.exists()
    with pytest.raises(BadInput):
        read_places(adapter, raw)
    render(raw, adapter)
    assert digest(raw) == digest(folder(adapter))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("adapter", FLOWS)
def test_the_flows_cities_are_of_the_recipe_s_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    """From nothing to a layout that the recipe of its name can train on, broken images and all."""
    options = OPTIONS.get(adapter, {}) | ({"missing": 1} if adapter == "cvact" else {})
    monkeypatch.setitem(LAYOUTS[adapter].sizes, "small", (CITIES[adapter], options))
    raw = tmp_path / "raw"
    assert rendered.render(raw, adapter, "small", seed=1).fresh
    assert not rendered.render(raw, adapter, "small", seed=1).fresh
    cities = {"train_cities": ["NewYork"], "test_cities": ["Chicago"]} if adapter == "vigor" else {}
    stored = ShardOptions(**rendered.shard_options(adapter))
    layout = shard(read_places(adapter, raw, **cities), Store.open(str(tmp_path)), "any", "base", stored, 1).layout
    recipe = default_settings(rendered.dataset_name(adapter))
    assert recipe.model.name == "test_convnext"
    assert list(layout.info["images"]["tile_size"]) == [recipe.model.tile_size] * 2
    assert list(layout.info["images"]["view_size"]) == [recipe.model.view_height, recipe.model.view_width]
    assert layout.info["images"]["enlarged"] == 0
    assert len(layout.pairs("train").place) > 0


def test_what_the_flows_cannot_render_is_told() -> None:
    assert rendered.dataset_name("vigor") == "simcity"
    for ask in (rendered.dataset_name, rendered.shard_options):
        with pytest.raises(BadInput, match="vigor, cvusa, cvact, university1652"):
            ask("kitti")
