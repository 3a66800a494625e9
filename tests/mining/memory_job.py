"""Build a graph with two Dask processes of one thread, and tell what each process has held.

``python -m tests.mining.memory_job gps|visual FOLDER N DIM K [NAME=VALUE …]``; the embeddings must be in FOLDER. The
settings are constants of the modules of mining, such as ``exact.BLOCK=4096``. The last line is JSON.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from typing import Any
from unittest.mock import patch

from geostream.mining.embeddings import open_embeddings
from geostream.mining.gps import build_gps_graph
from geostream.mining.visual import build_visual_graph
from geostream.store import Store
from tests.mining.places import EMBEDDINGS, places


def peak(dask_worker: Any = None) -> int:
    """Import what tasks import; return the most bytes that this process has held."""
    import faiss  # noqa: F401
    import scipy.spatial  # noqa: F401

    import geostream.mining.visual  # noqa: F401

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def configure(constants: list[str]) -> None:
    for constant in constants:
        name, value = constant.split("=")
        module, name = name.split(".")
        setattr(importlib.import_module(f"geostream.mining.{module}"), name, int(value))


def main(stage: str, folder: str, n: int, dim: int, k: int, constants: list[str]) -> dict[str, Any]:
    from distributed import Client, LocalCluster

    run, layout = Store.open(folder), places(n, max(1, n // 1_000_000))
    configure(constants)
    with (
        patch("geostream.mining.gps.open_graph"),  # reading the graph is no part of the stage
        patch("geostream.mining.visual.open_graph"),
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(configure, constants)
        if stage == "gps":  # the layout is held before
            _ = layout.position, layout.area, layout.places
        before = [peak(), *client.run(peak).values()]
        begun = time.perf_counter()
        if stage == "gps":
            build_gps_graph(run, "gps.zarr", layout, k, cluster.scheduler_address)
        else:
            embeddings = open_embeddings(run, EMBEDDINGS, layout)
            build_visual_graph(run, "visual.zarr", layout, embeddings, k, cluster.scheduler_address, "approximate")
        seconds = time.perf_counter() - begun
        after = [peak(), *client.run(peak).values()]
    beyond = [late - early for late, early in zip(after, before, strict=True)]
    search = run.read_json(f"{'gps' if stage == 'gps' else 'visual'}.zarr/zarr.json")["attributes"]["search"]
    return {"seconds": seconds, "client": beyond[0], "worker": max(beyond[1:]), "most": max(after), "search": search}


if __name__ == "__main__":
    stage, folder, n, dim, k, *constants = sys.argv[1:]
    print(json.dumps(main(stage, folder, int(n), int(dim), int(k), constants)))
