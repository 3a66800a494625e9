"""Define the commands ``models list``, ``show``, ``promote`` and ``rollback``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from geostream.cli.options import (
    DEFAULT_RUN,
    Cluster,
    Dataset,
    LayoutName,
    StoreUrl,
    open_run,
    open_store,
    open_trained,
    print_table,
)
from geostream.errors import BadInput

if TYPE_CHECKING:
    from geostream.store import Store

models = typer.Typer(help="List a dataset's models, make another one current, or go back.")

Number = Annotated[str, typer.Argument(metavar="MODEL", help="current, or a model's number.")]


@models.command("list")
def list_(store: StoreUrl, dataset: Dataset = None) -> None:
    """Show every model, and which one is current."""
    from geostream.runs.models import list_models, read_current

    root, name = _opened(store, dataset)
    current = read_current(root, name)
    rows = [
        {
            "model": model.number,
            "now": _standing(model.number, current.model.number, current.before) if current else None,
            "run": model.run,
            "checkpoint": model.checkpoint,
            "layout": model.layout["name"],
            "R@1": f"{model.metrics['r1']:.2%}",
            "before": f"{model.compared['r1_before']:.2%}" if model.compared else None,
            "promoted": model.promoted,
            "by": model.by,
        }
        for model in list_models(root, name)
    ]
    if not rows:
        raise BadInput(f"{root.url}/{name}: no model was promoted yet; promote a run's: geostream models promote")
    print_table(f"models of {name}", rows)


@models.command()
def show(store: StoreUrl, model: Number = "current", dataset: Dataset = None) -> None:
    """Print a model's entry as JSON."""
    from dataclasses import asdict

    from geostream.runs.models import find_model

    root, name = _opened(store, dataset)
    print(json.dumps(asdict(find_model(root, name, model)), indent=1))


@models.command()
def promote(
    store: StoreUrl,
    run: Annotated[str, typer.Argument(help="Name of a run; or model:N, to make an earlier model current again.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Default: that of the best evaluation; newest: that of the last whole epoch.")
    ] = None,
    dataset: Dataset = None,
    layout: LayoutName = None,
    force: Annotated[bool, typer.Option("--force", help="Promote without a comparison, also a worse one.")] = False,
    promote_z: Annotated[
        float, typer.Option(help="Standard errors of the difference in R@1 that it may be worse by.")
    ] = 1.0,
    cluster: Cluster = None,
) -> None:
    """Compare a run's checkpoint with the current model on the test gallery, and promote it if it is no worse."""
    from geostream.report import report
    from geostream.runs.log import RunResult
    from geostream.runs.promotion import promote_if_no_worse
    from geostream.runs.stages import BEST

    if run.startswith("model:"):
        if checkpoint is not None:
            raise BadInput(f"--checkpoint {checkpoint}: a model has only one")
        names = (dataset, layout, DEFAULT_RUN)
        source, wanted = open_trained(store, names, None, run.removeprefix("model:"), cluster)
    else:
        source = open_run(store, dataset, layout, run, cluster)
        wanted = {None: BEST, "newest": None}.get(checkpoint, checkpoint)
    decision, promoted = promote_if_no_worse(source, wanted, by="by hand", promote_z=promote_z, force=force)
    if decision.new.model is None and not run.startswith("model:"):
        result = RunResult.of(source.url, source.log, already_finished=True)
        report.publish(source, result, report.summarise(source.store.url, source.layout, result))
    print(decision.rule)
    if promoted is None:
        raise BadInput(f"{source.url}: not promoted; --force promotes it nevertheless")
    print(f"model {promoted.number} is current: {promoted.run} {promoted.checkpoint}")


@models.command()
def rollback(store: StoreUrl, dataset: Dataset = None) -> None:
    """Make the model current that was so before; done twice, it goes one further back. Nothing is removed."""
    from geostream.runs.models import rollback as roll_back

    root, name = _opened(store, dataset, write=True)
    model = roll_back(root, name)
    print(f"model {model.number} is current: {model.run} {model.checkpoint}")


def _opened(url: str, dataset: str | None, *, write: bool = False) -> tuple[Store, str]:
    """Open the store, and return the data set's name: the one named, or the only one."""
    from geostream.runs.generations import check_dataset

    root = open_store(url, write=write)
    return root, check_dataset(root, dataset)


def _standing(number: int, current: int, before: list[int]) -> str | None:
    """Return "current", "before" for the models that rollbacks go to, or None."""
    if number == current:
        return "current"
    return "before" if number in before else None
