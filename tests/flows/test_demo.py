"""The demo on a small city: every part real, every figure that others rely on there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from infra.prefect_server import without_prefect
from infra.s3 import without_aws

QUICK = ["epochs=3", "first_mining=1", "mine_every=1", "evaluate_every=3", "batch_size=16"]


def test_demo_leaves_summary_and_report_and_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "a demo"
    words = ["demo", "--out", str(out), "--city", "small", *(w for s in QUICK for w in ("--set", s))]
    environment = without_prefect(without_aws(os.environ)) | {"COLUMNS": "200"}
    command = [str(Path(sys.executable).with_name("geostream")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    *_, summary_line, report_line = done.stdout.strip().splitlines()
    assert summary_line.endswith(str(out / "summary.json"))
    assert report_line.endswith(str(out / "report.html"))

    summary = json.loads((out / "summary.json").read_text())
    assert summary["store"] == "s3://geostream"
    assert summary["dataset"].keys() >= {"places", "pairs", "bytes", "shards"}
    [evaluation] = summary["evaluations"]
    assert evaluation.keys() >= {"epoch", "r1", "r5", "r10", "r1pct", "hit_rate", "gallery"}
    assert [(p["epoch"], p["source"]) for p in summary["plans"]] == [(1, "gps"), (2, "visual"), (3, "visual")]
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
    page = (out / "report.html").read_text()
    assert page.count("<figure class=query>") == 12
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]
    secret = "AWS_SECRET_ACCESS_KEY"
    assert secret not in done.stdout + done.stderr


def test_a_folder_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [str(Path(sys.executable).with_name("geostream")), "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "holds something else than an earlier demo" in done.stderr
    assert (tmp_path / "thesis.tex").exists()
