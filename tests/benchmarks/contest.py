"""What benchmarks share that compare trainings: contestants in fresh processes, their results kept, paired differences.

Decides that a seed changes cities and training alike, so the comparisons are of differences within a seed. The spread
is the standard error of a mean difference, from the variance of the differences over the seeds, pooled over the pairs
of contestants, because a few seeds say little about one pair's. It is one standard error and no more: a rule of thumb,
not a test.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from geostream.layout import open_layout
from geostream.runs.log import Record
from geostream.runs.loop import train
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.benchmarks.measure import ROOT, Failed, Result
from tests.benchmarks.payoff_city import DATASET

LOOK = 0.5  # seconds between two looks at what is running
PLAN = ("epoch", "source", "hardness_score", "hardness_note", "overlap", "resident_share", "amplification")


class Job(Protocol):
    """What a contestant is told; a dataclass, so that it can be handed to its process as JSON.

    ``store`` is a local folder, the contestant's own copy of the cities; ``out`` the file that its result goes to;
    ``settings`` those of its training.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def contestant(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def store(self) -> str: ...

    @property
    def out(self) -> str: ...

    @property
    def settings(self) -> TrainSettings: ...


AnyJob = TypeVar("AnyJob", bound=Job)


def found(job: Job) -> Result | None:
    """The job's result, where it was measured before. Raises Failed where something else was measured there."""
    out = Path(job.out)
    if not out.exists():
        return None
    result: Result = json.loads(out.read_text())
    if result["settings"] != json.loads(job.settings.model_dump_json()):
        raise Failed(f"{out}: measured with other settings; name another folder to keep results in, or delete it")
    return result


def measure(jobs: Sequence[Job], module: str, at_once: int, console: Console) -> None:
    """Run the jobs in order, ``at_once`` of them side by side, each as ``python -m module`` and a file that holds it.

    Raises Failed with the last lines of one that failed.
    """
    waiting, running = list(jobs), list[tuple[Job, float, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running.append((job, time.monotonic(), start(job, module)))
            time.sleep(LOOK)
            for one in [one for one in running if one[2].poll() is not None]:
                job, started, process = one
                running.remove(one)
                log = Path(job.out).with_suffix(".log")
                if process.returncode:
                    last = log.read_text(errors="replace").splitlines()[-20:]
                    raise Failed("\n".join([f"seed {job.seed}, {job.contestant}: failed", *last]))
                shutil.rmtree(job.store)
                for file in (log, Path(job.out).with_suffix(".job")):
                    file.unlink()
                r1 = json.loads(Path(job.out).read_text())["curve"][-1]["r1"]
                taken = time.monotonic() - started
                console.print(f"seed {job.seed}, {job.contestant}: R@1 {r1:.4f}, {taken:.0f} s", highlight=False)
    finally:
        for _, _, process in running:
            process.kill()
            process.wait()


def start(job: Job, module: str) -> subprocess.Popen[bytes]:
    """Start the contestant on a fresh copy of its cities: a streamed one writes layouts beside the first."""
    out = Path(job.out)
    shutil.rmtree(job.store, ignore_errors=True)
    shutil.copytree(out.parent / "store", job.store)
    description = out.with_suffix(".job")
    description.write_text(json.dumps(asdict(job)))
    command = [sys.executable, "-m", module, str(description)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # FAISS and NumPy; torch has its setting
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment)


def train_and_tell(job: AnyJob, then: Callable[[AnyJob], Result] | None = None) -> None:
    """Run in the contestant's process: train as the job says, and write its result to ``job.out``.

    ``then`` is called between the two, with the job; what it returns is added to the result.
    """
    store = Store.open(job.store)
    records: list[Record] = []
    spent = time.process_time()

    def record(one: Record) -> None:
        nonlocal spent
        before, spent = spent, time.process_time()
        records.append(one | {"cpu_seconds": spent - before})

    train(store, open_layout(store, DATASET), job.contestant, job.settings, on_record=record)
    more = {} if then is None else then(job)
    # The store belongs to the job's folder and says nothing of what was measured.
    what = {name: value for name, value in asdict(job).items() if name not in ("store", "out")}
    result = what | {"settings": job.settings.model_dump()} | story(records) | more
    partial = Path(job.out).with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(job.out)


def story(records: Sequence[Record]) -> Result:
    """What a run's records, in the order in which they were written, come to.

    ``curve``: R@1 at each evaluation, with the seconds of wall and of the trainer's process that went into all stages
    before it; earlier evaluations are left out, and what happened beside the training. ``evaluation``: all that the
    last one found. ``peak_resident_bytes``: most that the reader held, what it fetched early included.
    """
    curve: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for one in records:
        stage = one["stage"]
        if one.get("beside"):  # it passed while the trainer trained
            continue
        if stage == "evaluate":
            so_far = {"seconds": sum(seconds.values()), "cpu_seconds": sum(cpu.values())}
            curve.append({"epoch": one["epoch"], **so_far, "r1": one["r1"]})
        else:
            seconds[stage] = seconds.get(stage, 0.0) + one["seconds"]
            cpu[stage] = cpu.get(stage, 0.0) + one["cpu_seconds"]
    training = [one for one in records if one["stage"] == "train"]
    return {
        "curve": curve,
        "evaluation": [one for one in records if one["stage"] == "evaluate"][-1],
        "steps": max(one["step"] for one in training),
        "peak_resident_bytes": max(one["stream"]["peak_resident_bytes"] for one in training),
        "seconds_by_stage": seconds,
        "cpu_seconds_by_stage": cpu,
        "plans": [{name: one.get(name) for name in PLAN} for one in records if one["stage"] == "plan"],
        "reclusterings": [one for one in records if one["stage"] == "recluster"],
    }


def told(values: Sequence[float]) -> dict[str, Any]:
    """A figure of which nothing is wanted."""
    return {"value": statistics.mean(values), "wanted": None, "met": None, "spread": [min(values), max(values)]}


def subtract(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def standard_error(differences: Sequence[Sequence[float]]) -> float:
    """Of a mean paired difference over the seeds; a sequence is a pair of contestants; their variances are pooled."""
    variance = statistics.mean(statistics.variance(by_seed) for by_seed in differences)
    return math.sqrt(variance / len(differences[0]))


def table(made: Mapping[str, Any]) -> Table:
    """The figures as a person reads them."""
    rows = Table("value", "wanted", "met", "of the seeds", "figure")
    for name, one in made.items():
        low, high = one["spread"]
        met = {True: "yes", False: "no", None: ""}[one["met"]]
        rows.add_row(f"{one['value']:.4f}", one["wanted"] or "", met, f"{low:.4f} to {high:.4f}", name)
    return rows
