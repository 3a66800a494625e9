"""Write raw data sets as layouts: places in tar shards on an object store, with an index.

An adapter (:mod:`sharding.adapters`) reads one data set's raw folder and returns places. All that follows is the same
for every data set: order and cut into shards, encoding, writing, commit.

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
