"""List the data sets that can be sharded: what each holds, where it is to be had, on which terms, what its files are.

``geostream datasets`` prints the list, and ``python -m sharding.datasets`` the same as ``docs/datasets.md``, from the
facts in :data:`sharding.adapters.ADAPTERS`.
"""

from __future__ import annotations

HEAD = """# Data sets

What `geostream shard` reads, and where it is to be had. `geostream datasets` prints the same. Terms are as the authors
say them; read them at the source before you use the images. Nothing is downloaded for you.

Every raw folder may also lie in a bucket: `geostream shard vigor s3://bucket/raw/VIGOR s3://bucket/geo`.
"""
TAIL = """
Which options each takes: [Your own bucket](how-to/own-bucket.md#shard). A table of your own: [Your own
dataset](how-to/own-dataset.md#a-table). Without any of them, `geostream demo` renders a city.
"""


def datasets() -> None:
    """List what can be sharded: what it holds, where it is to be had, on which terms, what its files are called."""
    from rich.console import Console

    from sharding.adapters import ADAPTERS

    console = Console()
    for name, adapter in ADAPTERS.items():
        for label, fact in (
            (name, adapter.holds),
            ("  from", adapter.source),
            ("  terms", adapter.terms),
            ("  files", adapter.files),
        ):
            if fact:
                console.print(f"{label:16}{fact}", highlight=False, markup=False, soft_wrap=True)


def page() -> str:
    """Return ``docs/datasets.md``."""
    from sharding.adapters import ADAPTERS

    parts = [HEAD]
    for name, adapter in ADAPTERS.items():
        lines = [f"## `{name}`", "", f"{adapter.holds}.", ""]
        lines += [f"- From: [{adapter.source}]({adapter.source})"] if adapter.source else []
        lines += [f"- Terms: {adapter.terms}", f"- Files: `{adapter.files}`", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts) + TAIL


if __name__ == "__main__":
    print(page(), end="")
