"""Define the commands that only read a store: ``inspect`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geostream.cli.options import Dataset, LayoutName, StoreUrl, open_store, print_table
from geostream.errors import BadInput, StoreError

if TYPE_CHECKING:
    from geostream.layout import Layout


def inspect(
    store: StoreUrl,
    dataset: Dataset = None,
    layout: LayoutName = None,
    page: Annotated[str | None, typer.Option(help="Write an HTML page here, with pairs and where each lies.")] = None,
) -> None:
    """Show what is in a store: its datasets and layouts, or one layout in detail."""
    from rich.console import Console

    from geostream.layout import list_datasets, list_layouts, open_layout

    root = open_store(store, write=False, listed=not (dataset and layout))
    datasets = [dataset] if dataset else list_datasets(root)
    names = [(d, n) for d in datasets for n in ([layout] if layout else list_layouts(root, d))]
    if not names:
        raise BadInput(f"{root.url}: no committed layout; shard one first: geostream shard vigor RAW {root.url}")
    layouts = [open_layout(root, d, n) for d, n in names]
    if page is not None:
        _write_page(layouts[0] if len(layouts) == 1 else open_layout(root, dataset, layout), Path(page))
        return
    print_table("layouts", [_layout_row(one) for one in layouts])
    if len(layouts) != 1:
        return
    [one] = layouts
    images = one.members.group_by("member").aggregate([("size", "count"), ("size", "mean")]).to_pylist()
    rows = sorted(images, key=lambda row: str(row["member"]))
    print_table(
        "members", [{"member": r["member"], "count": r["size_count"], "mean bytes": r["size_mean"]} for r in rows]
    )
    if one.joined:
        print_table("joined", [part._asdict() for part in one.joined])
    for key in ("id", "gallery", "source", "images", "broken"):
        for line in _lines(key, one.info.get(key)):
            Console().print(line, highlight=False, markup=False)


def _lines(name: str, value: object) -> list[str]:
    """Return a line for each value of a field of ``layout.json``, with the names that lead to it before it."""
    if isinstance(value, dict) and value:
        return [line for key, one in value.items() for line in _lines(f"{name}: {key}", one)]
    if isinstance(value, list | dict):
        value = ", ".join(map(str, value))
    return [f"{name}: {'–' if value in (None, '') else value}"]


def _write_page(layout: Layout, path: Path) -> None:
    """Write the page of pairs; a file there is replaced, as a whole."""
    from geostream.report.pairs_page import pairs_page

    if not path.parent.is_dir():
        raise BadInput(f"--page {path}: no such folder; make it first")
    text = pairs_page(layout)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadInput(f"--page {path}: cannot write it ({error.strerror}); name another file") from error
    print(f"{path}: pairs of {layout.dataset} {layout.name}")


def verify(store: StoreUrl, dataset: Dataset = None, layout: LayoutName = None) -> None:
    """Read every shard of a layout once and compare it with the index. Name what is damaged, and exit with 1."""
    from geostream.layout import open_layout
    from geostream.layout.files import ADVICE
    from geostream.layout.verify import verify_layout

    opened = open_layout(open_store(store, write=False, listed=not (dataset and layout)), dataset, layout)
    found = verify_layout(opened)
    for line in found.problems:
        print(line)
    if found.count > len(found.problems):
        print(f"… and {found.count - len(found.problems)} more")
    if found.count:
        raise StoreError(f"{opened.store.url}: {found.count} problems; {ADVICE}")
    print(f"{found.shards} shards, {found.members} members, {found.bytes} bytes: all as committed")


def _layout_row(layout: Layout) -> dict[str, object]:
    return {
        "dataset": layout.dataset,
        "layout": layout.name,
        "generation": layout.generation,
        "places": layout.n_places,
        "train pairs": layout.info["pairs"].get("train", 0),
        "test pairs": layout.info["pairs"].get("test", 0),
        "shards": len(layout.shard_names),
        "borrowed": int(layout.borrowed.sum()),
        "MB": f"{layout.shard_sizes.sum() / 1e6:,.1f}",
        "broken": len(layout.info["broken"]),
    }
