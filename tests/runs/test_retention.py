"""What is kept and why: a test for each reason, on plain data."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geostream.runs.retention import (
    LayoutFacts,
    LayoutNeeds,
    Rule,
    RunFacts,
    layouts_to_keep,
    runs_to_keep,
    superseded,
    why_not_removed,
)

BASE = LayoutFacts("base", "0")
FIRST = LayoutFacts("base-g1", "1", frozenset("0"), frozenset({"base"}))  # an append, which borrows
SECOND = LayoutFacts("base-g2", "2", frozenset("01"), frozenset({"base-g1"}))
THIRD = LayoutFacts("base-g3", "3", frozenset("012"))  # a reclustering, which owns all
LAYOUTS = (BASE, FIRST, SECOND, THIRD)

REASONS = [
    (LayoutNeeds(current="1"), "current"),
    (LayoutNeeds(tags={"paper": "1", "talk": "1", "other": "0"}), "paper, talk"),
    (LayoutNeeds(runs={"one": {"0"}, "two": {"1", "3"}}), "run two"),
    (LayoutNeeds(runs={"one": set(), "dark": None}), "run dark"),
    (LayoutNeeds(models={"the current model": "1"}), "the current model"),
    (LayoutNeeds(indexes={"graz": "1"}), "index graz"),
    (LayoutNeeds(under_way={"base-g2-2": "1"}), "base-g2-2"),
]


@pytest.mark.parametrize(("needs", "reason"), REASONS)
def test_every_reason_keeps_a_layout(needs: LayoutNeeds, reason: str) -> None:
    kept = layouts_to_keep([FIRST, THIRD], needs)
    assert reason in kept["base-g1"] and kept["base-g3"]
    assert reason in why_not_removed("base-g1", LAYOUTS, needs)
    nobody = layouts_to_keep([FIRST, THIRD], LayoutNeeds(runs={"one": set()}, tags={"other": "0"}))
    assert nobody == {"base-g1": "", "base-g3": "the newest of its line"}


def test_lenders_stay_as_long_as_a_kept_layout_reads_their_shards() -> None:
    assert layouts_to_keep(LAYOUTS, LayoutNeeds()) == {
        "base": "",
        "base-g1": "",
        "base-g2": "",
        "base-g3": "the newest of its line",
    }
    kept = layouts_to_keep(LAYOUTS, LayoutNeeds(tags={"paper": "2"}))
    assert kept["base-g1"] == "base-g2 reads shards of it" and kept["base"] == "base-g1 reads shards of it"


def test_a_layout_that_lends_cannot_be_removed_by_name() -> None:
    assert why_not_removed("base", LAYOUTS, LayoutNeeds()) == "base-g1 reads shards of it"
    assert why_not_removed("base-g2", LAYOUTS, LayoutNeeds()) == ""
    assert why_not_removed("base-g3", LAYOUTS, LayoutNeeds()) == ""  # the newest of its line may be removed by name


def test_of_joined_layouts_of_the_same_data_sets_one_of_later_layouts_supersedes() -> None:
    joined = {
        "base": {"a": ["a0"], "b": ["b0"]},
        "base-2": {"a": ["a0", "a1"], "b": ["b0"]},
        "base-3": {"b": ["b0", "b1"], "a": ["a0"]},
        "base-4": {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"]},
        "again": {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"]},
        "more": {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"], "c": ["c0"]},
        "other": {"a": ["x0"], "b": ["b0", "b1"]},
    }
    assert superseded(joined) == {
        "base": [],
        "base-2": ["base"],
        "base-3": ["base"],
        "base-4": ["base", "base-2", "base-3"],
        "again": ["base", "base-2", "base-3"],
        "more": [],
        "other": [],
    }


NOW = datetime(2026, 11, 29, tzinfo=UTC)
RUNS = [RunFacts(f"run-{days}", NOW - timedelta(days=days)) for days in (3, 1, 30, 10)]


def removed(*runs: RunFacts, rule: Rule, models: dict[str, str] | None = None) -> set[str]:
    kept = runs_to_keep(runs or RUNS, models or {}, rule, NOW)
    return {name for name, reason in kept.items() if not reason}


def test_the_newest_runs_stay() -> None:
    assert removed(rule=Rule(2)) == {"run-10", "run-30"}
    assert removed(rule=Rule(0)) == {"run-1", "run-3", "run-10", "run-30"} and removed(rule=Rule(5)) == set()


def test_young_runs_stay() -> None:
    assert removed(rule=Rule(0, timedelta(days=10))) == {"run-30"}
    assert removed(rule=Rule(2, timedelta(days=5))) == {"run-10", "run-30"}
    assert removed(rule=Rule(4, timedelta(days=5))) == set()


def test_what_is_needed_stays_whatever_its_age() -> None:
    training = RunFacts("held", NOW - timedelta(days=100), is_training=True)
    rule = Rule(0, named=frozenset({"run-3"}))
    assert removed(training, *RUNS, rule=rule, models={"run-30": "model 2"}) == {"run-1", "run-10"}
    reasons = runs_to_keep([training, *RUNS], {"run-30": "model 2"}, rule, NOW)
    assert "model 2" in reasons["run-30"] and "process" in reasons["held"]


@given(st.lists(st.integers(0, 100), max_size=12), st.integers(0, 12), st.integers(0, 100))
def test_stricter_rules_remove_more(days: list[int], keep: int, age: int) -> None:
    runs = [RunFacts(str(number), NOW - timedelta(days=one)) for number, one in enumerate(days)]

    def gone(rule: Rule) -> set[str]:
        return {name for name, reason in runs_to_keep(runs, {}, rule, NOW).items() if not reason}

    assert gone(Rule(keep + 1)) <= gone(Rule(keep)) and gone(Rule(keep, timedelta(days=age))) <= gone(Rule(keep))
    assert len(gone(Rule(keep))) == max(len(runs) - keep, 0)
