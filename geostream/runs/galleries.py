"""Find the test galleries that a run is evaluated on, sum up what was measured there, and note it in the run.

A run is evaluated on the test split of its layout. A run on a layout that joins several data sets is evaluated on each
of these alone: on the layout that was joined, by the protocols of its own data set. So its figures can be compared with
those of any run on that data set. Its headline, by which the best checkpoint is chosen, is the mean of the data sets'.

What a run was tested on stands in its ``tested.json``, a few hundred bytes, so that the tables of several runs can be
put together (:mod:`geostream.report.transfer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from geostream.errors import BadInput, LayoutNotCommitted, NotFound
from geostream.evaluation.evaluate import Evaluation
from geostream.layout import Layout, open_layout
from geostream.layout.join import known_view_kind
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.store import Store

TESTED = "tested.json"
MEAN = "mean"  # stands for a protocol where figures are means of several data sets'
FIGURES = ("r1", "r5", "r10", "r1pct", "hit_rate")


def galleries(run: Run) -> list[Run]:
    """Return the run as it is on each layout whose test split it is evaluated on.

    Args:
        run: The run.

    Returns:
        The run on its own layout, or on each that this one joins; layouts without test pairs are left out.

    Raises:
        LayoutNotCommitted: A layout that the run's joins is gone, or was replaced.
    """
    layouts = [joined_layout(run.store, run.layout, n) for n in range(len(run.layout.joined))] or [run.layout]
    return [run.on(layout) for layout in layouts if len(layout.pairs("test"))]


def joined_layout(store: Store, layout: Layout, number: int) -> Layout:
    """Open one of the layouts that a layout joins.

    Args:
        store: The store that holds the data sets.
        layout: The layout that joins them.
        number: Which of them.

    Raises:
        LayoutNotCommitted: It is gone, or was replaced.
    """
    one = layout.joined[number]
    found = open_layout(store, one.dataset, one.layout)
    if found.id != one.id:
        raise LayoutNotCommitted(
            f"{found.store.url}: another layout than when {layout.dataset} {layout.name} joined it; restore it, or "
            f"join again: geostream layouts join {store.url} {layout.dataset}"
        )
    return found


def tested_on(run: Run, datasets: Sequence[str], settings: TrainSettings | None = None) -> list[Run]:
    """Return the run as it is on layouts of some data sets, to test it there.

    These are the current layouts of other data sets. Of the run's own data set, and of those that its layout joins,
    they are the run's :func:`galleries`, which may be older: figures on them can be compared with its others.

    Args:
        run: The run.
        datasets: Names of data sets in its store; none stands for all of its galleries.
        settings: The settings that it is to be begun with; None: those that it was begun with.

    Raises:
        BadInput: There is no such data set, it has no test pairs, it joins others, or its views are of another kind
            than those that the run trains on.
        LayoutNotCommitted: A layout that the run's joins is gone, or was replaced.
    """
    found = []
    joined = [one.dataset for one in run.layout.joined]
    for name in datasets:
        try:
            if name in joined:
                layout = joined_layout(run.store, run.layout, joined.index(name))
            else:
                layout = run.layout if name == run.layout.dataset else open_layout(run.store, name)
        except LayoutNotCommitted as error:
            raise BadInput(f"data set {name}, to test on: {error}") from error
        if layout.joined:
            parts = ", ".join(one.dataset for one in layout.joined)
            raise BadInput(f"data set {name}, to test on: it joins others; name those instead: {parts}")
        if not len(layout.pairs("test")):
            raise BadInput(f"data set {name}, to test on: its layout {layout.name} has no test pairs")
        if name not in (run.layout.dataset, *joined):
            _check_kind(layout, settings or run.settings)
        found.append(run.on(layout))
    return found if datasets else galleries(run)


def _check_kind(layout: Layout, settings: TrainSettings) -> None:
    """Raise BadInput where views of another kind are known to be in a layout than a run trains on.

    A run that narrows panoramas is meant for pictures.
    """
    kind, trained = known_view_kind(layout), settings.augment.view_kind
    if kind not in (None, trained) and not settings.augment.narrows:
        raise BadInput(
            f"data set {layout.dataset}, to test on: views of another kind than the run's ({layout.dataset}: {kind}, "
            f"the run's view_kind: {trained}); name data sets with views of its kind"
        )


def check_joined_kind(store: Store, layout: Layout, settings: TrainSettings) -> None:
    """Check that a new run does not take the pictures of joined data sets, which have no recipe, for panoramas.

    Args:
        store: The store that holds the data sets.
        layout: The layout that the run begins on.
        settings: The settings asked for.

    Raises:
        BadInput: ``view_kind`` is panorama, and the layout joins data sets of pictures.
        LayoutNotCommitted: A layout that it joins is gone, or was replaced.
    """
    if settings.augment.view_kind != "panorama":
        return
    parts = [joined_layout(store, layout, number) for number in range(len(layout.joined))]
    if pictures := [one.dataset for one in parts if known_view_kind(one) == "picture"]:
        raise BadInput(
            f"data set {layout.dataset} joins pictures ({', '.join(pictures)}), and view_kind is panorama; "
            "say --set view_kind=picture"
        )


def summed_up(found: Sequence[tuple[Layout, Evaluation]]) -> dict[str, Any]:
    """Return the record of an evaluation: that of the only layout, or the means of several with the record of each.

    Args:
        found: Each layout, and what was measured on its test split.

    Returns:
        The fields of an :class:`Evaluation`. Of several layouts ``protocol`` is "mean", ``gallery`` and ``queries`` are
        sums, and ``datasets`` has a record of each.
    """
    if len(found) == 1:
        return asdict(found[0][1])
    each = [{"dataset": layout.dataset, "layout": layout.name} | asdict(one) for layout, one in found]
    means = {name: float(np.mean([one[name] for one in each])) for name in FIGURES}
    sums = {name: sum(int(one[name]) for one in each) for name in ("gallery", "queries")}
    return means | sums | {"protocol": MEAN, "others": [], "metres": {}, "datasets": each}


def note_tested(run: Run, checkpoint: str, epoch: int, found: Sequence[tuple[Layout, Mapping[str, Any]]]) -> None:
    """Write into the run's ``tested.json`` what was measured on some test splits, in place of earlier figures on them.

    Args:
        run: The run.
        checkpoint: Name of the checkpoint that was tested.
        epoch: The epoch that it belongs to.
        found: Each layout, and the record of the evaluation on it.
    """
    noted = {
        layout.dataset: {
            "layout": layout.name,
            "gallery": layout.gallery or layout.places_id,
            "checkpoint": checkpoint,
            "epoch": epoch,
        }
        | {name: record[name] for name in (*FIGURES, "queries") if name in record}  # older records have fewer
        for layout, record in found
    }

    def updated(said: Any) -> Any:
        return {"trained_on": run.trained_on, "on": (said or {}).get("on", {}) | noted}

    run.folder.update_json(TESTED, updated)


def read_tested(folder: Store) -> dict[str, Any] | None:
    """Return what the run in a folder was tested on; None if it was never tested, or by an older geostream.

    Args:
        folder: The run's folder.

    Returns:
        ``trained_on``, names of data sets, and ``on``: by data set the layout, the id of its gallery, the checkpoint
        and the figures.
    """
    try:
        found: dict[str, Any] = folder.read_json(TESTED)
    except NotFound:
        return None
    return found
