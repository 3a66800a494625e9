"""A store on a plain web server is for reading, and is read where dataset and layout are named."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from obstore.store import HTTPStore

from geostream.cli import evaluate as cli_evaluate
from geostream.cli import layouts as cli_layouts
from geostream.cli import train as cli_train
from geostream.errors import LayoutNotCommitted, NotFound, Refused, StoreError, Unsupported
from geostream.layout import Layout, open_layout, use_layout
from geostream.layout.verify import verify_layout
from geostream.store import Store
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.loader import Loader
from sharding import ShardOptions, shard
from sharding.places import RawDataset
from tests.command import geostream
from tests.helpers import tiny_layout
from tests.scripted_server import Answer, Request, ScriptedServer, content, scripted_server
from tests.streaming.plans import SIZES, assert_as_planned, hand_made_plan

NAMED = ["--dataset", "tiny", "--layout", "g0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a web server serves; below it the store "a store"."""
    root = tmp_path_factory.mktemp("web")
    tiny_layout(Store.open(root / "a store"), places=12)
    return root


class Web:
    """A web server with ranges, as most are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answer(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return Answer(405)
        file = self.folder / request.path.strip("/").replace("%20", " ")
        return content(request, file.read_bytes()) if file.is_file() else Answer(404, b"<html>")


@pytest.fixture
def server(folder: Path) -> Iterator[ScriptedServer]:
    with scripted_server(Web(folder).answer) as running:
        yield running


@pytest.fixture
def store(server: ScriptedServer) -> Store:
    return Store.open(f"{server.url}/a%20store")


@pytest.fixture
def plain(folder: Path) -> Iterator[str]:
    """URL of the store on Python's own web server, which knows neither ranges nor listing."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/a%20store"
    running.shutdown()
    running.server_close()


def refused(ask: Callable[[], Any], kind: type[StoreError]) -> str:
    """The one line of the error, which comes at once."""
    began = time.monotonic()
    with pytest.raises(kind) as error:
        ask()
    assert time.monotonic() - began < 3
    line = str(error.value)
    assert "\n" not in line and "<" not in line and "AWS" not in line
    return line


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_named_is_found_without_listing(server: ScriptedServer, store: Store, command: str) -> None:
    done = geostream(command, store.url, *NAMED)
    assert done.returncode == 0, done.stderr
    assert ("all as committed" if command == "verify" else "tile.jpg") in done.stdout
    assert {one.method for one in server.requests} <= {"GET", "HEAD"}


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("words", [[], NAMED[:2], NAMED[2:]])
def test_what_is_not_named_is_asked_for(server: ScriptedServer, store: Store, command: str, words: list[str]) -> None:
    done = geostream(command, store.url, *words)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert store.url in line and "--dataset" in line and "--layout" in line
    assert server.requests == []


def test_nothing_is_listed(server: ScriptedServer, store: Store) -> None:
    for ask in (store.list, store.folders, store.check, lambda: open_layout(store), lambda: open_layout(store, "tiny")):
        assert "--layout" in refused(ask, Unsupported)
    assert {one.path.rpartition("/")[2] for one in server.requests} == {"current.json"}  # which is asked for by name


def test_the_current_layout_is_found_by_name(folder: Path, store: Store) -> None:
    local = Store.open(folder / "a store")
    use_layout(local, "tiny", "g0")
    assert open_layout(store, "tiny").name == "g0"
    local.delete("tiny/layouts/current.json")  # the other tests share the folder


# reading


def test_a_layout_is_read_whole(folder: Path, store: Store) -> None:
    layout = open_layout(store, "tiny", "g0")
    assert layout.id == open_layout(Store.open(folder / "a store")).id
    assert verify_layout(layout).count == 0
    plan = hand_made_plan(layout, lanes=2)
    with Loader(plan_dataset(layout, plan, SIZES)) as loader:
        batches = list(loader)
        assert loader.stats.retries == {}
    assert_as_planned(batches, plan, layout)


def test_columns_of_a_table(folder: Path, store: Store) -> None:
    at, name = store.child("tiny", "layouts", "g0"), "members.parquet"
    assert at.read_table(name, columns=["size"]).column_names == ["size"]
    assert at.read_table(name, columns=["size"])["size"].equals(at.read_table(name)["size"])


def test_what_is_not_there(store: Store) -> None:
    assert "tiny/x" in refused(lambda: store.read("tiny/x"), NotFound)
    assert not store.exists("tiny/x")
    with pytest.raises(LayoutNotCommitted, match="layouts/none"):
        open_layout(store, "tiny", "none")


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_not_let_out(server: ScriptedServer, store: Store, status: int) -> None:
    server.answer = lambda _: Answer(status, b"<html>")
    assert str(status) in refused(lambda: store.read("x"), Refused)


@pytest.mark.parametrize(
    "url", ["https://bucket.s3.eu-west-1.amazonaws.com/geo", "https://account.blob.core.windows.net/geo"]
)
def test_a_cloud_by_https_is_a_web_server(url: str) -> None:
    """Its own protocol would ask for credentials."""
    assert isinstance(Store.open(url)._obstore, HTTPStore)


# a server without ranges


def test_a_server_without_ranges(plain: str) -> None:
    store = Store.open(plain)
    layout = open_layout(store, "tiny", "g0")  # which takes whole objects only
    folder = store.child("tiny", "layouts", "g0")
    assert "range" in refused(lambda: folder.read_range("shard-00000.tar", 0, 512), Unsupported)
    assert "range" in refused(lambda: verify_layout(layout), Unsupported)

    def stream(layout: Layout = layout) -> None:
        with Loader(plan_dataset(layout, hand_made_plan(layout, lanes=2), SIZES)) as loader:
            list(loader)

    assert "range" in refused(stream, Unsupported)
    refused(store.check, Unsupported)


@pytest.mark.parametrize(("command", "exit_code"), [("inspect", 0), ("verify", 1)])
def test_a_server_without_ranges_by_command(plain: str, command: str, exit_code: int) -> None:
    done = geostream(command, plain, *NAMED)
    assert done.returncode == exit_code
    if exit_code:
        [line] = done.stderr.splitlines()
        assert "range" in line and "problems" not in line


# writing


def test_nothing_is_written(server: ScriptedServer, store: Store, raw_dataset: RawDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")

    def write_array() -> None:
        zarr.open_group(store.zarr("x.zarr"), mode="w").create_array("x", data=np.zeros(3))

    for write in (
        lambda: store.write("x", b"1"),
        lambda: store.write("x", b"1", if_absent=True),
        lambda: store.write_json("x", {}),
        lambda: store.write_file("x", tmp_path / "file"),
        lambda: store.delete("x"),
        lambda: store.delete_all(["x"]),
        lambda: store.check(write=True),
        lambda: shard(raw_dataset, store, "vigor", options=ShardOptions(), workers=1),
        write_array,
    ):
        assert store.url in refused(write, Unsupported)
    assert server.requests == []


@pytest.mark.parametrize(
    "command",
    [
        cli_train.train,
        cli_train.embed,
        cli_train.mine,
        functools.partial(cli_train.plan, epoch=1),
        cli_evaluate.evaluate,
        cli_layouts.recluster,
        functools.partial(cli_layouts.prune, dry_run=True),
    ],
    ids=["train", "embed", "mine", "plan", "evaluate", "recluster", "prune"],
)
def test_commands_that_write_say_so_first(server: ScriptedServer, store: Store, command: Callable[..., None]) -> None:
    assert "s3://" in refused(lambda: command(store.url, dataset="tiny"), Unsupported)
    assert server.requests == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_sharding_says_so_first(server: ScriptedServer, store: Store, raw_root: Path, dry_run: bool) -> None:
    done = geostream("shard", "vigor", str(raw_root), store.url, *(["--dry-run"] if dry_run else []))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert store.url in line and "s3://" in line
    assert server.requests == []


@pytest.fixture(scope="module")
def raw_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.vigor_raw import write_city

    root = tmp_path_factory.mktemp("raw")
    for city in ("NewYork", "Chicago", "SanFrancisco", "Seattle"):
        write_city(root, city)
    return root


@pytest.fixture
def raw_dataset(raw_root: Path) -> RawDataset:
    from sharding import read_places

    return read_places("vigor", raw_root)
