"""Reclustering: the same members, bit for bit, in a better order; cut off anywhere it ends right; nobody notices."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from webdataset.gopen import gopen_schemes

from geostream.dask import run_tasks
from geostream.errors import AlreadyExists, BadInput, LayoutNotCommitted, NotFound, StaleArtefact, StoreError
from geostream.layout import Layout, NewLayout, commit_layout, layout_infos, open_layout
from geostream.layout.files import GOING, JOB
from geostream.layout.verify import verify_layout
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings, read_rows
from geostream.mining.graph import GraphWriter, open_graph
from geostream.reclustering import rewrite as module
from geostream.reclustering.means import place_vectors
from geostream.reclustering.recluster import recluster
from geostream.runs import stages
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.loader import Loader
from infra.s3 import S3Server
from tests.cities import unit
from tests.command import said
from tests.helpers import tiny_layout, tiny_places, write_layout
from tests.streaming.plans import SIZES, assert_same, hand_made_plan

RUN = "base"
PLACES = 48
WHOLE = TrainSettings()  # batches larger than these layouts: no plan can be tried, so each shard is one piece


def recluster_by_run(
    root: Store, layout: Layout, name: str, settings: TrainSettings, epoch: int | None = None
) -> Layout:
    run = Run(root, layout, name)
    run.settings = settings
    return stages.recluster(run, epoch)


def embedded(layout: Layout, root: Store, run: str = RUN, epoch: int = 2, seed: int = 0) -> Embeddings:
    """Embeddings of the training set, with a graph: place p is of cluster p % 4, unlike a tiny layout's order."""
    rng = np.random.default_rng(seed)
    pairs, places = layout.pairs("train"), np.unique(layout.pairs("train").place)
    centres = unit(rng.standard_normal((4, 16)))
    folder, name = root.child(layout.dataset, "runs", run), Run.embeddings_name("train", epoch)
    writer = create_embeddings(
        folder,
        name,
        layout=layout,
        checkpoint="step-00000010",
        split="train",
        pairs=pairs,
        reference_place=places,
        dim=16,
    )
    for of, write in ((pairs.place, writer.write_query), (places, writer.write_reference)):
        vectors = unit(centres[of % 4] + 0.3 * unit(rng.standard_normal((len(of), 16))))
        write(np.arange(len(of)), vectors)
    writer.commit()
    made = open_embeddings(folder, name, layout)
    vectors = read_rows(made.reference)
    likeness = vectors @ vectors.T - 3 * np.eye(len(places), dtype=np.float32)
    nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :6]
    graph = GraphWriter.create(
        folder, Run.graph_name(epoch), kind="visual", layout=layout, embeddings=name, places=places, k=6
    )
    graph.write(0, places[nearest], np.take_along_axis(likeness, nearest, axis=1))
    graph.commit({"mode": "exact"})
    return made


def reclustered(root: Store, layout: Layout, embeddings: Embeddings, settings: TrainSettings = WHOLE) -> Layout:
    """By the graph of the embeddings."""
    epoch = int(embeddings.name.removesuffix(".zarr")[-4:])
    graph = open_graph(embeddings.run, Run.graph_name(epoch), layout)
    return recluster(root, layout, RUN, embeddings, graph, settings)


def members(layout: Layout) -> Counter[Any]:
    """(place, member, size, checksum) of every member, as the index has it."""
    return Counter((row["place"], row["member"], row["size"], row["crc32c"]) for row in layout.members.to_pylist())


def stored(layout: Layout) -> dict[str, str]:
    """Hash of header and data of every member, read where the index says, padding left away."""
    found = {}
    for row in layout.members.to_pylist():
        data = layout.store.read_range(layout.shard_names[row["shard"]], row["offset"] - 512, row["size"] + 512)
        found[f"{layout.keys[row['place']]}.{row['member']}"] = hashlib.sha256(data).hexdigest()
    return found


def contents(store: Store) -> dict[str, str]:
    return {info.path: hashlib.sha256(store.read(info.path)).hexdigest() for info in store.list()}


def by_webdataset(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Every sample by key, through webdataset's own reader."""
    filesystem, _ = layout.store.filesystem()
    monkeypatch.setitem(gopen_schemes, "s3", lambda url, mode="rb", bufsize=8192: filesystem.open(url, mode))
    urls = [f"{layout.store.url}/{name}" for name in layout.shard_names]
    samples = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        samples[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return samples


def test_the_next_generation_holds_the_same_in_a_better_order(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny_layout(s3_store, places=PLACES, views=2, distractors=3, name="base")
    old = contents(before.store)
    after = reclustered(s3_store, before, embedded(before, s3_store))
    assert (after.name, after.generation, after.info["parent"]) == ("base-g1", 1, before.id)
    assert after.id != before.id and after.places_id == before.places_id
    assert members(after) == members(before)
    assert stored(after) == stored(before) and len(stored(after)) == before.members.num_rows
    assert verify_layout(after).count == 0
    assert by_webdataset(after, monkeypatch) == by_webdataset(before, monkeypatch)
    assert len(by_webdataset(after, monkeypatch)) == before.n_places
    assert contents(before.store) == old  # untouched
    # Places of one cluster lie together: all shards but those that a cluster's end falls into are pure.
    places = np.unique(before.pairs("train").place)
    mixed = [len(set(places[after.shard_of_place[places] == shard] % 4)) for shard in range(PLACES // 4)]
    assert np.mean(np.array(mixed) == 1) > 0.6
    source = after.info["source"]
    assert source["similarity"]["after"] > source["similarity"]["before"] + 0.3
    assert (source["made_from"], source["run"], source["first"]) == ("base", RUN, {"adapter": "tiny"})
    assert open_layout(s3_store).id == after.id
    # Again, from the old generation and from the new one: found, and nothing written.
    whole = contents(after.store)
    assert set(whole) == {"layout.json", "members.parquet", "places.parquet", *after.shard_names}
    assert (
        recluster_by_run(s3_store, before, RUN, WHOLE).id
        == recluster_by_run(s3_store, after, RUN, WHOLE).id
        == after.id
    )
    assert contents(after.store) == whole and s3_store.folders("tiny/layouts") == ["base", "base-g1"]


def test_shards_are_spread_over_the_order_as_far_as_plans_stay_hard_enough(tmp_path: Path) -> None:
    """Four clusters of twelve places in four shards: all a cluster's, or as many pieces as batches of four allow."""
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=PLACES, places_per_shard=12)
    embeddings = embedded(before, root)
    places = np.unique(before.pairs("train").place)

    def corners(hardness: float) -> list[int]:
        """Clusters in each shard."""
        settings = TrainSettings().changed(batch_size=4, resident_shards=1, hardness=hardness)
        after = reclustered(root, before, embeddings, settings)
        assert members(after) == members(before) and verify_layout(after).count == 0
        assert reclustered(root, before, embeddings, settings).id == after.id
        assert recluster_by_run(root, after, RUN, settings).id == after.id  # lies in this order already
        of_shard = [len(set(places[after.shard_of_place[places] == shard] % 4)) for shard in range(4)]
        assert after.info["source"]["pieces"] >= max(of_shard) - 1  # a piece may lie across two clusters
        return of_shard

    assert min(corners(0.1)) > 2
    assert max(corners(9.0)) <= 2  # no plan is as hard as that: then the hardest


def test_shards_are_as_many_as_before_and_never_mix_places_with_and_without_pairs(tmp_path: Path) -> None:
    """Here the shards of the old generation do mix them."""
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=38, test_places=9, distractors=4, places_per_shard=6)
    after = reclustered(root, before, embedded(before, root))
    trained = np.isin(np.arange(before.n_places), before.pairs("train").place)
    for shard in range(len(after.shard_names)):
        assert len(set(trained[after.shard_of_place == shard])) == 1
    of_trained = [after.shard_sizes[s] for s in np.unique(after.shard_of_place[trained])]
    assert len(of_trained) == 6 and max(of_trained) < 1.5 * min(of_trained)
    place = after.members["place"].to_numpy()
    others = place[~trained[place]]
    assert others[np.sort(np.unique(others, return_index=True)[1])].tolist() == list(range(38, 51))
    assert verify_layout(after).count == 0 and members(after) == members(before)


def test_every_byte_is_read_once_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=PLACES, views=2)
    embeddings = embedded(before, root)
    read: list[tuple[str, int, int]] = []
    written: list[tuple[str, int]] = []
    get, put = Store.read_range, Store.write

    def read_range(self: Store, path: str, offset: int, size: int) -> bytes:
        read.append((path, offset, size))
        return get(self, path, offset, size)

    def write(self: Store, path: str, data: bytes, **how: Any) -> None:
        if path.endswith(".tar"):
            written.append((path, len(data)))
        put(self, path, data, **how)

    monkeypatch.setattr(Store, "read_range", read_range)
    monkeypatch.setattr(Store, "write", write)
    monkeypatch.setattr(module, "RANGE_BYTES", 9000)
    after = reclustered(root, before, embeddings)
    assert sorted(written) == sorted(zip(after.shard_names, after.shard_sizes.tolist(), strict=True))
    of_tars = sorted(one for one in read if one[0].endswith(".tar"))
    assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in pairwise(of_tars))
    data = int((before.members["size"].to_numpy() + 512).sum())
    assert data <= sum(size for _, _, size in of_tars) < before.shard_sizes.sum()
    # Neighbours are read at once, four members a place, but no more than the limit and a member at a time.
    assert len(of_tars) < before.members.num_rows / 2
    assert max(size for _, _, size in of_tars) < 9000 + before.members["size"].to_numpy().max() + 1024


def test_few_tasks_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number is: the generation is the same, byte for byte."""
    made = []
    for name, most in (("all", module.TASKS), ("few", 5)):
        root = Store.open(tmp_path / name)
        before = tiny_layout(root, places=PLACES)
        monkeypatch.setattr(module, "TASKS", most)
        handed: list[int] = []

        def counted(cluster: Any, work: Any, tasks: Any, stage: str, handed: list[int] = handed) -> Iterator[Any]:
            handed.append(len(tasks))
            return run_tasks(cluster, work, tasks, stage)

        with monkeypatch.context() as patch:
            patch.setattr(module, "run_tasks", counted)
            made.append(contents(reclustered(root, before, embedded(before, root)).store))
        assert handed == ([14] if name == "all" else [5, 5, 4])
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_task_holds_its_new_shard_and_a_few_ranges(tmp_path: Path) -> None:
    """A layout of 96 MB; a task that writes 24 MB of it holds two of its shards and the ranges, not the layout."""
    root = Store.open(tmp_path)
    places = [
        replace(place, images={name: data + bytes(10**6) for name, data in place.images.items()})
        for place in tiny_places(places=48, test_places=0, distractors=0)
    ]
    before = write_layout(root, places, places_per_shard=12)
    program = """
    import sys
    from functools import partial
    import numpy as np
    from geostream.layout import open_layout
    from geostream.reclustering import rewrite
    from geostream.store import Store

    def held(name):
        [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
        return int(line.split()[1]) * 1024

    root = Store.open(sys.argv[1])
    layout = open_layout(root)
    rewrite.RANGE_BYTES = 2**18
    index = rewrite._MembersOfPlaces(layout)
    folder = root.child("tiny", "layouts", "new")
    write = partial(rewrite.write_shard, root=root.url, dataset="tiny", parent=(layout.name, layout.id), folder=folder)
    write(rewrite.NewShard("shard-00000.tar", index.task(np.array([3], dtype=np.int32))))
    open("/proc/self/clear_refs", "w").write("5")
    before = held("VmRSS")
    write(rewrite.NewShard("shard-00001.tar", index.task(np.arange(0, 48, 4, dtype=np.int32))))
    print(held("VmHWM") - before)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    grown = int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
    shard = int(before.shard_sizes[0])
    assert before.shard_sizes.sum() > 95e6
    assert shard < grown < 2 * shard + module.READS * 1.1e6 + 8e6


def test_a_reader_of_the_old_generation_notices_nothing(s3_store: Store) -> None:
    before = tiny_layout(s3_store, places=PLACES)
    embeddings = embedded(before, s3_store)
    plan = hand_made_plan(before, lanes=2)
    with Loader(plan_dataset(before, plan, SIZES)) as loader:
        alone = list(loader)
    with Loader(plan_dataset(before, plan, SIZES)) as loader:
        batches = iter(loader)
        taken = [next(batches) for _ in range(3)]
        reclustered(s3_store, before, embeddings)
        taken += list(batches)
    assert_same(taken, alone)
    with Loader(plan_dataset(open_layout(s3_store, "tiny", "g0"), plan, SIZES)) as loader:
        assert_same(list(loader), alone)


SCRIPT = """
import os, sys
import distributed
from geostream.layout import open_layout
from geostream.runs.run import Run
from geostream.runs.stages import recluster
from geostream.settings import TrainSettings
from geostream.store import Store
children = []
for line in sys.stdin:
    if line.split():
        if not (child := os.fork()):
            try:
                root = Store.open(line.split()[0])
                run = Run(root, open_layout(root, "tiny", "g0"), line.split()[1])
                run.settings = TrainSettings()
                recluster(run)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
        print(child, flush=True)
    else:
        print(*[os.waitpid(child, 0)[1] for child in children], flush=True)
        children = []
"""


class Reclusterings:
    """Processes that recluster. One imports what they need and forks them: that would take longer than their work."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", SCRIPT]
        self.parent = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, line: str) -> list[int]:
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.parent.stdin.write(f"{line}\n")
        self.parent.stdin.flush()
        return [int(number) for number in self.parent.stdout.readline().split()]

    def start(self, root: Store, run: str = RUN) -> int:
        """The process's id."""
        [pid] = self.ask(f"{root.url} {run}")
        return pid

    def wait(self) -> list[int]:
        """The exit statuses of all that were started; 0: all went well, 9: killed."""
        return self.ask("")


@pytest.fixture(scope="module")
def reclusterings(s3: S3Server) -> Iterator[Reclusterings]:
    made = Reclusterings()
    yield made
    made.parent.kill()
    made.parent.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("places", "moments"), [(120, (0.3,)), (240, (0.0, 0.5))], ids=["once", "twice"])
def test_killed_at_any_moment_and_started_again(
    tmp_path: Path, s3_store: Store, reclusterings: Reclusterings, places: int, moments: tuple[float, ...]
) -> None:
    """SIGKILL it ever later: what the last one commits is, byte for byte, what an undisturbed one commits.

    ``moments``: shares of the shards behind which it is killed.
    """
    size: dict[str, Any] = {"places": places, "views": 1, "places_per_shard": 2}
    whole = Store.open(tmp_path / "whole")
    undisturbed = tiny_layout(whole, **size)
    expected = reclustered(whole, undisturbed, embedded(undisturbed, whole))
    before = tiny_layout(s3_store, **size)
    embedded(before, s3_store)
    folder = s3_store.child("tiny", "layouts", "g0-g1")
    seen = []
    for shards in (max(1, int(len(expected.shard_names) * moment)) for moment in moments):
        pid = reclusterings.start(s3_store)
        while len(folder.list()) < 1 + shards:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        assert reclusterings.wait() == [signal.SIGKILL]
        seen.append(sum(info.path.endswith(".tar") for info in folder.list()))
        assert not folder.exists("layout.json") and open_layout(s3_store).id == before.id
    assert seen[0] >= 1 and sorted(set(seen)) == seen and seen[-1] < len(expected.shard_names)
    reclusterings.start(s3_store)
    assert reclusterings.wait() == [0]
    assert contents(folder) == contents(expected.store)
    assert s3_store.folders("tiny/layouts") == ["g0", "g0-g1"]


@pytest.mark.slow
def test_two_at_once_end_with_one_generation_an_order(s3_store: Store, reclusterings: Reclusterings) -> None:
    """Four processes, two orders: two generations, neither of them mixed."""
    before = tiny_layout(s3_store, places=60, places_per_shard=2)
    for seed, run in enumerate(("one", "two")):
        embedded(before, s3_store, run, seed=seed)
    for run in ("one", "two", "one", "two"):
        reclusterings.start(s3_store, run)
    assert reclusterings.wait() == [0, 0, 0, 0]
    assert s3_store.folders("tiny/layouts") == ["g0", "g0-g1", "g0-g1-2"]
    made = [open_layout(s3_store, "tiny", name) for name in ("g0-g1", "g0-g1-2")]
    assert {one.info["source"]["run"] for one in made} == {"one", "two"}
    for one in made:
        assert verify_layout(one).count == 0 and members(one) == members(before)
        assert {info.path for info in one.store.list()} == {
            "layout.json",
            "members.parquet",
            "places.parquet",
            *one.shard_names,
        }
        assert recluster_by_run(s3_store, before, one.info["source"]["run"], WHOLE).name == one.name
    current = open_layout(s3_store)  # of the one that was first
    [other] = [one for one in made if one.name != current.name]
    third = recluster_by_run(s3_store, current, other.info["source"]["run"], WHOLE)
    assert (third.name, third.generation, open_layout(s3_store).id) == ("g0-g2", 2, third.id)


def test_a_commit_between_two_looks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process with the same order was faster: before this one's claim, or before its commit."""
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=12)
    embeddings = embedded(before, root)

    def faster(*arguments: Any, **named: Any) -> Layout:
        commit_layout(*arguments, **named)
        raise AlreadyExists("layout.json")

    with monkeypatch.context() as patch:
        patch.setattr(module, "commit_layout", faster)
        after = reclustered(root, before, embeddings)
    assert verify_layout(after).count == 0 and not after.store.exists(JOB)
    looks = []

    def late(store: Store, dataset: str) -> dict[str, dict[str, Any]]:
        looks.append(layout_infos(store, dataset))
        return {name: info for name, info in looks[-1].items() if name != after.name or len(looks) > 1}

    monkeypatch.setattr(module, "layout_infos", late)
    assert reclustered(root, before, embeddings).id == after.id and len(looks) == 2
    assert root.folders("tiny/layouts") == ["g0", "g0-g1"]


def test_a_kill_between_commit_and_clean_up(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=12)
    embeddings = embedded(before, root)
    after = reclustered(root, before, embeddings)
    after.store.write_json(JOB, {"order": after.info["source"]["order"]})
    left = tmp_path / "tiny" / "layouts" / "g0-g1" / "shard-00001.tar#3"
    young = left.with_name("shard-00000.tar#1")  # another process may be writing it
    theirs = left.with_name("shard-00000.tar#mine")
    for file in (left, young, theirs):
        file.write_bytes(b"half")
    for file in (left, theirs):
        os.utime(file, (time.time() - 7200, time.time() - 7200))
    assert reclustered(root, before, embeddings).id == after.id
    assert not after.store.exists(JOB) and not left.exists()
    assert young.exists() and theirs.exists()


def test_leftovers_of_another_order_are_not_taken(tmp_path: Path) -> None:
    """Folders that another reclustering, a sharding or a removal has begun: each keeps its name and its objects."""
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=12)
    embeddings = embedded(before, root)
    layouts = root.child("tiny", "layouts")
    shard = before.store.read("shard-00000.tar")
    order = module.order_id(before, [])
    for name, mark in (("g0-g1", {"order": order}), ("g0-g1-2", {"fingerprint": "f"}), ("g0-g1-3", None)):
        layouts.child(name).write("shard-00000.tar", shard)
        if mark is not None:
            layouts.child(name).write_json(JOB, mark)
    others = {name: contents(layouts.child(name)) for name in ("g0-g1", "g0-g1-2", "g0-g1-3")}
    after = reclustered(root, before, embeddings)
    assert after.name == "g0-g1-4" and verify_layout(after).count == 0
    assert {name: contents(layouts.child(name)) for name in others} == others


def test_a_folder_that_is_being_removed_is_not_gone_on_with(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=12)
    embeddings = embedded(before, root)
    twin = reclustered(root, before, embeddings)
    twin.store.write_json(JOB, {"order": twin.info["source"]["order"]})
    twin.store.write_json(GOING, {})
    twin.store.delete("layout.json")
    assert reclustered(root, before, embeddings).name == "g0-g1-2"


def test_shards_that_someone_removes_meanwhile_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=12)
    folder, keep_alive = root.child("tiny", "layouts", "g0-g1"), module._keep_alive
    times = []

    def removed_behind(*arguments: Any) -> None:
        keep_alive(*arguments)
        times.append(1)
        if len(times) == 1:
            folder.delete("shard-00001.tar")

    monkeypatch.setattr(module, "_keep_alive", removed_behind)
    after = reclustered(root, before, embedded(before, root))
    assert verify_layout(after).count == 0 and len(times) == 2


def test_long_work_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=12)
    said = []
    put = Store.write_json

    def write_json(self: Store, path: str, value: Any, **how: Any) -> None:
        said.append(path)
        put(self, path, value, **how)

    monkeypatch.setattr(Store, "write_json", write_json)
    monkeypatch.setattr(module, "SIGN_OF_LIFE", 0.0)
    reclustered(root, before, embedded(before, root))
    assert said.count(JOB) > 2


def flip(data: bytearray, row: dict[str, Any]) -> None:
    data[row["offset"] + 3] ^= 1


def flip_header(data: bytearray, row: dict[str, Any]) -> None:
    data[row["offset"] - 500] ^= 1


def rename(data: bytearray, row: dict[str, Any]) -> None:
    header = tarfile.TarInfo.frombuf(bytes(data[row["offset"] - 512 : row["offset"]]), "utf-8", "strict")
    header.name = "other.tile.jpg"
    data[row["offset"] - 512 : row["offset"]] = header.tobuf(tarfile.USTAR_FORMAT)


def cut_off(data: bytearray, row: dict[str, Any]) -> None:
    del data[row["offset"] + 10 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "'alpha-0005.tile.jpg': .*checksum"),
        (flip_header, "'alpha-0005.tile.jpg': .*header .*damaged"),
        (rename, "'alpha-0005.tile.jpg': .*header .*another member"),
        (cut_off, "'alpha-000[567].*': .*shard ends"),
    ],
)
def test_a_damaged_member_stops_it_and_nothing_is_committed(tmp_path: Path, damage: Any, message: str) -> None:
    root = Store.open(tmp_path)
    before = tiny_layout(root, places=16)
    embeddings = embedded(before, root)
    [row] = [r for r in before.members.to_pylist() if (r["place"], r["member"]) == (5, "tile.jpg")]
    whole = before.store.read("shard-00001.tar")
    data = bytearray(whole)
    damage(data, row)
    before.store.write("shard-00001.tar", bytes(data))
    with pytest.raises(StoreError, match=f"g0/shard-00001.tar: {message}.*; .* geostream verify"):
        reclustered(root, before, embeddings)
    with pytest.raises(LayoutNotCommitted):
        open_layout(root, "tiny", "g0-g1")
    assert open_layout(root).id == before.id
    before.store.write("shard-00001.tar", whole)  # restored: it goes on
    assert verify_layout(reclustered(root, before, embeddings)).count == 0


def test_a_shard_that_is_gone_stops_it(s3_store: Store) -> None:
    before = tiny_layout(s3_store, places=16)
    embeddings = embedded(before, s3_store)
    before.store.delete("shard-00002.tar")
    with pytest.raises(NotFound, match="g0/shard-00002.tar"):
        reclustered(s3_store, before, embeddings)
    assert open_layout(s3_store).id == before.id


def test_the_table_of_places_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """Whatever wrote it: what was made of these places stays valid."""
    root = Store.open(tmp_path)
    tiny = tiny_layout(root, places=12)
    pq.write_table(tiny.places, tmp_path / "other.parquet", compression="none", row_group_size=3)
    other = (tmp_path / "other.parquet").read_bytes()
    assert other != tiny.store.read("places.parquet")
    folder = root.child("tiny", "layouts", "other")
    for name in tiny.shard_names:
        folder.write(name, tiny.store.read(name))
    before = commit_layout(
        folder,
        NewLayout(
            dataset="tiny",
            name="other",
            generation=0,
            coordinates="latlon",
            places=tiny.places,
            places_file=other,
            members=tiny.members,
            shards=list(zip(tiny.shard_names, tiny.shard_sizes.tolist(), strict=True)),
            source={},
            images={},
            broken=[],
        ),
    )
    assert before.places_id != tiny.places_id
    after = reclustered(root, before, embedded(before, root))
    assert after.store.read("places.parquet") == other and after.places_id == before.places_id
    with pytest.raises(StaleArtefact, match="places"):
        reclustered(root, tiny, Run(root, before, RUN).embeddings("train", 2))


def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    layout = tiny_layout(root, places=12)
    with pytest.raises(BadInput, match="not embedded yet"):
        recluster_by_run(root, layout, RUN, WHOLE)
    embedded(layout, root, epoch=3)
    with pytest.raises(NotFound, match=r"epoch-0004\.zarr"):
        recluster_by_run(root, layout, RUN, WHOLE, epoch=4)


def test_a_places_vector_is_the_mean_of_its_tile_and_of_its_views(tmp_path: Path) -> None:
    root = Store.open(tmp_path)
    layout = tiny_layout(root, places=12, views=3)
    embeddings = embedded(layout, root)
    places = np.unique(embeddings.pairs.place)
    query, reference = read_rows(embeddings.query), read_rows(embeddings.reference)
    expected = [query[embeddings.pairs.place == p].mean(axis=0) + reference[i] for i, p in enumerate(places)]
    assert np.allclose(place_vectors(embeddings, places), unit(np.array(expected)), atol=1e-6)


def test_the_command(s3_store: Store) -> None:
    before = tiny_layout(s3_store, places=16)
    embedded(before, s3_store, "first")
    shown = said("recluster", s3_store.url, "--run", "first")
    assert shown.endswith("layouts/g0-g1\n") and "likeness" in shown
    assert verify_layout(open_layout(s3_store)).count == 0
