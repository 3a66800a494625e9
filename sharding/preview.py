"""What a sharding would do, found out before anything is written: for ``--dry-run`` and the flow's parameter.

Decides that a dry run is the real thing up to the first write: it reads the lists and folders, encodes the same sample
of images, and looks whether the store can be reached and what lies under the layout's name. So what it takes is seconds
to a minute, and its sizes are as good as the sample. What the real run would refuse, it tells, rather than fails.
On S3 one object is written after all, under a name like no other, and removed at once: only so can it be told whether
we may write there, and whether the server has conditional puts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from geostream.errors import BadInput, StoreError, Unanswered
from geostream.layout.files import JOB
from geostream.store import Store
from geostream.store.conditional import probe
from sharding.commit import is_committed, layout_folder
from sharding.job import Broken, ShardJob, ShardOptions, plan_shards
from sharding.places import RawDataset, Size
from sharding.writer import check_foreign, foreign_objects

SHOWN = 10  # missing images that are named


@dataclass(frozen=True)
class DryRun:
    """What would be written.

    In words, or None: ``warning``, what the server cannot promise, and ``refused``, why the real run would not do it.
    """

    url: str
    state: str  # of the layout's folder, in words
    warning: str | None
    refused: str | None
    job: ShardJob
    missing: tuple[Broken, ...]

    @property
    def figures(self) -> dict[str, object]:
        """What would be written, in numbers and names, by name."""
        raw, images = self.job.raw, self.job.images
        pairs = Counter(view.split for place in raw.places for view in place.views)
        return {
            "layout": self.url,
            "there": self.state,
            "adapter": raw.adapter,
            "options": ", ".join(f"{name} {_plain(value)}" for name, value in raw.options.items()) or "none",
            "protocols": _plain(raw.protocols),
            "coordinates": raw.coordinates,
            "places": len(raw.places),
            "pairs": ", ".join(f"{split} {count:,}" for split, count in sorted(pairs.items())),
            "test gallery": sum("test" in place.splits for place in raw.places),
            "images": self.job.n_images,
            "missing images": len(self.missing),
            "stored tiles": _size(images.tile_size),
            "stored views": _size(images.view_size),
            "shards": len(self.job.parts),
            "MB, about": round(self.job.estimated_bytes / 1e6, 1),
        }

    @property
    def remarks(self) -> list[str]:
        """Lines on what is odd: the adapter's notes, what is missing, the server, and why it would be refused."""
        lines = [*self.job.raw.notes, *(str(one) for one in self.missing[:SHOWN])]
        if len(self.missing) > SHOWN:
            lines.append(f"… and {len(self.missing) - SHOWN:,} more images are missing")
        lines += [self.warning] if self.warning else []
        return [*lines, *([f"It would be refused: {self.refused}"] if self.refused else [])]


def dry_run(
    raw: RawDataset, store: Store, dataset: str, name: str = "base", options: ShardOptions | None = None
) -> DryRun:
    """What :func:`sharding.shard` would do with the same arguments.

    Raises BadInput for names and options that make no sense and where there is nothing to train or test on, StoreError
    where the store cannot be reached.
    """
    folder = layout_folder(store, dataset, name)
    if not store.is_local:
        store.check(write=True)
    job = plan_shards(raw, options)
    missing = tuple(job.missing)
    state, warning, refused, committed = "nothing", None, None, False
    try:
        job.check_broken(missing)
        if committed := is_committed(job, folder):
            state = "this very layout, committed: it would be left as it is"
        elif folder.exists(JOB):
            state = "an unfinished layout: it would be gone on with, if it is this one"
        else:
            check_foreign(folder, foreign_objects(job, folder))
    except BadInput as error:
        refused = str(error)
    if store.is_s3 and not committed:
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
