"""Show on the page of a flow run of ``retrain`` what a training gave, and tell of it by events and assets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.events import emit_event

from flows.assets import note_asset
from flows.common import link, percent, show
from geostream.layout import Layout
from geostream.runs.log import RunResult
from geostream.runs.models import Model, model_folder
from geostream.runs.run import Run

if TYPE_CHECKING:
    from geostream.runs.promotion import Decision

SHARES = {"overlap", "resident_share"}  # columns of plans that are shares


def tell_stalled(layout: Layout, run: str, why: str) -> None:
    """Emit the event ``geostream.training.stalled``."""
    emit_event(
        event="geostream.training.stalled",
        resource=_resource(layout, run),
        payload={"why": why},
    )


def _resource(layout: Layout, run: str) -> dict[str, str]:
    """Return what an event of a training is about."""
    return {
        "prefect.resource.id": f"geostream.dataset.{layout.dataset}",
        "prefect.resource.name": f"{layout.dataset} {run}",
        "geostream.dataset": layout.dataset,
        "geostream.run": run,
    }


def tell_decision(run: Run, decision: Decision | None) -> None:
    """Show a decision on the flow run's page, and emit its events: promoted, or rejected because recall has dropped."""
    if decision is None:
        return
    compared = decision.result() or {"r1": decision.new.metrics["r1"]}
    kinds = ["model.promoted"] if decision.promotes else ["model.rejected", "recall.dropped"]
    for kind in kinds:
        emit_event(
            event=f"geostream.{kind}",
            resource=_resource(run.layout, run.name),
            payload={"rule": decision.rule, **compared},
        )
    rows = [
        {
            "model": "this run" if side is decision.new else f"model {side.model}",
            "run": side.run,
            "checkpoint": side.checkpoint,
            "R@1": percent(side.metrics["r1"]),
        }
        for side in (decision.new, decision.old)
        if side is not None
    ]
    show("comparison", rows, decision.rule)


def show_run(run: Run, result: RunResult) -> None:
    """Show the run's report, evaluations, plans and reclusterings on the flow run's page."""
    from geostream.report.evaluation_page import results_by_epoch

    link("report", f"{result.url}/report.html", f"report of {run.name}")
    link("layout-folder", run.layout.store.url, f"{run.layout.dataset} {run.layout.name}")
    show("evaluation", results_by_epoch(run.layout, result.evaluations), "Recall on the test gallery, in percent")
    show(
        "epoch-plans",
        [_readable(row) for row in result.plans],
        "Hardness: 0 = random batches, 1 = Sample4Geo's with random access to everything",
    )
    if result.reclusterings:
        rows = [_readable(row) for row in result.reclusterings]
        show("generations", rows, "Shards rewritten in the order of similarity, and the scores it gave")


def note_assets(begun_on: Layout, run: Run, model: Model | None) -> None:
    """Note the run as an asset made of its layouts and of the model that it began from, and the model made of it."""
    store, dataset = run.store, run.layout.dataset
    sources = list(dict.fromkeys([begun_on.store.url, run.layout.store.url]))
    kind, _, number = (run.settings.model.weights or "").partition(":")
    if kind == "model" and number.isdigit():
        sources.append(model_folder(store, dataset, int(number)).url)
    facts = {"epochs": run.settings.optim.epochs, "best": run.best()}
    note_asset(run.url, f"{dataset} {run.name}", sources, facts)
    if model is not None:
        measured = {"checkpoint": model.checkpoint, "R@1": model.metrics["r1"]}
        note_asset(
            model_folder(store, dataset, model.number).url, f"{dataset} model {model.number}", [run.url], measured
        )


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table as a person reads it: shares in percent, few digits, no hashes."""
    return {
        name.replace("_", " "): _cell(name, value)
        for name, value in row.items()
        if name != "hash" and not isinstance(value, dict | list)
    }


def _cell(name: str, value: Any) -> Any:
    if name in SHARES and isinstance(value, float):
        return percent(value)
    if isinstance(value, float):
        return float(f"{value:.3g}")
    return value
