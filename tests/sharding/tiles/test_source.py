"""What is shown and stored of a source's address: never a key."""

from __future__ import annotations

import pytest

from sharding.tiles.source import said_of, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:KEY@host:81/a/land.tif?key=KEY", "https://host:81/…/land.tif"),
        ("https://host/services;key=KEY/{z}/{x}/{y}.png", "https://host/…/{y}.png"),
        ("https://host/KEY/{z}/{x}/{y}", "https://host"),
        ("https://host/{z}/{x}/{y}.png;key=KEY", "https://host/…/{y}.png"),
        ("https://host/land.tif#KEY", "https://host/land.tif"),
        ("https://host?key=a/KEY@b", "https://host"),
        ("https://host/a.tif/eyJhb.eyJzd.KEYKEYKEY", "https://host"),
        ("s3://bucket/KEY/b", "s3://bucket"),
        ("/imagery/a?b/land.tif", "/imagery/a?b/land.tif"),
        ("file:///tiles/{z}/{x}/{y}.png", "file:///tiles/{z}/{x}/{y}.png"),
    ],
)
def test_of_an_address_stay_what_can_be_no_key(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def test_an_error_that_quotes_an_address_is_told_without_keys() -> None:
    url = "https://user:KEY@host/KEY/a.tif?key=KEY"
    for text in (f"cannot open {url}\nat all", "Max retries exceeded with url: /KEY/a.tif (refused)"):
        said = said_of(OSError(text), url)
        assert "KEY" not in said and "\n" not in said
    assert said_of(OSError("refused"), url) == "refused"
