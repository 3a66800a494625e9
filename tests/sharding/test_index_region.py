"""The index of a region: imagery in, no photos of it, a model trained elsewhere; photos are found in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geostream.cli.main import app
from geostream.layout import open_layout
from geostream.store import Store
from sharding.index_cli import index
from sharding.simcity import CitySpec, render_cities
from tests.command import refused, said
from tests.helpers import tiny_layout
from tests.runs.small_runs import run_with_checkpoint

pytest.importorskip("rasterio")


@pytest.fixture(autouse=True)
def with_index_command() -> None:
    """The command, also where the package was installed before it had the entry point."""
    if not any(command.name == "index" for command in app.registered_commands):
        app.command("index")(index)


def test_a_region_becomes_an_index(tmp_path: Path) -> None:
    store, raw = Store.open(tmp_path / "store"), tmp_path / "raw"
    run_with_checkpoint(store, tiny_layout(store), "run")
    render_cities(raw, [CitySpec("Graz", 4, 4)], seed=3, adapter="photos", tile_size=32, view_size=(32, 64), workers=1)
    words = ["index", store.url, "--run", "run", "--name", "graz", "--tiles", str(raw / "imagery")]
    assert "name both" in refused(*words)
    words += ["--region", str(raw / "region.geojson")]
    assert "--metres" in refused(*words), "the layout does not say how large its tiles are"
    words += ["--metres", "70", "--attribution", "City of Graz"]
    assert "Committed" in said(*words)
    assert "Was there already" in said(*words)
    layout = open_layout(store, "tiny", "graz")
    assert layout.tile_metres == 70 and layout.n_places > 4 and open_layout(store, "tiny").name == "g0"
    [photo, *_] = sorted((raw / "photos").rglob("*.jpg"))
    found = said("locate", str(photo), "--store", store.url, "--geojson", str(tmp_path / "found.json"))
    assert "Tiles: City of Graz" in found
    features = json.loads((tmp_path / "found.json").read_text())["features"]
    south, west = layout.position.min(axis=0)
    north, east = layout.position.max(axis=0)
    for one in features:
        assert west - 1e-3 <= one["geometry"]["coordinates"][0] <= east + 1e-3
        assert south - 1e-3 <= one["geometry"]["coordinates"][1] <= north + 1e-3
    assert {one["properties"]["kind"] for one in features} == {"candidate", "truth"}
    assert 0 <= features[0]["properties"]["error_metres"] < 400
