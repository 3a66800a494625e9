"""Compare two models by the same queries in the same gallery, and decide whether the new one is no worse.

Both models answer the same queries, so they are compared query by query. That is far sharper than to compare two
recalls, because most queries are found by both or by neither and say nothing about which one is better.

**Standard error.** Let d be a query's contribution under the new model minus that under the old one: -1, 0 or 1 for a
recall. The difference of the metrics is the mean of the n values d, and its standard error follows from their variance.
With few queries, or few that changed, that variance is too small, and 0 where no query changed. So two queries are
added to the sum, of which one did not change, and one is half won and half lost:

    standard error = sqrt(sum(d²) + 1 - sum(d)² / (n + 2)) / (n + 2)

For a recall this is the interval of Agresti and Min (Simple improved confidence intervals for comparing matched
proportions, Statistics in Medicine 24, 2005): Wald's, after 1/2 is added to each of the four counts (found by both,
by one, by the other, by neither). It is never below 1 / (n + 2). Queries are taken as independent. Many views of one
place are not quite, and then the true error is larger.

**Rule.** The new model is no worse if its R@1 is at least that of the old one minus ``z`` standard errors. This is a
one-sided test for being worse. With z = 1, of models that are exactly as good 84 % pass, and of models that are worse
by two standard errors 16 %. A larger z, such as the usual 1.645, would pass 95 % and 36 %. Refusing an equal model
costs one retraining, and the next one gets another chance. A worse model that passes becomes what the next one is
compared with. So the smaller z is the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from geostream.arrays import Bools, Float64, Int64, pair_codes
from geostream.errors import BadInput
from geostream.evaluation.evaluate import Ranked
from geostream.evaluation.metrics import by_query, first_ranks
from geostream.evaluation.protocols import Search
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings

PROMOTE_Z = 1.0  # standard errors that a new model's R@1 may lie below that of the old one
SHOWN = 20  # most queries that are named, of those won and of those lost


@dataclass(frozen=True)
class Difference:
    """Hold one metric of both models.

    Attributes:
        protocol: Name of the protocol.
        direction: "view→tile" or "tile→view".
        metric: Its name, such as "r1".
        old: Value of the old model, 0 to 1.
        new: Value of the new model.
        difference: ``new`` minus ``old``.
        standard_error: Of the difference.
    """

    protocol: str
    direction: str
    metric: str
    old: float
    new: float
    difference: float
    standard_error: float


@dataclass(frozen=True)
class Moved:
    """Hold a query that only one of the models finds at rank 1.

    Attributes:
        key: Key of its place.
        place: Id of its place.
        view: Number of the view within its place.
        before: Rank of its best positive under the old model, from 1.
        after: The same under the new model.
    """

    key: str
    place: int
    view: int
    before: int
    after: int


@dataclass(frozen=True)
class Comparison:
    """Hold how a new model does beside an old one.

    Attributes:
        queries: Number of queries of the headline protocol.
        gallery: Number of candidates.
        metrics: All metrics of all protocols. The first is the one that decides: R@1 of the headline protocol.
        z: Standard errors that the new model may be worse by.
        tolerance: The same in terms of R@1.
        no_worse: Whether the new model is no worse than this tolerance.
        won: Number of queries that the new model alone finds at rank 1.
        lost: Number of queries that the old model alone finds at rank 1.
        won_queries: Those of them that had ranked worst, at most SHOWN.
        lost_queries: Those of them that rank worst now, at most SHOWN.
    """

    queries: int
    gallery: int
    metrics: list[Difference]
    z: float
    tolerance: float
    no_worse: bool
    won: int
    lost: int
    won_queries: list[Moved]
    lost_queries: list[Moved]


def paired_difference(new: Bools | Float64, old: Bools | Float64) -> tuple[float, float]:
    """Return the mean difference of two models over the same queries, and its standard error.

    Args:
        new: (n,) what each query contributes to a metric under the new model, 0 to 1.
        old: (n,) the same under the old model.
    """
    d = new.astype(np.float64) - old.astype(np.float64)
    n = len(d) + 2
    variance = (np.square(d).sum() + 1 - d.sum() ** 2 / n) / n
    return float(d.mean()), float(np.sqrt(variance / n))


def changed_queries(before: Int64, after: Int64) -> tuple[Int64, Int64]:
    """Return which queries were won, those that had ranked worst first, and which were lost, those that rank worst now.

    Args:
        before: (n,) wrong candidates above the best positive under the old model.
        after: (n,) the same under the new model.
    """
    won, lost = np.flatnonzero((after == 0) & (before > 0)), np.flatnonzero((before == 0) & (after > 0))
    return won[np.argsort(-before[won], kind="stable")], lost[np.argsort(-after[lost], kind="stable")]


def check_z(z: float) -> None:
    """Raise BadInput unless ``z`` is a number of standard errors, 0 or more."""
    if not z >= 0:
        raise BadInput(f"promote_z {z}: a number of standard errors, 0 or more")


def compare_ranks(new: Sequence[Ranked], old: Sequence[Ranked]) -> list[Difference]:
    """Compare two models by every metric of every protocol.

    Args:
        new: Ranks of the new model, the headline protocol first.
        old: Ranks of the old model, of the same queries in the same gallery.

    Raises:
        BadInput: Queries, positives or galleries are not the same.
    """
    if len(new) != len(old) or not all(_is_same(a, b) for a, b in zip(new, old, strict=True)):
        raise BadInput("models can only be compared by the same queries in the same gallery; these are others")
    found = []
    for (protocol, search, ranks), before in zip(new, old, strict=True):
        values, were = by_query(protocol, search, ranks), by_query(*before)
        for metric in values:
            difference, error = paired_difference(values[metric], were[metric])
            means = float(were[metric].mean()), float(values[metric].mean())
            found.append(Difference(protocol, search.direction, metric, *means, difference, error))
    return found


def _is_same(one: Ranked, other: Ranked) -> bool:
    a, b = one.search, other.search
    named = (one.protocol, a.direction, a.gallery) == (other.protocol, b.direction, b.gallery)
    return named and all(np.array_equal(x, y) for x, y in zip(_arrays(a), _arrays(b), strict=True))


def _arrays(search: Search) -> list[npt.NDArray[Any]]:
    (first, positives), (first_ignored, ignored) = search.positives, search.ignored
    return [search.queries, first, positives, first_ignored, ignored]


def check_same_gallery(new: Embeddings, old: Embeddings) -> None:
    """Check that both models have embedded the same images.

    Raises:
        BadInput: They have not.
    """
    if not (
        (new.places_id, new.split) == (old.places_id, old.split)
        and np.array_equal(pair_codes(*new.pairs), pair_codes(*old.pairs))
        and np.array_equal(new.reference_place, old.reference_place)
    ):
        raise BadInput(
            f"{new.run.url}/{new.name} and {old.run.url}/{old.name} are of different galleries; embed both models on "
            "the same layout"
        )


def compare(layout: Layout, new: Sequence[Ranked], old: Sequence[Ranked], pairs: Embeddings, z: float) -> Comparison:
    """Compare two models, and decide whether the new one is no worse.

    Args:
        layout: The layout whose queries were ranked.
        new: Ranks of the new model, the headline protocol first.
        old: Ranks of the old model, of the same queries in the same gallery.
        pairs: Embeddings of one of them, which say which view each query is.
        z: Standard errors that the new model may be worse by.

    Raises:
        BadInput: Queries, positives or galleries are not the same.
    """
    metrics = compare_ranks(new, old)
    search, r1 = new[0].search, metrics[0]
    before, after = first_ranks(search, old[0].ranks), first_ranks(search, new[0].ranks)
    won, lost = changed_queries(before, after)

    def named(rows: Int64) -> list[Moved]:
        return [_moved(layout, search, pairs, int(row), int(before[row]), int(after[row])) for row in rows[:SHOWN]]

    return Comparison(
        queries=len(search.queries),
        gallery=search.gallery,
        metrics=metrics,
        z=z,
        tolerance=z * r1.standard_error,
        no_worse=r1.difference >= -z * r1.standard_error,
        won=len(won),
        lost=len(lost),
        won_queries=named(won),
        lost_queries=named(lost),
    )


def joint_comparison(found: Mapping[str, Comparison], z: float) -> Comparison:
    """Join the comparisons on several data sets to one, which is decided by the mean of their R@1.

    The standard error of a mean of independent differences follows from theirs.

    Args:
        found: The comparison on each data set, by its name.
        z: Standard errors that the new model may be worse by.

    Returns:
        The comparison. Its first metric is the mean R@1; then come those of each data set, with its name in front of
        the protocol's. The queries that moved are of all data sets.
    """
    heads = [one.metrics[0] for one in found.values()]
    old, new, difference = (
        float(np.mean([getattr(head, name) for head in heads])) for name in ("old", "new", "difference")
    )
    error = float(np.sqrt(sum(head.standard_error**2 for head in heads))) / len(heads)
    mean = replace(heads[0], protocol="mean", old=old, new=new, difference=difference, standard_error=error)
    each = [
        replace(one, protocol=f"{name} {one.protocol}") for name, compared in found.items() for one in compared.metrics
    ]
    won = sorted((one for compared in found.values() for one in compared.won_queries), key=lambda one: -one.before)
    lost = sorted((one for compared in found.values() for one in compared.lost_queries), key=lambda one: -one.after)
    return Comparison(
        queries=sum(one.queries for one in found.values()),
        gallery=sum(one.gallery for one in found.values()),
        metrics=[mean, *each],
        z=z,
        tolerance=z * error,
        no_worse=difference >= -z * error,
        won=sum(one.won for one in found.values()),
        lost=sum(one.lost for one in found.values()),
        won_queries=won[:SHOWN],
        lost_queries=lost[:SHOWN],
    )


def _moved(layout: Layout, search: Search, embeddings: Embeddings, row: int, before: int, after: int) -> Moved:
    at = int(search.queries[row])
    place, view = int(embeddings.pairs.place[at]), int(embeddings.pairs.view[at])
    # A positive that is not finite has more candidates above it than there are.
    return Moved(layout.key(place), place, view, *(min(wrong + 1, search.gallery) for wrong in (before, after)))
