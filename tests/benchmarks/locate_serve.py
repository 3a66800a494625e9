"""What the page costs beside its network: ``python -m tests.benchmarks.locate_serve --json PATH``.

The page runs as a process of its own, with a gallery of 100,000 tiles and a network of 28 million parameters
(``convnext_tiny``, random weights, which take as long as trained ones) on views of 192×384. Its clients, a third
process with 8 threads, send JPEGs of 1024×512. The vectors of the gallery are clustered as embeddings are. The network
alone gets the same photos, already decoded and resized, on as many threads. Page and network take turns within one run.

1. Queries a second: 8 clients, each of which asks again as soon as it is answered, against the network in batches as
   large as the page's.
2. The 95th percentile of the time to an answer at half that load, against the network's time for one photo. The 8
   clients ask at a steady pace that a tenth of chance is added to, and begin at even distances. The same with random
   arrivals (Poisson) is printed, too: then photos queue for one another, whatever serves them.

Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from joblib import cpu_count
from PIL import Image

from geostream.layout import Layout
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.benchmarks.measure import machine, ratio

SIDE = 316  # of the grid of tiles: 99,857 places with the test place
MODEL, VIEW, PHOTO = "convnext_tiny", (192, 384), (512, 1024)
CLIENTS, PHOTOS, TURNS = 8, 32, 3
SECONDS = 20.0  # of each turn
BOUNDARY = "photo-of-a-benchmark"


def settings() -> TrainSettings:
    return TrainSettings().changed(model=MODEL, view_height=VIEW[0], view_width=VIEW[1])


def photos() -> list[bytes]:
    """JPEGs with edges and areas, as photos have, so that they take as long to decode."""
    rng, made = np.random.default_rng(0), []
    for _ in range(PHOTOS):
        coarse = rng.integers(0, 256, (PHOTO[0] // 16, PHOTO[1] // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(PHOTO[::-1], Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (*PHOTO, 3))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def serve(store: Store) -> None:
    """Serve the page of a gallery that was never embedded; print its URL."""
    import faiss
    import torch

    from geostream.evaluation.embed import Trained
    from geostream.layout import open_layout
    from geostream.locating.index import Index
    from geostream.locating.locate import Locator
    from geostream.serving import server
    from geostream.serving.app import make_app
    from geostream.serving.service import Service
    from geostream.serving.uploads import Limits
    from geostream.training.model import Encoder

    torch.set_num_threads(cpu_count())
    faiss.omp_set_num_threads(cpu_count())
    layout = open_layout(store)
    encoder = Encoder.of(settings())
    info = {
        "tiles": layout.n_places,
        "model": {"run": "benchmark", "checkpoint": "none", "number": None},
        "calibration": {"threshold": 0.05},
    }
    trained = Trained(encoder, settings(), "none", 0)
    locator = Locator(Index(store, store, info, layout), trained, gallery(layout, encoder.dim))
    listening = server.listen("127.0.0.1", 0)
    app = make_app(Service(locator, Limits()))
    server.serve(app, listening, lambda: print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True))


def gallery(layout: Layout, dim: int) -> Any:
    """A search as an index of this size has it."""
    from geostream.locating.search import EXACT_ROWS, TRAINED_ON, TileSearch, fill_lists, flat, n_lists, train_lists
    from tests.benchmarks.locate import clustered

    n = layout.n_places
    vectors, _ = clustered(n, 1, dim)
    place = np.arange(n, dtype=np.int32)
    if n <= EXACT_ROWS:
        return TileSearch(place, flat(vectors))
    lists = n_lists(n)
    index = train_lists(vectors[:: max(1, n // (TRAINED_ON * lists))], lists)
    number = index.quantizer.search(vectors, 1)[1][:, 0].astype(np.int32)
    fill_lists(index, [(vectors, number)])
    index.nprobe = 32
    return TileSearch(place, index)


def bare() -> None:
    """Run the network alone whenever a line asks for it: "batch" for photos a second, "one" for the time of one."""
    import torch

    from geostream.locating.photos import read_photo
    from geostream.locating.view import as_view
    from geostream.serving.service import BATCH
    from geostream.training.model import Encoder, autocast, device_of

    torch.set_num_threads(cpu_count())
    encoder = Encoder.of(settings()).eval()
    views = torch.from_numpy(np.stack([as_view(read_photo(photo), settings()) for photo in photos()])).permute(
        0, 3, 1, 2
    )

    def embed(some: torch.Tensor) -> None:
        with torch.inference_mode(), autocast(device_of(encoder), settings().model.precision):
            encoder.encode(some)

    embed(views[:BATCH])
    print("ready", flush=True)
    for line in sys.stdin:
        size = BATCH if line.strip() == "batch" else 1
        times, begun = list[float](), time.perf_counter()
        while time.perf_counter() - begun < SECONDS / 2:
            one = time.perf_counter()
            start = len(times) * size % PHOTOS
            embed(views[start : start + size])
            times.append(time.perf_counter() - one)
        seconds = time.perf_counter() - begun
        print(json.dumps({"rate": len(times) * size / seconds, "median": float(np.median(times))}), flush=True)


def clients() -> None:
    """Ask the page whenever a line says how: a URL, and the requests a second, 0 for as many as it answers."""
    bodies = [body(photo) for photo in photos()]
    print("ready", flush=True)
    for line in sys.stdin:
        url, pace, arrivals = line.split()
        print(json.dumps(load(url, bodies, float(pace), arrivals)), flush=True)


def body(photo: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="photos"; filename="photo.jpg"\r\n\r\n'
    return head.encode() + photo + f"\r\n--{BOUNDARY}--\r\n".encode()


def load(url: str, bodies: list[bytes], pace: float, arrivals: str) -> dict[str, Any]:
    """Ask for ``SECONDS``; answers a second, and the time to each of them."""
    address, times, lock = urlsplit(url), list[float](), threading.Lock()
    begun = time.perf_counter()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)
        rng, gap = random.Random(number), CLIENTS / pace if pace else 0.0
        due = begun + (gap * number / CLIENTS if arrivals == "steady" else rng.expovariate(1) * gap)
        count = number
        while True:
            now = time.perf_counter()
            if max(now, due) - begun > SECONDS:
                return
            time.sleep(max(0.0, due - now))
            asked = due if gap else now  # a client that is late has waited since it should have asked
            connection.request(
                "POST",
                "/api/locate",
                bodies[count % len(bodies)],
                {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
            )
            answer = connection.getresponse()
            found = json.loads(answer.read())
            assert answer.status == 200 and len(found["answers"][0]["candidates"]) == 5, found
            with lock:
                times.append(time.perf_counter() - asked)
            count += CLIENTS
            due += gap * (rng.uniform(0.9, 1.1) if arrivals == "steady" else rng.expovariate(1))

    with ThreadPoolExecutor(CLIENTS) as threads:
        for future in [threads.submit(client, number) for number in range(CLIENTS)]:
            future.result()
    seconds = time.perf_counter() - begun
    return {"rate": len(times) / seconds, "p95": float(np.percentile(times, 95)), "median": float(np.median(times))}


@contextmanager
def helper(*words: str) -> Iterator[tuple[str, Callable[[str], dict[str, Any]]]]:
    """A process of this module: the first line that it prints, and a function that asks it."""
    command = [sys.executable, "-m", "tests.benchmarks.locate_serve", *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout

    def ask(line: str) -> dict[str, Any]:
        assert process.stdin and process.stdout
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    try:
        first = process.stdout.readline().strip()
        if not first:
            raise RuntimeError(f"{' '.join(command)}: ended with {process.wait()}")
        yield first, ask
    finally:
        process.terminate()
        process.wait(60)
        process.stdin.close()
        process.stdout.close()


def figures(work: Path, *, quick: bool = False) -> dict[str, Any]:
    """The page's throughput and latency against its bare network.

    Args:
        work: A folder, for the gallery's index.
        quick: A small gallery and one turn: does it run, not what does it give.
    """
    from tests.cities import city

    store = Store.open(work / "page")
    city(store, side=20 if quick else SIDE, areas=1, coordinates="latlon")
    found: dict[str, list[float]] = {name: [] for name in ("page", "bare", "p95", "random", "one")}
    with helper("--serve", store.url) as (url, _), helper("--bare") as (_, alone), helper("--clients") as (_, ask):
        ask(f"{url} 0 steady")  # the first answers take longer
        for _ in range(1 if quick else TURNS):
            found["bare"].append(alone("batch")["rate"])
            found["page"].append(ask(f"{url} 0 steady")["rate"])
            found["one"].append(alone("one")["median"])
            half = float(np.median(found["page"])) / 2
            found["p95"].append(ask(f"{url} {half} steady")["p95"])
            found["random"].append(ask(f"{url} {half} random")["p95"])
    print({name: [round(value, 4) for value in values] for name, values in found.items()}, file=sys.stderr)
    return {
        "page_queries_per_s_to_bare_network": ratio(found["page"], found["bare"], ">= 0.8"),
        "page_p95_at_half_load_to_bare_network": ratio(found["p95"], found["one"], "<= 2"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The page of geostream serve against its bare network")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small gallery, one turn")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--clients", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(Store.open(options.serve))
    if options.bare:
        return bare()
    if options.clients:
        return clients()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(Path(folder), quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "figures": found}, indent=1) + "\n")
    from rich.console import Console

    from tests.benchmarks.measure import figures_table

    Console(width=120).print(figures_table(found))


if __name__ == "__main__":
    main()
