"""Write a run's curves in TensorBoard's format, from its log.

The whole event file is rewritten under the same name whenever the log has grown. So it holds nothing twice after a
resume, and a kill while writing leaves the earlier file. Steps count over the whole run; values known once an epoch
have the epoch as their step. Times are the seconds that the run took until then, without the breaks between sessions.
Writing costs about 0.1 ms a point, and one second for the import of TensorBoard at the first write.

Open it with ``tensorboard --logdir <run>``. To watch a run grow, add ``--load_fast=false``, because TensorBoard's
faster reader does not notice that the file was replaced.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from geostream.evaluation.metrics import named_rows, row_name
from geostream.store import Store

EVENTS = "tensorboard/events.out.tfevents.0.geostream"

# TensorBoard tags of the values known once an epoch, by stage and by name in the record.
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
BY_STEP = ("loss", "learning rate", "gradient scale")  # values after the step in a record's curve; the last: fp16 only
MEASURES = ("r1", "r5", "r10", "r1pct", "hit_rate", "ap")


class Point(NamedTuple):
    """One value of a curve.

    Attributes:
        step: The optimizer step, or the epoch.
        seconds: Training time of the run until then.
        value: The value.
    """

    step: int
    seconds: float
    value: float


def write_events(run: Store, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the event file into the run's folder, unless the log has no values for it yet.

    Args:
        run: The run's folder.
        records: The records of the run's log.
    """
    found = curves(records)
    if found:
        run.write(EVENTS, event_file(found))


def curves(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Collect the points of each curve from the log's records.

    Args:
        records: The records of the run's log, in the order in which they were written.

    Returns:
        For each tag its points, sorted by step, one a step (the newest). Values that are not finite numbers are left
        out.
    """
    found: dict[str, dict[int, Point]] = {}
    elapsed = 0.0

    def add(tag: str, step: int, seconds: float, value: Any) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(tag, {})[int(step)] = Point(int(step), seconds, float(value))

    for record in records:
        stage, epoch, began = record["stage"], int(record["epoch"]), elapsed
        if stage == "progress":  # the epoch's train record will hold the same values
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
                    add(f"test {row_name(row)} {row['direction']}/{name}", epoch, ended, row.get(name))
            for one in record.get("datasets", [record]):
                where = f"{one['dataset']} on the ground" if "dataset" in one else "on the ground"
                for name, value in (one.get("metres") or {}).items():
                    add(f"test {where}/{name}", epoch, ended, value)
    return {tag: [points[step] for step in sorted(points)] for tag, points in sorted(found.items())}


def event_file(found: Mapping[str, Iterable[Point]]) -> bytes:
    """Return the curves as a TensorBoard event file; the same curves always give the same bytes.

    Args:
        found: The points of each tag, as :func:`curves` returns them.
    """
    from tensorboard.compat.proto.event_pb2 import Event  # takes a second, and most commands do not need it
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
    # Sorted by time, so that a longer log only appends to the file.
    in_time = sorted((point.seconds, tag, point) for tag, points in found.items() for point in points)
    for seconds, tag, point in in_time:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=point.value)])
        writer.write(Event(wall_time=seconds, step=point.step, summary=summary).SerializeToString())
    return buffer.getvalue()
