"""Play three weeks of a team's work on rendered cities, by its deployments alone: ``make week``.

Week 1 shards a city and trains a first model. Week 2 brings a new district: it is appended, and a training that begins
from the current model takes its place. In the middle the trainer is killed, and the training goes on by itself. Week 3
brings another district, and lists of labels whose columns have slipped: the model is rejected, and the current one
stays. In the end the model of week 1 is made current again.

Everything happens by runs of deployments on a stack of its own below ``runs/week``, which is taken down at the end. A
table says what each step read, wrote, trained and decided; ``runs/week/summary.json`` has the same. One more training,
from scratch on what week 2 has, is there to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from geostream.errors import BadInput, GeostreamError, NotFound
from geostream.layout import open_layout
from geostream.runs.models import current_model, rollback
from geostream.runs.run import Run, run_folder
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints
from infra.dask_cluster import without_dask
from infra.prefect_server import without_prefect
from infra.s3 import without_aws
from infra.stack import down, up
from sharding.simcity import CitySpec, render_cities

ROOT = Path(__file__).parents[1]
DATASET = "simcity"  # whose recipe the runs begin with
TILE, VIEW = 64, (48, 192)  # pixels of the raw images; they are stored smaller, as raw data mostly are
OPTIONS = {"tile_size": [48, 48], "view_size": [32, 128], "shard_bytes": 2**19}
TEST = CitySpec("Chicago", 20, 20)
DISTRICTS = {1: CitySpec("NewYork", 40, 40), 2: CitySpec("Seattle", 22, 22), 3: CitySpec("Boston", 12, 12)}
MARK = ".geostream-week"  # in a folder that an earlier play has made, which the next may remove
WIDTH = 150  # of the table, in characters
LOOK_EVERY = 2.0  # seconds between two looks whether a flow run has ended
WAIT = 300.0  # seconds that a training may take to go on after it was killed


def bring(raw: Path, city: CitySpec, seed: int) -> int:
    """Render a city and put it into a raw folder in VIGOR's layout, beside those that are there.

    Args:
        raw: the raw folder.
        city: the city.
        seed: of all that is random.

    Returns:
        The bytes of its images.
    """
    whole = raw.with_name(f"{raw.name}-{city.name}")
    render_cities(whole, [city], seed=seed, tile_size=TILE, view_size=VIEW, max_offset=0.1)
    size = sum(path.stat().st_size for path in (whole / city.name).rglob("*") if path.is_file())
    for name in (city.name, f"splits/{city.name}"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(whole / name, raw / name)
    shutil.rmtree(whole)
    return size


def mislabel(raw: Path, city: str, seed: int) -> None:
    """Give each panorama of a city the tiles of another one, as a list whose columns have slipped does."""
    labels = raw / "splits" / city / "pano_label_balanced.txt"
    lines = [line.split(" ", 1) for line in labels.read_text().splitlines()]
    order = np.random.default_rng(seed).permutation(len(lines))
    labels.write_text("".join(f"{lines[row][0]} {lines[other][1]}\n" for row, other in enumerate(order.tolist())))


class Week:
    """Run deployments on a stack of its own, and note what each step did.

    Args:
        folder: where the stack, the raw data and the summary lie.
        console: what happens is printed there.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.raw = folder / "raw"
        self.rows: list[dict[str, Any]] = []
        self.killed = ""  # the run whose trainer was killed
        self.store = Store.open(os.environ["GEOSTREAM_STORE"])

    def deployment(self, name: str, **parameters: Any) -> None:
        """Run a deployment and wait for its end; raise GeostreamError where it does not complete."""
        # Only now: Prefect learns where its server is when it is imported.
        from prefect.client.schemas.objects import FlowRun
        from prefect.deployments import run_deployment

        ended = run_deployment(name, parameters=parameters, poll_interval=LOOK_EVERY)
        assert isinstance(ended, FlowRun)  # not a coroutine: this process runs no event loop
        if ended.state is None or not ended.state.is_completed():
            raise GeostreamError(f"{name}, {ended.name}: {ended.state_name}: {ended.state and ended.state.message}")

    def shard(self, week: int, new_bytes: int) -> None:
        """Bring the raw folder's state into the store, and note what that read and wrote."""
        before, started = self._objects(), time.monotonic()
        cities = [DISTRICTS[number].name for number in DISTRICTS if number <= week]
        options = {"train_cities": cities, "test_cities": [TEST.name]}
        self.deployment(
            "shard/shard-vigor", raw=str(self.raw), dataset=DATASET, options=OPTIONS, adapter_options=options
        )  # fmt: skip
        layout, [found] = open_layout(self.store, DATASET), self._artifact("layout")
        written = sum(size for path, size in self._objects().items() if before.get(path) != size)
        self.note(
            week,
            "shard" if week == 1 else "append",
            started,
            layout=layout.name,
            places=layout.n_places,
            pairs=layout.info["pairs"]["train"],
            new_mb=new_bytes / 1e6,
            read_mb=found["raw MB read"],
            written_mb=written / 1e6,
        )

    def retrain(
        self, week: int, step: str, *, kill: bool = False, settings: Mapping[str, int] | None = None, **parameters: Any
    ) -> Run:
        """Train by the deployment, and note how well and what was decided.

        Args:
            week: number of the week.
            step: what it is called in the table.
            kill: kill the trainer in the middle, and let it go on by itself.
            settings: further ones than that every epoch is evaluated.
            parameters: of the deployment.
        """
        started, before = time.monotonic(), set(self._runs())
        killer = threading.Thread(target=self._kill_trainer, args=(before,), daemon=True)
        if kill:
            killer.start()
        wanted = {"evaluate_every": 1, "checkpoint_every": 20, **(settings or {})}
        self.deployment("retrain/retrain", dataset=DATASET, settings=wanted, **parameters)
        [name] = set(self._runs()) - before
        if kill and self.killed != name:
            raise GeostreamError(
                f"{name}: its trainer was to be killed in the middle of its work, and was not met there"
            )
        run = Run.find(self.store, DATASET, None, name)
        model = current_model(self.store, DATASET)
        evaluations = run.log.of("evaluate")
        self.note(
            week,
            step,
            started,
            run=name,
            layout=run.layout.name,
            epochs=len(run.log.of("train")),
            train_s=sum(record["seconds"] for record in run.log.of("train")),
            r1=evaluations[-1]["r1"],
            decision=self._decision(run),
            model=None if model is None else model.number,
        )
        return run

    @staticmethod
    def _decision(run: Run) -> str:
        record = run.read_comparison()
        if record is None:
            return "not compared"
        return "promoted" if record["promotes"] else "rejected"

    def _kill_trainer(self, before: set[str]) -> None:
        """Kill the process that trains the next new run, behind its first checkpoint; a thread runs this."""
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            time.sleep(0.2)
            for name in set(self._runs()) - before:
                folder = run_folder(self.store, DATASET, name)
                with suppress(NotFound, psutil.Error):
                    if list_checkpoints(folder):
                        newest = max(info.path for info in folder.list("lease"))
                        psutil.Process(int(folder.read_json(newest)["pid"])).kill()
                        self.killed = name
                        return

    def note(self, week: int, step: str, started: float, **facts: Any) -> None:
        """Add a row to the table, and print it."""
        row = {"week": week, "step": step, "seconds": round(time.monotonic() - started, 1), **facts}
        self.rows.append(row)
        said = ", ".join(f"{name} {_short(value)}" for name, value in row.items() if value is not None)
        self.console.print(said, highlight=False)

    def _artifact(self, key: str) -> list[dict[str, Any]]:
        """Return the newest table of this name that a flow run has on its page."""
        body = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
        address = f"{os.environ['PREFECT_API_URL']}/artifacts/filter"
        asked = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(asked, timeout=30) as answer:
            [artifact] = json.load(answer)
        rows: list[dict[str, Any]] = json.loads(artifact["data"])
        return rows

    def _runs(self) -> list[str]:
        return self.store.child(DATASET, "runs").folders()

    def _objects(self) -> dict[str, int]:
        return {info.path: info.size for info in self.store.child(DATASET, "layouts").list()}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


COLUMNS = {  # of the table: the facts of a step, and how they are called
    "week": "week",
    "step": "step",
    "seconds": "s",
    "layout": "layout",
    "places": "places",
    "pairs": "pairs",
    "new_mb": "new MB",
    "read_mb": "MB read",
    "written_mb": "MB written",
    "epochs": "epochs",
    "train_s": "s of training",
    "r1": "R@1",
    "decision": "decision",
    "model": "model",
}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of what each step read, wrote, trained and decided."""
    made = Table(title="three weeks")
    for name in COLUMNS.values():
        made.add_column(name)
    for row in rows:
        made.add_row(*("" if row.get(name) is None else _short(row[name]) for name in COLUMNS))
    return made


def figures(rows: Sequence[Mapping[str, Any]], warm: Run, scratch: Run) -> dict[str, Any]:
    """Return what week 2 cost beside what it brought, and beside a training from scratch.

    Args:
        rows: the steps.
        warm: the run that began from the model of week 1.
        scratch: the run from scratch on the same layout.
    """
    grown = next(row for row in rows if row["week"] == 2 and row["step"] == "append")
    goal = scratch.log.of("evaluate")[-1]["r1"]
    reached = next((row["epoch"] for row in warm.log.of("evaluate") if row["r1"] >= goal), None)
    return {
        "read_to_new": grown["read_mb"] / grown["new_mb"],
        "written_to_new": grown["written_mb"] / grown["new_mb"],
        "scratch_r1": goal,
        "warm_r1": warm.log.of("evaluate")[-1]["r1"],
        "warm_to_scratch_seconds": None if reached is None else _trained(warm, reached) / _trained(scratch),
    }


def _trained(run: Run, until: int | None = None) -> float:
    """Return the seconds that a run has trained, up to an epoch."""
    return float(sum(row["seconds"] for row in run.log.of("train") if until is None or row["epoch"] <= until))


def play(folder: Path, seed: int, console: Console) -> dict[str, Any]:
    """Play the three weeks, and return what happened.

    Args:
        folder: where everything lies, with its stack up.
        seed: of the cities.
        console: what happens is printed there.
    """
    started = time.monotonic()
    week = Week(folder, console)
    bring(week.raw, TEST, seed)
    new = bring(week.raw, DISTRICTS[1], seed)
    week.shard(1, new)
    week.retrain(1, "train")
    first = current_model(week.store, DATASET)
    week.shard(2, bring(week.raw, DISTRICTS[2], seed))
    warm = week.retrain(2, "train from the model", kill=True)
    # Only its last evaluation is compared with.
    scratch = week.retrain(2, "train from scratch", settings={"evaluate_every": 9}, warm_start=False, promote=False)
    second = current_model(week.store, DATASET)
    size = bring(week.raw, DISTRICTS[3], seed)
    for city in DISTRICTS.values():
        mislabel(week.raw, city.name, seed)
    week.shard(3, size)
    week.retrain(3, "train from the model", settings={"epochs": 1})  # enough to unlearn by wrong labels
    third = current_model(week.store, DATASET)
    back = rollback(week.store, DATASET)
    numbers = [None if model is None else model.number for model in (first, second, third, back)]
    console.print(table(week.rows))
    return {
        "rows": week.rows,
        "models": dict(zip(("week 1", "week 2", "week 3", "rolled back"), numbers, strict=True)),
        **figures(week.rows, warm, scratch),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.week", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/week"), help="folder for everything; an earlier one goes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the cities")
    options = parser.parse_args()
    folder, console = options.out.absolute(), Console(width=WIDTH, soft_wrap=True)
    try:
        own_folder(folder)
        console.print("starting S3, Dask, Prefect and a worker", highlight=False)
        stack = up(folder)
        try:
            environment = without_dask(without_prefect(without_aws(os.environ))) | stack.environment()
            os.environ.clear()
            os.environ.update(environment)
            found = play(folder, options.seed, console)
        finally:
            down(folder)
    except GeostreamError as error:
        print(f"week: {error}", file=sys.stderr)
        return 1
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        if name != "rows":
            console.print(f"{name}: {_short(value)}", highlight=False)
    console.print(f"summary: {folder / 'summary.json'}", highlight=False)
    return 0


def own_folder(folder: Path) -> None:
    """Make a folder anew, with what a checkout has.

    Args:
        folder: what an earlier play has left in it is ended and removed.

    Raises:
        BadInput: it holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise BadInput(f"{folder}: holds something else than an earlier play; name another folder with --out")
    if folder.exists():
        down(folder)  # what a play that was killed has left running
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    for name in ("flows", "prefect.yaml", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)


if __name__ == "__main__":
    sys.exit(main())
