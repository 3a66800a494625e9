"""A run stays on the layout that it was begun on, whatever becomes the current one; only a new run takes that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import geostream.reclustering.recluster as reclustering
import sharding.commit
from flows.common import open_layout as open_for_flow
from geostream.errors import StaleArtefact
from geostream.layout import current_layout, open_layout, use_layout
from geostream.layout.tags import tag_layout
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.command import refused, said
from tests.helpers import child_of, tiny_layout
from tests.reclustering.test_recluster import embedded
from tests.training.settings import TINY
from tests.vigor_raw import write_vigor


class Killed(BaseException):
    pass


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def current(root: Store) -> str | None:
    found = current_layout(root, "tiny")
    return None if found is None else found.layout


def test_found_by_names(root: Store) -> None:
    base = tiny_layout(root, name="base")
    child = child_of(root, base)
    other = tiny_layout(root, name="other", places=16)
    Run(root, base, "one").pin_layout(base)
    use_layout(root, "tiny", "other")
    tag_layout(root, child, "again")
    assert Run.find(root, None, None, "one").layout.id == base.id == Run.find(root, "tiny", "base", "one").layout.id
    assert Run.find(root, "tiny", "again", "one").layout.id == child.id  # other shards, the same places
    assert Run.find(root, "tiny", None, "new").layout.id == other.id
    with pytest.raises(StaleArtefact, match="base.*other"):
        Run.find(root, "tiny", "other", "one")
    assert open_for_flow.fn(root, None, None, "one").id == base.id
    assert open_for_flow.fn(root, None, None, "new").id == other.id == open_for_flow.fn(root, None, None).id


def test_commands_go_on_with_a_run_on_its_own_layout(root: Store) -> None:
    """Another layout, of other places, became current meanwhile."""
    tiny_layout(root, name="base", places=16, views=1, view_size=(32, 64))
    plain = TrainSettings().flat()
    tiny = TINY.changed(epochs=1, workers=0).flat()
    settings = [f"--set={name}={value}" for name, value in tiny.items() if value != plain[name]]
    train = ["train", root.url, "--run", "one", *settings]
    said(*train)
    use_layout(root, "tiny", tiny_layout(root, name="other", places=20, view_size=(32, 64)).name)
    assert "was finished before" in said(*train)
    said("embed", root.url, "--run", "one")
    said("mine", root.url, "--run", "one")
    said("plan", root.url, "--epoch", "3", "--run", "one")
    assert "base" in said("evaluate", root.url, "--run", "one")
    assert (
        Run.find(root, None, None, "one").embeddings("train", 1).places_id == open_layout(root, None, "base").places_id
    )
    assert "other" in refused(*train, "--layout", "other")


def test_a_reclustering_moves_the_current_layout_only_from_its_own(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_layout(root, places=24, name="base")
    use_layout(root, "tiny", "base")
    embedded(base, root, "first")
    command = ["recluster", root.url, "--run", "first"]

    def killed(*_: Any) -> bool:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(reclustering, "advance", killed)
        said(*command)
    assert current(root) == "base" and open_layout(root, "tiny", "base-g1").generation == 1
    assert "stays" not in said(*command) and current(root) == "base-g1"
    other = tiny_layout(root, name="other", places=16)
    use_layout(root, "tiny", "other")
    assert "other stays the current layout" in said(*command, "--layout", "base")
    assert open_layout(root).id == other.id


def test_sharding_makes_the_first_layout_current(root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vigor(tmp_path / "raw")
    words = [
        "shard",
        "vigor",
        str(tmp_path / "raw"),
        root.url,
        "--dataset",
        "tiny",
        "--workers",
        "1",
        "--max-broken",
        "1",
    ]

    def killed(*_: Any) -> bool:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(sharding.commit, "advance", killed)
        said(*words)
    assert current(root) is None and open_layout(root).name == "base"
    said(*words)
    assert current(root) == "base"
    said(*words, "--layout", "second")
    assert current(root) == "base" == open_layout(root).name
