"""A store's URL is exactly one folder, or it is refused before anything is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from botocore.config import Config
from botocore.session import Session
from hypothesis import given
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.store import Store
from infra.s3 import S3Server
from tests.command import geostream


def keys(server: S3Server) -> dict[str, str]:
    """Every key in the bucket with its ETag, as another client than ours sees them."""
    client: Any = Session().create_client(
        "s3", endpoint_url=server.endpoint, config=Config(s3={"addressing_style": "path"})
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=server.bucket)
    return {found["Key"]: found["ETag"] for page in pages for found in page.get("Contents", [])}


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a b/é+~=&,@%20", "s3://bucket/a b/é+~=&,@%20"),
        ("gs://bucket/a b", "gs://bucket/a b"),
        ("abfss://container@account/a", "abfss://container@account/a"),
        ("https://host:8080/a%20b/", "https://host:8080/a%20b"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("file:///a/b%20c%23", "/a/b c#"),
        ("file://localhost/a", "/a"),
        ("/a/b#2?x=1", "/a/b#2?x=1"),
        ("/a//b/./c/", "/a/b/c"),
        ("/usr/../usr", "/usr"),
    ],
)
def test_urls_are_kept_as_they_were_written(url: str, kept: str) -> None:
    assert Store.open(url).url == kept


@pytest.mark.parametrize(
    "url",
    [
        "",
        "  ",
        *(f"s3://bucket{path}" for path in ("#x", "?x=1", "/a#2", "/a?x", "/a//b", "//a", "/a//", "/a/../b", "/./a")),
        *(f"s3://bucket/{path}" for path in ("a\\b", "a\nb", "a\tb", "\x7f", "a\u200bb", "..")),
        *(f"s3://{bucket}/a" for bucket in ("", "b:80", "key:secret@b", "b c", "é", "[b")),
        *(f"{scheme}://b/a{odd}" for scheme in ("gs", "az", "https") for odd in ("#x", "?x", "//b", "/../b")),
        "gs://b/a%20b",  # which obstore takes for "a b"
        "https://user:word@host/a",
        "file:///a#2",
        "file:///a?x",
        "file://other/a",
        "file://a",
        "file:///%ff",
        "s3:/bucket/a",
        "s3:bucket/a",
        "file:/a",
        " s3://bucket/a",
        "ftp://host/a",
        "s4://bucket/a",
        "/a\0b",
        "~nobody-of-this-name/a",
    ],
)
def test_what_is_not_exactly_one_folder_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(BadInput) as refused:
        Store.open(url)
    assert "\n" not in str(refused.value) and "word@" not in str(refused.value) and "secret@" not in str(refused.value)


ODD = st.text(st.sampled_from("ab.#?%/\\ \t~é:@&=+*[]{}'\"<>|^`!$(),;_-0\u00a0\u200b"), max_size=8)


@given(st.sampled_from(["s3://bucket", "s3://bucket/", "gs://bucket/", "az://bucket/", "https://host/"]), ODD)
def test_any_url_is_kept_to_the_letter_or_refused(start: str, rest: str) -> None:
    """But for one slash at its end."""
    try:
        found = Store.open(start + rest).url
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert found == (start + rest).removesuffix("/")
        assert found.count("//") == 1 and not {".", ".."} & set(found.split("/"))


@pytest.mark.parametrize("prefix", ["a b", "%20", "a+b", "é", "é", "~x", "*", "{a}", "a=1&b", "'\"<>|^`", "x.", ".x"])
def test_a_key_on_the_server_is_the_prefix_and_the_path(s3_store: Store, s3: S3Server, prefix: str) -> None:
    """Also for the library that reads Parquet and the one that writes Zarr."""
    before = keys(s3)
    store = Store.open(f"{s3_store.url}/{prefix}")
    store.write("x", b"1")
    filesystem, root = store.filesystem()
    filesystem.pipe(f"{root}/y", b"2")
    assert store.read("y") == b"2" and filesystem.cat(f"{root}/x") == b"1"
    base = s3_store.url.removeprefix(f"s3://{s3.bucket}/")
    assert keys(s3).keys() - before.keys() == {f"{base}/{prefix}/x", f"{base}/{prefix}/y"}
    assert [one.path for one in store.list()] == ["x", "y"]


@pytest.mark.parametrize("name", ["a#2", "a?x=1", "a%20b", "a b", "é", "x\\y", "a:b", "'", "*", "[a]"])
def test_a_local_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    store = Store.open(tmp_path / name)
    store.write("k/x", b"1")
    assert (tmp_path / name / "k" / "x").read_bytes() == b"1" == store.read("k/x")
    store.delete_all(["k/x"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_looking_makes_no_folder(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "typo")
    assert store.list() == [] == store.folders("a") and not store.exists("x")
    store.child("a").delete_all(["x"])
    assert list(tmp_path.iterdir()) == []


def test_a_url_is_refused_before_the_raw_folder_is_read(tmp_path: Path, s3: S3Server) -> None:
    before = keys(s3)
    for url in (f"{s3.url}/exp#2", f"{s3.url}/exp?x=1", f"{s3.url}#x", f"file://{tmp_path}#x"):
        done = geostream("shard", "vigor", str(tmp_path / "raw"), url)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and url.split("#")[0] in done.stderr
    assert keys(s3) == before and list(tmp_path.iterdir()) == []
