"""Map the records of a run's log to metrics: which field of which record is which metric.

A new metric is one row here, and one in the table of docs/operations.md. Names follow OpenTelemetry's conventions;
Prometheus shows ``geostream.loader.io`` in bytes, which counts, as ``geostream_loader_io_bytes_total``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from geostream.evaluation.metrics import named_rows, row_name
from geostream.runs.log import STAGES


class Metric(NamedTuple):
    """Describe a metric.

    Attributes:
        name: Its name.
        unit: Its unit by UCUM. What stands in braces says what is counted, or that a number has no unit; names in
            Prometheus leave it out.
        description: What it tells, in words.
        counts: Whether it only grows. The records hold its value since the epoch began, and it adds up over epochs.
    """

    name: str
    unit: str
    description: str
    counts: bool = False


class Reading(NamedTuple):
    """A value of a metric, and the attributes that tell it from the metric's other values."""

    metric: Metric
    value: float
    attributes: dict[str, str]


DURATION = Metric("geostream.stage.duration", "s", "Time that a stage took", counts=True)
RETRIES = Metric("geostream.loader.retries", "{read}", "Reads that were repeated, by reason", counts=True)

# By stage and by field of its record, of which "stream.…" are the loader's.
FIELDS = {
    "train": {
        "epoch": Metric("geostream.train.epoch", "{epoch}", "Epoch that is trained"),
        "step": Metric("geostream.train.step", "{step}", "Optimizer steps of the run so far"),
        "pairs": Metric("geostream.train.pairs", "{pair}", "Pairs trained on", counts=True),
        "pairs_per_second": Metric("geostream.train.throughput", "{pair}/s", "Pairs per second, over the epoch"),
        "loss": Metric("geostream.train.loss", "", "Mean loss, over the epoch"),
        "wait_share": Metric("geostream.train.waiting", "{share}", "Share of the epoch spent waiting for batches"),
        "stream.bytes_fetched": Metric("geostream.loader.io", "By", "Bytes read from the store", counts=True),
        "stream.bytes_used": Metric("geostream.loader.used", "By", "Bytes of them that batches need", counts=True),
        "stream.requests": Metric("geostream.loader.reads", "{read}", "Reads from the store", counts=True),
        "stream.stall_seconds": Metric("geostream.loader.stall", "s", "Time waited for batches", counts=True),
        "stream.replaced_pairs": Metric("geostream.loader.replaced", "{pair}", "Damaged pairs replaced", counts=True),
        "stream.resident_bytes": Metric("geostream.loader.held", "By", "Bytes of images held in memory"),
        "stream.peak_resident_bytes": Metric("geostream.loader.held_peak", "By", "Most of them in the epoch"),
    },
    "plan": {
        "hardness_score": Metric("geostream.plan.hardness", "", "Hardness: 0 random batches, 1 Sample4Geo's"),
        "overlap": Metric("geostream.plan.overlap", "{share}", "Share of a batch that shared one in the epoch before"),
        "resident_share": Metric("geostream.plan.resident", "{share}", "Share of the data held in memory at once"),
        "amplification": Metric("geostream.plan.amplification", "{ratio}", "Bytes to read for each that is used"),
    },
    "compare": {
        "promotes": Metric(
            "geostream.compare.promoted", "", "1: the checkpoint was no worse than the model; 0: it was"
        ),
        "r1": Metric("geostream.compare.r1", "{share}", "R@1 of the checkpoint"),
        "r1_before": Metric("geostream.compare.r1_before", "{share}", "R@1 of the model that was current"),
    },
    "shard": {
        "places": Metric("geostream.shard.places", "{place}", "Places of the layout, each with an image of its tile"),
        "views": Metric("geostream.shard.views", "{image}", "Images of views of the layout"),
        "broken": Metric("geostream.shard.broken", "{image}", "Images left out, because they are broken or missing"),
        "bytes_read": Metric("geostream.shard.read", "By", "Bytes of raw files read"),
        "bytes_written": Metric("geostream.shard.written", "By", "Bytes of shards written"),
    },
}

# Of each row of an evaluation, by name.
RECALLS = {
    "r1": Metric("geostream.evaluate.r1", "{share}", "R@1"),
    "r5": Metric("geostream.evaluate.r5", "{share}", "R@5"),
    "r10": Metric("geostream.evaluate.r10", "{share}", "R@10"),
    "r1pct": Metric("geostream.evaluate.r1pct", "{share}", "R@1 %"),
    "hit_rate": Metric("geostream.evaluate.hit_rate", "{share}", "VIGOR's hit rate"),
    "ap": Metric("geostream.evaluate.ap", "{share}", "Average precision"),
}

METRICS = (DURATION, RETRIES, *RECALLS.values(), *(metric for of in FIELDS.values() for metric in of.values()))


def readings(record: Mapping[str, Any]) -> Iterator[Reading]:
    """Return the metrics that a record holds; values that are no finite numbers are left out.

    Args:
        record: A record of a run's log; ``progress`` is a train record of an epoch that goes on.
    """
    stage = "train" if record["stage"] == "progress" else record["stage"]
    if stage in STAGES and record.get("seconds") is not None:
        beside = str(bool(record.get("beside", False))).lower()
        yield Reading(DURATION, record["seconds"], {"stage": stage, "beside": beside})
    for path, metric in FIELDS.get(stage, {}).items():
        value: Any = record
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            yield Reading(metric, float(value), {})
    for reason, times in (record.get("stream") or {}).get("retries", {}).items():
        yield Reading(RETRIES, times, {"reason": reason})
    for row in named_rows(record) if stage == "evaluate" else ():
        for name, metric in RECALLS.items():
            if row.get(name) is not None:
                yield Reading(metric, row[name], {"protocol": row_name(row), "direction": row["direction"]})
