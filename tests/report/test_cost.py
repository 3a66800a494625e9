"""What ``geostream cost`` computes: the same bytes and objects as real artefacts, and numbers that hang together."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.mining.embeddings import ARRAYS
from geostream.mining.gps import build_gps_graph
from geostream.mining.visual import EXACT_UP_TO
from geostream.planning.make_plan import WHOLE_GRAPH, make_plan
from geostream.planning.plan import save_plan
from geostream.report import cost as model
from geostream.report.cost import Coefficients, Job, Prices, cost
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.cities import city
from tests.command import geostream, said
from tests.mining.places import EMBEDDINGS, places, write_embeddings
from tests.report import scale_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "scale.md"
JOB = Job(
    places=1_000_000, views=1, tile_bytes=115_000, view_bytes=163_000, raw_image_bytes=700_000, dim=128, neighbours=64,
    epochs=40, mine_every=4, evaluate_every=4, reclusters=1, test_places=100_000, lanes=64, shard_mib=128, workers=8,
    cores=2, gpus=8, pairs_per_second=150.0, bandwidth=250.0,
)  # fmt: skip
PRICES = Prices(storage=0.023, puts=0.005, gets=0.0004, gpu_hour=4.0, core_hour=0.05, months=1.0)
ADDED = ("seconds", "core_hours", "gpu_hours", "read", "written", "gets", "puts", "dollars")
STAGES = [
    "shard", "train an epoch", "embed", "GPS graph", "visual graph", "plan", "similarity order", "rewrite",
    "evaluation",
]  # fmt: skip

jobs = st.builds(
    lambda **numbers: replace(JOB, **numbers),
    places=st.integers(1, 10**9),
    views=st.integers(1, 54),
    dim=st.integers(1, 2048),
    neighbours=st.integers(1, 256),
    epochs=st.integers(1, 100),
    mine_every=st.integers(1, 10),
    lanes=st.integers(1, 4096),
    workers=st.integers(1, 256),
    cores=st.integers(1, 32),
)


def objects(folder: Path) -> list[int]:
    """Bytes of each object below a folder, without Zarr's descriptions."""
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json"]


@pytest.mark.parametrize("n", [512, 4096, 9000])
def test_embeddings_take_the_bytes_and_objects_that_are_computed(tmp_path: Path, n: int) -> None:
    write_embeddings(Store.open(tmp_path), places(n), 16)
    for array in ("query", "reference"):
        found = objects(tmp_path / EMBEDDINGS / array)
        assert (sum(found), len(found)) == model.vectors_size(n, 16)
    others = sum(sum(objects(tmp_path / EMBEDDINGS / name)) for name in ARRAYS if name not in ("query", "reference"))
    assert others <= 10 * n + 100


def test_a_graph_takes_the_objects_that_are_computed_and_at_most_the_bytes(tmp_path: Path) -> None:
    n, k = 5000, 12
    build_gps_graph(Store.open(tmp_path), "graph.zarr", places(n), k)
    found = [size for array in ("indices", "scores") for size in objects(tmp_path / "graph.zarr" / array)]
    size, count = model.graph_size(n, k)
    assert len(found) == count
    assert 0.2 * size < sum(found) < size


def test_a_plan_takes_at_most_the_bytes_and_reads_that_are_computed(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = city(store, side=40, areas=2, per_shard=100)
    plan = make_plan(layout, None, TrainSettings().changed(batch_size=32, strategy="random", lanes=1), 1, seed=1)
    save_plan(store.child("plans"), plan)
    pairs = plan.quality["pairs"]
    assert 0.2 < (tmp_path / "plans" / "epoch-0001.parquet").stat().st_size / model.plan_size(pairs) < 1.2
    train_shards = len(np.unique(layout.shard_of_place[plan.place.ravel()]))
    fetched = plan.quality["requests_per_gib"]
    used = sum(int(layout.shard_sizes[shard]) for shard in range(train_shards)) / 2**30
    assert fetched * used == pytest.approx(train_shards, rel=0.25)  # each shard is one read, as it is below MAX_READ


@pytest.mark.parametrize(("tile", "view", "views"), [(115_000, 163_000, 1), (512, 1, 3)])
def test_a_place_takes_the_bytes_that_a_tar_file_has(tile: int, view: int, views: int) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate([tile, *[view] * views, 300]):
            member = tarfile.TarInfo(str(number))
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
        assert data.tell() == model.place_bytes(replace(JOB, tile_bytes=tile, view_bytes=view, views=views))


def test_the_largest_shard_is_read_in_parts() -> None:
    known, size = Coefficients(), 128 * 2**20
    [epoch] = [stage for stage in cost(JOB, PRICES).stages if stage.name == "train an epoch"]
    assert epoch.gets == model.shards(JOB) * 3
    assert epoch.read >= model.shards(JOB) * size * 0.99 * known.amplification
    assert model.upload_requests(5 * 2**20) == 1
    assert model.upload_requests(size) == 28


@given(jobs)
@settings(deadline=None)
def test_totals_are_the_sums_of_the_rows(job: Job) -> None:
    result = cost(job, PRICES)
    assert [stage.name for stage in result.stages] == STAGES
    for name in ADDED:
        rows = sum(getattr(stage, name) * stage.times for stage in result.stages)
        rows += result.storage_dollars if name == "dollars" else 0
        assert getattr(result.total, name) == pytest.approx(rows)
        assert all(getattr(stage, name) >= 0 for stage in result.stages)
    assert result.total.memory == max(stage.memory for stage in result.stages if stage.times)


@given(jobs, st.floats(1, 100))
@settings(deadline=None)
def test_more_places_never_cost_less(job: Job, times: float) -> None:
    """Up to EXACT_UP_TO the visual graph's time grows with N²; beyond, lists are cheaper, so there it begins anew."""
    more = replace(job, places=int(job.places * times))
    small, large = cost(job, PRICES), cost(more, PRICES)
    for one, other in zip(small.stages, large.stages, strict=True):
        if one.name == "visual graph" and job.places <= EXACT_UP_TO < more.places:
            continue
        # A graph above WHOLE_GRAPH is held by nobody.
        held = 4 * job.neighbours * job.places <= WHOLE_GRAPH < 4 * more.neighbours * more.places
        for name in ADDED if one.name == "plan" and held else (*ADDED, "memory"):
            assert getattr(other, name) >= getattr(one, name) * (1 - 1e-9), (one.name, name)


@given(jobs, st.integers(1, 100))
@settings(deadline=None)
def test_more_workers_never_take_longer(job: Job, times: int) -> None:
    few, many = cost(job, PRICES), cost(replace(job, workers=job.workers * times), PRICES)
    for one, other in zip(few.stages, many.stages, strict=True):
        assert other.seconds <= one.seconds * (1 + 1e-9), one.name
    assert cost(replace(job, workers=job.workers + times), PRICES).total.seconds <= few.total.seconds * (1 + 1e-9)


def test_what_exceeds_the_bound_is_named_with_what_to_do() -> None:
    few_lanes = cost(replace(JOB, places=10_000_000, lanes=4), PRICES)
    [lane] = [line for line in few_lanes.warnings if "lane holds" in line]
    enough = int(lane.split("--lanes ")[1].split()[0])
    assert not any(
        "lane holds" in line for line in cost(replace(JOB, places=10_000_000, lanes=enough), PRICES).warnings
    )
    assert any("lane holds" in w for w in cost(replace(JOB, places=10_000_000, lanes=enough - 1), PRICES).warnings)
    large = cost(replace(JOB, places=100_000_000, lanes=1000), PRICES)
    assert any("planner" in line for line in large.warnings)
    assert any("extrapolated" in line for line in large.warnings)
    small = cost(replace(JOB, places=100_000), PRICES)
    assert not small.warnings


def test_lanes_that_the_planner_would_refuse_are_named() -> None:
    job = replace(JOB, places=10_000)
    most = model.shards(job)
    fits, fails = (cost(replace(job, lanes=lanes, gpus=1), PRICES).warnings for lanes in (most, most + 1))
    assert [line for line in fails if f"{most + 1} lanes" in line and "fewer --lanes" in line]
    assert not [line for line in fits if "fewer --lanes" in line]


def test_numbers_of_any_size_are_computed_and_fit_in_the_table() -> None:
    assert model.place_bytes(replace(JOB, views=10**11)) > 10**16
    huge = said("cost", "--places", str(10**12))
    assert "…" not in huge and "e+" in huge


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("option", ["--pairs-per-second", "--bandwidth", "--gpu-price", "--months"])
def test_numbers_that_make_no_sense_are_refused(option: str, value: str) -> None:
    done = geostream("cost", option, value)
    assert done.returncode == 2 and f"'{option}'" in done.stderr


def test_a_worse_coefficient_shows() -> None:
    by_name = [
        {stage.name: stage.seconds for stage in cost(replace(JOB, gpus=1), PRICES, known).stages}
        for known in (Coefficients(), replace(Coefficients(), plan_pair=1.0, shard_image=1.0))
    ]
    changed = {name for name in STAGES if by_name[0][name] != by_name[1][name]}
    assert changed == {"plan", "shard"}


def test_the_command_prints_every_stage_and_the_same_as_json() -> None:
    words = ("cost", "--places", "2000000", "--gpu-price", "7", "--lanes", "128")
    text = said(*words)
    assert all(f" {name} " in text for name in (*STAGES, "total"))
    assert "2025" in text and "assumption" in text
    found = json.loads(said(*words, "--json"))
    assert found["job"]["places"] == 2_000_000 and found["prices"]["gpu_hour"] == 7
    assert found["coefficients"]["plan_pair"] == Coefficients().plan_pair
    job, prices = Job(**found["job"]), Prices(**found["prices"])
    assert found["total"]["dollars"] == pytest.approx(cost(job, prices).total.dollars)
    assert [stage["name"] for stage in found["stages"]] == STAGES


def test_the_page_has_the_table_that_the_command_computes() -> None:
    """After a change of a coefficient: ``python -m tests.report.scale_table`` prints the rows for the page."""
    page = DOCUMENT.read_text()
    assert [row for row in scale_table.rows() if row not in page] == []
    for number in scale_table.PLACES:
        assert scale_table.COMMAND.format(number).removesuffix(" --json") in page
