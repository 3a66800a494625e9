"""Find imagery in a STAC catalogue: ``stac+https://HOST/PATH?collections=NAME&datetime=2023-06/2023-09&asset=visual``.

What stands behind the question mark are the parameters of a STAC API item search (collections, datetime, ids, limit),
and ``asset``, the name of the asset to read. The region's box is added. Items come newest first: where several show a
spot, the newest one is taken. The assets are GeoTIFFs, mostly cloud-optimised ones behind HTTP, and are read as such
(:mod:`sharding.tiles.geotiff`). Licence and attribution are those of the items' collections.
"""

from __future__ import annotations

import urllib.parse
from typing import Any

import google_crc32c

from geostream.errors import BadInput, Unanswered
from sharding.places import Box
from sharding.sources import Stamp
from sharding.tiles.geotiff import Rasters, open_rasters
from sharding.tiles.source import describe, facts_of, said_of, without_secrets

PARAMETERS = ("collections", "datetime", "ids", "asset")
MOST = 2000  # items: more of them are hardly meant for one region
ASSETS = ("visual", "image", "data")  # names that are looked for where none is given
TIMEOUT = 30  # seconds
RETRIES = 3


def search_stac(text: str, box: Box) -> Rasters:
    """Search a STAC catalogue for imagery of a region, and look at what is found.

    Args:
        text: ``stac+`` and the URL of the catalogue, with the search's parameters.
        box: the region.

    Raises:
        BadInput: a parameter is unknown, nothing is found, or an item has no such asset.
        Unanswered: the catalogue does not answer.
    """
    import pystac_client
    import requests
    from pystac import STACError
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO

    address, _, query = text.removeprefix("stac+").partition("?")
    url = without_secrets(address)
    given = {name: values[-1] for name, values in urllib.parse.parse_qs(query, keep_blank_values=True).items()}
    if unknown := sorted(set(given) - set(PARAMETERS)):
        raise BadInput(f"{url}: no parameter {', '.join(unknown)}; a STAC search has {', '.join(PARAMETERS)}")
    wanted: dict[str, Any] = {name: given[name].split(",") for name in ("collections", "ids") if name in given}
    if "datetime" in given:
        wanted["datetime"] = given["datetime"]
    try:
        io = StacApiIO(max_retries=RETRIES, timeout=TIMEOUT)
        client = pystac_client.Client.open(address, stac_io=io)
        items = list(client.search(bbox=box, max_items=MOST, **wanted).items())
        collections = {item.collection_id for item in items if item.collection_id}
        about = [one for name in sorted(collections) if (one := client.get_collection(name))]
    except (requests.RequestException, APIError) as error:
        raise Unanswered(
            f"{url}: the catalogue does not answer as it should ({said_of(error, address)}); try again"
        ) from error
    except (STACError, ValueError, KeyError, NotImplementedError) as error:
        raise BadInput(f"{url}: no STAC API that can be searched ({said_of(error, address)})") from error
    if not items:
        raise BadInput(f"{url}: nothing found in {describe(box)}; mend collections, datetime or the region")
    if len(items) == MOST:
        raise BadInput(f"{url}: {MOST} items or more; name collections, a shorter datetime or a smaller region")
    items.sort(key=lambda item: (-item.datetime.timestamp() if item.datetime else 0.0, item.id))
    assets = [_asset(item, given.get("asset"), url) for item in items]
    # A signed address has another query each time.
    stamps = [Stamp(0, google_crc32c.value(f"{href.partition('?')[0]} {made}".encode())) for href, made in assets]
    licences = sorted({one.license for one in about if one.license})
    providers = sorted({provider.name for one in about for provider in one.providers or ()})
    facts = facts_of(
        ", ".join(sorted(collections)) or urllib.parse.urlsplit(url).hostname or url,
        licence=", ".join(licences) or None,
        attribution=", ".join(providers) or None,
        url=url,
    )
    return open_rasters([href for href, _ in assets], facts, stamps)


def _asset(item: Any, name: str | None, url: str) -> tuple[str, str]:
    """Return where an item's picture lies, and when or what it was made: all that tells one version from the next."""
    names = [name] if name is not None else [one for one in ASSETS if one in item.assets]
    if not names and len(item.assets) == 1:
        names = list(item.assets)
    if not names or names[0] not in item.assets:
        raise BadInput(
            f"{url}: item {item.id} has no asset {names[0] if names else ' or '.join(ASSETS)}; choose one of "
            f"{', '.join(sorted(item.assets))} with &asset="
        )
    asset = item.assets[names[0]]
    made = asset.extra_fields.get("file:checksum") or item.properties.get("updated") or item.datetime
    return str(asset.get_absolute_href() or asset.href), str(made)
