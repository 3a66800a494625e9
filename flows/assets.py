"""Note what a flow has made as an asset of Prefect, with what it was made of: raw data, layout, run, model.

An asset's key is its URL on the store. Prefect's server keeps the events of assets
(``prefect.asset.materialization.succeeded``, with the sources as related resources), and its page *Event feed* shows
them. It has no pages for assets themselves; Prefect Cloud has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.assets import Asset, AssetProperties, materialize
from prefect.cache_policies import NO_CACHE

MOST_CHARACTERS = 512  # of a key


def note_asset(url: str, name: str, made_of: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Note that an asset was made, by a task run of its own.

    Args:
        url: where it lies: a URL, or a folder.
        name: what people call it.
        made_of: URLs or folders of the assets that it was made of.
        facts: what else is to be known of it; values that JSON can hold.
    """
    asset = Asset(key=asset_key(url), properties=AssetProperties(name=name))
    sources = [asset_key(one) for one in made_of]

    @materialize(asset, asset_deps=[*sources], task_run_name="asset {name}", cache_policy=NO_CACHE)
    def note(name: str) -> None:
        asset.add_metadata(dict(facts))

    note(name)


def asset_key(url: str) -> str:
    """Return a URL or folder as the key of an asset, in which Prefect allows fewer characters."""
    whole = url if "://" in url else Path(url).absolute().as_uri()
    return re.sub(r"[^A-Za-z0-9:/._~+=@,;!$()*-]", "_", whole)[:MOST_CHARACTERS]
