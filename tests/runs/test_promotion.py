"""From two checkpoints to a decision: measured on one gallery, recorded in the run, shown by its report."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from geostream.errors import BadInput, Changed
from geostream.evaluation.compare import compare
from geostream.layout import Layout
from geostream.report import report
from geostream.runs import promotion
from geostream.runs.log import RunLog, RunResult
from geostream.runs.models import current_model, list_models, promote
from geostream.runs.promotion import decide, promote_if_no_worse
from geostream.runs.run import LOG, Run
from geostream.store import Store
from tests.command import geostream, refused, said
from tests.helpers import tiny_layout
from tests.report.self_contained import needs_nothing_else
from tests.runs.small_runs import run_with_checkpoint

NAME = "step-00000030"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


@pytest.fixture
def layout(store: Store) -> Layout:
    return tiny_layout(store, places=4, test_places=40)


def embedded_when(run: Run) -> list[int]:
    """When the files of the test embeddings in a run's folder were written."""
    return [path.stat().st_mtime_ns for path in sorted(Path(run.url, "embeddings").rglob("*")) if path.is_file()]


def test_no_worse_is_promoted_and_worse_is_not(store: Store, layout: Layout) -> None:
    first, _ = run_with_checkpoint(store, layout, "first", seed=1)
    decision, model = promote_if_no_worse(first)
    assert decision.promotes and decision.old is None and model is not None and model.compared is None
    assert model.metrics == decision.new.metrics and model.metrics["r1"] > 0

    worse, _ = run_with_checkpoint(store, layout, "worse", blind=True)
    decision, refused_model = promote_if_no_worse(worse)
    assert refused_model is None and current_model(store, "tiny") == model and list_models(store, "tiny") == [model]
    assert not decision.promotes and decision.rule.startswith("Not promoted")
    assert decision.old is not None and decision.old.metrics == model.metrics
    compared = decision.comparison
    assert compared is not None and compared.won == 0 and compared.lost == round(40 * model.metrics["r1"])
    stored = json.loads(json.dumps(worse.read_comparison()))
    assert stored["comparison"]["lost"] == compared.lost and stored["promotes"] is False
    [record] = RunLog(worse.folder, LOG).of("compare")
    assert record["model"] == 1 and record["no_worse"] is False and record["r1_before"] == model.metrics["r1"]

    same, _ = run_with_checkpoint(store, layout, "same", seed=1)
    decision, second = promote_if_no_worse(same)
    assert second is not None and second.number == 2 and second.compared is not None
    assert (second.compared["model"], second.compared["won"], second.compared["lost"]) == (1, 0, 0)
    assert current_model(store, "tiny") == second


def test_embeddings_that_are_there_are_used_again(store: Store, layout: Layout) -> None:
    first, _ = run_with_checkpoint(store, layout, "first", seed=1)
    other, _ = run_with_checkpoint(store, layout, "other", seed=2)
    promote_if_no_worse(first)
    decide(other)
    copy = Run(store, layout, "copy")
    copy.folder = store.child("tiny", "models", "0001")
    times = embedded_when(other), embedded_when(copy)
    assert all(times)
    decide(other)
    assert (embedded_when(other), embedded_when(copy)) == times


def test_force_promotes_without_a_comparison(store: Store, layout: Layout) -> None:
    first, _ = run_with_checkpoint(store, layout, "first", seed=1)
    worse, _ = run_with_checkpoint(store, layout, "worse", blind=True)
    promote_if_no_worse(first)
    decision, model = promote_if_no_worse(worse, by="by hand", force=True)
    assert decision.comparison is None and "force" in decision.rule
    assert model is not None and (model.number, model.by, model.compared) == (2, "by hand", None)


def test_promoted_once(store: Store, layout: Layout) -> None:
    """A flow that is tried again after its promotion finds that it is done, and keeps the comparison."""
    first, _ = run_with_checkpoint(store, layout, "first", seed=1)
    promote_if_no_worse(first)
    second, _ = run_with_checkpoint(store, layout, "second", seed=1)
    _, model = promote_if_no_worse(second)
    told = second.read_comparison()
    decision, again = promote_if_no_worse(Run(store, layout, "second"))
    assert again == model and decision.new.model == 2 and second.read_comparison() == told


def test_another_model_promoted_meanwhile(store: Store, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second", "third"):
        run_with_checkpoint(store, layout, name, seed=1)
    promote_if_no_worse(Run(store, layout, "first"))

    def slowly(*words: Any) -> Any:
        promote(Run(store, layout, "second"), NAME, {"r1": 0.5}, over=1, by="by hand")
        return compare(*words)

    monkeypatch.setattr(promotion, "compare", slowly)
    with pytest.raises(Changed, match="model 2 "):
        promote_if_no_worse(Run(store, layout, "third"))
    model = current_model(store, "tiny")
    assert model is not None and model.run == "second"


def test_another_gallery_is_told(store: Store, layout: Layout) -> None:
    first, _ = run_with_checkpoint(store, layout, "first", seed=1)
    second, _ = run_with_checkpoint(store, layout, "second", seed=1)
    first.layout = replace(layout, info=layout.info | {"gallery": "a" * 16})
    promote_if_no_worse(first)
    second.layout = replace(layout, info=layout.info | {"gallery": "b" * 16})
    decision = decide(second)
    assert decision.gallery == "b" * 16 and decision.old is not None and decision.old.gallery == "a" * 16
    assert "another test gallery" in decision.rule
    second.layout = first.layout
    assert "another test gallery" not in decide(second).rule


def test_no_such_run_begins_none(store: Store, layout: Layout) -> None:
    with pytest.raises(BadInput, match="runs/nobody"):
        decide(Run(store, layout, "nobody"))
    assert store.folders("tiny/runs") == []


def test_the_report_shows_it(store: Store, layout: Layout) -> None:
    first, _ = run_with_checkpoint(store, layout, "first", seed=1)
    worse, _ = run_with_checkpoint(store, layout, "worse", blind=True)
    promote_if_no_worse(first)
    decision = decide(worse)
    result = RunResult.of(worse.url, worse.log, already_finished=True)
    page = report.publish(worse, result, report.summarise("store", layout, result))
    needs_nothing_else(page)
    section = html.unescape(page[page.index("Beside the current model") : page.index("Epoch plans")])
    assert decision.rule in section and "<th>model 1</th>" in section and "<th>worse</th>" in section
    assert decision.comparison is not None
    assert f"Queries lost: {decision.comparison.lost}" in section and "Queries won" not in section
    assert section.count("data:image/jpeg;base64,") == 2 * min(6, decision.comparison.lost) > 0
    lost = decision.comparison.lost_queries[0]
    assert f"{lost.key}, view {lost.view}: rank 1 → {lost.after}" in section
    without = report.publish(first, result, report.summarise("store", layout, result))
    assert "because no model was current" in without and "Queries lost" not in without


@pytest.mark.slow
def test_the_commands(store: Store, layout: Layout) -> None:
    url = store.url
    assert "no model" in refused("models", "list", url)
    assert "no model" in refused("models", "rollback", url)
    assert "no model" in refused("evaluate", url, "--model", "current")
    for name, blind in (("first", False), ("worse", True)):
        run_with_checkpoint(store, layout, name, seed=1, blind=blind)
    assert "model 1 is current: first" in said("models", "promote", url, "first")
    done = geostream("models", "promote", url, "worse")
    assert done.returncode == 1 and "Not promoted" in done.stdout
    line = done.stderr.splitlines()[-1]  # on a slow machine, progress is shown before it
    assert "runs/worse: not promoted" in line and "--force" in line
    assert "Beside the current model" in Run(store, layout, "worse").folder.read("report.html").decode()
    assert "model 2 is current: worse" in said("models", "promote", url, "worse", "--checkpoint", NAME, "--force")
    table = said("models", "list", url)
    assert all(word in table for word in ("first", "worse", "current", "before", "by hand"))
    assert json.loads(said("models", "show", url))["number"] == 2
    assert json.loads(said("models", "show", url, "1"))["run"] == "first"
    assert "model 1 is current" in said("models", "rollback", url)
    assert "before model 1" in refused("models", "rollback", url)
    assert "model 2 is current" in said("models", "promote", url, "model:2", "--force")
    assert "models/0001/evaluation-test-epoch-0003.html" in said("evaluate", url, "--model", "1")
    assert "models/0002/embeddings/epoch-0003.zarr" in said("embed", url, "--model", "current")


def test_errors_of_the_commands(store: Store, layout: Layout) -> None:
    url = store.url
    for name in ("first", "second"):
        run_with_checkpoint(store, layout, name, seed=1)
    said("models", "promote", url, "first")
    assert "no model 7 (there: 1)" in refused("models", "show", url, "7")
    assert "no model 7 (there: 1)" in refused("evaluate", url, "--model", "7")
    assert "'other'" in refused("models", "list", url, "--dataset", "other")
    assert "other" in refused("models", "promote", url, "first", "--dataset", "other")
    assert "runs/nobody" in refused("models", "promote", url, "nobody")
    assert "step-00000099" in refused("models", "promote", url, "first", "--checkpoint", "step-00000099")
    assert "--checkpoint" in refused("models", "promote", url, "model:1", "--checkpoint", NAME)
    assert "--model 1" in refused("evaluate", url, "--model", "1", "--run", "first")
    assert "promote_z" in refused("models", "promote", url, "second", "--promote-z", "-1")
