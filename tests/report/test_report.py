"""The report: every row of results under its protocol's name, the loss of steps, the preview of augmented pairs."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from geostream.evaluation import protocols
from geostream.layout import Layout
from geostream.report import report
from geostream.report.curves import curves_svg, loss_by_step
from geostream.report.timeline import timeline_svg
from geostream.runs.log import RunLog, RunResult
from geostream.runs.run import LOG, Run
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.stats import StreamStats
from tests.helpers import tiny_layout
from tests.report.self_contained import needs_nothing_else

SHARES = {"r1": 0.5, "r5": 0.75, "r10": 0.875, "r1pct": 0.5}
PAIRED = SHARES | {"hit_rate": 0.625, "gallery": 6, "queries": 4}
NEAR = {"protocol": "within-5m", "direction": "view→tile"} | PAIRED | {"r1": 0.6125}
BOTH = [
    {"protocol": "both-ways", "direction": d, "ap": ap, "queries": 4, "gallery": 6} | SHARES
    for d, ap in (("view→tile", 0.7125), ("tile→view", 0.8125))
]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return tiny_layout(Store.open(tmp_path_factory.mktemp("store")), places=20)


def training(epoch: int, **more: Any) -> dict[str, Any]:
    measured = {"loss": 2.0 / epoch, "pairs": 20, "pairs_per_second": 100.0, "wait_share": 0.01}
    return measured | {"stream": StreamStats(bytes_fetched=2000, bytes_used=1000).as_dict()} | more


def result_of(run: Store, *evaluations: dict[str, Any]) -> RunResult:
    log = RunLog(run, LOG)
    for epoch in (1, 2):
        log.append("train", epoch, 3.0, **training(epoch, step=4 * epoch, curve=[[4 * epoch - 2, 1.5, 1e-3]]))
    for epoch, measured in enumerate(evaluations, 1):
        log.append("evaluate", epoch, 1.0, **measured)
    return RunResult.of(run.url, log, False)


def page_of(layout: Layout, result: RunResult) -> str:
    return report.render_report("title", report.summarise("store", layout, result), result.training, [], [])


def test_the_imagerys_attribution_stands_below_its_tiles(layout: Layout, tmp_path: Path) -> None:
    summary = report.summarise("store", layout, result_of(Store.open(tmp_path), PAIRED))
    facts = {"name": "ortho", "licence": "CC-BY-4.0", "attribution": "Maps <b>", "url": None}
    page = report.render_report("title", summary, [], [], [], imagery=facts)
    assert "ortho · CC-BY-4.0 · Maps &lt;b&gt;</p>" in page and "None</p>" not in page
    assert "Imagery:" not in report.render_report("title", summary, [], [], [])


def test_one_protocol_has_its_table_by_epoch_and_no_heading(layout: Layout, tmp_path: Path) -> None:
    page = page_of(layout, result_of(Store.open(tmp_path), PAIRED, PAIRED | {"r1": 0.5625}))
    recall = page[page.index("Recall on the test gallery") : page.index("Epoch plans")]
    assert "<h3>" not in recall and recall.count("<table>") == 1
    assert re.findall(r"<th>(.*?)</th>", recall)[:6] == ["epoch", "R@1", "R@5", "R@10", "R@1%", "hit rate"]
    assert "<td>50.0%</td>" in recall and "<td>56.2%</td>" in recall and "<td>62.5%</td>" in recall


def test_further_rows_stand_under_the_names_of_their_protocols(layout: Layout, tmp_path: Path) -> None:
    page = page_of(layout, result_of(Store.open(tmp_path), PAIRED | {"others": [NEAR]}, PAIRED | {"others": [NEAR]}))
    assert re.findall("<h3>(.*?)</h3>", page) == ["paired, view→tile", "within-5m, view→tile"]
    assert page.count("<td>61.3%</td>") + page.count("<td>61.2%</td>") == 2, "by epoch"
    assert html.unescape(page).count(report.PROTOCOLS[protocols.NEAR]) == 1


def test_narrowed_views_have_a_table_after_training_with_them(layout: Layout, tmp_path: Path) -> None:
    narrowed = [PAIRED | {"fov": 70.0, "r1": 0.25}, PAIRED | {"fov": 180.0, "r1": 0.375}]
    page = page_of(layout, result_of(Store.open(tmp_path), PAIRED, PAIRED | {"narrowed": narrowed}))
    table = page[page.index("field of view") : page.index("Epoch plans")]
    assert re.findall(r"<td>([\d.]+°)</td><td>([\d.]+%)</td>", re.sub(r">\s+<", "><", table)) == [
        ("70°", "25.0%"), ("180°", "37.5%"), ("360°", "50.0%"),
    ]  # fmt: skip
    assert "field of view" not in page_of(layout, result_of(Store.open(tmp_path / "other"), PAIRED))


def test_figures_on_the_ground_have_a_table_where_there_are_any(layout: Layout, tmp_path: Path) -> None:
    metres = {f"r{k}_within_{limit}m": limit / 200 for k in (1, 5, 10) for limit in (25, 50, 100)}
    page = page_of(
        layout, result_of(Store.open(tmp_path), PAIRED, PAIRED | {"metres": metres | {"median_metres": 37.26}})
    )
    recall = page[page.index("On the ground") : page.index("Epoch plans")]
    assert "<td>12.5%</td>" in recall and "<td>25.0%</td>" in recall and "<td>50.0%</td>" in recall
    assert "<td>37.3</td>" in recall and recall.count("<tr>") == 2, "the evaluation that measured it"


def test_both_ways_have_average_precision_and_no_hit_rate(layout: Layout, tmp_path: Path) -> None:
    page = page_of(layout, result_of(Store.open(tmp_path), PAIRED | {"protocol": "both-ways", "others": BOTH}))
    assert re.findall("<h3>(.*?)</h3>", page) == ["both-ways, view→tile", "both-ways, tile→view"]
    recall = page[page.index("<h3>both-ways, tile→view") : page.index("Epoch plans")]
    assert "<th>AP</th>" in recall and "hit rate" not in recall and "<td>81.2%</td>" in recall


def test_the_loss_of_steps_lies_around_that_of_their_epoch() -> None:
    epochs: list[dict[str, Any]] = [
        {"epoch": 1, "loss": 2.0, "step": 10, "curve": [[5, 3.0, 0.1], [10, 2.5, 0.1]]},
        {"epoch": 2, "loss": 1.5, "step": 20},
        {"epoch": 3, "loss": 1.0, "step": 30, "curve": [[25, 1.25, 0.1]]},
    ]
    assert loss_by_step(epochs) == ([1.0, 1.5, 3.0], [3.0, 2.5, 1.25])
    assert loss_by_step([{"epoch": 1, "loss": 2.0}]) == ([], [])
    assert curves_svg(epochs, [], [], []).startswith("<svg")
    assert curves_svg([], [], [], []).startswith("<svg"), "a run that has not begun"


def test_a_run_without_evaluation_has_a_report_with_a_preview_of_its_pairs(layout: Layout, tmp_path: Path) -> None:
    run = Run(Store.open(tmp_path), layout, "one")
    run.store_settings(TrainSettings().changed(tile_size=32, view_height=16, view_width=64))
    result = result_of(run.folder)
    page = report.publish(run, result, report.summarise("a <store>", layout, result))
    assert run.folder.read("report.html").decode() == page
    assert "R@1" not in page and "a &lt;store&gt;" in page
    assert page.count('<div class="preview">') == 12 and page.count("<image") == 12 * 4
    assert "alpha-0019 view-00" in page
    needs_nothing_else(page)


def test_names_of_others_are_escaped(layout: Layout, tmp_path: Path) -> None:
    result = result_of(Store.open(tmp_path), PAIRED)
    result.stream["retries"]["<b>slow</b>"] = 2
    result.stream["replaced"].append({"member": "<script>", "reason": "&"})
    result.plans.append({"epoch": 1, "source": "<i>"})
    page = page_of(layout, result)
    assert "&lt;b&gt;slow&lt;/b&gt;" in page and "<td>&lt;script&gt;</td><td>&amp;</td>" in page
    assert "<td>&lt;i&gt;</td>" in page and "<i>" not in page
    needs_nothing_else(page)


def test_dropped_candidates_have_a_row_for_each_mining(layout: Layout, tmp_path: Path) -> None:
    log = RunLog(Store.open(tmp_path), LOG)
    log.append("train", 1, 3.0, **training(1))
    search = {"mode": "exact", "positive_margin": 0.95}
    log.append("mine", 1, 2.0, places=1234, k=8, search={"mode": "exact"}, beside=True)
    assert "dropped" not in page_of(layout, RunResult.of("run", log, False))
    log.append("mine", 2, 2.0, places=1234, k=8, search=search, dropped=5678, touched=91, short=3, empty=1, beside=True)
    page = page_of(layout, RunResult.of("run", log, False))
    row = page[page.index("Likely false negatives") : page.index("Generations of the layout")]
    assert re.findall("<td>(.*?)</td>", row) == ["2", "0.950", "5,678", "91", "1,234", "3", "1"]


def test_the_time_line_says_what_ran_beside_and_what_was_waited_for(layout: Layout, tmp_path: Path) -> None:
    log = RunLog(Store.open(tmp_path), LOG)
    log.append("train", 1, 3.0, **training(1))
    log.append("mine", 1, 2.0, beside=True)
    log.append("wait", 2, 1.0)
    result = RunResult.of("run", log, False)
    assert (result.seconds["mine"], result.beside["mine"], result.seconds["wait"]) == (0, 2.0, 1.0)
    page = page_of(layout, result)
    assert page.count("<svg") == 2
    needs_nothing_else(page)
    assert timeline_svg([{"stage": "train", "epoch": 1, "seconds": 1.0}]) == "", "a log from before there were times"
