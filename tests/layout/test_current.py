"""Which layout is the current one: who moves it, who does not, and what happens in between."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from geostream.errors import BadInput, LayoutNotCommitted, StoreError
from geostream.layout import Layout, advance, current_layout, open_layout, use_layout
from geostream.layout.tags import read_tags, tag_layout, untag
from geostream.store import Store
from tests.helpers import child_of, tiny_layout


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


def current(root: Store) -> str | None:
    found = current_layout(root, "tiny")
    return None if found is None else found.layout


def test_the_first_layout_is_current_and_its_children_follow(root: Store) -> None:
    base = tiny_layout(root, name="base")
    assert current(root) is None and advance(root, "tiny", base, None) and current(root) == "base"
    first = child_of(root, base)
    assert open_layout(root).name == "base"  # killed before it moved
    assert advance(root, "tiny", first, base.id) and open_layout(root).name == "base-g1"
    assert advance(root, "tiny", first, base.id) and advance(root, "tiny", base, None) is False
    assert open_layout(root).name == "base-g1"


def test_two_generations_from_one_parent_and_a_second_layout_leave_it_clear(root: Store) -> None:
    base = tiny_layout(root, name="base")
    advance(root, "tiny", base, None)
    one, two = child_of(root, base, 1), child_of(root, base, 2)
    assert advance(root, "tiny", one, base.id) and not advance(root, "tiny", two, base.id)
    other = tiny_layout(root, name="other", places=16)
    assert not advance(root, "tiny", other, None)
    assert open_layout(root).name == "base-g1"
    assert use_layout(root, "tiny", "other").id == other.id == open_layout(root).id
    assert not advance(root, "tiny", child_of(root, one, 3), one.id) and current(root) == "other"


def test_two_at_once_move_it_once(s3_store: Store) -> None:
    base = tiny_layout(s3_store, name="base")
    advance(s3_store, "tiny", base, None)
    children = [child_of(s3_store, base, seed) for seed in (1, 2)]
    moved: list[str] = []

    def race(child: Layout) -> None:
        if advance(Store.open(s3_store.url), "tiny", child, base.id):
            moved.append(child.name)

    threads = [threading.Thread(target=race, args=(child,)) for child in children]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moved == [current(s3_store)]


def test_an_older_store_goes_on_from_its_newest_generation(root: Store) -> None:
    """It has no current.json: the newest generation is meant, and stays so when something else is committed."""
    base = tiny_layout(root, name="base")
    first = child_of(root, base)
    assert open_layout(root).name == "base-g1" and current(root) is None
    assert not advance(root, "tiny", base, None)  # sharded again, and found done
    assert current(root) == "base-g1"
    root.delete("tiny/layouts/current.json")
    assert not advance(root, "tiny", tiny_layout(root, name="other", places=16), None) and current(root) == "base-g1"
    root.delete("tiny/layouts/current.json")
    root.delete("tiny/layouts/other/layout.json")
    assert advance(root, "tiny", child_of(root, first, 4), first.id) and current(root) == "base-g2"
    root.delete("tiny/layouts/current.json")
    assert not advance(root, "tiny", child_of(root, base, 5), base.id) and current(root) == "base-g2"


def test_an_older_store_where_it_is_not_clear(root: Store) -> None:
    tiny_layout(root, name="base"), tiny_layout(root, name="other", places=16)
    with pytest.raises(BadInput, match="base, other.*geostream layouts use"):
        open_layout(root)
    use_layout(root, "tiny", "other")
    assert open_layout(root).name == "other"


def test_a_current_layout_that_is_gone(root: Store) -> None:
    base = tiny_layout(root, name="base")
    first = child_of(root, base)
    use_layout(root, "tiny", "base-g1")
    root.delete("tiny/layouts/base-g1/layout.json")
    with pytest.raises(LayoutNotCommitted, match="base-g1.*geostream layouts use"):
        open_layout(root)
    assert not advance(root, "tiny", base, None)
    with pytest.raises(LayoutNotCommitted, match="base-g1"):
        use_layout(root, "tiny", "base-g1")
    assert open_layout(root, "tiny", use_layout(root, "tiny", "base").layout).id != first.id
    root.write_json("tiny/layouts/current.json", {"format": 1, "layout": "base", "id": "of before"})
    with pytest.raises(LayoutNotCommitted, match="base.*geostream layouts use"):
        open_layout(root)  # another layout has the name by now
    assert advance(root, "tiny", base, None) and open_layout(root).id == base.id  # sharded anew under its name


@pytest.mark.parametrize("said", [b"{", b"[]", b'{"format": 2, "layout": "base", "id": "x"}', b'{"format": 1}'])
def test_a_damaged_file(root: Store, said: bytes) -> None:
    base = tiny_layout(root, name="base")
    root.write("tiny/layouts/current.json", said)
    for ask in (lambda: open_layout(root), lambda: advance(root, "tiny", base, None)):
        with pytest.raises(StoreError, match=r"current\.json"):
            ask()
    use_layout(root, "tiny", "base")
    assert open_layout(root).id == base.id


def test_a_tag_is_another_name(root: Store) -> None:
    base = tiny_layout(root, name="base")
    other = tiny_layout(root, name="other", places=16)
    tag_layout(root, base, "paper")
    tag_layout(root, base, "paper")
    tag_layout(root, open_layout(root, "tiny", "paper"), "first")
    assert {tag: one.layout for tag, one in read_tags(root, "tiny").items()} == {"first": "base", "paper": "base"}
    assert open_layout(root, "tiny", "first").id == base.id and use_layout(root, "tiny", "paper").layout == "base"
    for wrong in ("paper", "other", "later-g2", "a/b"):
        with pytest.raises(BadInput, match=wrong):
            tag_layout(root, other, wrong)
    assert untag(root, "tiny", "paper") == "base"
    with pytest.raises(BadInput, match="'paper'.*first"):
        untag(root, "tiny", "paper")
    with pytest.raises(LayoutNotCommitted, match="layouts/paper"):
        open_layout(root, "tiny", "paper")
    root.delete("tiny/layouts/base/layout.json")
    with pytest.raises(LayoutNotCommitted, match="'first'"):
        open_layout(root, "tiny", "first")


@pytest.mark.parametrize("said", [b"{", b"[]", b'{"format": 2, "tags": {}}', b'{"format": 1, "tags": {"a": 1}}'])
def test_damaged_tags(root: Store, said: bytes) -> None:
    base = tiny_layout(root, name="base")
    root.write("tiny/layouts/tags.json", said)
    with pytest.raises(StoreError, match=r"tags\.json"):
        tag_layout(root, base, "paper")
