"""Imagery found in a STAC API: a small server over real HTTP, with cloud-optimised GeoTIFFs behind it."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream.errors import BadInput, Unanswered
from sharding.tiles.grid import Grid
from sharding.tiles.source import open_source
from tests.sharding.tiles.pictures import LAND, SIDE, SOUTH, WEST, expected, write_geotiff

BOX = tuple(Grid(60.0).boxes(np.array([[SOUTH + SIDE / 2, WEST + SIDE / 2]]))[0].tolist())


def item(name: str, when: str, host: str, collection: str = "ortho") -> dict[str, Any]:
    west, south, east, north = LAND
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "bbox": list(LAND),
        "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"datetime": when}, "links": [],
        "assets": {"visual": {"href": f"{host}/{name}.tif"}, "thumbnail": {"href": f"{host}/{name}.png"}},
    }  # fmt: skip


class Catalogue(SimpleHTTPRequestHandler):
    """A STAC API: landing page, collections, item search by POST and GET; and files, with ranges."""

    protocol_version = "HTTP/1.1"
    items: list[dict[str, Any]]
    broken = False

    def _json(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/geo+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @property
    def host(self) -> str:
        return f"http://{self.headers['Host']}"

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        if path.rstrip("/") == "/stac":
            search = {"rel": "search", "href": f"{self.host}/stac/search", "type": "application/geo+json"}
            links = [search | {"method": "GET"}, search | {"method": "POST"}]
            links += [
                {"rel": "self", "href": f"{self.host}/stac"},
                {"rel": "data", "href": f"{self.host}/stac/collections"},
            ]
            conforms = ["core", "item-search", "collections", "ogcapi-features"]
            said = [f"https://api.stacspec.org/v1.0.0/{one}" for one in conforms]
            about = {"type": "Catalog", "id": "c", "stac_version": "1.0.0", "description": "c", "links": links}
            self._json({**about, "conformsTo": said})
        elif path.startswith("/stac/collections/"):
            extent = {"spatial": {"bbox": [list(LAND)]}, "temporal": {"interval": [[None, None]]}}
            about = {"type": "Collection", "id": "ortho", "stac_version": "1.0.0", "description": "o", "links": []}
            provider = {"name": "Office of Maps", "roles": ["licensor"]}
            self._json({**about, "license": "CC-BY-4.0", "extent": extent, "providers": [provider]})
        else:
            self._file(Path(self.translate_path(path)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), self.headers.get("Range", "")
        first, last = 0, len(data) - 1
        if asked:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.broken:
            self._json({"code": "broken"}, 400)
            return
        west, south, east, north = asked["bbox"]
        found = [
            one
            for one in self.items
            if one["collection"] in asked.get("collections", ["ortho"])
            and (one["bbox"][0] <= east and one["bbox"][2] >= west)
            and (one["bbox"][1] <= north and one["bbox"][3] >= south)
        ]
        self._json({"type": "FeatureCollection", "features": found, "links": []})

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[tuple[str, type[Catalogue]]]:
    class Own(Catalogue):
        pass

    (tmp_path / "files").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Own, directory=str(tmp_path / "files"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        Own.items = [item("old", "2019-05-01T00:00:00Z", host), item("new", "2023-05-01T00:00:00Z", host)]
        write_geotiff(tmp_path / "files" / "old.tif", metres=5, picture=np.zeros((3, 5000, 5000), np.uint8))
        write_geotiff(tmp_path / "files" / "new.tif", crs="EPSG:3857", compress="deflate")
        yield host, Own
        server.shutdown()


def test_the_newest_item_is_read_over_http_with_its_licence_and_attribution(
    catalogue: tuple[str, type[Catalogue]], tmp_path: Path
) -> None:
    source = open_source(f"stac+{catalogue[0]}/stac?collections=ortho", LAND, 60.0, tmp_path)
    window = source.window(BOX)
    off = np.abs(window.imagery.read(BOX, 64, 64).astype(int) - expected(BOX, 64))
    assert off.mean() < 1.5
    assert source.facts == {
        "name": "ortho", "licence": "CC-BY-4.0", "attribution": "Office of Maps", "url": catalogue[0]
    }  # fmt: skip
    again = open_source(f"stac+{catalogue[0]}/stac?collections=ortho", LAND, 60.0, tmp_path)
    assert again.window(BOX).stamp == window.stamp
    catalogue[1].items[1]["properties"]["updated"] = "2024-01-01T00:00:00Z"
    changed = open_source(f"stac+{catalogue[0]}/stac?collections=ortho", LAND, 60.0, tmp_path)
    assert changed.window(BOX).stamp != window.stamp


def test_searches_that_lead_nowhere_are_one_line(catalogue: tuple[str, type[Catalogue]], tmp_path: Path) -> None:
    host, handler = catalogue
    for text, said in (
        ("?collections=other", "nothing found"),
        ("?collections=ortho&asset=red", "no asset red.*thumbnail, visual"),
        ("?colections=ortho", "no parameter colections"),
    ):
        with pytest.raises(BadInput, match=said) as error:
            open_source(f"stac+{host}/stac{text}", LAND, 60.0, tmp_path)
        assert "\n" not in str(error.value)
    handler.broken = True
    with pytest.raises(Unanswered, match=host):
        open_source(f"stac+{host}/stac?collections=ortho", LAND, 60.0, tmp_path)
    with pytest.raises((BadInput, Unanswered), match=host):
        open_source(f"stac+{host}/nothing?collections=ortho", LAND, 60.0, tmp_path)
