"""Compute what a large training takes: seconds, memory, bytes, requests and dollars, stage by stage.

Pure functions on numbers; nothing is measured and nothing is read. What the formats fix is computed as the code writes
it: objects, rows of a Zarr shard, bytes of a number. What only a measurement can tell is in :class:`Coefficients`. They
were measured at MEASURED_TO places or fewer, on a small machine, so larger numbers are extrapolated.

A stage reserves all workers (or all GPUs) from its start to its end, so it costs that much even where it waits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import ceil, log2
from typing import Any

from geostream.layout.schema import HEADER
from geostream.mining import embeddings, exact, gps, graph, ivf
from geostream.mining.approximate import SAMPLE, WRITTEN
from geostream.mining.place_blocks import PLACE
from geostream.mining.visual import EXACT_UP_TO
from geostream.planning.graph_rows import BLOCK_BYTES
from geostream.planning.make_plan import WHOLE_GRAPH
from geostream.planning.schedule import MAX_READ
from geostream.planning.smoothing import NEAR, ROUNDS
from geostream.reclustering import rewrite, scratch

MEASURED_TO = 10_000_000  # places of the largest measurement behind the coefficients
MEMORY = 2.5e9  # bytes that a process should stay within
TRIED = 0.6e9  # bytes of the client of a reclustering, for the places that it tries
PART = 5 * 2**20  # bytes of a part of an upload; a smaller object is one request
LIST_READS = 8  # range reads that a mining task makes at a time
HOUR = 3600.0


@dataclass(frozen=True)
class Job:
    """What is trained, and on what; each number is explained by ``geostream cost --help``."""

    places: int
    views: int
    tile_bytes: int
    view_bytes: int
    raw_image_bytes: int
    dim: int
    neighbours: int
    epochs: int
    mine_every: int
    evaluate_every: int
    reclusters: int
    test_places: int
    lanes: int
    shard_mib: int
    workers: int
    cores: int
    gpus: int
    pairs_per_second: float
    bandwidth: float

    @property
    def pairs(self) -> int:
        """Training pairs."""
        return self.places * self.views

    @property
    def minings(self) -> int:
        """How often the training set is embedded and mined: not after the last epoch, where no plan follows."""
        return (self.epochs - 1) // self.mine_every

    @property
    def threads(self) -> int:
        """Cores of all workers."""
        return self.workers * self.cores


@dataclass(frozen=True)
class Prices:
    """Dollars; list prices are an assumption, and every one of them can be changed."""

    storage: float  # a GB and month
    puts: float  # a thousand PUT requests
    gets: float  # a thousand GET requests
    gpu_hour: float
    core_hour: float
    months: float  # how long what was written is kept


@dataclass(frozen=True)
class Coefficients:
    """What was measured, per unit. The comments give the unit and the measurement."""

    shard_image: float = 0.022  # core s an image, field's sizes: tests.benchmarks.shard
    shard_memory: float = 0.38e9  # bytes of a process: tests.benchmarks.shard
    multiply_add: float = 2.6e-11  # core s, FAISS's flat search with its top-k: docs/notes/mining.md
    list_query: float = 170e-6  # core s a query beside the products, D = 128: docs/notes/mining.md
    probes: float = 13.0  # lists that a query searches at 200,000 places: docs/notes/mining.md
    probes_growth: float = 0.16  # exponent; time grew with N^1.16: tests.benchmarks.neighbours
    shared_lists: float = 0.5  # share of a task's lists that no earlier list of it has read; assumed
    gps_place: float = 75e-6  # core s a place, K = 64: docs/notes/mining.md
    gps_alone: float = 2e-6  # s a place, by the client alone: docs/notes/mining.md
    plan_pair: float = 70e-6  # core s a pair, in the tasks: tests.benchmarks.scale
    plan_alone: float = 10e-6  # s a pair, by the planner alone: tests.benchmarks.scale
    gps_client: float = 90.0  # bytes a place, in the process that mines by GPS: tests.benchmarks.scale
    visual_client: float = 130.0  # bytes a place, in the process that mines by similarity: the same
    planner_pair: float = 150.0  # bytes a pair, in the planner: tests.benchmarks.scale
    lane_pair: float = 2000.0  # bytes a pair beside its neighbours, while a lane is assembled: estimated
    order_place: float = 250e-6  # core s a place at a million: tests.benchmarks.scale
    order_trial: float = 140.0  # core s of the plans that are tried: tests.benchmarks.scale
    rewrite_byte: float = 2e-9  # core s a byte, checksums and copies: estimated from docs/notes/streaming.md
    embed_share: float = 1 / 3  # of a training step, for a pass without gradients: docs/notes/mining.md
    amplification: float = 1.009  # bytes read for each that is used: tests.benchmarks.plan
    graph_kept: float = 0.5  # share of a graph's bytes that is left by its compression: geostream/mining/graph.py
    index_member: float = 17.0  # bytes a member on the store: docs/notes/report.md
    index_place: float = 42.0  # bytes a place and view on the store beside, the same
    index_held: float = 100.0  # bytes a member in memory: docs/notes/layout.md
    trainer_pair: float = 55.0  # bytes a pair in each trainer, which checks the whole plan: tests/streaming
    lane_image: float = 33.0  # bytes an image of a reader's lanes: tests/streaming
    buffer: float = 2.0 * 2**30  # bytes that a rank holds of shards: the setting buffer_mib
    request: float = 0.03  # s of one small read: assumed


@dataclass(frozen=True)
class Process:
    """The most that one kind of process holds, and what to do where it is too much."""

    name: str
    bytes: float
    advice: str


@dataclass(frozen=True)
class Stage:
    """What a stage takes, once."""

    name: str
    times: float  # how often it happens in the training
    seconds: float
    core_hours: float
    gpu_hours: float
    process: str  # the process that holds the most
    memory: float  # bytes that it holds
    read: float  # bytes
    written: float
    gets: float
    puts: float
    dollars: float


@dataclass(frozen=True)
class Cost:
    """The cost of a training."""

    stages: list[Stage]
    total: Stage  # each stage as often as it happens; memory is the largest
    kept: float  # bytes on the store at the end
    storage_dollars: float  # for keeping them, in the total
    warnings: list[str]


class _Work:
    """The numbers of one stage, gathered by its function."""

    def __init__(self, name: str, times: float, *processes: Process) -> None:
        self.name, self.times, self.processes = name, times, processes
        self.core_s = self.alone_s = self.gpu_s = self.read = self.written = 0.0
        self.gets = self.puts = self.small_gets = 0.0
        self.parallel: float | None = None  # tasks at most; None: as many as there are cores


def upload_requests(size: float) -> int:
    """Return how many requests write an object of ``size`` bytes."""
    return 1 if size <= PART else ceil(size / PART) + 2


def place_bytes(job: Job) -> int:
    """Return the bytes of a place in its shard: headers, and data padded to whole tar blocks; its JSON takes one."""
    data = ((job.tile_bytes, 1), (job.view_bytes, job.views), (HEADER, 1))
    return sum((HEADER + ceil(size / HEADER) * HEADER) * count for size, count in data)


def shards(job: Job) -> int:
    """Return how many shards the training places make."""
    return ceil(job.places * place_bytes(job) / (job.shard_mib * 2**20))


def vectors_size(rows: int, dim: int) -> tuple[int, int]:
    """Return the bytes and the objects of an array of embeddings; the last chunk is stored whole."""
    objects = ceil(rows / embeddings.SHARD_ROWS)
    chunks = embeddings.SHARD_ROWS // embeddings.CHUNK_ROWS
    return ceil(rows / embeddings.CHUNK_ROWS) * embeddings.CHUNK_ROWS * dim * 4 + objects * (16 * chunks + 4), objects


def graph_size(places: int, k: int) -> tuple[int, int]:
    """Return the bytes of a graph's entries before compression, and the objects that hold them."""
    return 6 * k * places, 2 * ceil(places / graph.SHARD_ROWS)


def plan_size(pairs: int) -> int:
    """Return the bytes of a plan before compression: batch and place of four bytes, lane and view of two."""
    return 12 * pairs


def index_bytes(job: Job, known: Coefficients) -> float:
    """Return about how many bytes of the store the index takes."""
    return job.places * (2 + job.views) * known.index_member + job.pairs * known.index_place


def probes_of(places: int, known: Coefficients) -> float:
    """Return about how many inverted lists each query searches."""
    grown: float = known.probes * max(1.0, places / 200_000) ** known.probes_growth
    return min(grown, ivf.MOST_PROBES, places / ivf.LIST)


def cost(job: Job, prices: Prices, known: Coefficients | None = None) -> Cost:
    """Compute the cost of a training.

    Args:
        job: What is trained, and on what.
        prices: Dollars.
        known: What was measured; None takes the defaults.
    """
    known = known or Coefficients()
    works = [stage(job, known) for stage in (_shard, _train, _embed, _gps, _visual, _plan, _order, _rewrite, _evaluate)]
    stages = [_priced(job, prices, known, work) for work in works]
    kept = _kept(job, known)
    storage = kept / 1e9 * prices.storage * prices.months
    return Cost(stages, _total(stages, storage), kept, storage, _warnings(job, works, stages))


def _priced(job: Job, prices: Prices, known: Coefficients, work: _Work) -> Stage:
    """Turn a stage's work into seconds and dollars on the job's machines."""
    on_gpus = work.gpu_s > 0 and work.core_s == 0  # which then read the store
    threads = min(job.threads, work.parallel or job.threads)
    through = (work.read + work.written) / (job.bandwidth * 1e6 * (job.gpus if on_gpus else job.workers))
    waiting = work.small_gets * known.request / (LIST_READS * threads)
    of_gpus, of_cores = work.gpu_s / job.gpus, work.alone_s + max(work.core_s / threads, through, waiting)
    if on_gpus:
        of_gpus, of_cores = max(of_gpus, through), 0.0
    seconds = of_gpus + of_cores
    cores, gpus = of_cores * job.threads / HOUR, of_gpus * job.gpus / HOUR
    dollars = cores * prices.core_hour + gpus * prices.gpu_hour
    dollars += (work.gets * prices.gets + work.puts * prices.puts) / 1000
    most = max(work.processes, key=lambda process: process.bytes)
    return Stage(
        work.name, work.times, seconds, cores, gpus, most.name, most.bytes, work.read, work.written,
        work.gets, work.puts, dollars,
    )  # fmt: skip


def _total(stages: list[Stage], storage: float) -> Stage:
    most = max((stage for stage in stages if stage.times), key=lambda stage: stage.memory)
    names = ("seconds", "core_hours", "gpu_hours", "read", "written", "gets", "puts", "dollars")
    sums = {name: sum(getattr(stage, name) * stage.times for stage in stages) for name in names}
    sums["dollars"] += storage
    return Stage(name="total", times=1, process=most.process, memory=most.memory, **sums)


def _kept(job: Job, known: Coefficients) -> float:
    """Return the bytes on the store at the end: all generations, embeddings, graphs and plans."""
    layouts = (1 + job.reclusters) * (job.places * place_bytes(job) + index_bytes(job, known))
    vectors = vectors_size(job.pairs, job.dim)[0] + vectors_size(job.places, job.dim)[0]
    graphs = (job.minings + 1) * graph_size(job.places, job.neighbours)[0] * known.graph_kept
    return layouts + job.minings * vectors + graphs + job.epochs * plan_size(job.pairs)


def _shard(job: Job, known: Coefficients) -> _Work:
    images = job.places * (1 + job.views)
    work = _Work("shard", 1, Process("worker", known.shard_memory, ""))
    work.core_s = images * known.shard_image
    work.read = images * job.raw_image_bytes
    work.written = job.places * place_bytes(job) + index_bytes(job, known)
    work.gets = images
    work.puts = shards(job) * upload_requests(job.shard_mib * 2**20)
    return work


def _read_layout(job: Job, known: Coefficients, work: _Work) -> None:
    """Add one reading of all shards."""
    work.read += job.places * place_bytes(job) * known.amplification
    work.gets += shards(job) * ceil(job.shard_mib * 2**20 / MAX_READ)


def _train(job: Job, known: Coefficients) -> _Work:
    index = job.places / job.gpus * (1 + job.views) * known.lane_image
    held = known.buffer + index + job.pairs * known.trainer_pair
    advice = "give the trainer's machine that much; more GPUs, with as many lanes, divide the index"
    work = _Work("train an epoch", job.epochs, Process("trainer", held, advice))
    work.gpu_s = job.pairs / job.pairs_per_second
    _read_layout(job, known, work)
    work.read += plan_size(job.pairs) + index_bytes(job, known)
    return work


def _embed(job: Job, known: Coefficients) -> _Work:
    sizes = [vectors_size(job.pairs, job.dim), vectors_size(job.places, job.dim)]
    index = job.places / job.gpus * (2 + job.views) * known.index_held + 8 * job.places + 10 * job.pairs
    waiting = sum(min(size, embeddings.HELD_BYTES) for size, _ in sizes)  # the rest lies in a file
    advice = "give the trainer's machine that much; more GPUs divide the index"
    work = _Work("embed", job.minings, Process("first trainer", known.buffer + index + waiting, advice))
    work.gpu_s = job.pairs / job.pairs_per_second * known.embed_share
    _read_layout(job, known, work)
    work.written = sum(size for size, _ in sizes)
    work.puts = sum(objects * upload_requests(size / objects) for size, objects in sizes)
    return work


def _write_graph(job: Job, known: Coefficients, work: _Work) -> None:
    size, objects = graph_size(job.places, job.neighbours)
    work.written += size * known.graph_kept
    work.puts += objects


def _gps(job: Job, known: Coefficients) -> _Work:
    n, k = job.places, job.neighbours
    thread = max(40 * gps.BLOCK * k + 40e6, 18 * gps.WRITTEN * k)
    work = _Work(
        "GPS graph", 1,
        Process("worker", thread * job.cores, f"{thread / 1e9:.2g} GB a core: start workers with fewer cores each"),
        Process("client", known.gps_client * n, "give the process that mines that much; nothing divides it"),
    )  # fmt: skip
    work.core_s, work.alone_s = n * known.gps_place, n * known.gps_alone
    find, blocks = 4 + 6 * k, ceil(n / gps.BLOCK)  # bytes of what is found for a place; blocks of space
    _write_graph(job, known, work)
    # A block is read with those around it. Where ids do not follow space, each range of rows is of all blocks.
    work.read = (9 * PLACE.itemsize + find) * n
    work.written += (PLACE.itemsize + find) * n
    work.gets = work.small_gets = 10 * blocks + blocks * ceil(n / gps.WRITTEN)
    work.puts += blocks * (upload_requests(PLACE.itemsize * gps.BLOCK) + upload_requests(find * gps.BLOCK))
    return work


def _visual(job: Job, known: Coefficients) -> _Work:
    """Return the work of mining: lists keep their size, so most grows with N; centroids and some reads with N²."""
    n, queries, dim, k = job.places, job.pairs, job.dim, job.neighbours
    rows = n + queries
    thread = exact.BLOCK * dim * 4 + exact.QUERIES * (dim * 4 + 48 * k)
    if n > EXACT_UP_TO:
        thread = max(4 * exact.BLOCK * dim * 4 + exact.QUERIES * 48 * k, 4 * WRITTEN * k * 8)
    work = _Work(
        "visual graph", job.minings,
        Process("worker", thread * job.cores + 10 * rows, f"{thread / 1e9:.2g} GB a core: fewer cores; the rest stays"),
        Process("client", known.visual_client * n, "give the process that mines that much; nothing divides it"),
    )  # fmt: skip
    _write_graph(job, known, work)
    if n <= EXACT_UP_TO:
        blocks = ceil(queries / exact.QUERIES)
        work.core_s = queries * n * dim * known.multiply_add
        work.read = 4 * dim * (queries + blocks * n)
        work.gets = ceil(queries / embeddings.CHUNK_ROWS) + blocks * ceil(n / embeddings.CHUNK_ROWS)
        return work
    probes = probes_of(n, known)
    lists, tasks = n / ivf.LIST, ceil(queries / exact.QUERIES)
    centroids = 2 * lists**2 * dim
    partitions = ceil(rows / ivf.PARTITION * 2) * ivf.PARTITION * dim
    compared = queries * probes * ivf.LIST * dim + SAMPLE * n * dim
    work.core_s = queries * known.list_query + (centroids + partitions + compared) * known.multiply_add
    # Lists that a task of QUERIES queries reads; those of neighbouring lists are partly the same.
    of_task = min(lists, max(1.0, exact.QUERIES / ivf.LIST) * probes * known.shared_lists)
    vector = 4 * (dim + 1)
    work.read = vector * (3 * rows + tasks * of_task * ivf.LIST) + 8 * k * queries
    work.written = work.written + 2 * vector * rows + 8 * k * queries
    ranges = ceil(rows / exact.BLOCK) * ceil(n / ivf.PARTITION) + tasks * ceil(queries / WRITTEN)
    work.gets = rows / embeddings.CHUNK_ROWS + ranges + tasks * of_task
    work.small_gets = work.gets
    objects = 2 * rows / exact.BLOCK
    work.puts += objects * upload_requests(exact.BLOCK * vector) + tasks * upload_requests(exact.QUERIES * 8 * k)
    return work


def _plan(job: Job, known: Coefficients) -> _Work:
    k, n = job.neighbours, job.places
    ids = 4 * k * n  # bytes of the neighbours, which are written again with those of a lane together
    by_lanes = ids > WHOLE_GRAPH
    of_place = 4 * k + known.lane_pair * job.views
    planner = job.pairs * known.planner_pair + (0 if by_lanes else 2 * ids)
    work = _Work(
        "plan", job.epochs,
        Process("planner", planner, "give the process that plans that much; nothing divides it"),
        Process(
            "task of a lane", n / job.lanes * of_place,
            f"the lanes are too long: use --lanes {ceil(n * of_place / MEMORY)} or more",
        ),
    )  # fmt: skip
    work.core_s, work.alone_s = job.pairs * known.plan_pair, job.pairs * known.plan_alone
    work.parallel = job.lanes
    work.read = graph_size(n, k)[0] * known.graph_kept + index_bytes(job, known) + plan_size(job.pairs)
    work.gets = ceil(n / graph.SHARD_ROWS)
    work.written, work.puts = plan_size(job.pairs), upload_requests(plan_size(job.pairs)) + 1
    if by_lanes:
        blocks = ceil(ids / BLOCK_BYTES)
        work.read, work.gets = work.read + ids, work.gets + blocks * job.lanes
        work.written, work.puts = work.written + ids, work.puts + blocks * upload_requests(BLOCK_BYTES)
    return work


def _order(job: Job, known: Coefficients) -> _Work:
    n, dim = job.places, job.dim
    advice = "give the process that reclusters that much; nothing divides it"
    width = min(scratch.WIDTH, max(1, scratch.COLUMNS_BYTES // (2 * n)))  # columns kept together
    groups = ceil(dim / width)
    columns = min(2 * n * scratch.WIDTH, max(scratch.COLUMNS_BYTES, 2 * n))
    task = max(columns + 2 * scratch.BLOCK_BYTES, 5 * scratch.BLOCK_BYTES + 8 * n)
    work = _Work(
        "similarity order", job.reclusters,
        Process("client", TRIED + 60 * n, advice),
        Process("worker", task * job.cores, f"{task / 1e9:.2g} GB a core: start workers with fewer cores each"),
    )  # fmt: skip
    work.core_s = n * known.order_place * max(1.0, log2(n) / log2(1_000_000)) + known.order_trial
    levels = max(1, ceil(log2(max(2.0, 2 * dim * n / 2**26))))
    work.read = 4 * dim * (n + job.pairs) + ROUNDS * n * (4 * NEAR * groups + 4 * dim) + levels * 2 * dim * n
    work.written = n * (4 * NEAR + 2 * dim * (2 * ROUNDS + 2))
    blocks = ceil(2 * dim * n / scratch.BLOCK_BYTES)
    work.gets = blocks * groups * (2 * ROUNDS + 1) + blocks * levels
    work.puts = blocks * groups * (2 * ROUNDS + 1)
    return work


def _rewrite(job: Job, known: Coefficients) -> _Work:
    shard, members = job.shard_mib * 2**20, job.places * (2 + job.views)
    advice = "give the process that reclusters that much; it holds the index"
    work = _Work(
        "rewrite", job.reclusters,
        Process("client", members * (known.index_held + 8), advice),
        Process("worker", job.cores * (2 * shard + rewrite.READS * rewrite.RANGE_BYTES), "use a smaller --shard-mib"),
    )  # fmt: skip
    size = job.places * place_bytes(job)
    work.core_s, work.read, work.written = size * known.rewrite_byte, size, size + index_bytes(job, known)
    work.gets, work.small_gets = job.places, job.places * LIST_READS / rewrite.READS  # a range for each place
    work.puts = shards(job) * upload_requests(shard)
    return work


def _evaluate(job: Job, known: Coefficients) -> _Work:
    """Return the work of embedding the test split on the GPUs, and then comparing it on the workers."""
    n, queries = job.test_places, job.test_places * job.views
    work = _Work(
        "evaluation", max(1, job.epochs // job.evaluate_every),
        Process("worker", 200e6 * job.cores + 200 * (n + queries), "evaluate on a smaller test split"),
    )  # fmt: skip
    work.core_s = queries * n * job.dim * known.multiply_add
    work.gpu_s = queries / job.pairs_per_second * known.embed_share
    vectors = vectors_size(n, job.dim)[0] + vectors_size(queries, job.dim)[0]
    passes = ceil(queries / exact.QUERIES)
    work.read = n * place_bytes(job) + 4 * job.dim * (queries + passes * n)
    work.written = vectors
    work.gets = ceil(n * place_bytes(job) / MAX_READ) + passes * ceil(n / embeddings.SHARD_ROWS)
    work.puts = 2 * ceil(vectors / 2 / PART)
    return work


def _warnings(job: Job, works: list[_Work], stages: list[Stage]) -> list[str]:
    """Say where a bound is exceeded, and what to do."""
    found = [
        f"{work.name}: the {process.name} holds {process.bytes / 1e9:.1f} GB, above {MEMORY / 1e9} GB: {process.advice}"
        for work in works
        if work.times
        for process in work.processes
        if process.bytes > MEMORY and process.advice
    ]
    if job.lanes % job.gpus:
        found.append(f"train an epoch: {job.gpus} GPUs cannot share {job.lanes} lanes: use a multiple as --lanes")
    if job.lanes > shards(job):
        found.append(
            f"plan: {job.lanes} lanes, but {shards(job)} shards: a lane needs one of its own; use fewer --lanes"
        )
    elif job.lanes < job.threads:
        found.append(f"plan: {job.threads} cores, but {job.lanes} lanes: the other cores wait; use more --lanes")
    by_name = {stage.name: stage for stage in stages}
    epoch = by_name["train an epoch"].seconds
    beside = sum(by_name[name].seconds for name in ("visual graph", "plan", "similarity order", "rewrite"))
    if job.minings and beside > epoch:
        found.append(
            f"mining, planning and rewriting take up to {beside / epoch:.1f} epochs, so training waits for them: "
            "use more --workers, or mine less often"
        )
    if job.places > MEASURED_TO:
        found.append(
            f"extrapolated: the coefficients were measured with at most {MEASURED_TO:,} places, these are "
            f"{job.places / MEASURED_TO:,.0f} times as many"
        )
    if job.minings and job.places > EXACT_UP_TO:
        most = job.pairs * ivf.MOST_PROBES * ivf.LIST * job.dim * Coefficients.multiply_add / HOUR
        found.append(
            f"visual graph: {probes_of(job.places, Coefficients()):.0f} lists a query are assumed; data without local "
            f"structure take up to {ivf.MOST_PROBES}, {most:,.0f} core-hours"
        )
    return found


def as_json(job: Job, prices: Prices, result: Cost, known: Coefficients | None = None) -> dict[str, Any]:
    """Return a cost, and all that it was computed from, as what ``json`` can write."""
    whole = {"job": asdict(job), "prices": asdict(prices), "coefficients": asdict(known or Coefficients())}
    return whole | {name.name: _plain(getattr(result, name.name)) for name in fields(result)}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return asdict(value) if isinstance(value, Stage) else value
