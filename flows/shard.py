"""Write a raw data set as a committed layout of tar shards with an index: the flow ``shard``.

Where no raw folder is named, cities are rendered first: demo data in the dataset's own raw layout, easier than the real
one. Run again after a failure it goes on from the shards that are whole; run again after success it finds the layout
and writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field, TypeAdapter, ValidationError

import sharding
from flows import rendered
from flows.assets import note_asset
from flows.common import layout_committed, link, may_pass, open_store, show, title
from flows.parameters import Adapter, AdapterOptions, City, ShardingOptions, StoreURL, given
from flows.updates import progress_of
from geostream.errors import BadInput
from geostream.runs.metrics.export import push
from geostream.store import Store
from sharding import DryRun, RawDataset, ShardOptions, ShardReport
from sharding.simcity import RenderSummary

RENDERED = Path("runs", "raw")  # below the folder that the flow runs in


@flow(name="shard", flow_run_name="shard {adapter} {layout}")
def shard(
    adapter: Adapter = "vigor",
    raw: Annotated[str | None, Field(description="raw folder of the worker, or s3://…; none: rendered cities")] = None,
    store: StoreURL = None,
    dataset: Annotated[str | None, Field(description="name in the store; none: the adapter's")] = None,
    layout: str = "base",
    options: ShardingOptions | None = None,
    adapter_options: AdapterOptions | None = None,
    city: City = "demo",
    seed: int = 0,
    workers: Annotated[int | None, Field(ge=1, description="processes that encode; none: one a core")] = None,
    remove_missing: bool = False,
    extend_test: bool = False,
    dry_run: bool = False,
) -> str:
    """Write the raw dataset as a layout, or append to it what is new, and return its id; of a dry run, its URL.

    Args:
        adapter: what the raw folder holds: a name of `geostream datasets`, such as "vigor".
        raw: the raw folder, as the worker sees it, or in a bucket. None: cities rendered in that dataset's raw layout.
        store: s3://bucket/prefix or a folder. None: $GEOSTREAM_STORE, which `make up` sets for its worker.
        dataset: the dataset's name in the store. None: the adapter's; where rendered, "simcity…".
        layout: the layout's name in the dataset.
        options: of sharding: tile_size, view_size, original, quality, shard_bytes, max_broken.
        adapter_options: of the adapter: vigor has protocol, train_cities, test_cities; cvact protocol ("val" or
            "test"); university1652 views ("drone" or "street") and join_alike (0.95); photos those of
            its own page (docs/how-to/own-imagery.md).
        city: size of the rendered cities.
        seed: of the rendered cities.
        workers: processes that encode. None: one a core.
        remove_missing: an append removes places and images that the raw folder no longer has; else they stay.
        extend_test: an append may change the test set; else it adds to training alone, and figures stay comparable.
        dry_run: only tell, on the flow run's page, what would be written and what is missing. On S3 a small object of
            our own is written, and removed, to see what the server can do.
    """
    target, chosen = open_store(store), given(options)
    folder: str | Path
    if raw is None:
        rendered_name = rendered.dataset_name(adapter)
        folder, name = RENDERED / f"{rendered_name}-{city}-{seed}", dataset or rendered_name
        chosen = rendered.shard_options(adapter) | chosen
        render(folder, adapter, city, seed)
    else:
        folder, name = raw, dataset or adapter
    title(f"shard {name} {layout}{' (dry run)' if dry_run else ''}")
    places = read_places(adapter, folder, given(adapter_options))
    rules = {"remove_missing": remove_missing, "extend_test": extend_test}
    if dry_run:
        plan = plan_layout(places, target, name, layout, shard_options(chosen), rules)
        show_plan(plan)
        return plan.url
    report = write_layout(places, target, name, layout, shard_options(chosen), workers, rules)
    show_layout(report)
    if not report.already:
        layout_committed(report.layout)
        note_layout(report, folder)
    return report.layout.id


def shard_options(values: dict[str, Any]) -> ShardOptions:
    """Return the options of sharding from a flow's parameter; raise BadInput that names a wrong one."""
    known = ShardOptions.__dataclass_fields__
    wrong = [f"{name}: no such option" for name in values if name not in known]
    if not wrong:
        try:
            return TypeAdapter(ShardOptions).validate_python(values)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    raise BadInput(f"options of sharding: {'; '.join(wrong)}. Known options: {', '.join(known)}")


@task(task_run_name="render {size}", cache_policy=NO_CACHE)
def render(raw: Path, adapter: str, size: str, seed: int) -> RenderSummary:
    """Render cities of a size as the adapter's raw folder."""
    return rendered.render(raw, adapter, size, seed)


@task(task_run_name="read {adapter}", cache_policy=NO_CACHE)
def read_places(adapter: str, raw: str | Path, options: dict[str, Any]) -> RawDataset:
    """Read the raw folder with the adapter's options."""
    return sharding.read_places(adapter, raw, **options)


@task(
    task_run_name="plan {dataset} {layout}",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def plan_layout(
    raw: RawDataset, store: Store, dataset: str, layout: str, options: ShardOptions, rules: dict[str, bool]
) -> DryRun:
    """Return what :func:`write_layout` would do."""
    return sharding.dry_run(raw, store, dataset, layout, options, **rules)


# A store that stumbles is worth another try: what is whole is kept.
@task(
    task_run_name="write {dataset} {layout}",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
)
def write_layout(
    raw: RawDataset,
    store: Store,
    dataset: str,
    layout: str,
    options: ShardOptions,
    workers: int | None,
    rules: dict[str, bool],
) -> ShardReport:
    """Write and commit the layout, append to it, or find it done; show the share of images that is written."""
    with progress_of("shards", "sharding", f"{dataset} {layout}: images written"):
        report = sharding.shard(raw, store, dataset, layout, options, workers, **rules)
    info, counts = report.layout.info, {"bytes_read": report.bytes_read, "bytes_written": report.bytes_written}
    counts |= {"places": info["places"], "views": sum(info["pairs"].values()), "broken": len(report.broken)}
    push({"stage": "shard", **counts}, dataset=dataset, layout=report.layout.name)
    return report


def note_layout(report: ShardReport, raw: str | Path) -> None:
    """Note the layout as an asset, made of the raw folder and of the layouts whose shards it borrows."""
    layout = report.layout
    folder = layout.store.url.removesuffix(layout.name)
    borrowed = sorted({f"{folder}{shard['layout']}" for shard in layout.info["shards"] if shard.get("layout")})
    facts = {"id": layout.id[:12], "places": layout.n_places, "pairs": layout.info["pairs"]}
    note_asset(layout.store.url, f"{layout.dataset} {layout.name}", [str(raw), *borrowed], facts)


def show_plan(plan: DryRun) -> None:
    """Show on the flow run's page what would be written."""
    rows = [{"what": name, "value": str(value)} for name, value in plan.figures.items()]
    show("dry-run", rows, "\n".join([*plan.remarks, "Nothing was written."]))


def show_layout(report: ShardReport) -> None:
    """Show the layout's figures on the flow run's page."""
    layout = report.layout
    link("layout-folder", layout.store.url, f"{layout.dataset} {layout.name}")
    show(
        "layout",
        [
            {
                "dataset": layout.dataset,
                "layout": layout.name,
                "id": layout.id[:12],
                "places": layout.n_places,
                "training pairs": layout.info["pairs"].get("train", 0),
                "test pairs": layout.info["pairs"].get("test", 0),
                "shards": len(layout.shard_names),
                "MB": round(layout.info["bytes"] / 1e6, 1),
                "raw MB read": round(report.bytes_read / 1e6, 2),
                "MB written": round(report.bytes_written / 1e6, 2),
                "broken images": len(report.broken),
                **{name: count for name, count in report.counts.items() if count},
            }
        ],
        "\n".join([f"{'Found' if report.already else 'Written'} at {layout.store.url}", *report.notes]),
    )
