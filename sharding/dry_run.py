"""What a sharding would do, found out without writing anything: for ``--dry-run`` and the flow's parameter.

Decides that a dry run is the real thing up to the first write: it reads the lists and folders, encodes the same sample
of images, and looks whether the store can be reached and what lies under the layout's name. So what it takes is seconds
to a minute, and its sizes are as good as the sample. What the real run would refuse, it tells, rather than fails.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from geostream.errors import BadInput
from geostream.store import Store
from sharding.commit import is_committed, layout_folder
from sharding.job import Broken, ShardJob, ShardOptions, plan_shards
from sharding.places import RawDataset, Size

SHOWN = 10  # missing images that are named


@dataclass(frozen=True)
class DryRun:
    """What would be written. ``refused``: why the real run would not do it, in words, or None."""

    url: str
    state: str  # of the layout's folder, in words
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
        """Lines on what is odd: the adapter's notes, what is missing, and why it would be refused."""
        lines = [*self.job.raw.notes, *(str(one) for one in self.missing[:SHOWN])]
        if len(self.missing) > SHOWN:
            lines.append(f"… and {len(self.missing) - SHOWN:,} more images are missing")
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
        store.check()
    job = plan_shards(raw, options)
    missing = tuple(job.missing)
    state, refused = "nothing", None
    try:
        job.check_broken(missing)
        # Asking a local store makes its folder.
        if not folder.is_local or Path(folder.url).is_dir():
            if is_committed(job, folder):
                state = "this very layout, committed: it would be left as it is"
            elif folder.list():
                state = "an unfinished layout: it would be gone on with, if it is this one"
    except BadInput as error:
        refused = str(error)
    return DryRun(folder.url, state, refused, job, missing)


def _plain(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _size(size: Size | None) -> str:
    return "as they are" if size is None else f"{size[0]}x{size[1]}"
