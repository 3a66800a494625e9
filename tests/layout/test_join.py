"""A joined layout is an index of other data sets' shards: nothing of theirs is copied, changed, or lost to it."""

from __future__ import annotations

import io
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geostream.layout.join as joining
from geostream.errors import BadInput, StoreError
from geostream.layout import Layout, current_layout, open_layout, use_layout
from geostream.layout.diff import diff_layouts
from geostream.layout.files import JOB
from geostream.layout.join import in_turn, join_layouts
from geostream.layout.members import read_image
from geostream.layout.verify import verify_layout
from geostream.reclustering.rewrite import rewrite
from geostream.runs import generations
from geostream.runs.generations import list_generations, prune
from geostream.store import Store
from tests.command import refused, said
from tests.helpers import child_of, tiny_layout, tiny_places, write_layout


@pytest.fixture
def sources(s3_store: Store) -> list[Layout]:
    """One with coordinates and semi-positives, one of the same keys without, with other image sizes and more views."""
    first = tiny_layout(s3_store, dataset="vigor", name="base")
    places = tiny_places(places=20, views=2, tile_size=24, view_size=(24, 24), seed=5)
    return [first, write_layout(s3_store, places, dataset="cvusa", name="base", coordinates="none")]


def objects(store: Store, dataset: str) -> dict[str, int]:
    return {one.path: one.size for one in store.list(dataset)}


def test_places_are_those_of_the_data_sets_in_turn(s3_store: Store, sources: list[Layout]) -> None:
    before = [objects(s3_store, name) for name in ("vigor", "cvusa")]
    made, already = join_layouts(s3_store, "both", sources)
    assert not already and [objects(s3_store, name) for name in ("vigor", "cvusa")] == before
    written = objects(s3_store, "both")
    assert set(written) == {
        *(f"both/layouts/base/{name}" for name in ("layout.json", "places.parquet", "members.parquet")),
        "both/layouts/current.json",
    }
    joined = open_layout(s3_store, "both")
    assert joined.id == made.id and joined.info["format"] == 3 and verify_layout(joined).problems == ()
    assert joined.coordinates == "none" and joined.n_places == sum(one.n_places for one in sources)
    for number, (source, part) in enumerate(zip(sources, joined.joined, strict=True)):
        mine = np.arange(part.first, part.first + part.places)
        assert (joined.part[mine] == number).all() and part.places == source.n_places
        assert [joined.keys[place] for place in mine] == [f"{source.dataset}_{key}" for key in source.keys]
        assert np.array_equal(joined.position[mine], source.position, equal_nan=True)
        for split in ("train", "test"):
            inside = np.isin(joined.pairs(split).place, mine)
            assert np.array_equal(joined.pairs(split).place[inside] - part.first, source.pairs(split).place)
            assert np.array_equal(joined.pairs(split).view[inside], source.pairs(split).view)
        for place in (0, source.n_places - 1):
            assert read_image(joined, part.first + place) == read_image(source, place)
            semi = joined.excluded("train").row(part.first + place) - part.first
            assert np.array_equal(semi, source.excluded("train").row(place))
    assert set(joined.places["area"].unique().to_pylist()) == {
        f"{name}/{area}" for name in ("vigor", "cvusa") for area in ("alpha", "beta")
    }


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=4))
def test_every_stretch_of_the_order_has_its_share_of_every_group(weights: list[list[int]]) -> None:
    groups = [np.array(some, dtype=np.int64) for some in weights]
    order = in_turn(groups)
    assert sorted(order.tolist()) == list(range(sum(map(len, groups))))
    group = np.repeat(np.arange(len(groups)), [len(some) for some in groups])[order]
    weight = np.concatenate(groups)[order]
    for number in range(len(groups)):
        assert (np.diff(order[group == number]) > 0).all()  # of a group they keep their order
    done = np.stack([np.cumsum(np.where(group == n, weight, 0)) / max(some.sum(), 1) for n, some in enumerate(groups)])
    step = max(some.max() / max(some.sum(), 1) for some in groups)
    heavy = [n for n, some in enumerate(groups) if some.sum()]
    if heavy:
        assert np.ptp(done[heavy], axis=0).max() <= step + 1e-9  # never ahead by more than one item


def test_joined_again_it_is_there_and_after_an_append_another_one_is_current(
    s3_store: Store, sources: list[Layout]
) -> None:
    first, _ = join_layouts(s3_store, "both", sources)
    same, already = join_layouts(s3_store, "both", sources)
    assert already and (same.name, same.id) == ("base", first.id)
    grown = tiny_layout(s3_store, dataset="vigor", name="base-g1", places=16)
    second, already = join_layouts(s3_store, "both", [grown, sources[1]])
    assert (second.name, already) == ("base-2", False) and open_layout(s3_store, "both").id == second.id
    child = child_of(s3_store, second)
    use_layout(s3_store, "both", child.name)
    assert join_layouts(s3_store, "both", [grown, sources[1]])[1]
    assert open_layout(s3_store, "both").id == child.id, "its own next generation stays current"
    out = said("layouts", "join", s3_store.url, "both", "--of", "vigor/base", "--of", "cvusa")
    assert "was there already" in out and "base-2-g1 is the current layout of both" in " ".join(out.split())
    assert open_layout(s3_store, "both").id == child.id, "an older join that is repeated does not become current"
    s3_store.write_json(f"both/layouts/base/{JOB}", {})  # as a kill between the commit and the rest leaves it
    out = said("layouts", "join", s3_store.url, "both", "--of", "vigor/base", "--of", "cvusa")
    assert "base is the current layout" in out and open_layout(s3_store, "both").id == first.id
    assert not s3_store.exists(f"both/layouts/base/{JOB}")


def test_prune_removes_a_join_that_a_later_one_supersedes_and_then_what_it_joined(
    tmp_path: Path,
) -> None:
    store = Store.open(tmp_path)
    vigor = tiny_layout(store, dataset="vigor", name="base")
    cvusa = tiny_layout(store, dataset="cvusa", name="base", seed=5)
    join_layouts(store, "both", [vigor, cvusa])
    newer = child_of(store, vigor)
    use_layout(store, "vigor", newer.name)
    second, _ = join_layouts(store, "both", [newer, cvusa])
    use_layout(store, "both", "base")
    assert {one.name: one.keep for one in list_generations(store, "both")} == {
        "base": "the current layout",
        "base-2": "the newest of its line",
    }
    use_layout(store, "both", second.name)
    assert {one.name: one.keep for one in prune(store, "both")} == {"base": "", "base-2": "the current layout"}
    assert [one.keep for one in prune(store, "vigor")] == ["", "the current layout"]
    assert verify_layout(open_layout(store, "both")).count == 0


def test_killed_anywhere_it_is_finished_by_the_next(
    s3_store: Store, sources: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> Any:
        raise Killed

    use_layout(s3_store, "vigor", child_of(s3_store, sources[0]).name)
    for name in ("_members", "advance"):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(joining, name, killed)
            join_layouts(s3_store, "both", sources)
        assert current_layout(s3_store, "both") is None
        assert s3_store.exists(f"both/layouts/base/{JOB}")
        assert "both/base" in refused("layouts", "remove", s3_store.url, "base", "--dataset", "vigor")
    made, already = join_layouts(s3_store, "both", sources)
    assert already and made.name == "base" and open_layout(s3_store, "both").id == made.id
    assert not s3_store.exists(f"both/layouts/base/{JOB}")


def test_a_join_that_was_cut_off_is_removed_with_what_is_its_own(
    s3_store: Store, sources: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name at once; by prune when it has shown no sign of life for a day. A file that is not ours stays."""

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    folder, before = s3_store.child("both", "layouts", "base"), {one.path for one in s3_store.list()}
    for remove in ("by name", "prune"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(joining, "_members", killed)
            join_layouts(s3_store, "both", sources)
        folder.write("places.parquet", b"half a table")
        folder.write("mine.txt", b"a note")
        [one] = prune(s3_store, "both")
        assert (one.kind, one.number) == ("join begun", None) and "cut off" in one.keep and "remove it" in one.keep
        assert folder.exists(JOB)
        if remove == "by name":
            said("layouts", "remove", s3_store.url, "base", "--dataset", "both")
        else:
            with monkeypatch.context() as patched:
                patched.setattr(generations, "IDLE", timedelta(0))
                assert [one.keep for one in prune(s3_store, "both")] == [""]
        assert {one.path for one in s3_store.list()} - before == {"both/layouts/base/mine.txt"}
        assert "base" in refused("layouts", "remove", s3_store.url, "base", "--dataset", "both")
        folder.delete("mine.txt")
    assert "both/" not in refused("layouts", "remove", s3_store.url, "base", "--dataset", "vigor")


def test_a_join_does_not_go_on_in_a_folder_that_is_being_removed(
    s3_store: Store, sources: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    for patch, call in (
        ((joining, "_members"), lambda: join_layouts(s3_store, "both", sources)),
        ((Store, "delete_all"), lambda: generations.remove(s3_store, "both", "base")),
    ):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(patch[0], patch[1], killed)
            call()
    assert join_layouts(s3_store, "both", sources)[0].name == "base-2"
    said("layouts", "remove", s3_store.url, "base", "--dataset", "both")
    assert not s3_store.list("both/layouts/base")


def test_what_is_joined_stays_as_long_as_the_joined_one_does(s3_store: Store, sources: list[Layout]) -> None:
    vigor, _ = sources
    newer = child_of(s3_store, vigor)
    use_layout(s3_store, "vigor", newer.name)
    assert {one.name: one.keep for one in list_generations(s3_store, "vigor")}["base"] == ""
    said("layouts", "join", s3_store.url, "both", "--of", "vigor/base", "--of", "cvusa")
    [joined] = list_generations(s3_store, "both")
    assert (joined.kind, joined.bytes) == ("joined", 0) and joined.borrowed > 0
    assert "joined by both/base" in refused("layouts", "remove", s3_store.url, "base", "--dataset", "vigor")
    assert {one.name: one.keep for one in prune(s3_store, "vigor")}["base"] == "joined by both/base"
    assert verify_layout(open_layout(s3_store, "both")).count == 0
    # Its next generation has shards of its own, but is evaluated on the layouts that were joined.
    both = open_layout(s3_store, "both")
    child = child_of(s3_store, both)
    use_layout(s3_store, "both", child.name)
    said("layouts", "remove", s3_store.url, "base", "--dataset", "both")
    assert "joined by both/base-g1" in refused("layouts", "remove", s3_store.url, "base", "--dataset", "vigor")


def test_a_next_generation_has_the_same_images_under_the_joined_names(s3_store: Store, sources: list[Layout]) -> None:
    """Both data sets have the same keys; a tar in which two places had one name would mix them up for webdataset."""
    joined, _ = join_layouts(s3_store, "both", sources)
    order = np.random.default_rng(1).permutation(joined.n_places).astype(np.int32)
    child = rewrite(s3_store, joined, np.array_split(order, 3), {})
    assert child.joined == joined.joined and verify_layout(child).problems == ()
    found = diff_layouts(joined, child)
    assert (found.came.count, found.went.count, found.changed.count) == (0, 0, 0) and found.same_gallery
    names = list[str]()
    for path in child.shard_paths:
        with tarfile.open(fileobj=io.BytesIO(child.shards_store.read(path))) as tar:
            names += tar.getnames()
    keys = pc.take(joined.places["key"], joined.members["place"]).to_pylist()
    members = zip(keys, joined.members["member"].to_pylist(), strict=True)
    assert sorted(names) == sorted(f"{key}.{name}" for key, name in members)
    again = child_of(s3_store, child)  # from shards that have the joined names
    assert verify_layout(again).problems == ()


def test_damage_is_told_with_the_data_set(s3_store: Store, sources: list[Layout]) -> None:
    joined, _ = join_layouts(s3_store, "both", sources)
    path = "vigor/layouts/base/shard-00001.tar"
    data = bytearray(s3_store.read(path))
    data[600] ^= 1
    s3_store.write(path, bytes(data))
    [problem] = verify_layout(joined).problems
    assert problem.startswith(path) and "alpha-0004.tile.jpg" in problem
    with pytest.raises(StoreError, match="alpha-0004"):
        child_of(s3_store, joined)


def test_what_cannot_be_joined_is_refused_in_one_line(s3_store: Store, sources: list[Layout]) -> None:
    url = s3_store.url
    tiny_layout(s3_store, dataset="university1652", name="base")
    tiny_layout(s3_store, dataset="other", name="base")
    join_layouts(s3_store, "both", sources)
    for words, told in (
        (["three", "--of", "vigor"], "at least two"),
        (["three", "--of", "vigor", "--of", "vigor/base"], "vigor is named twice"),
        (["vigor", "--of", "vigor", "--of", "cvusa"], "another name"),
        (["three", "--of", "vigor", "--of", "both"], "vigor cvusa"),
        (["three", "--of", "vigor", "--of", "university1652"], "university1652: picture"),
        (["three", "--of", "vigor", "--of", "nothing"], "nothing"),
        (["th.ree", "--of", "vigor", "--of", "cvusa"], "th.ree"),
        (["other", "--of", "vigor", "--of", "cvusa"], "layout base, which joins no others"),
        (["cvact", "--of", "vigor", "--of", "cvusa"], "cvact: is the name of a recipe"),
        (["three", "--of", "vigor/", "--of", "cvusa"], "--of vigor/: no layout is named"),
    ):
        assert told in refused("layouts", "join", url, *words)
    assert not s3_store.list("three")


def test_a_name_that_makes_keys_too_long_is_a_number(s3_store: Store) -> None:
    places = tiny_places()
    long = [type(place)(**{**vars(place), "key": f"{place.key}-{'x' * 60}"}) for place in places]
    name = "a-data-set-with-a-long-name"
    layouts = [write_layout(s3_store, long, dataset=name), tiny_layout(s3_store, dataset="vigor")]
    joined, _ = join_layouts(s3_store, "both", layouts)
    assert [one.prefix for one in joined.joined] == ["0_", "vigor_"]
    assert verify_layout(child_of(s3_store, joined)).problems == ()


def test_inspect_shows_what_is_joined_in_plain_words(s3_store: Store, sources: list[Layout]) -> None:
    join_layouts(s3_store, "both", sources)
    out = said("inspect", s3_store.url, "--dataset", "both")
    assert "source: adapter: joined" in out and "Joined(" not in out and "{" not in out
    assert all(f"{name}_" in out for name in ("vigor", "cvusa"))


def test_an_older_geostream_refuses_it(s3_store: Store, sources: list[Layout]) -> None:
    """It would look for the shards in the wrong folder; so the format is one that it does not know."""
    joined, _ = join_layouts(s3_store, "both", sources)
    assert joined.info["format"] == 3 and sources[0].info["format"] == 2
    info = s3_store.read_json("both/layouts/base/layout.json")
    info["joined"][0]["places"] += 1
    s3_store.write_json("both/layouts/base/layout.json", info)
    with pytest.raises(StoreError, match="joined"):
        open_layout(s3_store, "both")


def test_nothing_is_appended_to_a_joined_layout(s3_store: Store, sources: list[Layout], tmp_path: Any) -> None:
    from tests.vigor_raw import write_vigor

    join_layouts(s3_store, "both", sources)
    write_vigor(tmp_path / "raw")
    words = ["shard", "vigor", str(tmp_path / "raw"), s3_store.url, "--dataset", "both", "--workers", "1"]
    assert "joined" in refused(*words)


def test_bad_input_is_the_kind_of_error(s3_store: Store, sources: list[Layout]) -> None:
    with pytest.raises(BadInput):
        join_layouts(s3_store, "both", sources[:1])
