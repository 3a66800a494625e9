"""Compare a run's checkpoint with the current model of its data set, and promote it where it is no worse.

Both are evaluated on the test split of the run's layout, by the same process. A test gallery is frozen: layouts made by
appending have that of the layout before. If the current model was measured on another gallery, both are still compared
on this one, and the record says so. Embeddings that are on the store already are used again. So the new checkpoint,
which its own training has evaluated, mostly runs no network, and the current model is embedded once a layout.

The result is written into the run, as ``comparison.json`` for the report and as a record of the run's log. Nothing
else of a model that is refused is kept.

Where the layout joins several data sets, the models are compared on the gallery of each, and the mean of their R@1
decides.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from geostream.errors import BadInput
from geostream.evaluation.compare import (
    PROMOTE_Z,
    Comparison,
    Moved,
    check_same_gallery,
    check_z,
    compare,
    joint_comparison,
)
from geostream.evaluation.embed import Trained
from geostream.evaluation.evaluate import Ranked, rank_embeddings, summed_up
from geostream.layout import Layout
from geostream.layout.lineage import Joined
from geostream.runs import stages
from geostream.runs.galleries import galleries
from geostream.runs.galleries import summed_up as summed_up_on
from geostream.runs.metrics.export import push
from geostream.runs.models import By, Model, current_model, is_model, open_model, promote
from geostream.runs.run import Run


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        model: Number of the model; None for a checkpoint that is none yet.
        run: Name of the run.
        checkpoint: Name of its checkpoint.
        epoch: The epoch that the checkpoint belongs to.
        gallery: Id of the test gallery that its own training was evaluated on, if known.
        metrics: As an evaluation gives them, on the gallery of the comparison.
    """

    model: int | None
    run: str
    checkpoint: str
    epoch: int
    gallery: str | None
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """Whether a checkpoint should become the current model, and why.

    Attributes:
        promotes: The decision.
        rule: The decision and its reason in words.
        layout: ``name``, ``id`` and ``places`` (their id) of the layout that both were evaluated on.
        gallery: Id of its test gallery, if the layout names one.
        new: The checkpoint.
        old: The current model; None if there is none, or if it was not compared with.
        comparison: Their metrics, query by query; None without ``old``.
    """

    promotes: bool
    rule: str
    layout: dict[str, str]
    gallery: str | None
    new: Side
    old: Side | None
    comparison: Comparison | None

    def result(self) -> dict[str, Any] | None:
        """Return the comparison in a few numbers, as a model's entry and the run's log have it; None without one."""
        if self.old is None or self.comparison is None:
            return None
        r1 = self.comparison.metrics[0]
        found: dict[str, Any] = {"model": self.old.model, "run": self.old.run, "checkpoint": self.old.checkpoint}
        found |= {"layout": self.layout["name"], "gallery": self.gallery, "no_worse": self.comparison.no_worse}
        found |= {"r1": r1.new, "r1_before": r1.old, "standard_error": r1.standard_error}
        names = ("tolerance", "queries", "won", "lost")
        return found | {name: getattr(self.comparison, name) for name in names}


def decide(
    run: Run, checkpoint: str | None = stages.BEST, *, promote_z: float = PROMOTE_Z, force: bool = False
) -> Decision:
    """Compare a checkpoint with the current model, and record the result in the run; nothing is promoted.

    Args:
        run: The run, on the layout that it ended with.
        checkpoint: Name of the checkpoint; "best" for that of the best evaluation, None for the newest at an epoch's
            end.
        promote_z: Standard errors of the difference in R@1 that the checkpoint may be worse by.
        force: Promote in any case; nothing is compared.

    Raises:
        BadInput: There is no such run or checkpoint, the layout has no test queries, or ``promote_z`` is negative.
        RunHeld: The run is being trained.
    """
    check_z(promote_z)
    _ = run.settings  # where there is no such run, none must be begun by holding it
    with nullcontext() if run.lease else run.hold():
        started = time.perf_counter()
        decision = _decide(run, stages.load_trained(run, checkpoint), promote_z, force)
        if decision.new.model is None:
            run.write_comparison(asdict(decision))
            result = decision.result() or {"model": None}
            seconds = time.perf_counter() - started
            record = run.log.append("compare", decision.new.epoch, seconds, promotes=decision.promotes, **result)
            push(record, dataset=run.layout.dataset, run=run.name, layout=run.layout.name)
    return decision


def promote_if_no_worse(
    run: Run,
    checkpoint: str | None = stages.BEST,
    *,
    by: By = "run",
    promote_z: float = PROMOTE_Z,
    force: bool = False,
) -> tuple[Decision, Model | None]:
    """Compare a checkpoint with the current model, and make it current if it is no worse.

    Args:
        run: The run, on the layout that it ended with.
        checkpoint: As in :func:`decide`.
        by: Who asks for it.
        promote_z: As in :func:`decide`.
        force: As in :func:`decide`.

    Returns:
        The decision, and the model if the checkpoint is current now.

    Raises:
        BadInput: There is no such run or checkpoint, or the layout has no test queries.
        Changed: Another model became current meanwhile; nothing was promoted, and it can be tried again.
        RunHeld: The run is being trained.
    """
    decision = decide(run, checkpoint, promote_z=promote_z, force=force)
    if not decision.promotes:
        return decision, None
    if force:
        current = current_model(run.store, run.layout.dataset)
        over = None if current is None else current.number
    else:
        over = None if decision.old is None else decision.old.model
    model = promote(run, decision.new.checkpoint, decision.new.metrics, over=over, by=by, compared=decision.result())
    return decision, model


def _decide(run: Run, trained: Trained, z: float, force: bool) -> Decision:
    layout, gallery = run.layout, run.layout.info.get("gallery")
    where = {"name": layout.name, "id": layout.id, "places": layout.places_id}
    on = galleries(run)
    if not on:
        raise BadInput(f"layout {layout.name} of {layout.dataset} has no test queries to compare models by")
    embeddings = [stages.embedded(one, trained, "test") for one in on]
    ranked = [rank_embeddings(one.layout, some, one.cluster) for one, some in zip(on, embeddings, strict=True)]
    metrics = _metrics(on, ranked)
    new = Side(None, run.name, trained.checkpoint, trained.epoch, gallery, metrics)
    current = current_model(run.store, layout.dataset)
    if current is not None and is_model(current, run, trained.checkpoint):
        new = replace(new, model=current.number)
        return Decision(True, f"It is the current model, {current.number}, already.", where, gallery, new, None, None)
    if force or current is None:
        why = "Promoted by force, without a comparison" if force else "Promoted, because no model was current"
        return Decision(True, f"{why}. R@1 {new.metrics['r1']:.1%}.", where, gallery, new, None, None)
    opened, model = open_model(run.store, layout, current.number, run.cluster)
    trained_before, before_ranked, found = stages.load_trained(opened, model.checkpoint), [], dict[str, Comparison]()
    for one, new_ranked, some in zip(on, ranked, embeddings, strict=True):
        before = stages.embedded(opened.on(one.layout), trained_before, "test")
        check_same_gallery(some, before)
        before_ranked.append(rank_embeddings(one.layout, before, run.cluster))
        found[one.layout.dataset] = compare(one.layout, new_ranked, before_ranked[-1], some, z)
    compared = joint_comparison(_as_joined(layout, found), z) if layout.joined else found[layout.dataset]
    metrics = _metrics(on, before_ranked)
    old = Side(model.number, model.run, model.checkpoint, model.epoch, model.gallery, metrics)
    return Decision(compared.no_worse, _said(compared, old, gallery), where, gallery, new, old, compared)


def _metrics(on: Sequence[Run], ranked: Sequence[Sequence[Ranked]]) -> dict[str, Any]:
    """Return the metrics of some galleries, as the record of an evaluation has them."""
    return summed_up_on([(one.layout, summed_up(some)) for one, some in zip(on, ranked, strict=True)])


def _as_joined(layout: Layout, found: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Name the queries that moved by the places of the joined layout instead of those of their own data sets."""

    def moved(queries: Sequence[Moved], one: Joined) -> list[Moved]:
        return [replace(query, key=one.prefix + query.key, place=one.first + query.place) for query in queries]

    return {
        one.dataset: replace(
            compared,
            won_queries=moved(compared.won_queries, one),
            lost_queries=moved(compared.lost_queries, one),
        )
        for one in layout.joined
        if (compared := found.get(one.dataset)) is not None
    }


def _said(compared: Comparison, old: Side, gallery: str | None) -> str:
    """Return the decision, the rule and the numbers in words."""
    r1 = compared.metrics[0]
    decision = "Promoted: no worse" if compared.no_worse else "Not promoted: worse"
    text = (
        f"{decision} than model {old.model}. R@1 {r1.old:.1%} → {r1.new:.1%}, a difference of {r1.difference:+.1%} "
        f"with a standard error of {r1.standard_error:.1%} over {compared.queries:,} queries; down to "
        f"{-compared.tolerance:+.1%} ({compared.z:g} standard errors) counts as no worse. "
        f"{compared.won:,} queries won, {compared.lost:,} lost."
    )
    if gallery is not None and old.gallery is not None and gallery != old.gallery:
        text += f" Model {old.model} was promoted on another test gallery; here both are measured on the new one."
    return text
