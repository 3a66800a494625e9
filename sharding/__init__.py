"""Write raw data sets as layouts: places in tar shards on an object store, with an index.

An adapter (:mod:`sharding.adapters`) reads one data set's raw folder and returns places. All that follows is the same
for every data set: order and cut into shards, encoding, writing, commit.

>>> raw = read_places("vigor", "/data/VIGOR", protocol="same-area")
>>> shard(raw, Store.open("s3://bucket/geo"), dataset="vigor")

The names are imported when they are first used, so that ``geostream shard --help`` need not wait for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharding.adapters import ADAPTERS, read_places
    from sharding.commit import ShardReport, commit_shards, layout_folder
    from sharding.job import ShardJob, ShardOptions, plan_shards
    from sharding.places import Place, RawDataset, RawImage, View
    from sharding.preview import DryRun, dry_run
    from sharding.steps import shard
    from sharding.writer import write_shards

__all__ = [
    "ADAPTERS",
    "DryRun",
    "Place",
    "RawDataset",
    "RawImage",
    "ShardJob",
    "ShardOptions",
    "ShardReport",
    "View",
    "commit_shards",
    "dry_run",
    "layout_folder",
    "plan_shards",
    "read_places",
    "shard",
    "write_shards",
]

_NAMES = {
    "adapters": ("ADAPTERS", "read_places"),
    "commit": ("ShardReport", "commit_shards", "layout_folder"),
    "job": ("ShardJob", "ShardOptions", "plan_shards"),
    "places": ("Place", "RawDataset", "RawImage", "View"),
    "preview": ("DryRun", "dry_run"),
    "steps": ("shard",),
    "writer": ("write_shards",),
}
_MODULES = {name: f"sharding.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name from its module, once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
