"""No job ever sees, changes or removes what it has not written: other stores beside its own, and files of others in it.

Every clean-up is carried out here with strangers' objects all around it, under the names that would be hit if it
looked for what to remove instead of knowing it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from geostream.errors import BadInput
from geostream.layout import Layout, list_datasets, list_layouts, open_layout
from geostream.layout.verify import verify_layout
from geostream.mining.embeddings import create_embeddings
from geostream.reclustering.rewrite import rewrite
from geostream.runs.generations import prune
from geostream.store import Store
from sharding import ShardOptions, dry_run, read_places, shard
from sharding.job import ShardJob
from sharding.writer import foreign_objects
from tests.helpers import tiny_layout
from tests.vigor_raw import TWO, write_vigor

OPTIONS = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000)
# What a clean-up that lists would take for its own: there from the beginning, and beside what has been written.
BEFORE = (
    *(f"vigor/layouts/base/{name}" for name in ("notes.txt", "shard-90000.tar", "x.tar", "parts/mine.json", "a/b.tar")),
    *(f"tiny/layouts/{name}" for name in ("base/x.tar", "x/y.tar", "old/shard-00000.tar", "a b/layout.json")),
    *(f"tiny/runs/one/embeddings/epoch-0001.zarr/{name}" for name in ("notes.txt", "query/c/99/0", "scratch/mine")),
    "a dataset/layouts/base/layout.json",
)
BETWEEN = tuple(
    f"tiny/layouts/base-g1/{name}"
    for name in ("shard-00099.tar", "parts/x.json", "shard-00000.tar.bak", "shard-00000.tar#mine", "a/layout.json")
)
Contents = dict[str, str]


def contents(store: Store) -> Contents:
    return {info.path: hashlib.sha256(store.read(info.path)).hexdigest() for info in store.list()}


def put(store: Store, paths: Iterable[str]) -> None:
    for path in paths:
        store.write(path, path.encode())


def every_clean_up(store: Store, raw: Path, strangers: Iterable[str] = ()) -> Layout:
    """Shard, shard again, rewrite and prune layouts, embed a run twice: whatever removes objects.

    ``strangers``: objects that are put into the first rewritten layout.
    """
    places = read_places("vigor", raw, **TWO)
    shard(places, store, "vigor", options=OPTIONS, workers=1)
    assert shard(places, store, "vigor", options=OPTIONS, workers=1).already
    layout = tiny_layout(store, name="base", places=8)
    for seed in (1, 2):
        order = np.random.default_rng(seed).permutation(layout.n_places).astype(np.int32)
        layout = rewrite(store, layout, np.array_split(order, 3), {})
        put(store, strangers)
    run = store.child("tiny", "runs", "one")
    run.write_json("layout.json", {"layout": layout.name, "id": layout.id})
    prune(store, "tiny")
    for _ in range(2):
        pairs, references = layout.pairs("train"), np.unique(layout.pairs("train").place)
        create_embeddings(
            run, "embeddings/epoch-0001.zarr", layout=layout, checkpoint="", split="train",
            pairs=pairs, reference_place=references, dim=3,
        )  # fmt: skip
    assert list_datasets(store) == ["tiny", "vigor"] and list_layouts(store, "tiny") == ["base-g2"]
    for dataset in ("tiny", "vigor"):
        assert verify_layout(open_layout(store, dataset)).count == 0
    return layout


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_vigor(folder)
    return folder


@pytest.fixture(params=["s3", "local"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(tmp_path) if request.param == "local" else request.getfixturevalue("s3_store")


def test_strangers_in_a_store_are_left_alone(root: Store, raw: Path) -> None:
    put(root, BEFORE)
    every_clean_up(root, raw, BETWEEN)
    left = contents(root)
    strangers = {path: hashlib.sha256(path.encode()).hexdigest() for path in (*BEFORE, *BETWEEN)}
    assert {path: left.get(path) for path in strangers} == strangers
    quiet = root.child("quiet")  # the same without strangers: what a clean-up should remove, it does remove
    every_clean_up(quiet, raw)
    assert left.keys() - strangers.keys() == contents(quiet).keys()


def test_what_lies_where_a_sharding_would_write_is_named_and_kept(root: Store, raw: Path) -> None:
    places = read_places("vigor", raw, **TWO)
    folder = root.child("vigor", "layouts", "base")
    folder.write("shard-00001.tar", b"a stranger's")
    with pytest.raises(BadInput, match="shard-00001.tar"):
        shard(places, root, "vigor", options=OPTIONS, workers=1)
    assert "shard-00001.tar" in str(dry_run(places, root, "vigor", options=OPTIONS).refused)
    assert {info.path for info in folder.list()} == {"shard-00001.tar"}
    assert folder.read("shard-00001.tar") == b"a stranger's"
    folder.delete("shard-00001.tar")
    shard(places, root, "vigor", options=OPTIONS, workers=1)


def test_an_earlier_cut_into_more_shards_is_tidied_up(root: Store, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw images changed between a sharding that was cut off and the next: its shards go, a stranger's stays."""
    from sharding import writer

    places = read_places("vigor", raw, **TWO)
    folder = root.child("vigor", "layouts", "base")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        parts: list[object] = []

        def cut_off(folder: Store, part: object, *rest: object) -> object:
            parts.append(part)
            if len(parts) > 2:
                raise KeyboardInterrupt
            return write_part(folder, part, *rest)

        write_part: Callable[..., object] = writer.write_part
        patch.setattr(writer, "write_part", cut_off)
        shard(places, root, "vigor", options=OPTIONS, workers=1)
    claim = folder.read_json("parts/job.json")
    made = claim["shards"]
    extra = f"shard-{made:05d}.tar"
    folder.write_json("parts/job.json", claim | {"shards": made + 1})  # one more, which was written
    folder.write(extra, b"of an earlier cut")
    folder.write(f"shard-{made + 1:05d}.tar", b"a stranger's")
    layout = shard(places, root, "vigor", options=OPTIONS, workers=1).layout
    left = {info.path for info in folder.list()}
    assert left == {
        *layout.shard_names,
        "layout.json",
        "places.parquet",
        "members.parquet",
        "sources.parquet",
        f"shard-{made + 1:05d}.tar",
    }


def test_a_job_that_begins_meanwhile_is_no_stranger(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process of the same job claims the folder, and writes, between two looks at it."""
    from sharding import writer

    store = Store.open(tmp_path)
    look = foreign_objects

    def later(job: ShardJob, folder: Store) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(writer, "foreign_objects", look)
            patch.setattr("sharding.commit.clean", lambda *_: None)
            shard(job.raw, store, "vigor", options=OPTIONS, workers=1)
        folder.delete("layout.json")
        return look(job, folder)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "foreign_objects", later)
        shard(read_places("vigor", raw, **TWO), store, "vigor", options=OPTIONS, workers=1)


# Local stores resolve ``..``, which would lead out of the test's folder; tests/store/test_url.py has those.
NAMES = st.text(st.sampled_from("ab#?% .é=+-"), min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
PREFIXES = st.lists(NAMES, min_size=1, max_size=2).map("/".join)
SUFFIXES = st.sampled_from(["", "#2", "?x=1", "2", "/vigor", "/tiny/layouts", "/tiny/layouts/base"])


@pytest.mark.parametrize(("kind", "examples"), [("local", 2), pytest.param("s3", 8, marks=pytest.mark.slow)])
def test_two_stores_never_meet(request: pytest.FixtureRequest, raw: Path, kind: str, examples: int) -> None:
    if kind == "s3":
        base = request.getfixturevalue("s3_store").url

    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @example("a", "", "2")
    @example("b", "", "/tiny/layouts")
    @given(PREFIXES, PREFIXES, SUFFIXES)
    def check(one: str, other: str, suffix: str) -> None:
        with TemporaryDirectory() as folder:
            root = f"{base}/{uuid.uuid4().hex}" if kind == "s3" else folder
            other = one + suffix if suffix else other
            try:
                first, second = Store.open(f"{root}/{one}"), Store.open(f"{root}/{other}")
            except BadInput:
                return
            if first.url == second.url:
                return
            whole = Store.open(root)
            whole.write("bystander/x.tar", b"x")
            every_clean_up(first, raw)
            before = contents(whole)
            every_clean_up(second, raw)
            after = contents(whole)
            assert {path: after.get(path) for path in before} == before
            inside = second.url.removeprefix(whole.url + "/") + "/"
            assert all(path.startswith(inside) for path in after.keys() - before.keys())
            every = {info.path for info in first.list()}
            assert list_datasets(first) == ["tiny", "vigor"] and list_layouts(first, "tiny") == ["base-g2"]
            prune(first, "tiny")
            prune(first, "vigor")
            assert {info.path for info in first.list()} == every

    check()
