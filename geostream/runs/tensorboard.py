"""The run's curves in TensorBoard's format, made from its log.

Decides that the log is the truth and the curves are only another way to read it: the one event file is written whole,
under the same name, when the log has grown. So nothing is in it twice after a resume, and a writer that is killed
leaves the file before. Steps go over the whole run; what is known once an epoch has the epoch for its step. Times are
the seconds that the run took until then, without the breaks between sessions. It costs 0.1 ms a point, and a second for
the import, which waits until there is something to write.

Open it with ``tensorboard --logdir <run>``. To see a run grow, add ``--load_fast=false``: TensorBoard's faster reader
keeps the file that it began with.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from geostream.evaluation.metrics import named_rows
from geostream.store import Store

EVENTS = "tensorboard/events.out.tfevents.0.geostream"

# Tags of what a record tells once an epoch, by stage and name in the record.
ONCE = {
    "train": {
        "loss": "epoch/loss",
        "temperature": "epoch/temperature",
        "pairs_per_second": "reading/pairs per second",
        "wait_share": "reading/share of time waiting",
    },
    "plan": {
        "hardness_score": "plan/hardness score",
        "overlap": "plan/overlap",
        "resident_share": "plan/resident share",
    },
}
BY_STEP = ("loss", "learning rate", "gradient scale")  # what follows the step in a record's curve; the last in fp16
MEASURES = ("r1", "r5", "r10", "r1pct", "hit_rate", "ap")


class Point(NamedTuple):
    """One value of a curve."""

    step: int
    seconds: float  # of the run until then
    value: float


def write_events(run: Store, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the curves of the log's ``records`` into the run's folder; nothing where there are none yet."""
    found = curves(records)
    if found:
        run.write(EVENTS, event_file(found))


def curves(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The points of each tag by step, one a step, the last told of it; values that are no numbers are left out."""
    found: dict[str, dict[int, Point]] = {}
    elapsed = 0.0

    def add(tag: str, step: int, seconds: float, value: Any) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(tag, {})[int(step)] = Point(int(step), seconds, float(value))

    for record in records:
        stage, epoch, began = record["stage"], int(record["epoch"]), elapsed
        if stage == "progress":  # what it tells of will be in the epoch's train record again
            continue
        elapsed = ended = began + float(record["seconds"])
        for name, tag in ONCE.get(stage, {}).items():
            add(tag, epoch, ended, record.get(name))
        steps = record.get("curve") or []
        for number, (step, *values) in enumerate(steps, 1):
            seconds = began + (ended - began) * number / len(steps)
            for name, value in zip(BY_STEP, values, strict=False):
                add(f"step/{name}", step, seconds, value)
        if stage == "train" and (stream := record.get("stream")):
            used = stream["bytes_used"]
            add("reading/bytes read per byte used", epoch, ended, stream["bytes_fetched"] / used if used else None)
        if stage == "evaluate":
            for row in named_rows(record):
                for name in MEASURES:
                    add(f"test {row['protocol']} {row['direction']}/{name}", epoch, ended, row.get(name))
    return {tag: [points[step] for step in sorted(points)] for tag, points in sorted(found.items())}


def event_file(found: Mapping[str, Iterable[Point]]) -> bytes:
    """The curves as a file of TensorBoard's events; the same curves always give the same bytes."""
    from tensorboard.compat.proto.event_pb2 import Event  # takes a second, and most commands never come here
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
    # In the order of time, so that a log that grows makes a file that grows.
    in_time = sorted((point.seconds, tag, point) for tag, points in found.items() for point in points)
    for seconds, tag, point in in_time:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=point.value)])
        writer.write(Event(wall_time=seconds, step=point.step, summary=summary).SerializeToString())
    return buffer.getvalue()
