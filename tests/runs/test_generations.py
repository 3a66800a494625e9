"""Which generations may go: what nobody needs and a committed one descends from; and how they go."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from geostream.errors import BadInput, LayoutNotCommitted, StoreError
from geostream.layout import Layout, list_layouts, open_layout, use_layout
from geostream.layout.files import GOING, JOB
from geostream.layout.tags import tag_layout, untag
from geostream.layout.verify import verify_layout
from geostream.runs.generations import check_dataset, list_generations, prune, remove
from geostream.runs.run import needed_layouts
from geostream.store import Store
from geostream.training.checkpoint_files import drop_checkpoint
from tests.command import refused, said
from tests.helpers import child_of, tiny_layout
from tests.runs.small_runs import write_models


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


def line(root: Store, generations: int = 3) -> list[Layout]:
    """A layout and its descendants."""
    made = [tiny_layout(root, name="base")]
    while len(made) < generations:
        made.append(child_of(root, made[-1], seed=len(made)))
    return made


def checkpoint(run: Store, layout: Layout, step: int) -> None:
    run.write_json(f"checkpoints/step-{step:08d}/state.json", {"position": {"layout_id": layout.id}})


def kept(root: Store) -> dict[str, str]:
    """Why each generation stays."""
    return {one.name: one.keep for one in list_generations(root, "tiny")}


def test_only_the_newest_stays_where_there_is_no_run(s3_store: Store) -> None:
    generations = line(s3_store)
    assert [one.name for one in generations] == ["base", "base-g1", "base-g2"]
    would = prune(s3_store, "tiny", dry_run=True)
    assert [(one.name, one.number, one.parent, one.bytes, one.keep) for one in would] == [
        ("base", 0, "", generations[0].info["bytes"], ""),
        ("base-g1", 1, "base", generations[1].info["bytes"], ""),
        ("base-g2", 2, "base-g1", generations[2].info["bytes"], "the current layout"),
    ]
    assert list_layouts(s3_store, "tiny") == ["base", "base-g1", "base-g2"]
    assert prune(s3_store, "tiny") == would
    assert {info.path.split("/")[2] for info in s3_store.list()} == {"base-g2"}
    assert verify_layout(open_layout(s3_store)).count == 0
    assert list_generations(s3_store, "tiny")[0].parent == generations[1].id  # gone, and named by its id
    assert [one.keep for one in prune(s3_store, "tiny")] == ["the current layout"]


def test_what_a_run_needs_stays(root: Store) -> None:
    """The layouts of all its checkpoints, of the plan of its newest epoch, and the one it stands on."""
    base, first, second, third, fourth = line(root, 5)
    run = root.child("tiny", "runs", "one")
    checkpoint(run, base, 100)
    assert needed_layouts(run) == {base.id}
    checkpoint(run, first, 200)
    run.write_json("plans/epoch-0002.json", {"layout_id": third.id})
    run.write_json("plans/epoch-0011.json", {"layout_id": second.id})
    assert needed_layouts(run) == {base.id, first.id, second.id}
    assert kept(root) == {
        **dict.fromkeys(["base", "base-g1", "base-g2"], "needed by run one"),
        "base-g3": "",
        "base-g4": "the current layout",
    }
    run.write_json("layout.json", {"layout": third.name, "id": third.id})
    assert kept(root)["base-g3"] == "needed by run one"
    run.delete_all(info.path for info in run.list("checkpoints"))
    assert needed_layouts(run) == set()
    checkpoint(run, third, 300)
    assert needed_layouts(run) == {second.id, third.id}
    prune(root, "tiny")
    assert list_layouts(root, "tiny") == ["base-g2", "base-g3", "base-g4"]
    assert [one.runs for one in list_generations(root, "tiny")] == [("one",), ("one",), ()]
    # A descendant counts also where the generation between is gone.
    run.delete_all(info.path for info in run.list())
    second_only = root.child("tiny", "runs", "two")
    checkpoint(second_only, second, 1)
    prune(root, "tiny")
    assert list_layouts(root, "tiny") == ["base-g2", "base-g4"]
    second_only.delete_all(info.path for info in second_only.list())
    prune(root, "tiny")
    assert list_layouts(root, "tiny") == ["base-g4"] and open_layout(root).id == fourth.id


def test_what_a_dropped_checkpoint_needed_may_go(root: Store) -> None:
    """A run needs the layouts of the checkpoints it keeps: its best one's stays until it is another."""
    base, first, second = line(root, 3)
    run = root.child("tiny", "runs", "one")
    for step, layout in ((100, base), (200, first), (300, second)):
        checkpoint(run, layout, step)
    run.write_json("layout.json", {"layout": second.name, "id": second.id})
    drop_checkpoint(run, "step-00000200")
    assert kept(root) == {"base": "needed by run one", "base-g1": "", "base-g2": "the current layout"}
    drop_checkpoint(run, "step-00000100")
    prune(root, "tiny")
    assert list_layouts(root, "tiny") == ["base-g2"]


def lease(run: Store, alive: bool) -> None:
    """A lease of a process on another machine, which gave a sign of life just now or an hour ago."""
    beat = datetime.now(UTC) - timedelta(hours=0 if alive else 1)
    run.write_json("lease/00000001.json", {"machine": "another", "beat": beat.isoformat()})


NOTHING_WHOLE: list[dict[str, bytes]] = [
    {"settings.json": b"{}"},
    {"metrics.jsonl": b""},
    {"checkpoints/step-00000001/model.safetensors": b"x"},  # not whole: it does not exist
    {"plans/epoch-0001.json": b'{"other": 1}'},
    {"layout.json": b"{}"},
]


@pytest.mark.parametrize("written", NOTHING_WHOLE)
def test_a_run_without_a_checkpoint_needs_nothing_unless_it_is_held(root: Store, written: dict[str, bytes]) -> None:
    line(root, 2)
    run = root.child("tiny", "runs", "dark")
    for path, data in written.items():
        run.write(path, data)
    lease(run, alive=False)
    assert needed_layouts(run) == set() and kept(root)["base"] == ""
    lease(run, alive=True)
    assert needed_layouts(run) is None
    assert kept(root)["base"] == "run dark does not say which layout it needs; delete it if it is none"
    assert len(prune(root, "tiny")) == len(list_layouts(root, "tiny")) == 2


def test_a_run_that_is_held_needs_what_it_reads_and_its_plan(root: Store) -> None:
    base, first, _ = line(root, 3)
    run = root.child("tiny", "runs", "one")
    run.write_json("layout.json", {"layout": first.name, "id": first.id})
    run.write_json("plans/epoch-0001.json", {"layout_id": base.id})
    assert needed_layouts(run) == set()
    lease(run, alive=True)
    assert needed_layouts(run) == {base.id, first.id}


@pytest.mark.parametrize("damaged", [b"{", b"[]"])
def test_a_run_that_does_not_say_what_it_needs_needs_everything(root: Store, damaged: bytes) -> None:
    line(root, 2)
    root.child("tiny", "runs", "dark").write("checkpoints/step-00000001/state.json", damaged)
    assert kept(root)["base"] == "run dark does not say which layout it needs; delete it if it is none"
    assert len(prune(root, "tiny")) == len(list_layouts(root, "tiny")) == 2


def test_one_damaged_checkpoint_among_whole_ones_keeps_everything(root: Store) -> None:
    _, second = line(root, 2)
    run = root.child("tiny", "runs", "one")
    checkpoint(run, second, 1)
    run.write("checkpoints/step-00000002/state.json", b"{")
    assert needed_layouts(run) is None and kept(root)["base"]


def test_branches_stay_and_their_root_goes(root: Store) -> None:
    [base] = line(root, 1)
    child_of(root, base, 1), child_of(root, base, 2)
    prune(root, "tiny")
    assert list_layouts(root, "tiny") == ["base-g1", "base-g1-2"]
    with pytest.raises(BadInput, match="base-g1, base-g1-2"):
        open_layout(root)


def begun(root: Store, name: str, job: dict[str, Any]) -> None:
    folder = root.child("tiny", "layouts", name)
    folder.write("shard-00000.tar", b"half a layout")
    folder.write_json(JOB, job)


def test_what_was_never_committed(root: Store) -> None:
    """A reclustering given up goes; one that may be at work stays with what it reads, and so does a sharding."""
    base, first = line(root, 2)

    def job(order: str, hours: int) -> dict[str, Any]:
        alive = datetime.now(UTC) - timedelta(hours=hours)
        return {"order": order, "parent": base.id, "shards": 1, "alive": alive.isoformat()}

    begun(root, "old", job("1", 25))
    begun(root, "sharding", {"fingerprint": "f"})
    assert kept(root)["base"] == "" == kept(root)["old"]
    begun(root, "young", job("2", 23))
    begun(root, "odd", {"order": "1", "parent": first.id})
    reasons = kept(root)
    assert reasons["base"] == "young is being made from it" and reasons["old"] == ""
    assert "within a day" in reasons["young"] and "sharding was cut off" in reasons["sharding"]
    assert "is damaged" in reasons["odd"]
    found = {one.name: one for one in prune(root, "tiny")}
    assert found["old"].bytes > len(b"half a layout") and found["old"].number is None
    assert root.folders("tiny/layouts") == ["base", "base-g1", "odd", "sharding", "young"]
    begun(root, "young", job("2", 25))
    prune(root, "tiny")
    assert root.folders("tiny/layouts") == ["base-g1", "odd", "sharding"] and open_layout(root).id == first.id


def test_a_reclustering_gone_on_with_just_now_is_not_removed(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    [base] = line(root, 1)
    job = {"order": "1", "parent": base.id, "shards": 1, "alive": (datetime.now(UTC) - timedelta(days=2)).isoformat()}
    begun(root, "late", job)
    put = Store.write_json

    def at_the_same_time(self: Store, path: str, value: Any, **how: Any) -> None:
        put(self, path, value, **how)
        if path == GOING:
            put(self, JOB, {**job, "alive": datetime.now(UTC).isoformat()})

    monkeypatch.setattr(Store, "write_json", at_the_same_time)
    prune(root, "tiny")
    folder = root.child("tiny", "layouts", "late")
    assert {info.path for info in folder.list()} == {"shard-00000.tar", JOB}


@pytest.mark.parametrize("deletions", range(1, 8))
def test_a_removal_cut_off_anywhere_is_finished_by_the_next(
    root: Store, deletions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(root, 2)
    delete, left = Store.delete, [deletions]

    def cut_off(self: Store, path: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(self, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "delete", cut_off)
        prune(root, "tiny")
    with pytest.raises(LayoutNotCommitted):
        open_layout(root, "tiny", "base")
    assert root.folders("tiny/layouts") == ["base", "base-g1"]
    prune(root, "tiny")
    assert root.folders("tiny/layouts") == ["base-g1"] and verify_layout(open_layout(root)).count == 0


def test_a_damaged_layout_stops_it(root: Store) -> None:
    """Whether something descends from it cannot be said."""
    line(root, 2)
    root.write("tiny/layouts/base-g1/layout.json", b"{")
    with pytest.raises(StoreError, match=r"base-g1/layout\.json"):
        prune(root, "tiny")
    assert root.exists("tiny/layouts/base/layout.json")


def test_which_dataset(root: Store) -> None:
    with pytest.raises(BadInput, match="there: none"):
        check_dataset(root, None)
    line(root, 1)
    assert check_dataset(root, None) == "tiny"
    tiny_layout(root, dataset="other")
    with pytest.raises(BadInput, match="there: other, tiny"):
        check_dataset(root, None)
    assert check_dataset(root, "other") == "other"
    with pytest.raises(BadInput, match="'typo'"):
        check_dataset(root, "typo")
    assert root.folders() == ["other", "tiny"]


def test_a_child_that_names_only_its_parent_has_it_for_ancestor(root: Store) -> None:
    """As layouts have it that something else than a reclustering has made."""
    base, first = line(root, 2)
    info = first.store.read_json("layout.json")
    del info["source"]["ancestors"]
    first.store.write_json("layout.json", info)
    assert kept(root) == {"base": "", "base-g1": "the current layout"}
    second = child_of(root, open_layout(root))
    assert second.info["source"]["ancestors"] == [base.id, first.id]


def lend(root: Store, lender: Layout, borrower: Layout) -> None:
    """Make a layout name another's shard, as an append does."""
    path = f"tiny/layouts/{borrower.name}/layout.json"
    info = root.read_json(path)
    info["shards"][0]["layout"] = lender.name
    root.write_json(path, info)


def test_removing_one_is_refused_for_each_reason(root: Store) -> None:
    _, first, _, third = line(root, 4)
    use_layout(root, "tiny", "base-g3")
    runs = root.child("tiny", "runs")
    folders = root.child("tiny")

    def stays(name: str, reason: str) -> None:
        with pytest.raises(BadInput, match=f"layouts/base-g.*{reason}"):
            remove(root, "tiny", name)

    stays("base-g3", "current")
    tag_layout(root, first, "paper")
    stays("base-g1", "paper")
    stays("paper", "paper")  # named by its tag
    untag(root, "tiny", "paper")
    checkpoint(runs.child("one"), first, 1)
    stays("base-g1", "run one")
    runs.delete_all(info.path for info in runs.list())
    models = [("gone", first.id), ("gone", third.id)]
    write_models(folders.child("models"), models, [1, 2])
    stays("base-g1", "model 1")
    write_models(folders.child("models"), models, [1, 2, 2])
    begun(root, "new", {"fingerprint": "f", "parent": first.id})
    stays("base-g1", "new is being made")
    root.delete("tiny/layouts/new/parts/job.json")
    root.delete("tiny/layouts/new/shard-00000.tar")
    lend(root, first, third)
    stays("base-g1", "base-g3 reads shards")
    with pytest.raises(LayoutNotCommitted, match="layouts/none"):
        remove(root, "tiny", "none")
    assert list_layouts(root, "tiny") == ["base", "base-g1", "base-g2", "base-g3"]
    root.write("tiny/layouts/base-g2/notes.txt", b"foreign")
    assert remove(root, "tiny", "base-g2").name == "base-g2"
    assert list_layouts(root, "tiny") == ["base", "base-g1", "base-g3"]
    assert [one.path for one in root.list("tiny/layouts/base-g2")] == ["tiny/layouts/base-g2/notes.txt"]


def test_the_newest_of_a_line_can_be_removed_by_name(root: Store) -> None:
    [base] = line(root, 1)
    use_layout(root, "tiny", "base")
    child_of(root, base, 1), child_of(root, base, 2)
    assert kept(root)["base-g1"] == "the newest of its line"
    remove(root, "tiny", "base-g1")
    assert list_layouts(root, "tiny") == ["base", "base-g1-2"] and open_layout(root).id == base.id


def test_a_lender_stays_and_of_a_borrower_only_its_own_shards_go(root: Store) -> None:
    base, first, second = line(root, 3)
    lend(root, base, first)
    lend(root, base, second)
    one = {one.name: one for one in list_generations(root, "tiny")}
    assert one["base"].keep == "base-g2 reads shards of it" and one["base-g1"].keep == ""
    size = int(first.shard_sizes[0])
    assert (one["base-g1"].borrowed, one["base-g1"].bytes) == (size, first.info["bytes"] - size)
    before = {info.path for info in root.list("tiny/layouts/base")}
    prune(root, "tiny")
    assert list_layouts(root, "tiny") == ["base", "base-g2"]
    assert {info.path for info in root.list("tiny/layouts/base")} == before


@pytest.mark.parametrize(
    "said", [b"{", b"[]", b'{"number": 1}', b'{"number": 1, "history": [{"what": "rolled back"}]}']
)
def test_a_damaged_registry_of_models_stops_it(root: Store, said: bytes) -> None:
    line(root, 2)
    root.write("tiny/models/current.json", said)
    with pytest.raises(StoreError, match=r"models/current\.json"):
        prune(root, "tiny")
    assert list_layouts(root, "tiny") == ["base", "base-g1"]


def test_the_commands_that_choose(root: Store) -> None:
    base, _ = line(root, 2)
    assert "base-g1 (current)" in said("layouts", "list", root.url)
    assert "base" in said("layouts", "tag", root.url, "base", "paper")
    said("layouts", "use", root.url, "paper")
    assert open_layout(root).id == base.id
    shown = said("layouts", "list", root.url)
    assert "base (current)" in shown and "paper" in shown and "sharded" in shown and "reclustered" in shown
    assert "current" in refused("layouts", "remove", root.url, "base")
    assert said("layouts", "remove", root.url, "base-g1").startswith("base-g1: removed")
    said("layouts", "untag", root.url, "paper")
    assert list_layouts(root, "tiny") == ["base"]


def test_the_command_that_compares(root: Store) -> None:
    tiny_layout(root, name="base", places=12)
    tiny_layout(root, name="more", places=16)
    shown = said("layouts", "diff", root.url, "base", "more")
    assert "alpha-0012" in shown and "beta-0012" in shown and "borrowed" in shown and "another" in shown
    assert "none" in refused("layouts", "diff", root.url, "base", "none")


def test_the_commands(s3_store: Store) -> None:
    base, _ = line(s3_store, 2)
    checkpoint(s3_store.child("tiny", "runs", "one"), base, 5)

    def layouts(*words: str) -> list[str]:
        return said("layouts", *words).splitlines()

    shown = "\n".join(layouts("list", s3_store.url))
    assert "base-g1" in shown and "needed by run one" in shown and "the current layout" in shown
    checkpoint(s3_store.child("tiny", "runs", "one"), open_layout(s3_store), 5)
    size = base.info["bytes"]
    lines = [f"base: would be removed, {size} bytes", "base-g1: kept, the current layout"]
    assert layouts("prune", s3_store.url, "--dry-run") == lines
    assert list_layouts(s3_store, "tiny") == ["base", "base-g1"]
    assert layouts("prune", s3_store.url)[0] == f"base: removed, {size} bytes"
    assert list_layouts(s3_store, "tiny") == ["base-g1"]
