"""The page's server: right answers, refusals of one line, bounds that hold, and an orderly end."""

from __future__ import annotations

import io
import json
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from geostream.locating.locate import Locator, as_geojson
from geostream.locating.photos import read_photo
from geostream.serving import server, service, tiles
from geostream.serving.app import STATIC
from geostream.serving.uploads import MIB, Limits
from geostream.store import Store
from infra.s3 import S3Server
from tests.command import refused
from tests.fault_proxy import fault_proxy
from tests.helpers import TinyPlace
from tests.locating.indexes import small_index
from tests.serving.pages import HERE, Here, ask, page_here, picture, running_page, wait_until

SMALL = Limits(file_bytes=200_000, request_bytes=MIB, files=3, pixels=40_000, requests=2, silence=0.5, seconds=1.5)


@pytest.fixture(scope="module")
def places_and_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TinyPlace], Store]:
    store = Store.open(tmp_path_factory.mktemp("store"))
    return small_index(store)[1], store


@pytest.fixture(scope="module")
def places(places_and_store: tuple[list[TinyPlace], Store]) -> list[TinyPlace]:
    return places_and_store[0]


@pytest.fixture(scope="module")
def store(places_and_store: tuple[list[TinyPlace], Store]) -> Store:
    return places_and_store[1]


@pytest.fixture(scope="module")
def page(store: Store) -> Iterator[Here]:
    with page_here(store, SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def url(page: Here) -> str:
    return page.url


def line(response: httpx.Response) -> str:
    """The one line of a refusal."""
    assert list(response.json()) == ["error"]
    text: str = response.json()["error"]
    assert text and "\n" not in text and len(text) < 300
    return text


def with_position(photo: bytes, latitude: float, longitude: float) -> bytes:
    image = Image.open(io.BytesIO(photo))
    exif = Image.Exif()
    gps = exif.get_ifd(0x8825)
    gps |= {1: "N" if latitude >= 0 else "S", 2: (abs(latitude), 0.0, 0.0)}
    gps |= {3: "E" if longitude >= 0 else "W", 4: (abs(longitude), 0.0, 0.0)}
    exif._ifds[0x8825] = gps
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def test_answers_are_those_of_the_locator(url: str, store: Store, places: list[TinyPlace]) -> None:
    photos = [places[number].images["view-00.jpg"] for number in (5, 9)]
    body = ask(url, *photos).json()
    assert body["errors"] == []
    wanted = Locator.open(store).answer([read_photo(photo) for photo in photos], ["photo.jpg"] * 2)
    for answer, expected in zip(body["answers"], wanted, strict=True):
        assert [one["place"] for one in answer["candidates"]] == [one.place for one in expected.candidates]
        assert [one["score"] for one in answer["candidates"]] == pytest.approx(
            [one.score for one in expected.candidates], abs=1e-5
        )
        assert answer["sure"] is expected.sure
        geojson = json.loads(json.dumps(as_geojson([expected])))
        assert [one["geometry"] for one in answer["geojson"]["features"]] == [
            one["geometry"] for one in geojson["features"]
        ]
        best = answer["candidates"][0]
        assert answer["heat"][0][:2] == best["point"] == [best["longitude"], best["latitude"]]
        assert answer["heat"][0][2] == 1.0 and len(answer["heat"]) <= len(places)


def test_the_truth_in_a_photo_is_shown_with_the_error(url: str, places: list[TinyPlace]) -> None:
    photo = with_position(places[5].images["view-00.jpg"], 40.002, -74.001)
    [answer] = ask(url, photo).json()["answers"]
    assert answer["truth"] == pytest.approx([-74.001, 40.002])
    best = answer["candidates"][0]
    north, east = best["latitude"] - 40.002, (best["longitude"] + 74.001) * 0.766
    assert answer["error_metres"] == pytest.approx((north**2 + east**2) ** 0.5 * 111_195, rel=0.01)


def test_tiles_come_from_the_shards(url: str, places: list[TinyPlace]) -> None:
    [answer] = ask(url, places[5].images["view-00.jpg"]).json()["answers"]
    for one in answer["candidates"]:
        tile = get(f"{url}/{one['tile']}")
        assert tile.content == places[one["place"]].images["tile.jpg"]
        assert tile.headers["content-type"] == "image/jpeg" and "immutable" in tile.headers["cache-control"]
    other = get(f"{url}/tiles/3.jpg?layout=another")
    assert other.content == places[3].images["tile.jpg"] and other.headers["cache-control"] == "no-cache"
    assert get(f"{url}/tiles/{len(places)}.jpg").status_code == 404
    assert get(f"{url}/tiles/-1.jpg").status_code == 404
    assert get(f"{url}/tiles/one.jpg").status_code == 422


def test_a_map_of_some_of_the_places(url: str) -> None:
    info = get(f"{url}/api/info").json()
    assert info["map"]["kind"] == "earth" and info["map"]["tile_metres_estimated"] is True
    view = {"west": -74.001, "east": -73.999, "south": 40.0, "north": 40.001}
    part = get(f"{url}/api/places", params=view).json()
    assert [tile["place"] for tile in part["tiles"]] == [0, 1, 2, 3] and part["cells"] == []
    west, south, east, north = part["tiles"][0]["bounds"]
    assert (west + east) / 2 == pytest.approx(-74.0) and (south + north) / 2 == pytest.approx(40.0)
    assert "north" in line(get(f"{url}/api/places", params=view | {"north": "x"}))


def test_the_page_and_its_schema(url: str) -> None:
    for path in ("", "static/page.js", "static/map.js", "static/maplibre/maplibre-gl.mjs", "static/pin.svg"):
        response = get(f"{url}/{path}")
        assert response.status_code == 200, path
        assert "default-src 'none'" in response.headers["content-security-policy"]
    schema = get(f"{url}/openapi.json").json()
    assert {"/api/locate", "/api/info", "/api/places", "/tiles/{place}.jpg", "/healthz", "/readyz"} <= set(
        schema["paths"]
    )
    locate = schema["paths"]["/api/locate"]["post"]
    assert "multipart/form-data" in locate["requestBody"]["content"]
    assert {"200", "413", "415", "429", "503"} <= set(locate["responses"])
    assert get(f"{url}/docs").status_code == 404  # it would load scripts from elsewhere
    assert get(f"{url}/healthz").json() == {"status": "alive"}
    assert get(f"{url}/readyz").json() == {"status": "ready"}


def test_nothing_that_is_shipped_names_another_host() -> None:
    """But for the licence's own links, what MapLibre shows a developer, and names of XML."""
    for path in STATIC.glob("*.*"):
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path


@pytest.mark.parametrize(
    ("photo", "status", "said"),
    [
        (b"", 415, "empty"),
        (b"no picture at all", 415, "not an image"),
        (picture()[:500], 415, "photo.jpg"),
        (picture(300, 300, kind="PNG"), 413, "larger than"),
        (picture(2000, 30), 413, "megapixel"),
    ],
    ids=["empty", "text", "cut off", "too many bytes", "too many pixels"],
)
def test_a_bad_photo_gets_one_line(url: str, photo: bytes, status: int, said: str) -> None:
    response = ask(url, photo)
    assert response.status_code == status and said in line(response)


def test_good_photos_are_answered_beside_bad_ones(url: str, places: list[TinyPlace]) -> None:
    response = ask(url, b"no picture", places[1].images["view-00.jpg"])
    assert response.status_code == 200
    body = response.json()
    assert len(body["answers"]) == len(body["errors"]) == 1 and "not an image" in body["errors"][0]["error"]


def test_requests_that_are_none_get_one_line(url: str) -> None:
    assert httpx.post(f"{url}/api/locate", json={}).status_code == 415
    assert httpx.post(f"{url}/api/locate", data={"a": "b"}).status_code == 415
    empty = httpx.post(f"{url}/api/locate", files=[("other", ("a.jpg", picture(), "image/jpeg"))])
    assert empty.status_code == 400 and "photos" in line(empty)
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(f"{url}/api/locate", content=b"--x\r\nnothing", headers=kind).status_code == 400
    assert (
        httpx.post(f"{url}/api/locate", content=b"", headers={"content-type": "multipart/form-data"}).status_code == 400
    )
    many = ask(url, *[picture()] * 100)
    assert many.status_code == 413 and "more than 3 photos" in line(many)
    large = ask(url, bytes(2 * MIB))
    assert large.status_code == 413 and "larger than 1 MB" in line(large)


def test_a_name_is_shown_on_one_line(url: str) -> None:
    assert "<b>.jpg" in line(ask(url, b"nothing", name="<b>.jpg"))
    assert len(line(ask(url, b"nothing", name="n" * 5000 + ".jpg"))) < 300


def test_a_request_of_unknown_length_is_cut_at_the_limit(url: str) -> None:
    def body() -> Iterator[bytes]:
        yield PART
        for _ in range(40):
            yield bytes(100_000)

    response = httpx.post(
        f"{url}/api/locate", content=body(), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert response.status_code == 413 and "larger than 1 MB" in line(response)


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=60, **options)


def connect(url: str) -> socket.socket:
    return socket.create_connection((HERE, urlsplit(url).port or 0), timeout=20)


BEGUN = b"POST /api/locate HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
BEGUN += b"Content-Length: 9000\r\n\r\n"
PART = b'--x\r\nContent-Disposition: form-data; name="photos"; filename="a.jpg"\r\n\r\n'


def test_a_client_that_falls_silent_is_told_and_cut_off(url: str) -> None:
    with connect(url) as slow:
        slow.sendall(BEGUN + b"--x\r\n")
        answer = slow.recv(10_000)
        assert b" 408 " in answer.split(b"\r\n")[0] and b"too slowly" in answer
        while answer:
            answer = slow.recv(10_000)


def test_a_client_that_drips_is_cut_off_too(url: str) -> None:
    with connect(url) as slow:
        begun = time.monotonic()
        slow.sendall(BEGUN + PART)
        slow.settimeout(0.3)
        answer = b""
        while not answer and time.monotonic() - begun < 20:
            slow.sendall(b"-")
            try:
                answer = slow.recv(10_000)
            except TimeoutError:
                continue
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert time.monotonic() - begun < 15


def test_a_connection_without_a_request_is_closed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE", 0.5)
    with page_here(store, SMALL) as (url, *_), connect(url) as silent, connect(url) as dripping:
        dripping.sendall(b"GET / HT")
        assert silent.recv(100) == b""
        with pytest.raises((ConnectionError, AssertionError)):
            for _ in range(30):
                dripping.sendall(b"T")
                time.sleep(0.1)
            raise AssertionError
        assert get(f"{url}/healthz").status_code == 200


def test_too_many_requests_are_asked_to_come_again(store: Store, places: list[TinyPlace]) -> None:
    photo = places[0].images["view-00.jpg"]
    with page_here(store, Limits(requests=2)) as (url, *_):
        with connect(url) as one, connect(url) as two:
            for waiting in (one, two):
                waiting.sendall(BEGUN)
            wait_until(lambda: ask(url, photo).status_code == 429)
            busy = ask(url, photo)
            assert "try again" in line(busy) and int(busy.headers["retry-after"]) >= 1
            assert get(f"{url}/healthz").status_code == 200
        wait_until(lambda: ask(url, photo).status_code == 200)


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with server.listen(HERE, 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_many_clients_get_their_own_answers(store: Store, places: list[TinyPlace]) -> None:
    with page_here(store) as (url, *_), ThreadPoolExecutor(8) as clients:
        numbers = [number for number in range(16) for _ in range(3)]
        photos = [places[number].images["view-00.jpg"] for number in numbers]
        alone = [ask(url, places[number].images["view-00.jpg"]).json() for number in range(16)]
        for number, response in zip(numbers, clients.map(lambda photo: ask(url, photo), photos), strict=True):
            [answer], [expected] = response.json()["answers"], alone[number]["answers"]
            assert [one["place"] for one in answer["candidates"]] == [one["place"] for one in expected["candidates"]]


def test_a_store_that_is_away_is_said_in_one_line_until_it_is_back(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(f"{s3.url}/{uuid.uuid4().hex}")
    _, places = small_index(store)
    monkeypatch.setattr(service, "STORE_ASKED", 0.0)
    monkeypatch.setattr(tiles, "TIMEOUT", 1.0)
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with page_here(store) as (url, *_):
            assert get(f"{url}/readyz").status_code == 200
            assert get(f"{url}/tiles/1.jpg").content == places[1].images["tile.jpg"]
            for fault in ({"kind": "drop"}, {"kind": "status"}, {"kind": "cut"}, {"kind": "stall"}):
                proxy.clear()
                proxy.inject(**fault, path="/")  # type: ignore[arg-type]
                response = get(f"{url}/tiles/1.jpg")
                assert response.status_code == 503, fault
                assert proxy.url not in line(response) and int(response.headers["retry-after"]) >= 1
            proxy.clear()
            proxy.inject("drop", path="/")
            assert get(f"{url}/readyz").status_code == 503
            assert get(f"{url}/healthz").status_code == 200
            assert ask(url, places[5].images["view-00.jpg"]).status_code == 200  # vectors and model are in memory
            proxy.clear()
            proxy.inject("flip", path=".tar", times=1)
            assert get(f"{url}/tiles/2.jpg").status_code == 503  # not the bytes that were written
            proxy.clear()
            assert get(f"{url}/tiles/2.jpg").content == places[2].images["tile.jpg"]
            assert get(f"{url}/readyz").status_code == 200


def test_requests_under_way_are_answered_at_the_end(store: Store, places: list[TinyPlace]) -> None:
    body = PART + places[5].images["view-00.jpg"] + b"\r\n--x--\r\n"
    with page_here(store) as here, connect(here.url) as slow:
        slow.sendall(BEGUN.replace(b"9000", str(len(body)).encode()) + body[:-10])
        wait_until(lambda: here.service.under_way == 1)
        here.server.should_exit = True
        wait_until(lambda: _refuses(here.url))  # nobody new is let in
        slow.sendall(body[-10:])
        assert b" 200 " in slow.recv(100_000).split(b"\r\n")[0]


def _refuses(url: str) -> bool:
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_in_order(store: Store, number: int) -> None:
    with running_page(store) as page:
        assert get(f"{page.url}/healthz").status_code == 200
        assert page.end(number) == 128 + number
        assert not page.errors


def test_what_cannot_be_served_is_one_line(store: Store, tmp_path: Path) -> None:
    with socket.create_server((HERE, 0)) as taken:
        assert "another program" in refused("serve", store.url, "--port", str(taken.getsockname()[1]))
    assert "--host" in refused("serve", store.url, "--host", "203.0.113.7", "--port", "0")
    assert "no such index" in refused("serve", store.url, "--port", "0", "--index", "other")
    assert "no such folder" in refused("serve", str(tmp_path / "none"), "--port", "0")
    assert "promote" in refused("serve", store.url, "--port", "0", "--model", "current")


@pytest.mark.slow
def test_memory_stays_bounded_under_a_flood_of_bad_uploads(store: Store, places: list[TinyPlace]) -> None:
    good = places[5].images["view-00.jpg"]
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")  # 900 megapixels in a few kilobytes
    largest = io.BytesIO()
    Image.new("RGB", (9_990, 5_000), "green").save(largest, "PNG")  # just within the limit
    with running_page(store) as page, ThreadPoolExecutor(24) as clients:
        assert ask(page.url, good).status_code == 200
        before, files = page.memory, page.open_files
        floods = [bytes(60 * MIB), bytes(24 * MIB), b"text" * 100, bomb.getvalue(), b""]
        requests = [[flood] for flood in floods * 12] + [[good] * 100] * 12 + [[bytes(24 * MIB)] * 2] * 12
        statuses = [response.status_code for response in clients.map(lambda photos: _asked(page.url, photos), requests)]
        assert set(statuses) <= {413, 415, 429}, statuses
        assert page.memory - before < 300 * MIB
        statuses = [_asked(page.url, [largest.getvalue()]).status_code for _ in range(2)]
        assert statuses == [200, 200]
        list(clients.map(lambda _: _asked(page.url, [largest.getvalue()]), range(12)))
        assert page.memory - before < 900 * MIB
        wait_until(lambda: page.open_files <= files + 30)
        assert ask(page.url, good).status_code == 200
        assert not [text for text in page.errors if "Traceback" in text], page.errors[-20:]


def _asked(url: str, photos: list[bytes]) -> httpx.Response:
    try:
        return ask(url, *photos)
    except httpx.WriteError:  # refused before all was sent
        return httpx.Response(413)
