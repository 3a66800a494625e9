"""What the payoff benchmark makes of its measurements; the training that it measures has tests of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.contest import found, standard_error, story
from tests.benchmarks.measure import Failed
from tests.benchmarks.payoff import figures
from tests.benchmarks.payoff_run import CONTESTANTS, Job


def result(*points: tuple[float, float]) -> dict[str, Any]:
    """A result of one seed: (seconds, R@1) of each evaluation."""
    return {"curve": [{"seconds": seconds, "r1": r1} for seconds, r1 in points]}


def finals(random: list[float], random_access: list[float], streamed: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Results that ended at the same second with these R@1, one a seed."""
    named = {"random": random, "random_access": random_access, "streamed": streamed}
    return {name: [result((10.0, r1)) for r1 in values] for name, values in named.items()}


def test_streaming_that_costs_more_than_the_spread_is_told() -> None:
    near = figures(finals([0.80, 0.82], [0.85, 0.88], [0.85, 0.875]))
    assert near["streamed_vs_random_access"]["value"] == pytest.approx(-0.0025)
    assert near["streamed_vs_random_access"]["met"]
    assert near["streamed_vs_random"]["met"]
    far = figures(finals([0.80, 0.82], [0.85, 0.88], [0.81, 0.83]))
    assert not far["streamed_vs_random_access"]["met"]
    assert far["random_access_vs_random"]["value"] == pytest.approx(0.055)


def test_a_gain_within_the_spread_is_none() -> None:
    made = figures(finals([0.80, 0.86, 0.80], [0.83, 0.83, 0.83], [0.83, 0.83, 0.83]))
    assert made["streamed_vs_random"]["value"] == pytest.approx(0.01)
    assert not made["streamed_vs_random"]["met"]


def test_the_spread_is_of_differences_within_a_seed() -> None:
    """Cities that are harder for everybody are no spread; nor is one seed enough for one."""
    assert standard_error([[0.25, 0.25, 0.25], [-0.5, -0.5, -0.5]]) == 0
    assert standard_error([[0.0, 2.0], [1.0, 1.0]]) == pytest.approx(0.5**0.5)  # variances 2 and 0, two seeds
    assert not any("_vs_" in name for name in figures(finals([0.8], [0.9], [0.9])))


def test_equal_seconds_is_when_the_fastest_of_the_seed_ended() -> None:
    runs = {
        "random": [result((10, 0.4), (20, 0.8)), result((30, 0.5), (60, 0.7))],
        "random_access": [result((15, 0.6), (30, 0.9)), result((25, 0.5), (50, 0.9))],
        "streamed": [result((40, 0.8)), result((50, 0.6), (100, 0.9))],
    }
    made = figures(runs)
    assert made["r1_random_at_equal_seconds"]["spread"] == pytest.approx([0.5 + 0.2 * 2 / 3, 0.8])
    assert made["r1_random_access_at_equal_seconds"]["spread"] == pytest.approx([0.7, 0.9])
    assert made["r1_streamed_at_equal_seconds"]["spread"] == pytest.approx([0.4, 0.6])
    assert made["r1_streamed"]["value"] == pytest.approx(0.85)


def test_every_stage_but_evaluation_is_on_the_clock() -> None:
    records = [
        {"stage": stage, "epoch": epoch, "seconds": seconds, "cpu_seconds": seconds / 2, **measured}
        for stage, epoch, seconds, measured in (
            ("plan", 1, 1.0, {"overlap": None}),
            ("train", 1, 10.0, {"step": 7, "stream": {"peak_resident_bytes": 5}}),
            ("evaluate", 1, 100.0, {"r1": 0.25}),
            ("embed", 1, 2.0, {}),
            ("mine", 1, 3.0, {}),
            ("recluster", 1, 4.0, {"layout": "base-g1"}),
            ("mine", 1, 50.0, {"beside": True}),
            ("plan", 2, 1.0, {"overlap": 0.5}),
            ("train", 2, 10.0, {"step": 14, "stream": {"peak_resident_bytes": 4}}),
            ("evaluate", 2, 100.0, {"r1": 0.5}),
        )
    ]
    told = story(records)
    assert told["curve"] == [
        {"epoch": 1, "seconds": 11.0, "cpu_seconds": 5.5, "r1": 0.25},
        {"epoch": 2, "seconds": 31.0, "cpu_seconds": 15.5, "r1": 0.5},
    ]
    assert (told["steps"], told["peak_resident_bytes"]) == (14, 5)
    assert [plan["overlap"] for plan in told["plans"]] == [None, 0.5]
    assert told["reclusterings"][0]["layout"] == "base-g1"


def test_contestants_differ_in_their_plans_only() -> None:
    made = [Job(name, 3, "full", 18, 32, "", "").settings.flat() for name in CONTESTANTS]
    differing = {name for name, value in made[0].items() if any(other[name] != value for other in made)}
    assert differing == {
        *("strategy", "hardness", "resident_shards", "recluster_below"),
        *("mining_lag", "mine_every"),  # when the embeddings are mined: between two epochs, or beside the training
    }


def test_what_was_kept_is_taken_only_for_the_same_settings(tmp_path: Path) -> None:
    out = tmp_path / "streamed.json"
    job = Job("streamed", 0, "tiny", 9, 32, "", str(out))
    assert found(job) is None
    out.write_text(json.dumps({"settings": job.settings.model_dump()}))
    assert found(job) is not None
    with pytest.raises(Failed, match="other settings"):
        found(Job("streamed", 0, "tiny", 12, 32, "", str(out)))
