"""Preview a sharding before anything is written: for ``--dry-run`` and the flow's parameter.

A dry run does what the real run does up to its first write: it reads lists and folders, encodes the same sample of
images, and looks whether the store can be reached and what lies under the layout's name. That takes seconds to a
minute. For an append it compares the raw folder with the layout, which reads all files whose size or time of change is
another than noted. What the real run would refuse is reported, not raised. On S3 one small object is written under a
name of its own and removed at once, to learn whether we may write and whether the server has conditional puts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from geostream.errors import BadInput, StoreError, Unanswered
from geostream.layout.files import JOB
from geostream.store import Store
from geostream.store.conditional import probe
from sharding.append import newest_layout, plan_append, read_again
from sharding.commit import layout_folder
from sharding.growth import Growth, Rules
from sharding.job import ShardJob, ShardOptions, plan_shards
from sharding.places import Broken, RawDataset, Size
from sharding.writer import check_foreign, foreign_objects

SHOWN = 10  # missing images that are named


@dataclass(frozen=True)
class DryRun:
    """Describe what a sharding would write.

    Attributes:
        url: the layout's folder.
        state: what lies there now, in words.
        warning: what the server cannot promise; None: nothing to warn of.
        refused: why the real run would fail; None: it would not.
        job: the planned shards.
        missing: images that the raw folder lacks.
        growth: what would be appended to a layout; None: it would be a first sharding.
    """

    url: str
    state: str
    warning: str | None
    refused: str | None
    job: ShardJob
    missing: tuple[Broken, ...]
    growth: Growth | None = None

    @property
    def figures(self) -> dict[str, object]:
        """Numbers and names of what would be written, by their label."""
        raw, images = self.job.raw, self.job.images
        pairs = Counter(view.split for place in raw.places for view in place.views)
        return {
            "layout": self.url,
            "there": self.state,
            "adapter": raw.adapter,
            "options": ", ".join(f"{name} {_plain(value)}" for name, value in raw.options.items()) or "none",
            "protocols": _plain(raw.protocols),
            "coordinates": raw.coordinates,
            "places" if self.growth is None else "places to write": len(raw.places),
            "pairs": ", ".join(f"{split} {count:,}" for split, count in sorted(pairs.items())),
            "test gallery": sum("test" in place.splits for place in raw.places),
            "images": self.job.n_images,
            "missing images": len(self.missing),
            "stored tiles": _size(images.tile_size),
            "stored views": _size(images.view_size),
            "shards": len(self.job.parts),
            "MB, about": round(self.job.estimated_bytes / 1e6, 1),
        } | self._append_figures

    @property
    def _append_figures(self) -> dict[str, object]:
        if self.growth is None:
            return {}
        return {
            "images to read": read_again(self.job),
            "compared": self.growth.compared,
            "borrowed shards": len(self.growth.parent.shard_paths),
        }

    @property
    def remarks(self) -> list[str]:
        """Lines to print: the adapter's notes, the first missing images, the warning, and why it would be refused."""
        grown = self.growth.notes if self.growth else []
        lines = [*self.job.raw.notes, *grown, *(str(one) for one in self.missing[:SHOWN])]
        if len(self.missing) > SHOWN:
            lines.append(f"… and {len(self.missing) - SHOWN:,} more images are missing")
        lines += [self.warning] if self.warning else []
        return [*lines, *([f"It would be refused: {self.refused}"] if self.refused else [])]


def dry_run(
    raw: RawDataset,
    store: Store,
    dataset: str,
    name: str = "base",
    options: ShardOptions | None = None,
    *,
    remove_missing: bool = False,
    extend_test: bool = False,
) -> DryRun:
    """Return what :func:`sharding.shard` would do with the same arguments.

    Args:
        raw: the data set, from :func:`sharding.read_places`.
        store: the root of the store.
        dataset: the data set's name in it.
        name: the layout's name.
        options: how the layout is written; None: the defaults.
        remove_missing: an append would remove what the raw folder no longer has.
        extend_test: an append may change the test set.

    Raises:
        BadInput: a name or option makes no sense, or there is nothing to train or test on.
        StoreError: the store cannot be reached.
    """
    folder = layout_folder(store, dataset, name)
    if not store.is_local:
        store.check(write=True)
    state, warning, refused, growth = "nothing", None, None, None
    try:
        if folder.exists("layout.json"):
            parent = newest_layout(store, dataset, name)
            job, growth = plan_append(raw, parent, options, Rules(remove_missing, extend_test), None)
            state = f"a layout, committed: its newest generation, {parent.name}, would be appended to"
            if growth.is_nothing:
                state = "this very layout, committed: it would be left as it is"
            return DryRun(folder.url, state, None, None, job, growth.broken, growth)
    except BadInput as error:
        refused = str(error)
    job = plan_shards(raw, options)
    missing = tuple(job.missing)
    try:
        job.check_broken(missing)
        if refused:
            state = "another layout"
        elif folder.exists(JOB):
            state = "an unfinished layout: it would be gone on with, if it is this one"
        else:
            check_foreign(folder, foreign_objects(job, folder))
    except BadInput as error:
        refused = refused or str(error)
    if store.is_s3:
        try:
            warning = probe(store)
        except Unanswered:
            raise
        except StoreError as error:
            refused = refused or str(error)
    return DryRun(folder.url, state, warning, refused, job, missing)


def _plain(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _size(size: Size | None) -> str:
    return "as they are" if size is None else f"{size[0]}x{size[1]}"
