"""The store behaves the same on a real S3 server and in a local folder."""

from __future__ import annotations

import io
import pickle
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr

from geostream.errors import AlreadyExists, BadInput, Changed, NotFound, StoreError
from geostream.store import Store, check_name
from geostream.store.store import ROW_GROUP


@pytest.fixture(params=["s3", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path / "a folder, with a comma")
    return request.getfixturevalue("s3_store")


def test_bytes_ranges_and_names(store: Store) -> None:
    data = bytes(range(256)) * 4
    store.write("a/b/one.bin", data)
    store.write("a/two.bin", b"")
    assert store.read("a/b/one.bin") == data
    assert store.read_range("a/b/one.bin", 250, 10) == data[250:260]
    end = len(data)
    assert store.read_range("a/b/one.bin", end - 2, 10) == data[-2:] and store.read_range("a/b/one.bin", end, 10) == b""
    assert [(o.path, o.size) for o in store.list("a")] == [("a/b/one.bin", 1024), ("a/two.bin", 0)]
    assert store.folders() == ["a"]
    assert store.folders("a") == ["b"]
    assert store.child("a").child("b").read("one.bin") == data
    assert store.exists("a/two.bin")
    assert not store.exists("a/three.bin")
    assert not store.exists("a")
    assert store.size("a/b/one.bin") == 1024
    store.delete("a/two.bin")
    store.delete("a/two.bin")
    store.delete_all(["a/b/one.bin", "a/never.bin"])
    assert store.list() == []


def test_missing_object_is_named(store: Store) -> None:
    with pytest.raises(NotFound, match="nowhere/x.json"):
        store.read_json("nowhere/x.json")


def test_conditional_write_lets_one_of_many_win(store: Store) -> None:
    won: list[int] = []

    def attempt(number: int) -> None:
        try:
            store.write("commit", str(number).encode(), if_absent=True)
            won.append(number)
        except AlreadyExists:
            pass

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("commit") == str(won[0]).encode()


def test_only_what_was_read_is_replaced(store: Store) -> None:
    store.write("x", b"1")
    seen = store.read_with_info("x")
    assert seen[0] == b"1"
    store.replace("x", b"2", seen)
    with pytest.raises(Changed, match="/x"):
        store.replace("x", b"3", seen)
    with pytest.raises(Changed, match="/x"):
        store.replace("x", b"3", None)
    assert store.read("x") == b"2"
    store.delete("x")
    with pytest.raises(Changed, match="/x"):
        store.replace("x", b"3", seen)
    store.replace("x", b"4", None)
    assert store.read("x") == b"4"
    with pytest.raises(NotFound, match="/none"):
        store.read_with_info("none")


def test_no_change_is_lost(store: Store) -> None:
    """Several threads, each with a client of its own, add to one document at the same time."""

    def added(one: list[int], before: list[list[int]] | None) -> list[list[int]]:
        return [*(before or []), one]

    def add(thread: int) -> None:
        own = Store.open(store.url)
        for number in range(5):
            own.update_json("list.json", partial(added, [thread, number]))

    threads = [threading.Thread(target=add, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(store.read_json("list.json")) == [[thread, number] for thread in range(4) for number in range(5)]
    assert store.update_json("list.json", lambda _: None) == store.read_json("list.json")
    assert store.update_json("none.json", lambda before: before) is None and not store.exists("none.json")
    assert {one.path for one in store.list()} == {"list.json"}


def test_tables_json_and_files(store: Store, tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([1, 2, 3], pa.int32()), "name": ["a", "b", "ü"]})
    store.write_table("t.parquet", table)
    assert store.read_table("t.parquet").equals(table)
    assert store.read_table("t.parquet", columns=["name"]).column_names == ["name"]
    store.write("t2.parquet", store.read("t.parquet")[:-9])
    with pytest.raises(StoreError, match="t2.parquet"):
        store.read_table("t2.parquet")


def test_only_the_calling_thread_reads_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of Arrow's that holds a Python object when the program ends aborts it."""
    readers: set[int] = set()

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            readers.add(threading.get_ident())
            return super().read(size)

    store = Store.open(tmp_path)
    store.write_table("t.parquet", pa.table({name: np.arange(3 * ROW_GROUP) for name in "abc"}))
    monkeypatch.setattr(io, "BytesIO", Watched)
    assert store.read_table("t.parquet").num_rows == 3 * ROW_GROUP
    assert readers == {threading.get_ident()}
    store.write_json("j.json", {"ü": [1.5, None]})
    assert store.read_json("j.json") == {"ü": [1.5, None]}
    store.write("bad.json", b"{")
    with pytest.raises(StoreError, match=r"bad\.json"):
        store.read_json("bad.json")
    (tmp_path / "big").write_bytes(np.random.default_rng(0).bytes(12 * 2**20))  # over one multipart part
    store.write_file("big", tmp_path / "big")
    assert store.read("big") == (tmp_path / "big").read_bytes()


def test_zarr_round_trip(store: Store) -> None:
    group = zarr.open_group(store.zarr("e/x.zarr"), mode="w")
    array = group.create_array("query", shape=(10, 4), chunks=(2, 4), shards=(4, 4), dtype="f4")
    array[:] = np.arange(40).reshape(10, 4)
    again = zarr.open_array(store.zarr("e/x.zarr/query", read_only=True), mode="r")
    assert np.array_equal(np.asarray(again[:]), np.arange(40).reshape(10, 4))


def test_pickle_carries_only_the_url(store: Store) -> None:
    store.write("x", b"1")  # opens the client
    data = pickle.dumps(store)
    assert len(data) < 400
    assert pickle.loads(data).read("x") == b"1"  # noqa: S301


def test_wrong_secret_is_refused_without_showing_it(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StoreError, match="access refused") as error:
        Store.open(s3_store.url).write("x", b"1")
    assert "not-the-secret" not in str(error.value)


def test_missing_bucket(s3_store: Store) -> None:
    with pytest.raises(StoreError, match="bucket"):
        Store.open("s3://no-such-bucket/x").check()


def test_no_server(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
        Store.open(s3_store.url).check()


def test_no_credentials(s3_store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        Store.open(s3_store.url).check()


def test_unknown_profile(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="nobody.*AWS_PROFILE"):
        Store.open(s3_store.url).check()


def test_check_names_the_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        Store.open(tmp_path / "typo").check()
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "a.b", "-a", "a b"])
def test_names_that_could_climb_out(name: str) -> None:
    with pytest.raises(BadInput, match="run name"):
        check_name("run", name)
