"""Raw datasets → places → tar shards: a committed layout in an object store.

An adapter describes one dataset's raw folder and yields places (:mod:`sharding.places`); everything behind it is the
same for all: order and cut (:mod:`sharding.order`, :mod:`sharding.job`), encoding, writing, commit.

>>> raw = read_places("vigor", "/data/VIGOR", protocol="same-area")
>>> shard(raw, Store.open("s3://bucket/geo"), dataset="vigor")
"""

from sharding.adapters import ADAPTERS, read_places
from sharding.commit import ShardReport, commit_shards, committed, layout_folder, shard
from sharding.dry_run import DryRun, dry_run
from sharding.job import ShardJob, ShardOptions, plan_shards
from sharding.places import Place, RawDataset, RawImage, View
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
    "committed",
    "dry_run",
    "layout_folder",
    "plan_shards",
    "read_places",
    "shard",
    "write_shards",
]
