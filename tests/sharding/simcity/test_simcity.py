"""The rendered city: its geometry is right, its files are VIGOR's, and a render is whole or not there."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from geostream.errors import BadInput
from sharding.simcity import RenderSummary, main, render_cities
from sharding.simcity import shots as simcity_shots
from sharding.simcity.layouts import LAYOUTS, cities_of
from sharding.simcity.map import Bytes, City, look_alike, plan_city
from sharding.simcity.plan import CitySpec, Town
from sharding.simcity.raster import BUILDING, Raster, rasterise
from sharding.simcity.shots import PITCH, TILE_METRES
from sharding.simcity.view import Rays, cut_tile, look_around
from sharding.simcity.vigor import MISPLACED_METRES, misplace, plan_tiles, plan_views

METRES = 0.55
EYE = 2.5  # metres: of a panorama, as documented; not imported, so that a change is noticed
RED = np.array([220, 20, 20])
TINY = [CitySpec("NewYork", 4, 5), CitySpec("Chicago", 4, 4)]


def one_building(west: float, south: float, east: float, north: float, height: float) -> City:
    """Grass and one red building."""
    none = np.zeros((0, 3))
    return City(
        ground=np.array([[-200.0, -200.0, 200.0, 200.0]]),
        ground_colour=np.array([[60, 160, 60]], np.uint8),
        buildings=np.array([[west, south, east, north]]),
        building_height=np.array([height]),
        facade=RED[None].astype(np.uint8),
        roof=RED[None].astype(np.uint8),
        bay=np.array([3.0]),
        trees=none,
        tree_height=none[:, 0],
        tree_colour=none.astype(np.uint8),
    )


def raster_of(city: City, metres: float = METRES) -> Raster:
    pixels = round(160 / metres)
    return rasterise(city, -pixels, -pixels, 2 * pixels, 2 * pixels, metres)


def red(picture: Bytes) -> np.ndarray:
    """Which pixels are of the building (shaded, windowed or hazy, but redder than green and blue)."""
    picture = picture.astype(int)
    return (picture[..., 0] > picture[..., 1] + 10) & (picture[..., 0] > picture[..., 2] + 10)


@pytest.mark.parametrize(
    ("bearing", "share", "above", "right"), [("east", 0.75, 0, 1), ("north", 0.5, 1, 0), ("west", 0.25, 0, -1)]
)
def test_a_lone_tower_stands_where_it_should_in_both_views(bearing: str, share: float, above: int, right: int) -> None:
    x, y = 20.0 * right, 20.0 * above
    raster = raster_of(one_building(x - 4, y - 4, x + 4, y + 4, height=25.0))

    panorama = red(look_around(raster, 0.0, 0.0, Rays.of(96, 384, METRES)))
    columns = np.nonzero(panorama.any(axis=0))[0]
    assert abs((columns.mean() + 0.5) / 384 - share) < 0.01, bearing
    assert np.ptp(columns) + 1 == pytest.approx(2 * math.degrees(math.atan(4 / 16)) / 360 * 384, abs=3)

    rows, columns = np.nonzero(red(cut_tile(raster, 0.0, 0.0, TILE_METRES, 64)))
    pixel = TILE_METRES / 64
    assert (columns.mean() + 0.5 - 32) * pixel == pytest.approx(x, abs=0.6)
    assert (32 - rows.mean() - 0.5) * pixel == pytest.approx(y, abs=0.6)


def test_the_south_is_at_both_edges_of_a_panorama() -> None:
    raster = raster_of(one_building(-4, -24, 4, -16, height=25.0))
    columns = np.nonzero(red(look_around(raster, 0.0, 0.0, Rays.of(48, 192, METRES))).any(axis=0))[0]
    assert columns.min() == 0
    assert columns.max() == 191
    assert np.all((columns < 20) | (columns > 171))


@pytest.mark.parametrize(("distance", "height"), [(10.0, 12.0), (20.0, 30.0), (40.0, EYE)])
def test_a_wall_s_foot_and_top_are_where_an_eye_at_2_5_metres_sees_them(distance: float, height: float) -> None:
    metres, rows = 0.1, 384
    raster = raster_of(one_building(-60, distance, 60, distance + 10, height), metres)
    middle = red(look_around(raster, 0.0, 0.0, Rays.of(rows, 2 * rows, metres)))[:, rows]  # looking north
    seen = np.nonzero(middle)[0]
    per_row = math.radians(180 / rows)
    top = rows / 2 - math.atan((height - EYE) / distance) / per_row
    foot = rows / 2 + math.atan(EYE / distance) / per_row
    assert seen.min() == pytest.approx(top, abs=1.5)
    assert seen.max() + 1 == pytest.approx(foot, abs=1.5)


def test_the_ground_in_front_hides_nothing_and_the_wall_hides_what_is_behind_it() -> None:
    low = one_building(-60, 20, 60, 30, height=4.0)
    behind = one_building(-60, 60, 60, 70, height=4.0)  # 4 m at 60 m is lower than 4 m at 20 m
    both = City(**{**low.__dict__, "buildings": np.concatenate([low.buildings, behind.buildings]),
                   "building_height": np.array([4.0, 4.0]), "bay": np.array([3.0, 3.0]),
                   "facade": np.array([RED, [20, 20, 220]], np.uint8),
                   "roof": np.array([RED, [20, 20, 220]], np.uint8)})  # fmt: skip
    rays = Rays.of(96, 384, METRES)
    np.testing.assert_array_equal(
        look_around(raster_of(both), 0.0, 0.0, rays)[:, 150:234],
        look_around(raster_of(low), 0.0, 0.0, rays)[:, 150:234],
    )


def test_windows_of_a_city_agree_where_they_overlap() -> None:
    city = plan_city((-150, -150, 250, 250), np.random.default_rng(3))
    whole = rasterise(city, -200, -200, 500, 500, METRES)
    area = (100 * METRES, 50 * METRES, 220 * METRES, 170 * METRES)
    part = rasterise(city.window(area), 100, 50, 120, 120, METRES)
    inside = slice(500 - 250 - 120, 500 - 250), slice(300, 420)
    np.testing.assert_array_equal(part.height, whole.height[inside])
    np.testing.assert_array_equal(part.kind >= BUILDING, whole.kind[inside] >= BUILDING)
    sunny = part.colour[:80, 40:] == whole.colour[inside][:80, 40:]  # shadows come from up to 34 m south-west
    assert sunny.all()


def test_tiles_show_the_same_city_at_any_resolution() -> None:
    city = plan_city((-150, -150, 150, 150), np.random.default_rng(3))
    coarse = cut_tile(raster_of(city, 0.55), 0.0, 0.0, TILE_METRES, 64).astype(float)
    fine = cut_tile(raster_of(city, 0.275), 0.0, 0.0, TILE_METRES, 256).astype(float)
    fine = fine.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(coarse - fine).mean() < 6
    assert np.abs(coarse - fine[:, ::-1]).mean() > 30  # it is no constant picture


def test_panoramas_stand_outside_buildings_and_within_reach_of_their_tile() -> None:
    spec = CitySpec("Seattle", 10, 10)
    city = plan_city((-150, -150, 500, 500), np.random.default_rng(0))
    tiles = plan_tiles(spec)
    views = plan_views(Town(spec, city, np.random.default_rng(1)), tiles, 0.2, 0.1, 0.3)
    west, south, east, north = city.buildings.T
    for tile, at_tile in zip(tiles, views, strict=True):
        for view in at_tile:
            assert max(abs(view.x - tile.x), abs(view.y - tile.y)) <= 0.2 * TILE_METRES
            inside = (west < view.x) & (view.x < east) & (south < view.y) & (view.y < north)
            assert not inside.any()
            assert 0 <= view.x <= 9 * PITCH and 0 <= view.y <= 9 * PITCH
    counts = [len(at_tile) for at_tile in views]
    assert {0, 1, 2} <= set(counts)


def town_of(spec: CitySpec) -> Town:
    reach = 150.0
    area = (-reach, -reach, spec.extent[0] + reach, spec.extent[1] + reach)
    return Town(spec, plan_city(area, np.random.default_rng(0)), np.random.default_rng(1))


def test_a_misplaced_view_has_the_labels_of_the_position_that_its_name_says() -> None:
    town = town_of(CitySpec("Seattle", 8, 8))
    tiles = plan_tiles(town.spec)
    centres = {tile.name: (tile.x, tile.y) for tile in tiles}
    views = [view for at_tile in plan_views(town, tiles, 0.25, 0.0, 0.0) for view in at_tile]
    for view in views:
        wrong = misplace(town, tiles, view, 1.0)
        assert (wrong.x, wrong.y, wrong.light) == (view.x, view.y, view.light)  # the picture is of where it was taken
        identity, latitude, longitude, suffix = wrong.name.split(",")
        assert (identity, suffix) == (view.name.split(",")[0], ".jpg")
        said = town.spec.metres(float(latitude), float(longitude))
        assert math.dist(said, (view.x, view.y)) == pytest.approx(MISPLACED_METRES, abs=0.1)
        positive = wrong.shown[0][0]
        assert positive == min(centres, key=lambda name: math.dist(said, centres[name]))
        assert positive != view.shown[0][0]
    assert [misplace(town, tiles, view, 0.0) for view in views] == views
    some = [misplace(town, tiles, view, 0.25) != view for view in views * 10]
    assert np.mean(some) == pytest.approx(0.25, abs=0.06)


def test_where_no_wrong_position_lies_in_the_city_the_right_one_stays() -> None:
    town = town_of(CitySpec("Seattle", 2, 2))  # 35 m wide
    tiles = plan_tiles(town.spec)
    ((view, *_), *_) = [at_tile for at_tile in plan_views(town, tiles, 0.1, 0.0, 0.0) if at_tile]
    assert all(misplace(town, tiles, view, 1.0) == view for _ in range(5))


def test_only_the_cities_named_have_misplaced_views(tmp_path: Path) -> None:
    size: dict[str, Any] = {"tile_size": 16, "view_size": (16, 32), "workers": 1}
    render_cities(tmp_path / "right", TINY, seed=7, **size)
    render_cities(tmp_path / "wrong", TINY, seed=7, misplaced={"NewYork": 0.5}, **size)
    ids = {
        (raw, city): {line.split(",")[0]: line for line in lines(tmp_path / raw, city, "pano_label_balanced")}
        for raw in ("right", "wrong")
        for city in ("NewYork", "Chicago")
    }
    assert ids["wrong", "Chicago"] == ids["right", "Chicago"]
    right, wrong = ids["right", "NewYork"], ids["wrong", "NewYork"]
    assert right.keys() == wrong.keys()
    assert 0 < sum(right[one] != wrong[one] for one in right) < len(right)
    for one in right:  # the same pictures under both names
        pictures = [
            (tmp_path / raw / "NewYork" / "panorama" / lines_of[one].split(" ")[0]).read_bytes()
            for raw, lines_of in (("right", right), ("wrong", wrong))
        ]
        assert pictures[0] == pictures[1]
    with pytest.raises(BadInput, match="misplaced"):
        render_cities(tmp_path / "right", TINY, seed=7, misplaced={"NewYork": 0.5}, **size)
    with pytest.raises(BadInput, match="misplaced"):
        render_cities(tmp_path / "wrong", TINY, seed=7, **size)


def test_a_city_that_looks_like_another_differs_in_some_buildings_only() -> None:
    city = plan_city((-150, -150, 450, 450), np.random.default_rng(3))
    double = look_alike(city, np.random.default_rng(4), 0.3)
    for name in ("ground", "ground_colour", "buildings", "bay", "trees", "tree_height", "tree_colour"):
        np.testing.assert_array_equal(getattr(double, name), getattr(city, name))
    repainted = (double.facade != city.facade).any(axis=1)
    assert repainted.mean() == pytest.approx(0.3, abs=0.1)
    assert ((double.building_height != city.building_height) <= repainted).all()
    assert ((double.roof != city.roof).any(axis=1) <= repainted).all()


def test_tiles_look_like_those_of_the_city_that_theirs_is_like(tmp_path: Path) -> None:
    cities = [CitySpec("NewYork", 4, 4), CitySpec("Elsewhere", 4, 4, like="NewYork"), CitySpec("Chicago", 4, 4)]
    render_cities(tmp_path / "raw", cities, seed=1, tile_size=32, view_size=(16, 32), workers=1)
    pictures = {}
    for city in cities:
        images = []
        for name in lines(tmp_path / "raw", city.name, "satellite_list"):
            with Image.open(tmp_path / "raw" / city.name / "satellite" / name) as image:
                images.append(np.asarray(image, dtype=float))
        pictures[city.name] = np.stack(images)
    double, other = (np.abs(pictures[name] - pictures["NewYork"]).mean() for name in ("Elsewhere", "Chicago"))
    assert 1 < double < other / 2
    views = {city.name: {line.split(",")[0] for line in lines(tmp_path / "raw", city.name, "pano_label_balanced")}
             for city in cities}  # fmt: skip
    assert not views["NewYork"] & views["Elsewhere"]  # panoramas stand elsewhere


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RenderSummary]:
    raw = tmp_path_factory.mktemp("simcity") / "raw"
    return raw, render_cities(raw, TINY, seed=7, tile_size=32, view_size=(24, 96), workers=1)


def lines(raw: Path, city: str, name: str) -> list[str]:
    return (raw / "splits" / city / f"{name}.txt").read_text().splitlines()


def test_the_files_are_vigor_s(rendered: tuple[Path, RenderSummary]) -> None:
    raw, summary = rendered
    tiles = views = empty = 0
    for spec in TINY:
        listed = lines(raw, spec.name, "satellite_list")
        assert sorted(listed) == sorted(p.name for p in (raw / spec.name / "satellite").iterdir())
        assert len(listed) == spec.rows * spec.columns
        labels = [line.split(" ") for line in lines(raw, spec.name, "pano_label_balanced")]
        assert {len(columns) for columns in labels} == {13}
        assert sorted(columns[0] for columns in labels) == sorted(
            p.name for p in (raw / spec.name / "panorama").iterdir()
        )
        assert all(set(columns[1::3]) <= set(listed) and len(set(columns[1::3])) == 4 for columns in labels)
        train, test = (lines(raw, spec.name, f"same_area_balanced_{split}") for split in ("train", "test"))
        assert sorted(train + test) == lines(raw, spec.name, "pano_label_balanced")
        assert abs(len(train) - len(test)) <= 1
        tiles, views = tiles + len(listed), views + len(labels)
        empty += len(set(listed) - {columns[1] for columns in labels})
        for columns in labels:
            assert columns[0].endswith(",.jpg") and columns[0].count(",") == 3
            jpeg = (raw / spec.name / "panorama" / columns[0]).read_bytes()
            assert simplejpeg.decode_jpeg(jpeg).shape == (24, 96, 3)
        with Image.open(raw / spec.name / "satellite" / listed[0]) as tile:
            assert (tile.size, tile.mode) == ((32, 32), "RGB")
    assert (summary.tiles, summary.views, summary.empty_tiles) == (tiles, views, empty)
    assert empty > 0 and summary.fresh


def test_offsets_agree_with_the_coordinates_in_the_names(rendered: tuple[Path, RenderSummary]) -> None:
    """A positive row offset: the panorama stands south of the tile's centre; a positive column offset: west of it."""
    raw, _ = rendered
    for spec in TINY:
        for line in lines(raw, spec.name, "pano_label_balanced"):
            columns = line.split(" ")
            _, latitude, longitude, _ = columns[0].split(",")
            shrink = math.cos(math.radians(spec.origin[0]))
            distances = []
            for n in (1, 4, 7, 10):
                tile_latitude, tile_longitude = map(float, columns[n].removesuffix(".png").split("_")[1:])
                south = (tile_latitude - float(latitude)) * 111_320 / 0.11
                west = (tile_longitude - float(longitude)) * 111_320 * shrink / 0.11
                assert float(columns[n + 1]) == pytest.approx(south, abs=0.02)
                assert float(columns[n + 2]) == pytest.approx(west, abs=0.02)
                distances.append(math.hypot(south, west))
            assert distances == sorted(distances)  # the positive is the nearest
            assert max(abs(float(columns[2])), abs(float(columns[3]))) <= 160
            assert float(longitude) < 0


def test_a_panorama_file_shows_what_its_tile_file_shows(rendered: tuple[Path, RenderSummary]) -> None:
    """Under the eye is the ground that the tile has at the offset written in the label."""
    raw, _ = rendered
    under, there = [], []
    for line in lines(raw, "NewYork", "pano_label_balanced"):
        name, tile, row, column = line.split(" ")[:4]
        panorama = simplejpeg.decode_jpeg((raw / "NewYork" / "panorama" / name).read_bytes())
        with Image.open(raw / "NewYork" / "satellite" / tile) as image:
            pixels = np.asarray(image).astype(float)
        y, x = 16 + float(row) / 20, 16 - float(column) / 20
        under.append(panorama[-1].mean(axis=0))
        there.append(pixels[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].mean(axis=(0, 1)))
    similarity = np.corrcoef(np.ravel(under), np.ravel(there))[0, 1]
    shifted = np.corrcoef(np.ravel(under), np.ravel(there[1:] + there[:1]))[0, 1]
    assert similarity > 0.6 > shifted


def digest(raw: Path) -> dict[str, str]:
    return {
        str(path.relative_to(raw)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(raw.rglob("*"))
        if path.is_file()
    }


def test_a_city_follows_from_the_seed_and_its_name_alone(tmp_path: Path) -> None:
    cities = [CitySpec("NewYork", 3, 3), CitySpec("Elsewhere", 3, 3)]
    size: dict[str, Any] = {"tile_size": 16, "view_size": (16, 32), "workers": 1}
    render_cities(tmp_path / "both", cities, seed=1, **size)
    render_cities(tmp_path / "alone", cities[1:], seed=1, **size)
    alone = {k: v for k, v in digest(tmp_path / "alone").items() if k != "simcity.json"}
    assert alone.items() <= digest(tmp_path / "both").items()
    render_cities(tmp_path / "other", cities[1:], seed=2, **size)
    assert lines(tmp_path / "other", "Elsewhere", "pano_label_balanced") != lines(
        tmp_path / "alone", "Elsewhere", "pano_label_balanced"
    )


def test_rendering_again_does_nothing_and_never_overwrites(
    rendered: tuple[Path, RenderSummary], tmp_path: Path
) -> None:
    raw, first = rendered
    before = digest(raw)
    again = render_cities(raw, TINY, seed=7, tile_size=32, view_size=(24, 96), workers=1)
    assert not again.fresh and again.views == first.views and again.seconds < 1
    with pytest.raises(BadInput, match=r"\(seed\)"):
        render_cities(raw, TINY, seed=8, tile_size=32, view_size=(24, 96), workers=1)
    assert digest(raw) == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(BadInput, match=str(tmp_path)):
        render_cities(tmp_path, TINY, seed=7)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_render_that_breaks_off_is_never_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, cities = tmp_path / "raw", [CitySpec("NewYork", 3, 3)]
    size: dict[str, Any] = {"tile_size": 16, "view_size": (16, 32)}
    render_cities(tmp_path / "reference", cities, seed=1, workers=1, **size)
    taken = iter(range(4))

    def break_off(*arguments: object) -> Bytes:
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return look_around(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(simcity_shots, "look_around", break_off)
        with pytest.raises(KeyboardInterrupt):
            render_cities(raw, cities, seed=1, workers=1, **size)
    assert not raw.exists()
    raw.mkdir()  # an empty folder is as good as none
    render_cities(raw, cities, seed=1, workers=1, **size)
    assert digest(raw) == digest(tmp_path / "reference")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "reference"]


@pytest.mark.parametrize(
    ("cities", "options", "message"),
    [
        ([], {}, "no city"),
        ([CitySpec("A", 3, 3), CitySpec("A", 4, 4)], {}, "one name"),
        ([CitySpec("../A", 3, 3)], {}, "letters and digits"),
        ([CitySpec("A", 1, 9)], {}, "2 x 2"),
        ([CitySpec("A", 3, 3, like="B")], {}, "like B"),
        ([CitySpec("A", 3, 3, like="A")], {}, "like A"),
        ([CitySpec("A", 3, 3), CitySpec("B", 3, 4, like="A")], {}, "like A"),
        (TINY, {"misplaced": {"Paris": 0.1}}, "Paris"),
        (TINY, {"misplaced": {"Chicago": 2}}, "misplaced"),
        (TINY, {"max_offset": 0.3}, "max_offset"),
        (TINY, {"max_offset": 0.0}, "max_offset"),
        (TINY, {"view_size": (48, 190)}, "multiple of 4"),
        (TINY, {"tile_size": 8}, "16 pixels"),
        (TINY, {"empty_share": 1.0}, "empty_share"),
        (TINY, {"arrangement": "mine"}, "published, arranged"),
        (TINY, {"drone_views": 3}, "vigor .*drone_views; .*max_offset"),
        (TINY, {"adapter": "kitti"}, "'kitti'.* vigor, cvusa, cvact"),
        (TINY, {"adapter": "cvusa", "val_share": 0.0}, "val_share"),
        (TINY, {"adapter": "cvact", "val_share": 0.6, "test_share": 0.6}, "together"),
        (TINY, {"adapter": "cvact", "missing": 99}, "missing"),
        (TINY, {"adapter": "university1652", "drone_views": 0}, "drone_views"),
        (TINY, {"adapter": "university1652", "distractor_share": 1.0}, "distractor_share"),
        ([CitySpec("A", 2, 2)], {"adapter": "university1652"}, "too few"),
        (TINY, {"workers": 0}, "workers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, cities: list[CitySpec], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        render_cities(tmp_path / "raw", cities, seed=1, **options)
    assert not any(tmp_path.iterdir())


def test_every_layout_has_a_small_and_a_large_size() -> None:
    for adapter, layout in LAYOUTS.items():
        small, demo = (sum(city.rows * city.columns for city in layout.sizes[size][0]) for size in ("small", "demo"))
        assert list(layout.sizes) == ["small", "demo"] and small <= 600 < demo, adapter
    cities, _ = cities_of("vigor", "demo")
    assert [city.name for city in cities] == ["NewYork", "Seattle", "Chicago", "SanFrancisco"]
    assert sum(city.rows * city.columns for city in cities[2:]) >= 800
    with pytest.raises(BadInput, match="small"):
        cities_of("vigor", "huge")


def test_the_command_renders_and_says_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LAYOUTS["vigor"].sizes, "small", ([CitySpec("NewYork", 2, 2)], {}))
    arguments = ["simcity", str(tmp_path / "raw"), "--size", "small", "--tile-size", "16", "--view-size", "16", "32"]
    arguments += ["--set", "arrangement=arranged", "--set", "empty_share=0", "--workers", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "4 tiles" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "raw" / "ground" / "NewYork").iterdir())
    monkeypatch.setattr("sys.argv", [*arguments, "--seed", "5"])
    with pytest.raises(SystemExit, match=r"\(seed\)"):
        main()
