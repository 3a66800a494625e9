"""Keep a run's log: one JSON line for each stage of each epoch, on the store, and the result made of them.

A record is written after what it describes. So a stage with a record is done, and a run that was cut off
goes on behind the last one. Object stores cannot append: the whole log (a few hundred bytes a record) is written anew
each time, which is milliseconds even after hundreds of epochs. A stage that is done again replaces its record. While an
epoch is trained, its ``progress`` record, brought up to date with each checkpoint, tells how it goes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from geostream.errors import NotFound, StoreError
from geostream.store import Store
from geostream.streaming.stats import StreamStats

STAGES = ("plan", "train", "embed", "mine", "recluster", "evaluate")

Record = dict[str, Any]  # "stage", "epoch", "seconds" and what else the stage measured


class RunLog:
    """The records of a run, in the order in which they were written."""

    def __init__(self, folder: Store, file: str) -> None:
        """Read what is there. Raises StoreError where it is damaged."""
        self._folder, self._file = folder, file
        try:
            lines = folder.read(file).splitlines()
        except NotFound:
            lines = []
        try:
            self.records: list[Record] = [json.loads(line) for line in lines]
        except ValueError as error:
            raise StoreError(f"{folder.url}/{file}: damaged ({error}); correct the line or delete the file") from error

    def append(self, stage: str, epoch: int, seconds: float, **measured: Any) -> Record:
        """Add a record, in place of an earlier one of the same stage and epoch."""
        record = {"stage": stage, "epoch": epoch, "seconds": round(seconds, 3)} | measured
        self.records = [r for r in self.records if (r["stage"], r["epoch"]) != (stage, epoch)] + [record]
        self._folder.write(self._file, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        return record

    def of(self, stage: str) -> list[Record]:
        """The records of a stage, by epoch."""
        return sorted((r for r in self.records if r["stage"] == stage), key=lambda r: int(r["epoch"]))

    def has(self, stage: str, epoch: int) -> bool:
        return any(r["epoch"] == epoch for r in self.of(stage))


@dataclass(frozen=True)
class RunResult:
    """A run as its log tells it, over all the sessions that it took."""

    url: str  # the run's folder
    epochs: int  # trained so far
    already_finished: bool  # nothing was left to do
    evaluations: list[dict[str, Any]]  # epoch, r1, r5, r10, r1pct, hit_rate, gallery, queries
    plans: list[dict[str, Any]]  # epoch, source and the plan's quality
    reclusterings: list[dict[str, Any]]  # epoch, layout, generation, score_before, score_after
    training: list[dict[str, Any]]  # epoch, loss, pairs, pairs_per_second, wait_share, stream
    stream: dict[str, Any]  # StreamStats of all training as a dict
    seconds: dict[str, float]  # by stage

    @classmethod
    def of(cls, url: str, log: RunLog, already_finished: bool) -> RunResult:
        """Return what the log of the run at ``url`` tells."""
        def rows(stage: str) -> list[dict[str, Any]]:
            return [{name: value for name, value in r.items() if name != "stage"} for r in log.of(stage)]

        training = rows("train")
        score = {row["epoch"]: row.get("hardness_score") for row in rows("plan")}
        streams = [StreamStats.from_dict(row["stream"]) for row in training]
        stream = StreamStats.total(streams)
        for name in ("budget_bytes", "resident_bytes", "peak_resident_bytes"):  # one epoch after the other
            setattr(stream, name, max((getattr(one, name) for one in streams), default=0))
        return cls(
            url=url,
            epochs=max((row["epoch"] for row in training), default=0),
            already_finished=already_finished,
            evaluations=rows("evaluate"),
            plans=rows("plan"),
            reclusterings=[row | {"score_after": score.get(row["epoch"])} for row in rows("recluster")],
            training=training,
            stream=stream.as_dict(),
            seconds={stage: round(sum(r["seconds"] for r in log.of(stage)), 3) for stage in STAGES},
        )
