"""Draw the report's curves as one SVG: loss, recall and hardness of the batches, over the epochs.

The loss of single steps, where the run log has it, lies thin behind the mean of each epoch.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2563a6", "#c8651b", "#2f8f5b", "#777777"

Rows = Sequence[Mapping[str, Any]]


def curves_svg(epochs: Rows, evaluations: Rows, plans: Rows, moves: Rows) -> str:
    """Draw loss, recall and hardness side by side.

    Args:
        epochs: Records of training: ``epoch``, ``loss``, and where known ``step`` and ``curve``.
        evaluations: Records of evaluation: ``epoch``, ``r1``, ``r5``, ``hit_rate``.
        plans: Records of planning: ``epoch``, ``source``, and where known ``hardness_score`` and ``overlap``.
        moves: Records of reclustering: ``epoch``, ``score_before``.

    Returns:
        An ``<svg>`` element. Lists may be empty; their curves are then missing.
    """
    return svg_of(_curves(epochs, evaluations, plans, moves))


def loss_by_step(epochs: Rows) -> tuple[list[float], list[float]]:
    """Return the position on the epoch axis, and the loss, of every logged step.

    Args:
        epochs: Records of training in order. ``curve`` lists ``[step, loss, …]``; ``step`` is the last step of the
            epoch. Steps are counted from the begin of the run.

    Returns:
        Two lists of equal length. Epoch n covers n − 0.5 to n + 0.5, so that its mean lies in the middle.
    """
    where, losses, begun = [], [], 0
    for record in epochs:
        points = record.get("curve") or []
        ended = int(record.get("step") or max((step for step, *_ in points), default=begun))
        for step, loss, *_ in points:
            where.append(record["epoch"] - 0.5 + (step - begun) / max(ended - begun, 1))
            losses.append(loss)
        begun = ended
    return where, losses


def _curves(epochs: Rows, evaluations: Rows, plans: Rows, moves: Rows) -> Figure:
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(*loss_by_step(epochs), color=BLUE, linewidth=0.6, alpha=0.5)
    left.plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs], color=BLUE, marker="o", markersize=3)
    left.set(title="training loss", xlabel="epoch", ylim=(0, None))
    for name, label, colour in (("r1", "R@1", BLUE), ("r5", "R@5", GREEN), ("hit_rate", "hit rate", ORANGE)):
        middle.plot(
            [e["epoch"] for e in evaluations], [e[name] for e in evaluations], color=colour, marker="o", label=label
        )
    middle.set(title="recall on unseen places", xlabel="epoch", ylim=(0, 1))
    if evaluations:
        middle.legend(frameon=False)
    _plan_curves(right, plans, moves)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _plan_curves(axes: Axes, plans: Rows, moves: Rows) -> None:
    for name, label, colour in (("hardness_score", "hardness score", BLUE), ("overlap", "overlap", GREY)):
        known = [p for p in plans if p.get(name) is not None]
        axes.plot([p["epoch"] for p in known], [p[name] for p in known], color=colour, marker="o", ms=3, label=label)
    before = [(move["epoch"], move["score_before"]) for move in moves if move["score_before"] is not None]
    if before:
        axes.plot(*zip(*before, strict=True), "o", mfc="none", color=BLUE, label="before reclustering")
    first_visual = next((p["epoch"] for p in plans if p["source"] == "visual"), None)
    if first_visual is not None:
        axes.axvline(first_visual - 0.5, color=ORANGE, linestyle=":", label="visual negatives from here")
    axes.axhline(1, color=GREY, linewidth=0.6)
    axes.set(title="hardness of the batches", xlabel="epoch", ylim=(min(0.0, axes.get_ylim()[0]), None))
    if plans:
        axes.legend(frameon=False, fontsize=8)


def svg_of(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
