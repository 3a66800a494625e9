"""Keep a run's log on the store, one JSON line for each stage of each epoch, and sum it up as the run's result.

A record is written when its stage is done, so a run that was cut off continues after the last record. Object stores
cannot append, so each record rewrites the whole log, a few hundred bytes a record. A stage that is done again replaces
its record. While an epoch is trained, its ``progress`` record is updated with each checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from geostream.errors import NotFound, StoreError
from geostream.store import Store
from geostream.streaming.stats import StreamStats

STAGES = ("plan", "train", "embed", "mine", "recluster", "evaluate")

Record = dict[str, Any]  # "stage", "epoch", "seconds", and what the stage measured


class RunLog:
    """The records of a run, in the order in which they were written.

    Args:
        folder: The run's folder.
        file: Name of the log in it; the file need not exist yet.

    Attributes:
        records: The records so far.

    Raises:
        StoreError: The log is damaged or cannot be read.
    """

    def __init__(self, folder: Store, file: str) -> None:
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
        """Add a record and write the log; an earlier record of the same stage and epoch is replaced.

        Args:
            stage: Name of the stage.
            epoch: The epoch that it belongs to.
            seconds: How long the stage took.
            **measured: What else the record tells; values that JSON can hold.

        Returns:
            The new record.
        """
        record = {"stage": stage, "epoch": epoch, "seconds": round(seconds, 3)} | measured
        self.records = [r for r in self.records if (r["stage"], r["epoch"]) != (stage, epoch)] + [record]
        self._folder.write(self._file, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        return record

    def of(self, stage: str) -> list[Record]:
        """Return the records of a stage, sorted by epoch."""
        return sorted((r for r in self.records if r["stage"] == stage), key=lambda r: int(r["epoch"]))

    def has(self, stage: str, epoch: int) -> bool:
        """Return whether the stage has a record for the epoch, which means that it is done."""
        return any(r["epoch"] == epoch for r in self.of(stage))


@dataclass(frozen=True)
class RunResult:
    """The result of a run, from its log, over all the sessions that it took.

    Attributes:
        url: URL of the run's folder.
        epochs: Number of epochs trained so far.
        already_finished: Whether nothing was left to do when the run was started.
        evaluations: For each evaluation: epoch, r1, r5, r10, r1pct, hit_rate, gallery, queries.
        plans: For each plan: epoch, source and the plan's quality.
        reclusterings: For each reclustering: epoch, layout, generation, score_before, score_after.
        training: For each epoch: epoch, loss, pairs, pairs_per_second, wait_share, stream.
        stream: ``StreamStats`` of all training, as a dict.
        seconds: Seconds spent in each stage.
    """

    url: str
    epochs: int
    already_finished: bool
    evaluations: list[dict[str, Any]]
    plans: list[dict[str, Any]]
    reclusterings: list[dict[str, Any]]
    training: list[dict[str, Any]]
    stream: dict[str, Any]
    seconds: dict[str, float]

    @classmethod
    def of(cls, url: str, log: RunLog, already_finished: bool) -> RunResult:
        """Build the result from a run's log.

        Args:
            url: URL of the run's folder.
            log: The run's log.
            already_finished: Whether nothing was left to do when the run was started.
        """

        def rows(stage: str) -> list[dict[str, Any]]:
            return [{name: value for name, value in r.items() if name != "stage"} for r in log.of(stage)]

        training = rows("train")
        score = {row["epoch"]: row.get("hardness_score") for row in rows("plan")}
        streams = [StreamStats.from_dict(row["stream"]) for row in training]
        stream = StreamStats.total(streams)
        for name in ("budget_bytes", "resident_bytes", "peak_resident_bytes"):  # epochs run one after the other: no sum
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
