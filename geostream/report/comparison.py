"""Prepare the report's section on how a run's checkpoint compares with the model that was current.

The metrics come as a table, percent with one decimal. Of the queries won and lost the worst are shown, each with its
true tile; these pictures cost two reads a query from the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geostream.layout import Layout
from geostream.layout.members import read_image
from geostream.report.evaluation_page import COLUMNS
from geostream.report.retrievals import thumbnail

PICTURES = 6  # most queries shown, of those won and of those lost


@dataclass(frozen=True)
class MovedQuery:
    """Hold a query that was won or lost.

    Attributes:
        key: Key of its place.
        view: Number of the view within its place.
        before: Rank of the best true tile under the old model, from 1.
        after: The same under the new model.
        query: Picture of the query, JPEG; None where it cannot be read.
        tile: Picture of its place's tile, JPEG; None where it cannot be read.
    """

    key: str
    view: int
    before: int
    after: int
    query: bytes | None
    tile: bytes | None


def comparison_section(layout: Layout | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the section shows.

    Args:
        layout: Layout of the run, for the pictures; None: without pictures.
        record: ``comparison.json`` of the run.

    Returns:
        ``rule`` in words, ``rows`` of metrics, and the queries ``won`` and ``lost`` with ``won_count`` and
        ``lost_count``.
    """
    compared, old = record["comparison"], record["old"]
    if compared is None or old is None:
        return {"rule": record["rule"], "rows": [], "won": [], "lost": [], "won_count": 0, "lost_count": 0}
    if layout is not None and layout.places_id != record["layout"]["places"]:
        layout = None  # place ids mean others
    before, after = f"model {old['model']}", record["new"]["run"]
    rows = [
        {
            "protocol": row["protocol"],
            "direction": row["direction"],
            "metric": COLUMNS[row["metric"]],
            before: f"{row['old']:.1%}",
            after: f"{row['new']:.1%}",
            "difference": f"{row['difference']:+.1%}",
            "± standard error": f"{row['standard_error']:.1%}",
        }
        for row in compared["metrics"]
    ]
    return {
        "rule": record["rule"],
        "rows": rows,
        "won": _moved(layout, compared["won_queries"]),
        "lost": _moved(layout, compared["lost_queries"]),
        "won_count": compared["won"],
        "lost_count": compared["lost"],
    }


def _moved(layout: Layout | None, queries: Sequence[Mapping[str, Any]]) -> list[MovedQuery]:
    return [
        MovedQuery(
            key=one["key"],
            view=one["view"],
            before=one["before"],
            after=one["after"],
            query=_picture(layout, one["place"], one["view"]),
            tile=_picture(layout, one["place"], None),
        )
        for one in queries[:PICTURES]
    ]


def _picture(layout: Layout | None, place: int, view: int | None) -> bytes | None:
    try:
        return None if layout is None else thumbnail(read_image(layout, place, view))
    except (OSError, SyntaxError, ValueError):  # raised by Pillow for damaged images
        return None
