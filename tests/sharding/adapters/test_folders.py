"""Raw folders as archives, mirrors and other systems leave them: found, or refused with the hint that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geostream.errors import BadInput
from geostream.store import Store
from sharding import ADAPTERS, ShardOptions, plan_shards, read_places, shard
from sharding.simcity import CitySpec, render_cities
from sharding.simcity.layouts import LAYOUTS, cities_of

SIZES: dict[str, dict[str, tuple[int, int]]] = {"cvusa": {"view_size": (32, 176)}, "cvact": {"view_size": (64, 128)}}


PUBLISHED = [adapter for adapter in LAYOUTS if adapter != "photos"]  # own photos have tests of their own


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small city in an adapter's raw layout, rendered once."""
    base = tmp_path_factory.mktemp("rendered")

    def render(adapter: str) -> Path:
        cities, options = [CitySpec("NewYork", 3, 3), CitySpec("Chicago", 3, 3)], dict[str, Any]()
        if adapter != "vigor":
            cities, options = cities_of(adapter, "small")
        size: dict[str, Any] = SIZES.get(adapter, {"view_size": (32, 64) if adapter == "vigor" else (32, 32)})
        render_cities(base / adapter, cities, seed=0, adapter=adapter, tile_size=32, workers=1, **size, **options)
        return base / adapter

    return render


def options(adapter: str) -> dict[str, list[str]]:
    cities = {"vigor": ("NewYork", "Chicago"), "cv-cities": ("paris", "rio")}.get(adapter)
    return {} if cities is None else {"train_cities": [cities[0]], "test_cities": [cities[1]]}


def copy_of(raw: Path, to: Path) -> Path:
    """A tree of links to the files."""
    for file in sorted(path for path in raw.rglob("*") if path.is_file()):
        target = to / file.relative_to(raw)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    return to


@pytest.mark.parametrize("adapter", PUBLISHED)
def test_a_nested_root_is_the_same_job(rendered: Callable[[str], Path], tmp_path: Path, adapter: str) -> None:
    raw = rendered(adapter)
    expected = plan_shards(read_places(adapter, raw, **options(adapter)))
    outer = tmp_path / "download"
    copy_of(raw, outer / "Release" / "inner")
    (outer / "__MACOSX" / "Release").mkdir(parents=True)
    (outer / ".DS_Store").touch()
    for named in (outer, outer / "Release", outer / "Release" / "inner"):
        job = plan_shards(read_places(adapter, named, **options(adapter)))
        assert job.raw.root == outer / "Release" / "inner"
        assert (job.fingerprint, job.sample, len(job.missing)) == (
            expected.fingerprint, expected.sample, len(expected.missing)
        )  # fmt: skip
    copy_of(raw, outer / "Release" / "again")
    with pytest.raises(BadInput, match="again"):
        read_places(adapter, outer, **options(adapter))


@pytest.mark.parametrize("adapter", PUBLISHED)
def test_folders_in_another_case(rendered: Callable[[str], Path], tmp_path: Path, adapter: str) -> None:
    raw = rendered(adapter)
    expected = read_places(adapter, raw, **options(adapter))
    for file in sorted(path for path in raw.rglob("*") if path.is_file()):
        inside = file.relative_to(raw)
        target = tmp_path / "lower" / inside.parent.as_posix().lower() / inside.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    found = read_places(adapter, tmp_path / "lower", **options(adapter))
    assert [place.key for place in found.places] == [place.key for place in expected.places]
    missing = [sum(not one.present for place in raw.places for one in place.images()) for raw in (found, expected)]
    assert missing[0] == missing[1]


@pytest.mark.parametrize("adapter", PUBLISHED)
def test_what_is_missing_is_named_with_where_it_is_to_be_had(
    rendered: Callable[[str], Path], tmp_path: Path, adapter: str
) -> None:
    with pytest.raises(BadInput, match=ADAPTERS[adapter].source):
        read_places(adapter, tmp_path / "typo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=ADAPTERS[adapter].source) as error:
        read_places(adapter, tmp_path / "empty")
    assert "empty" in str(error.value) and len(str(error.value).splitlines()) == 1
    raw = copy_of(rendered(adapter), tmp_path / "holes")
    for image in [*raw.rglob("*.png"), *raw.rglob("*.jpg")]:
        image.unlink()
    if adapter != "university1652":  # which has no lists: what is not there is not asked for
        with pytest.raises(BadInput, match=ADAPTERS[adapter].source):
            shard(read_places(adapter, raw, **options(adapter)), Store.open(tmp_path / "store"), "x", workers=1)


@pytest.mark.parametrize("place", ["all.csv", "splits/all.csv", "Split_Locations/ALL.csv"])
def test_cvusas_coordinates_where_mirrors_have_them(
    rendered: Callable[[str], Path], tmp_path: Path, place: str
) -> None:
    raw = copy_of(rendered("cvusa"), tmp_path / "raw")
    published = raw / "split_locations" / "all.csv"
    data = published.read_bytes()
    published.unlink()
    published.parent.rmdir()
    bare = read_places("cvusa", raw)
    assert bare.coordinates == "none" and any("GPS" in note for note in bare.notes)
    (raw / place).parent.mkdir(exist_ok=True)
    (raw / place).write_bytes(data)
    assert read_places("cvusa", raw).places == read_places("cvusa", rendered("cvusa")).places


def test_cvusas_lists_from_windows(rendered: Callable[[str], Path], tmp_path: Path) -> None:
    raw = copy_of(rendered("cvusa"), tmp_path / "raw")
    for name in ("train-19zl.csv", "val-19zl.csv"):
        lines = (raw / "splits" / name).read_text()
        (raw / "splits" / name).unlink()
        (raw / "splits" / name).write_text(lines.replace("/", "\\"))
    job = plan_shards(read_places("cvusa", raw), ShardOptions())
    assert not job.missing and job.fingerprint == plan_shards(read_places("cvusa", rendered("cvusa"))).fingerprint


def test_cvacts_mat_within_its_folder(rendered: Callable[[str], Path], tmp_path: Path) -> None:
    raw = copy_of(rendered("cvact"), tmp_path / "raw")
    (raw / "ACT_data.mat").rename(raw / "ANU_data_small" / "ACT_data.mat")
    assert len(read_places("cvact", raw).places) == len(read_places("cvact", rendered("cvact")).places)
    with pytest.raises(BadInput, match=f"{raw}/ANU_data_small: only a part"):
        read_places("cvact", raw / "ANU_data_small")


def test_a_city_in_lower_case(rendered: Callable[[str], Path]) -> None:
    found = read_places("vigor", rendered("vigor"), train_cities=["newyork"], test_cities=["CHICAGO"])
    assert found.places == read_places("vigor", rendered("vigor"), **options("vigor")).places


def test_two_folders_that_differ_by_case_alone_are_refused(tmp_path: Path, rendered: Callable[[str], Path]) -> None:
    raw = copy_of(rendered("vigor"), tmp_path / "raw")
    (raw / "Splits").mkdir()
    (raw / "splits").rename(raw / "SPLITS")
    if len(list(raw.glob("[sS]*"))) < 2:
        pytest.skip("this file system does not tell cases apart")
    with pytest.raises(BadInput, match="SPLITS, Splits"):
        read_places("vigor", raw, **options("vigor"))
