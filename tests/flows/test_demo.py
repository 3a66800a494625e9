"""The demo on a small city: every part real, every figure that others rely on there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.demo import MARK, _own_folder
from geostream.errors import BadInput

QUICK = ["epochs=3", "first_mining=1", "mine_every=1", "evaluate_every=3", "batch_size=16"]
SECRET = "a-secret-that-nobody-may-print"


def test_demo_leaves_summary_and_report_and_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "a demo"
    out.mkdir()
    (out / ".geostream-demo").touch()  # an earlier demo's, with somebody's notes beside what it made
    (out / "summary.json").write_text("old")
    (out / "notes.txt").write_text("mine")
    # A relative folder, as the Makefile's, and an environment that speaks of other servers.
    words = ["demo", "--out", out.name, "--city", "small", *(w for s in QUICK for w in ("--set", s))]
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_PROFILE": "other",
    }
    command = [str(Path(sys.executable).with_name("geostream")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, summary_line, report_line = done.stdout.strip().splitlines()
    assert summary_line.endswith(str(Path(out.name, "summary.json")))
    assert report_line.endswith(str(Path(out.name, "report.html")))

    summary = json.loads((out / "summary.json").read_text())
    assert summary["store"] == "s3://geostream"
    assert summary["dataset"].keys() >= {"places", "pairs", "bytes", "shards"}
    [evaluation] = summary["evaluations"]
    assert evaluation.keys() >= {"epoch", "r1", "r5", "r10", "r1pct", "hit_rate", "gallery"}
    assert [(p["epoch"], p["source"]) for p in summary["plans"]] == [(1, "gps"), (2, "gps"), (3, "visual")]
    for plan in summary["plans"]:
        assert plan["batches"] * 16 + plan["left_out"] == plan["pairs"] == summary["dataset"]["pairs"]
        assert 0 < plan["resident_share"] <= 1
    assert summary["stream"]["bytes_fetched"] >= summary["stream"]["bytes_used"] > 0
    assert summary["stream"]["requests"] > 0
    assert summary["seconds"].keys() >= {"render", "shard", "plan", "train", "embed", "mine", "evaluate", "total"}
    assert [(run["flow"], run["state"]) for run in summary["flow_runs"]] == [
        ("shard", "Completed"),
        ("retrain", "Completed"),
    ]
    assert "where three photos of these cities were taken" in done.stdout
    points = [one for one in summary["located"]["features"] if one["properties"]["kind"] == "candidate"]
    assert len(points) == 15 and all(one["geometry"] for one in points)
    assert all(one["properties"]["error_metres"] >= 0 for one in points)
    assert len(list((out / "photos").glob("*.jpg"))) == 3
    again = [command[0], "locate", *map(str, (out / "photos").glob("*.jpg")), "--store", str(out / "store")]
    located = subprocess.run(again, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert located.returncode == 0 and "sure" in located.stdout, "the servers are gone, the copy is not"
    assert (out / "notes.txt").read_text() == "mine"
    page = (out / "report.html").read_text()
    assert page.count('<figure class="query">') == 12
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]
    written = [path.read_bytes() for path in out.rglob("*") if path.suffix in (".log", ".json", ".html", ".jsonl")]
    assert len(written) >= 4
    assert not [text for text in [(done.stdout + done.stderr).encode(), *written] if SECRET.encode() in text]


def test_a_folder_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [str(Path(sys.executable).with_name("geostream")), "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_two_demos_in_one_folder(tmp_path: Path) -> None:
    """The second neither removes what the first is working with nor waits."""
    with _own_folder(tmp_path):
        (tmp_path / "raw").mkdir()
        with pytest.raises(BadInput, match=re.escape(str(tmp_path))), _own_folder(tmp_path):
            pass
        assert (tmp_path / "raw").is_dir()
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "mine.txt").touch()
    (tmp_path / "s3").symlink_to(elsewhere)
    with _own_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [MARK] and (elsewhere / "mine.txt").exists()
