"""The report of a run: one HTML file with its curves, its tables and what the model retrieves.

Decides what a person sees first: the recall on unseen places, then how loss, recall and the hardness of the batches
went over the epochs, then test queries beside their five best tiles, the right one framed. The file holds its
pictures itself, so that it can be sent around; a dozen queries cost well under a megabyte.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a report is written on machines without a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geostream.layout import Layout
from geostream.mining.embeddings import open_embeddings
from geostream.retrievals import Retrieval, retrieval_section, retrievals
from geostream.store import Store
from geostream.training.metrics import RunResult
from geostream.training.stages import split_embeddings

BLUE, ORANGE, GREEN, GREY = "#2563a6", "#c8651b", "#2f8f5b", "#777777"


def summarise(store: str, layout: Layout, result: RunResult) -> dict[str, Any]:
    """A finished run in numbers: what was trained on, how it went, what was read and where the time went."""
    facts = ("pairs", "batches", "left_out", "hardness_score", "overlap", "resident_share")
    recalls = ("epoch", "r1", "r5", "r10", "r1pct", "hit_rate", "gallery")
    return {
        "store": store,
        "run": result.url,
        "dataset": {
            "name": layout.dataset,
            "layout": layout.name,
            "layout_id": layout.id,
            "places": layout.n_places,
            "pairs": len(layout.pairs("train").place),
            "test_pairs": len(layout.pairs("test").place),
            "bytes": int(layout.shard_sizes.sum()),
            "shards": len(layout.shard_names),
            "broken": len(layout.info["broken"]),
        },
        "evaluations": [{name: row[name] for name in recalls} for row in result.evaluations],
        "plans": [{name: row.get(name) for name in ("epoch", "source", *facts)} for row in result.plans],
        "reclusterings": list(result.reclusterings),
        "stream": dict(result.stream),
        "seconds": dict(result.seconds),
    }


def publish(run: Store, layout: Layout, result: RunResult, summary: Mapping[str, Any]) -> str:
    """Write ``report.html`` into the run, with what the last evaluated weights retrieve; returns it."""
    pictures: list[Retrieval] = []
    if result.evaluations:
        name = split_embeddings("test", int(result.evaluations[-1]["epoch"]))
        pictures = retrievals(layout, open_embeddings(run, name, layout))
    page = render_report(f"geostream: {layout.dataset} {layout.name}", summary, result.training, pictures)
    run.write("report.html", page.encode())
    return page


def render_report(
    title: str, summary: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]], pictures: Sequence[Retrieval]
) -> str:
    """The report as HTML. ``summary``: of :func:`summarise`; ``epochs``: the run's training records."""
    evaluations, plans, moves = summary["evaluations"], summary["plans"], summary["reclusterings"]
    last = evaluations[-1] if evaluations else None
    head = (
        f"<p class=lead>R@1 <b>{last['r1']:.1%}</b> on a gallery of {last['gallery']:,} tiles of unseen places "
        f"(chance {1 / last['gallery']:.2%}), hit rate {last['hit_rate']:.1%}, after {last['epoch']} epochs.</p>"
        if last
        else "<p class=lead>Not evaluated yet.</p>"
    )
    dataset = summary["dataset"]
    sections = [
        f"<h1>{html.escape(title)}</h1>{head}",
        f"<p>{dataset['places']:,} places, {dataset['pairs']:,} pairs, {dataset['bytes'] / 1e6:,.1f} MB in "
        f"{dataset['shards']} shards at <code>{html.escape(str(summary['store']))}</code>.</p>",
        "<h2>Training</h2>" + _svg(_curves(epochs, evaluations, plans, moves)),
        "<h2>Recall on the test gallery</h2>" + _table(evaluations, ["r1", "r5", "r10", "r1pct", "hit_rate"]),
        "<h2>Epoch plans</h2><p>Hardness score: 0 = random batches, 1 = Sample4Geo's assembly with random access to "
        "everything, on the same graph. Overlap: the largest share of a batch that came from one batch of the epoch "
        "before. Resident share: the most bytes held at once, of all.</p>" + _table(plans, ["resident_share"]),
        "<h2>Generations of the layout</h2><p>In geographic order look-alikes lie far apart, so that few of them are "
        "resident together, and a plan from a visual graph scores low. Then the shards are rewritten in the order of "
        "similarity, and training goes on from these.</p>" + _table(moves, []),
    ]
    if pictures:
        sections.append(retrieval_section(pictures))
    seconds = [{"stage": stage, "seconds": round(value, 1)} for stage, value in summary["seconds"].items()]
    sections.append("<h2>Where the time went</h2>" + _table(seconds, []))
    sections.append(_reading(summary["stream"], epochs))
    return _PAGE.format(title=html.escape(title), body="\n".join(sections))


def _reading(stream: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> str:
    """What streaming cost, by epoch, and which pairs were replaced."""
    rows = [
        {
            "epoch": row["epoch"],
            "pairs/s": round(row["pairs_per_second"]),
            "waiting": row["wait_share"],
            "MB read": row["stream"]["bytes_fetched"] / 1e6,
            "read / used": row["stream"]["bytes_fetched"] / max(row["stream"]["bytes_used"], 1),
            "requests": row["stream"]["requests"],
            "MB a request": row["stream"]["merged_read_bytes"] / 1e6,
            "most MB held": row["stream"]["peak_resident_bytes"] / 1e6,
            "retries": sum(row["stream"]["retries"].values()),
            "replaced": row["stream"]["replaced_pairs"],
        }
        for row in epochs
    ]
    parts = [
        "<h2>What was read</h2><p>Waiting: the share of the time that training stood still for want of a batch. Read / "
        "used: bytes fetched over bytes of the images in the batches.</p>" + _table(rows, ["waiting"])
    ]
    if stream["retries"]:
        reasons = ", ".join(f"{html.escape(reason)} {count:,}" for reason, count in stream["retries"].items())
        parts.append(f"<p>Reads repeated, by reason: {reasons}.</p>")
    if stream["replaced"]:
        parts.append("<p>Pairs with a damaged image, and those that were trained in their place:</p>")
        parts.append(_table(stream["replaced"], []))
    return "".join(parts)


def _curves(
    epochs: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    plans: Sequence[Mapping[str, Any]],
    moves: Sequence[Mapping[str, Any]],
) -> Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
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


def _plan_curves(axes: Axes, plans: Sequence[Mapping[str, Any]], moves: Sequence[Mapping[str, Any]]) -> None:
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


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _table(rows: Sequence[Mapping[str, Any]], percent: Sequence[str]) -> str:
    if not rows:
        return "<p>None.</p>"
    names = list(rows[0])
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(n), n in percent)}</td>" for n in names) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object, percent: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1%}" if percent else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.2rem }} .lead {{ font-size: 1.25rem }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #eee }}
td:first-child, th:first-child {{ text-align: left }}
.row {{ display: flex; gap: 10px; align-items: flex-start; margin-bottom: 14px }}
figure {{ margin: 0; text-align: center }} figcaption {{ font-size: 12px; color: #666 }}
figure img {{ height: 96px; border: 4px solid transparent; image-rendering: auto }}
figure.query {{ width: 410px }} figure.query img {{ max-width: 400px; width: auto }}
figure.truth img, span.truth {{ border-color: #2f8f5b }} figure.semi img {{ border-color: #d69a1e }}
span.truth {{ color: #2f8f5b }} span.semi {{ color: #b07a10 }}
</style></head><body>
{body}
</body></html>
"""
