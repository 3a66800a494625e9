"""Put together the table of transfer: models by what they were trained on, test galleries by columns.

A row is a run, the first one that of the report, then those of other data sets that were tested on one of its
galleries. Each run has its figures in its own ``tested.json``, which is all that is read: one small object a run. A
figure is only shown where the gallery is the same; the figures of two galleries cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geostream.errors import StoreError
from geostream.runs.galleries import read_tested
from geostream.runs.run import Run
from geostream.store import NAME

SHOWN = {"r1": "R@1", "r1pct": "R@1%"}


def transfer_rows(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the table; none if there is nothing to compare: one model, tested on one data set.

    Args:
        run: The run of the report.

    Returns:
        For each run ``trained on``, ``run``, and by data set R@1 and R@1%, 0 to 1; None where it was not tested.

    Raises:
        StoreError: What the run was tested on cannot be read.
    """
    own = read_tested(run.folder)
    if own is None:
        return []
    found = [_row(run.dataset, run.name, own, own)]
    for dataset in sorted(set(run.store.folders()) - {run.dataset}):
        if not NAME.fullmatch(dataset):
            continue
        runs = run.store.child(dataset, "runs")
        for name in runs.folders():
            try:
                other = read_tested(runs.child(name))
            except StoreError:  # damaged; the report is of this run
                continue
            row = None if other is None else _row(dataset, name, other, own)
            if row is not None and any(value is not None for value in list(row.values())[2:]):
                found.append(row)
    return found if len(found) > 1 or len(own["on"]) > 1 else []


def _row(dataset: str, name: str, tested: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run gave on the galleries that the report's own run was tested on."""
    together = ", ".join(tested["trained_on"])
    row: dict[str, Any] = {"trained on": dataset if together == dataset else f"{dataset} ({together})", "run": name}
    for column, wanted in own["on"].items():
        there = tested["on"].get(column)
        same = there is not None and there["gallery"] == wanted["gallery"]
        row |= {f"{column} {label}": there.get(figure) if same else None for figure, label in SHOWN.items()}
    return row


def percent_columns(rows: list[dict[str, Any]]) -> set[str]:
    """Return the names of the columns with figures."""
    return {name for name in (rows[0] if rows else {}) if name.endswith(tuple(SHOWN.values()))}
