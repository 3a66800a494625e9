"""Tiles from an XYZ service: a real HTTP server and its faults, a folder of files, the cache on disk."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import BadInput, Refused, Unanswered
from sharding import web
from sharding.places import TileImage, Uncovered
from sharding.tiles import xyz
from sharding.tiles.grid import Grid
from sharding.tiles.region import read_region
from sharding.tiles.source import open_source
from sharding.tiles.xyz import CIRCUMFERENCE, XyzImagery, zoom_for
from tests.sharding.tiles.pictures import LAND, SIDE, SOUTH, WEST, colours, expected, png_of, write_region

BOX = tuple(Grid(60.0).boxes(np.array([[SOUTH + SIDE / 2, WEST + SIDE / 2]]))[0].tolist())


def degrees(x: np.ndarray, y: np.ndarray, zoom: int) -> tuple[np.ndarray, np.ndarray]:
    longitude = x / 2**zoom * 360 - 180
    return longitude, np.degrees(np.arctan(np.sinh(math.pi * (1 - 2 * y / 2**zoom))))


def image(zoom: int, x: int, y: int) -> bytes:
    at = (np.arange(256) + 0.5) / 256
    return png_of(np.moveaxis(colours(*degrees(*np.meshgrid(x + at, y + at), zoom)), 0, -1))


@dataclass
class Service:
    """An XYZ service; ``answers`` are given first, then images."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    always: int = 200
    deepest: int = 99
    asked: Counter[str] = field(default_factory=Counter)
    agents: set[str] = field(default_factory=set)
    open: int = 0
    most_open: int = 0


@pytest.fixture
def service() -> Iterator[Service]:
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            state.open += 1
            state.most_open = max(state.most_open, state.open)

        def finish(self) -> None:
            super().finish()
            state.open -= 1

        def do_GET(self) -> None:
            state.asked[self.path] += 1
            state.agents.add(self.headers["User-Agent"])
            status = state.answers.pop(0) if state.answers else state.always
            zoom, x, y = (int(part) for part in self.path.partition("?")[0].removesuffix(".png").split("/")[1:])
            status = 404 if zoom > state.deepest else status
            body = image(zoom, x, y) if status == 200 else b"no"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_port}/{{z}}/{{x}}/{{y}}.png?key=secret"
        web._connections.cache_clear()
        yield state
        server.shutdown()


def test_a_tile_shows_what_lies_there_and_each_image_is_fetched_once(service: Service, tmp_path: Path) -> None:
    source = open_source(service.url, LAND, 60.0, tmp_path)
    window = source.window(BOX)
    off = np.abs(window.imagery.read(BOX, 64, 64).astype(int) - expected(BOX, 64))
    assert off.mean() < 1.5 and off[..., :2].max() <= 3
    window.imagery.read(BOX, 64, 64)
    assert set(service.asked.values()) == {1} and service.most_open == 1
    assert service.agents == {web.AGENT}
    again = open_source(service.url, LAND, 60.0, tmp_path)
    assert again.window(BOX).stamp == window.stamp and set(service.asked.values()) == {1}
    said = f"{source.facts}"
    assert "secret" not in said and "127.0.0.1" in said


def test_pixels_are_just_finer_than_asked() -> None:
    for metres in (0.1, 0.16, 0.3, 1.0, 7.0):
        zoom = zoom_for(metres)
        each = CIRCUMFERENCE / 2**zoom / 256
        assert each <= metres < 2 * each * 1.0001


def test_a_service_that_is_coarser_than_wanted_gives_its_finest_and_a_note_says_so(
    service: Service, tmp_path: Path
) -> None:
    service.deepest = 18
    region = write_region(tmp_path / "r.geojson", (BOX[0], BOX[1], BOX[2], BOX[3]))
    raw = read_region(service.url, region, metres=60, work=tmp_path)
    (note,) = raw.notes
    assert "zoom 20" in note and "zoom 18" in note and "secret" not in note
    tile = raw.places[0].tile
    assert isinstance(tile, TileImage)
    pixels = tile.imagery.read(tile.box, *tile.size((384, 384)))
    assert 96 < pixels.shape[0] < 192 and np.abs(pixels.astype(int) - expected(tile.box, len(pixels))).mean() < 2


def test_small_tiles_are_read_from_coarse_images(service: Service, tmp_path: Path) -> None:
    window = open_source(service.url, LAND, 60.0, tmp_path).window(BOX)
    service.asked.clear()
    off = np.abs(window.imagery.read(BOX, 96, 96).astype(int) - expected(BOX, 96))
    assert off.mean() < 1.5 and {path.split("/")[1] for path in service.asked} == {"18"}


def test_what_may_pass_is_tried_again(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *_: None)
    service.answers = [503, 429, 500]
    imagery = XyzImagery(service.url, 18, str(tmp_path))
    x, y = 142_307, 91_960
    assert imagery.image(x, y).shape == (256, 256, 3)
    assert sum(service.asked.values()) == 4
    service.always = 503
    with pytest.raises(Unanswered, match="503.*run again") as error:
        imagery.image(x + 1, y)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob(f"{x + 1}/*")), "nothing half-fetched is kept"


@pytest.mark.parametrize(("status", "kind"), [(403, Refused), (401, Refused), (404, BadInput)])
def test_a_service_that_has_nothing_for_us_is_told_at_once(
    service: Service, tmp_path: Path, status: int, kind: type[Exception]
) -> None:
    service.always = status
    with pytest.raises(kind, match=f"HTTP {status}") as error:
        open_source(service.url, LAND, 60.0, tmp_path)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert sum(service.asked.values()) == (1 if kind is Refused else 1 + xyz.COARSER)


def test_a_missing_image_makes_its_tiles_broken_and_no_answer_ends_the_run(service: Service, tmp_path: Path) -> None:
    imagery = XyzImagery(service.url, 18, str(tmp_path))
    service.always = 404
    with pytest.raises(Uncovered, match="404"):
        imagery.read(BOX, 8, 8)
    nobody = XyzImagery("http://127.0.0.1:9/{z}/{x}/{y}", 18, str(tmp_path / "n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("urllib3.util.retry.Retry.sleep", lambda *_: None)
        with pytest.raises(Unanswered, match="127.0.0.1:9"):
            nobody.read(BOX, 8, 8)


def test_a_folder_of_files_is_a_service_too(tmp_path: Path) -> None:
    zoom = zoom_for(60 / xyz.WANTED_PIXELS / math.cos(math.radians(SOUTH + SIDE / 2)))  # the folder has no other
    middle = ((WEST + SIDE / 2 + 180) / 360 * 2**zoom, 0.0)
    north = math.log(math.tan(math.pi / 4 + math.radians(SOUTH + SIDE / 2) / 2))
    at = int(middle[0]), int((1 - north / math.pi) / 2 * 2**zoom)
    for x in range(at[0] - 2, at[0] + 3):
        for y in range(at[1] - 2, at[1] + 3):
            path = tmp_path / "tiles" / str(zoom) / str(x) / f"{y}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(zoom, x, y))
    source = open_source(f"file://{tmp_path}/tiles/{{z}}/{{x}}/{{y}}.png", LAND, 60.0, tmp_path / "work")
    off = np.abs(source.window(BOX).imagery.read(BOX, 64, 64).astype(int) - expected(BOX, 64))
    assert off.mean() < 1.5
    path.write_bytes(b"<html>")
    with pytest.raises(Uncovered, match="no image"):
        XyzImagery(source.window(BOX).imagery.template, zoom, str(tmp_path / "n")).image(x, y)  # type: ignore[attr-defined]


def test_two_layers_of_one_server_are_kept_apart(service: Service, tmp_path: Path) -> None:
    template = service.url.replace("?key=secret", "?layer={}")
    windows = [open_source(template.replace("{}", layer), LAND, 60.0, tmp_path).window(BOX) for layer in "AB"]
    for window in windows:
        window.imagery.read(BOX, 8, 8)
    assert windows[0].stamp != windows[1].stamp
    images = {path.partition("?")[0] for path in service.asked}
    assert set(service.asked) == {f"{path}?layer={layer}" for path in images for layer in "AB"}


def test_an_image_that_the_disk_has_damaged_is_fetched_again(service: Service, tmp_path: Path) -> None:
    imagery = XyzImagery(service.url, 18, str(tmp_path))
    good = imagery.image(142_307, 91_960)
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    for damaged in (b"", b"<html>", kept.read_bytes()[:200]):
        kept.write_bytes(damaged)
        assert (imagery.image(142_307, 91_960) == good).all()
    assert sum(service.asked.values()) == 4 and (imagery.image(142_307, 91_960) == good).all()
    assert sum(service.asked.values()) == 4, "the good one is kept"


def test_images_of_different_sizes_make_one_picture(tmp_path: Path) -> None:
    imagery = XyzImagery("http://127.0.0.1:9/{z}/{x}/{y}", 18, str(tmp_path))
    cell = 2**18
    left, top = (
        int((BOX[0] + 180) / 360 * cell),
        int((1 - math.asinh(math.tan(math.radians(BOX[3]))) / math.pi) / 2 * cell),
    )
    for n, (x, y) in enumerate((x, y) for x in (left, left + 1) for y in (top, top + 1)):
        at = (np.arange(256 << n % 2) + 0.5) / (256 << n % 2)
        path = tmp_path / "18" / str(x) / str(y)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_of(np.moveaxis(colours(*degrees(*np.meshgrid(x + at, y + at), 18)), 0, -1)))
    west, north = degrees(np.array(left + 0.8), np.array(top + 0.8), 18)
    east, south = degrees(np.array(left + 1.2), np.array(top + 1.2), 18)
    box = (float(west), float(south), float(east), float(north))
    assert np.abs(imagery.read(box, 64, 64).astype(int) - expected(box, 64)).mean() < 2


@pytest.mark.parametrize(
    "template",
    [
        "ftp://host/{z}/{x}/{y}",
        "https://host/{z}/{x}/{y}?k={key}",
        "{z}/{x}/{y}.png",
        "https://host/{z}/{x}/{-y}.png",
        "https://host/{Z}/{X}/{Y}.png",
        "https://host/{q}.jpg",
    ],
)
def test_templates_that_make_no_sense_are_refused(template: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="template"):
        open_source(template, LAND, 60.0, tmp_path)
