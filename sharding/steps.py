"""Shard a raw folder in one call: write a layout, go on with one that was cut off, or append to one that is there."""

from __future__ import annotations

from geostream.store import Store
from sharding.append import append, newest_layout
from sharding.commit import ShardReport, commit_shards, layout_folder
from sharding.growth import Rules
from sharding.job import ShardOptions, plan_shards
from sharding.places import RawDataset
from sharding.workers import leave_a_starting_worker
from sharding.writer import write_shards


def shard(
    raw: RawDataset,
    store: Store,
    dataset: str,
    name: str = "base",
    options: ShardOptions | None = None,
    workers: int | None = None,
    *,
    remove_missing: bool = False,
    extend_test: bool = False,
) -> ShardReport:
    """Write a data set as a layout, go on with one that was cut off, or append to it what the raw folder has more.

    A first sharding calls :func:`plan_shards`, :func:`write_shards` and :func:`commit_shards`. Where the layout is
    committed, the raw folder is compared with the newest layout that descends from it, and only what is new or has
    changed is read, encoded and written, as the next generation. Where nothing is, nothing is written.

    Args:
        raw: the data set, from :func:`sharding.read_places`.
        store: the root of the store.
        dataset: the data set's name in it.
        name: the layout's name.
        options: how the layout is written; None: the defaults, and for an append as the layout is.
        workers: processes that encode; None: one a core; 1: this one.
        remove_missing: an append removes places and views that the raw folder no longer has.
        extend_test: an append may change the test set, so that figures are no longer comparable.

    Raises:
        BadInput: the options make no sense, too many images are broken, or the layout was made by another adapter or
            with other options.
        StoreError: the store cannot be reached, or refuses.
        GeostreamError: a worker process died; what is finished is kept.
    """
    leave_a_starting_worker()
    folder = layout_folder(store, dataset, name)
    if not store.is_local:
        store.check(write=True)  # before the sample is read; a local folder is made
    if folder.exists("layout.json"):
        rules = Rules(remove_missing, extend_test)
        return append(raw, newest_layout(store, dataset, name), store, options, rules, workers)
    job = plan_shards(raw, options)
    job.check_broken(job.missing)
    parts, resumed = write_shards(job, folder, workers)
    return commit_shards(job, store, dataset, name, parts, resumed)
