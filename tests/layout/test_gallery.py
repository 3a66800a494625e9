"""The id of a test set: it changes with all that figures depend on, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geostream.store import Store
from tests.helpers import TinyPlace, tiny_places, write_layout

World = list[TinyPlace]


def of(world: World, folder: Path) -> str | None:
    return write_layout(Store.open(folder), world).gallery


@pytest.fixture
def world() -> World:
    """Two places to train on, three to test on, of which each has the one behind it as semi-positive."""
    return tiny_places(places=2, test_places=3, distractors=1)


def swapped(place: TinyPlace, name: str, other: TinyPlace) -> TinyPlace:
    return replace(place, images=place.images | {name: other.images[name]})


@pytest.mark.parametrize(
    "change",
    [
        lambda world: [*world[:2], swapped(world[2], "tile.jpg", world[0]), *world[3:]],
        lambda world: [*world[:2], swapped(world[2], "view-00.jpg", world[0]), *world[3:]],
        lambda world: [*world[:2], replace(world[2], semi_positives=()), *world[3:]],
        lambda world: [*world[:2], replace(world[2], key="other"), *world[3:]],
        lambda world: [*world[:5], replace(world[5], splits=("train",))],
        lambda world: world[:5],
    ],
    ids=["tile", "query", "semi-positive", "key", "distractor's split", "distractor"],
)
def test_what_changes_it(tmp_path: Path, world: World, change: Callable[[World], World]) -> None:
    other = [
        replace(place, semi_positives=tuple(n for n in place.semi_positives if n < len(changed)))
        for changed in [change(world)]
        for place in changed
    ]
    assert of(other, tmp_path / "other") != of(world, tmp_path / "world")


def test_what_does_not(tmp_path: Path, world: World) -> None:
    first = of(world, tmp_path / "first")
    assert of([swapped(world[0], "tile.jpg", world[2]), *world[1:]], tmp_path / "trained") == first
    again = np.random.default_rng(0).permutation(len(world)).tolist()
    moved = [
        replace(world[old], semi_positives=tuple(again.index(n) for n in world[old].semi_positives)) for old in again
    ]
    assert of(moved, tmp_path / "moved") == first
    more = replace(world[0], key="more", splits=("train",), semi_positives=())
    shown = replace(world[2], semi_positives=(3, 6))  # a tile that is not in the gallery
    assert of([*world[:2], shown, *world[3:], more], tmp_path / "more") == first
