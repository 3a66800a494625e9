"""Every stage alone, as a person types it, against a real S3 server; errors are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from geostream.layout import Layout
from geostream.store import Store
from tests.command import geostream, refused, said
from tests.helpers import tiny_layout

SETTINGS = ["model=test_convnext", "tile_size=32", "view_height=32", "view_width=64", "batch_size=4", "neighbours=6"]
SETTINGS += ["epochs=2", "first_mining=1", "mine_every=1", "mining_lag=0", "evaluate_every=1", "threads=1"]
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture
def layout(s3_store: Store) -> Layout:
    return tiny_layout(s3_store, places=16)


def test_each_stage_alone_and_the_report(s3_store: Store, layout: Layout, tmp_path: Path) -> None:
    url, run = s3_store.url, s3_store.child(layout.dataset, "runs", "first")
    assert layout.name in said("inspect", url)
    assert "recall on the test gallery" in said("train", url, "--run", "first", *SET)
    page = run.read("report.html").decode()
    assert "<svg" in page
    assert "data:image/jpeg;base64," in page
    assert "was finished before" in said("train", url, "--run", "first", *SET)
    assert "embeddings/epoch-0002.zarr" in said("embed", url, "--run", "first")
    assert "neighbours/visual-epoch-0002.zarr" in said("mine", url, "--run", "first")
    assert "neighbours/gps.zarr" in said("mine", url, "--run", "first", "--kind", "gps")
    assert "hardness_score" in said("plan", url, "--run", "first", "--epoch", "2")
    table = said("evaluate", url, "--run", "first", "--json", str(tmp_path / "result.json"))
    record = run.read_json("evaluation-test-epoch-0002.json")
    assert set(record) >= {"epoch", "r1", "r5", "r10", "r1pct", "hit_rate", "queries", "gallery", "protocol", "others"}
    assert json.loads((tmp_path / "result.json").read_text()) == record
    for words in ("paired", "view→tile", "R@1%", "hit rate", f"{100 * record['r5']:.2f}"):
        assert words in table
    assert "data:image/jpeg;base64," in run.read("evaluation-test-epoch-0002.html").decode()
    table = said("evaluate", url, "--run", "first", "--fov", "90,360", "--tta", "--json", str(tmp_path / "result.json"))
    assert all(f"{look} " in table for look in ("90°", "360°", "90° TTA", "360° TTA")) and table.count("paired") == 4
    looks = json.loads((tmp_path / "result.json").read_text())
    assert looks == record | {"looks": [run.read_json(f"evaluation-test{look}-epoch-0002.json") for look in
                                        ("_fov90", "_fov90_tta", "_tta")]}  # fmt: skip


def test_verify(s3_store: Store, layout: Layout) -> None:
    url, shards, members = s3_store.url, len(layout.shard_names), layout.members.num_rows
    line = f"{shards} shards, {members} members, {layout.shard_sizes.sum()} bytes: all as committed\n"
    assert said("verify", url) == line
    whole = layout.store.read("shard-00001.tar")
    layout.store.write("shard-00001.tar", whole[:600] + b"\0\0\0" + whole[603:])
    layout.store.delete("shard-00002.tar")
    done = geostream("verify", url, "--dataset", layout.dataset, "--layout", layout.name)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"shard-00001.tar: '{layout.keys[4]}.tile.jpg': its bytes differ from the checksum in the index",
        "shard-00002.tar: gone since the commit",
    ]
    [line] = done.stderr.splitlines()
    assert line.startswith(f"geostream: {layout.store.url}: 2 problems; restore the layout's folder from a copy, or ")


def test_verify_shows_a_hundred_problems_and_counts_the_rest(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=60, places_per_shard=60)
    path = Path(layout.store.url, "shard-00000.tar")
    data = bytearray(path.read_bytes())
    for offset in layout.members["offset"].to_pylist()[:180]:
        data[offset] ^= 1
    path.write_bytes(data)
    done = geostream("verify", str(tmp_path))
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines), lines[-1]) == (1, 101, "… and 80 more")
    assert ": 180 problems; " in done.stderr


def test_as_a_person_types_it(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("geostream")), "inspect", str(tmp_path / "typo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stderr.startswith("geostream: ")
    assert len(done.stderr.splitlines()) == 1


def test_errors_are_one_line(s3_store: Store, layout: Layout, tmp_path: Path) -> None:
    url = s3_store.url
    assert str(tmp_path / "typo") in refused("inspect", str(tmp_path / "typo"))
    assert f"{url}/other" in refused("train", url, "--dataset", "other")
    assert "Known settings" in refused("train", url, "--set", "batchsize=3")
    assert "nobody" in refused("evaluate", url, "--run", "nobody")
    assert "--split val" in refused("evaluate", url, "--split", "val")
    for fov in ("0", "90,400", "wide", ""):
        assert "--fov" in refused("evaluate", url, "--run", "nobody", "--fov", fov)
    assert "--json" in refused("evaluate", url, "--json", str(tmp_path / "typo" / "result.json"))
    assert "--kind both" in refused("mine", url, "--kind", "both")
    assert "'tokyo'" in refused("shard", "tokyo", str(tmp_path), url)
    assert "HEIGHTxWIDTH" in refused("shard", "vigor", str(tmp_path), url, "--tile-size", "384")
