"""Every URL of a store, and every folder, becomes a key that Prefect allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prefect.assets import Asset

from flows.assets import asset_key


def test_a_url_of_a_store_is_its_own_key() -> None:
    assert asset_key("s3://bucket/geo/vigor/layouts/base-g1") == "s3://bucket/geo/vigor/layouts/base-g1"
    assert asset_key("/data/VIGOR") == "file:///data/VIGOR"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_prefect_allows_every_key(name: str) -> None:
    for url in (f"s3://bucket/{name}", f"/data/{name}", name):
        assert Asset(key=asset_key(url)).key == asset_key(url)
