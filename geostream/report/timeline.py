"""Draw a run's time line: what the trainer did when, what ran beside it, and what it waited for."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from geostream.report.curves import BLUE, GREEN, GREY, ORANGE, Rows, svg_of

COLOURS = {
    "train": BLUE,
    "evaluate": GREEN,
    "wait": "#c0392b",
    "embed": ORANGE,
    "mine": "#8e6bb0",
    "plan": GREY,
    "recluster": "#b8a13a",
}
TRAINER, BESIDE = 1, 0  # rows of the picture, from below


def timeline_svg(records: Rows) -> str:
    """Draw the stages of a run as bars in two rows, the trainer's and those beside it.

    Args:
        records: ``stage``, ``epoch``, ``started`` (seconds since 1970), ``seconds`` and ``beside`` of each stage.

    Returns:
        An ``<svg>`` element; "" where no record says when it started.
    """
    known = [record for record in records if record.get("started") is not None and record["stage"] in COLOURS]
    if not known:
        return ""
    figure = Figure(figsize=(13, 1.9), layout="constrained")
    axes = figure.subplots()
    began = min(record["started"] for record in known)
    for record in known:
        row = BESIDE if record.get("beside") else TRAINER
        at = (record["started"] - began) / 60
        axes.broken_barh([(at, record["seconds"] / 60)], (row - 0.35, 0.7), color=COLOURS[record["stage"]], linewidth=0)
        if record["stage"] == "train":
            middle = at + record["seconds"] / 120
            axes.text(middle, row, record["epoch"], ha="center", va="center", color="white", fontsize=8)
    axes.set(xlabel="minutes", yticks=[BESIDE, TRAINER], yticklabels=["beside it", "trainer"], ylim=(-0.5, 1.5))
    shown = [stage for stage in COLOURS if any(record["stage"] == stage for record in known)]
    axes.legend(
        handles=[Patch(color=COLOURS[stage], label=stage) for stage in shown],
        ncols=len(shown),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
        fontsize=8,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    return svg_of(figure)
