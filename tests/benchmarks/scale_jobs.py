"""Run one job of the benchmark of scale in this process.

``python -m tests.benchmarks.scale_jobs JOB FOLDER N LANES``: the folder holds the layout, its embeddings and what the
stages before have made. The last line is JSON. Time begins when the modules are imported and Dask's processes are up,
and includes opening whatever the stage reads. ``steps`` has the seconds of each step of the stage, and the most that
this process had held by its end.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from geostream.dask import MESSAGES_KEPT, give_back, shared_connection
from geostream.layout import Layout, open_layout
from geostream.mining.embeddings import open_embeddings
from geostream.mining.gps import build_gps_graph
from geostream.mining.graph import open_graph
from geostream.mining.visual import build_visual_graph
from geostream.planning.make_plan import make_plan
from geostream.planning.plan import load_plan, save_plan
from geostream.reclustering.recluster import order_places
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.benchmarks import scale_places
from tests.benchmarks.scale_places import DATASET, EMBEDDINGS, LAYOUT
from tests.benchmarks.scale_process import begin, resident, usage

K = 64
BATCH = 128
WORKERS = 2  # loader processes
SEED = 0
GPS, VISUAL, VISUAL_BY_ONE = (f"neighbours/{name}.zarr" for name in ("gps", "visual", "visual-by-one"))
Result = dict[str, Any]


class Job:
    """A stage that is measured.

    Args:
        folder: Where layout, embeddings and results lie.
        lanes: Lanes of the plans.
    """

    def __init__(self, folder: Path, lanes: int) -> None:
        self.store = Store.open(folder)
        self.run, self.lanes = self.store.child("run"), lanes
        self.plans = self.run.child(f"plans-{lanes}")
        #: A lane may hold what the defaults allow a reader of one lane: what is measured is not how little fits.
        self.settings = TrainSettings().changed(
            batch_size=BATCH, lanes=lanes, strategy="patchwork", neighbours=K, buffer_mib=2048 * lanes
        )
        self.result: Result = {"steps": []}
        self._last = time.perf_counter()

    def layout(self) -> Layout:
        return open_layout(self.store, DATASET, LAYOUT)

    def step(self, name: str) -> None:
        """Note that a step has ended."""
        now = time.perf_counter()
        self.result["steps"].append({"step": name, "seconds": now - self._last, "peak_bytes": usage()["peak_bytes"]})
        self._last = now

    @contextmanager
    def measured(self, processes: int = 0) -> Iterator[Any]:
        """Measure what is done within the context, by this process and so many of Dask, whose URL is yielded."""
        with ExitStack() as stack:
            client, url = None, None
            if processes == 1:  # a core for each, its share of the client's work included
                os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            if processes:
                from dask import config
                from distributed import Client, LocalCluster

                # As in infra/
                stack.enter_context(config.set({"distributed.worker.profile.enabled": False, MESSAGES_KEPT: 1}))
                cluster = stack.enter_context(
                    LocalCluster(
                        n_workers=processes,
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address="127.0.0.1:0",
                        memory_limit=0,
                    )
                )
                client = stack.enter_context(Client(cluster))
                url = cluster.scheduler_address
            before = _everywhere(client, begin)
            started = self._last = time.perf_counter()
            yield url
            self.result["seconds"] = time.perf_counter() - started
            after = _everywhere(client, usage)
        for name in ("cpu_seconds", "bytes_read", "bytes_written", "requests"):
            self.result[name] = sum(b[name] - a[name] for a, b in zip(before, after, strict=True))
        peaks = [int(one["peak_bytes"]) for one in after]
        self.result |= {
            "before_bytes": [int(one["peak_bytes"]) for one in before],
            "client_bytes": peaks[0],
            "worker_bytes": max(peaks[1:], default=0),
            "most_bytes": max(peaks),
        }


def _everywhere(client: Any, ask: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """Ask this process, and each worker in the order of their addresses."""
    found = client.run(ask) if client is not None else {}
    return [ask(), *(found[address] for address in sorted(found))]


def open_(job: Job) -> None:
    """What a trainer needs at once."""
    with job.measured():
        read, requests = usage()["bytes_read"], usage()["requests"]
        layout = job.layout()
        job.step("open_layout")
        job.result |= {"open_bytes": usage()["bytes_read"] - read, "open_requests": usage()["requests"] - requests}
        layout.pairs("train")
        job.step("pairs")
        _ = layout.shard_of_place
        job.step("shard_of_place")


def gps(job: Job) -> None:
    with job.measured(2) as url:
        graph = build_gps_graph(job.run, GPS, job.layout(), K, url)
        job.step("build_gps_graph")
    job.result["search"] = graph.search


def visual(job: Job, processes: int = 2) -> None:
    with job.measured(processes) as url:
        layout = job.layout()
        embeddings = open_embeddings(job.run, EMBEDDINGS, layout)
        job.step("open_embeddings")
        name = VISUAL if processes > 1 else VISUAL_BY_ONE
        graph = build_visual_graph(job.run, name, layout, embeddings, K, url, "approximate")
        job.step("build_visual_graph")
    job.result["search"] = graph.search


def plan(job: Job, epochs: tuple[int, ...] = (3,), processes: int = 2) -> None:
    """Plan an epoch that has two plans before; ``epochs`` are planned one after the other."""
    with job.measured(processes) as url:
        layout = job.layout()
        graph = open_graph(job.run, VISUAL, layout)
        job.step("open_graph")
        embeddings = open_embeddings(job.run, EMBEDDINGS, layout)
        job.step("open_embeddings")
        for epoch in epochs:
            previous = (load_plan(job.plans, before, layout) for before in (epoch - 1, epoch - 2) if before > 0)
            with shared_connection(url, "plan") as apply:
                made = make_plan(layout, graph, job.settings, epoch, SEED, previous, embeddings, apply)
            job.step("make_plan")
            save_plan(job.plans, made)
            job.step("save_plan")
    job.result |= {"quality": dict(made.quality), "hash": made.hash, "shards": len(layout.shard_names)}


def loader(job: Job) -> None:
    """What a trainer does to read a plan, and then each of its loader processes at its start.

    The processes are started as the loader starts its own. What each holds is told above one that has only imported
    the same modules: at most, and when it has everything.
    """
    from geostream.streaming.dataset import StreamDataset, plan_dataset
    from geostream.streaming.options import ReadOptions
    from geostream.streaming.pipeline import ImageSizes

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([StreamDataset.__module__])
    _in_process(context, None, 0)  # starts the server, too
    bare = _in_process(context, None, 0)
    with job.measured():
        layout = job.layout()
        made = load_plan(job.plans, 3, layout)
        job.step("load_plan")
        options = ReadOptions.of(job.settings)
        dataset = plan_dataset(layout, made, ImageSizes.of(job.settings), options=options)
        job.step("plan_dataset")
        workers = []
        for worker in range(WORKERS):
            workers.append(_in_process(context, dataset, worker))
            job.step(f"worker {worker}")
    job.result |= {
        "workers": workers,
        "bare": bare,
        "beyond_bytes": max(one["peak_bytes"] for one in workers) - bare["held_bytes"],
        "held_bytes": max(one["held_bytes"] for one in workers) - bare["held_bytes"],
    }
    job.result["most_bytes"] = max(job.result["most_bytes"], *(int(one["peak_bytes"]) for one in workers))
    job.result["cpu_seconds"] += sum(one["cpu_seconds"] - bare["cpu_seconds"] for one in workers)
    job.result["bytes_read"] += sum(one["bytes_read"] - bare["bytes_read"] for one in workers)


def _in_process(context: Any, dataset: Any, worker: int) -> Result:
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=loader_process, args=(dataset, worker, there))
    started = time.perf_counter()
    process.start()
    there.close()
    result: Result = here.recv()
    process.join()
    return result | {"seconds": time.perf_counter() - started}


def loader_process(dataset: Any, worker: int, answer: Connection) -> None:
    """Do what a loader process does before its first read, and tell what it took; nothing where there is no dataset."""
    from geostream.streaming.pipeline import Pipeline, Worker

    told: Result = {}
    if dataset is not None:
        share = dataset._share(worker, WORKERS)
        part = dataset.steps.part(share)
        pipeline = Pipeline(
            part.members,
            share,
            part.samples,
            dataset.sizes,
            dataset.change,
            dataset.options.share(WORKERS),
            part.replacement,
            Worker(worker, dataset.lanes // WORKERS),
        )
        schedule = pipeline.fetcher.schedule
        told = {"images": len(part.members.crc32c), "reads": schedule.requests, "buffer_bytes": schedule.peak_bytes}
        del share, part
    told |= usage()
    gc.collect()
    give_back()
    answer.send(told | {"held_bytes": resident()})


def order(job: Job) -> None:
    with job.measured(2) as url:
        layout = job.layout()
        embeddings = open_embeddings(job.run, EMBEDDINGS, layout)
        graph = open_graph(job.run, VISUAL, layout)
        job.step("open")
        found = order_places(layout, embeddings, graph, job.settings, url)
        job.step("order_places")
    job.result |= {"shards": len(found.shards), "pieces": found.pieces, "likeness": [found.before, found.after]}


JOBS: dict[str, Callable[[Job], None]] = {
    "open": open_,
    "gps": gps,
    "visual": visual,
    "visual-by-one": partial(visual, processes=1),
    "history": partial(plan, epochs=(1, 2)),  # the two plans before
    "plan": plan,
    "plan-by-one": partial(plan, processes=1),
    "loader": loader,
    "order": order,
}


def main(name: str, folder: str, n: int, lanes: int) -> Result:
    if name == "make":
        shutil.rmtree(folder, ignore_errors=True)  # what a call that was cut off has left
        started = time.perf_counter()
        scale_places.make(Path(folder), n)
        return {"seconds": time.perf_counter() - started, "most_bytes": usage()["peak_bytes"]}
    job = Job(Path(folder), lanes)
    JOBS[name](job)
    return job.result


if __name__ == "__main__":
    job_name, at, places, of_plan = sys.argv[1:]
    print(json.dumps(main(job_name, at, int(places), int(of_plan))))
