"""Keep a run's log on the store, one JSON line for each stage of each epoch, and sum it up as the run's result.

A record is written when its stage is done, so a run that was cut off continues after the last record. Object stores
cannot append, so each record rewrites the whole log, a few hundred bytes a record. A stage that is done again replaces
its record. While an epoch is trained, its ``progress`` record is updated with each checkpoint.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from geostream.errors import NotFound, StoreError
from geostream.store import Store
from geostream.streaming.stats import StreamStats

STAGES = ("wait", "plan", "train", "embed", "mine", "recluster", "evaluate")

# "stage", "epoch", "time" (when it ended, UTC; not in older logs), "seconds", "started", and what the stage measured
Record = dict[str, Any]


def new_record(stage: str, epoch: int, seconds: float, **measured: Any) -> Record:
    """Return the record of a stage that ends now.

    Args:
        stage: Name of the stage.
        epoch: The epoch that it belongs to.
        seconds: How long the stage took.
        **measured: What else the record tells; values that JSON can hold.
    """
    now = time.time()
    times = {
        "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "started": round(now - seconds, 3),
    }
    return {"stage": stage, "epoch": epoch} | times | measured


def log_record(logger: logging.Logger, record: Record) -> None:
    """Log a record as one line: its numbers, and as JSON all fields but lists, which can be long.

    Args:
        logger: The logger.
        record: The record of a stage.
    """
    numbers = [
        f"{name} {value:.4g}"
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "started"
    ]
    logger.info("%s: %s", record["stage"], "  ".join(numbers), extra={"fields": _without_lists(record)})


def _without_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if not isinstance(value, list)}
    return {name: _without_lists(value) if isinstance(value, dict) else value for name, value in kept.items()}


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
        return self.add(new_record(stage, epoch, seconds, **measured))

    def add(self, record: Record) -> Record:
        """Add a record as it is, in place of an earlier one of the same stage and epoch.

        Args:
            record: It has ``stage``, ``epoch``, ``seconds`` and ``started`` (seconds since 1970).

        Returns:
            The record.
        """
        stage, epoch = record["stage"], record["epoch"]
        self.records = [r for r in self.records if (r["stage"], r["epoch"]) != (stage, epoch)] + [record]
        self._folder.write(self._file, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        return record

    def of(self, stage: str) -> list[Record]:
        """Return the records of a stage, sorted by epoch."""
        return sorted((r for r in self.records if r["stage"] == stage), key=lambda r: int(r["epoch"]))

    def seconds(self, *, beside: bool) -> dict[str, float]:
        """Return the seconds of each stage: of those beside the training, or of the others."""
        of = {stage: [r["seconds"] for r in self.of(stage) if r.get("beside", False) == beside] for stage in STAGES}
        return {stage: round(sum(seconds), 3) for stage, seconds in of.items()}

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
        minings: For each mining: epoch, places, k, search and, where candidates were dropped, the counts of these.
        reclusterings: For each reclustering: epoch, layout, generation, score_before, score_after.
        training: For each epoch: epoch, loss, pairs, pairs_per_second, wait_share, stream.
        stream: ``StreamStats`` of all training, as a dict.
        seconds: Seconds of each stage that the trainer spent, or waited.
        beside: Seconds of each stage that passed in the background, while the trainer trained.
        timeline: For each stage of each epoch: stage, epoch, started (seconds since 1970), seconds, beside.
    """

    url: str
    epochs: int
    already_finished: bool
    evaluations: list[dict[str, Any]]
    plans: list[dict[str, Any]]
    minings: list[dict[str, Any]]
    reclusterings: list[dict[str, Any]]
    training: list[dict[str, Any]]
    stream: dict[str, Any]
    seconds: dict[str, float]
    beside: dict[str, float]
    timeline: list[dict[str, Any]]

    @classmethod
    def of(cls, url: str, log: RunLog, already_finished: bool) -> RunResult:
        """Build the result from a run's log.

        Args:
            url: URL of the run's folder.
            log: The run's log.
            already_finished: Whether nothing was left to do when the run was started.
        """

        def rows(stage: str) -> list[dict[str, Any]]:
            when = ("stage", "time", "started", "beside")
            return [{name: value for name, value in r.items() if name not in when} for r in log.of(stage)]

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
            minings=rows("mine"),
            reclusterings=[row | {"score_after": score.get(row["epoch"])} for row in rows("recluster")],
            training=training,
            stream=stream.as_dict(),
            seconds=log.seconds(beside=False),
            beside=log.seconds(beside=True),
            timeline=[
                {name: record.get(name) for name in ("stage", "epoch", "started", "seconds", "beside")}
                for record in log.records
                if record["stage"] in STAGES
            ],
        )
