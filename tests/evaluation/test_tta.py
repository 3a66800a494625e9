"""Similarities averaged over flips and turns: pairs are changed as in training, and the mean is one dot product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geostream.evaluation.embed import Trained
from geostream.evaluation.protocols import split_pairs
from geostream.evaluation.tta import changed, changes, joined
from geostream.report.evaluation_page import write_evaluation
from geostream.runs.inventory import OWN
from geostream.runs.run import Run
from geostream.runs.stages import embedded, new_encoder
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.augment import turn
from tests.helpers import tiny_layout
from tests.training.settings import TINY

ALL = TINY.changed(flip_probability=0.5, rotate_probability=0.75)


def batch(height: int, width: int, seed: int) -> tuple[Tensor, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), pixels


@pytest.mark.parametrize(
    ("settings", "number", "rolls"),
    [
        ({}, 8, True),
        ({"flip_probability": 0.0}, 4, True),
        ({"rotate_probability": 0.0}, 2, True),
        ({"rotate_probability": 0.0, "flip_probability": 0.0}, 1, True),
        ({"view_kind": "picture"}, 8, False),
        ({"fov": [70, 360]}, 8, False),
    ],
)
def test_pairs_are_changed_as_training_changes_them(settings: dict[str, Any], number: int, rolls: bool) -> None:
    made = ALL.changed(**settings)
    tiles, plain_tiles = batch(8, 8, 1)
    views, plain_views = batch(4, 16, 2)
    found = changes(made)
    assert len(set(found)) == number and found[0] == (False, 0)
    for flip, turns in found:
        tile, view = (changed(one, kind, (flip, turns), made) for one, kind in ((tiles, "tile"), (views, "view")))
        for row in range(3):
            wanted = turn(plain_tiles[row], plain_views[row], flip, turns, rolls)
            assert np.array_equal(tile[row].permute(1, 2, 0).numpy(), wanted[0])
            assert np.array_equal(view[row].permute(1, 2, 0).numpy(), wanted[1])


def test_the_dot_product_of_joined_vectors_is_the_mean_similarity() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = (torch.nn.functional.normalize(torch.randn(8, 5, 16, generator=random), dim=2) for _ in range(2))
    joint = joined(list(one)) @ joined(list(other)).T
    torch.testing.assert_close(joint, torch.einsum("gqd,grd->qr", one, other) / 8)
    torch.testing.assert_close(joined(list(one)).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("more", [{}, {"birds_eye": 20.0, "vertical_degrees": 180}])
def test_an_evaluation_averages_beside_the_plain_one(tmp_path: Path, more: dict[str, Any]) -> None:
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=4, test_places=6, view_size=(32, 64))
    settings: TrainSettings = ALL.changed(**more)
    plain = Trained(new_encoder(settings), settings, "step-00000007", 3)
    averaged = Trained(plain.encoder, settings, "step-00000007", 3, tta=True)
    run = Run(store, layout, "one")
    whole, found = embedded(run, plain, "test"), embedded(run, averaged, "test")
    assert found.dim == averaged.dim == 8 * plain.encoder.dim
    assert found.name == "embeddings/test_tta-epoch-0003.zarr" and OWN.fullmatch(f"{found.name}/zarr.json")
    parts = np.asarray(found.query[:]).reshape(6, 8, -1), np.asarray(found.reference[:]).reshape(8, 8, -1)
    assert np.allclose(parts[0][:, 0] * 8**0.5, whole.query[:], atol=1e-5), "the first part is the image as it is"
    assert np.allclose(parts[1][:, 0] * 8**0.5, whole.reference[:], atol=1e-5)
    assert np.allclose(np.linalg.norm(found.query[:], axis=1), 1, atol=1e-5)
    own = np.searchsorted(whole.reference_place, split_pairs(layout, "test").place)
    assert (np.ptp((parts[0] * parts[1][own]).sum(2), axis=1) > 1e-4).any(), "turned alike, and yet others"
    record = write_evaluation(run, averaged, found)
    assert record["tta"] is True and "tta" not in write_evaluation(run, plain, whole)
    assert run.folder.exists("evaluation-test_tta-epoch-0003.html") and run.folder.exists(
        "evaluation-test-epoch-0003.html"
    )


def test_narrowed_views_go_with_the_tiles_of_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=4, test_places=6, view_size=(32, 64))
    trained = Trained(new_encoder(TINY), TINY, "step-00000007", 3)
    run, kinds = Run(store, layout, "one"), []
    embed = Trained.embed

    def counted(self: Trained, kind: str, images: Tensor) -> Tensor:
        kinds.append((kind, len(images)))
        return embed(self, kind, images)

    monkeypatch.setattr(Trained, "embed", counted)
    narrow = embedded(run, trained, "test", 90.0)
    assert sum(n for kind, n in kinds if kind == "tile") == 8 and sum(n for kind, n in kinds if kind == "view") == 12
    whole = embedded(run, trained, "test")
    assert sum(n for _, n in kinds) == 20, "the whole ones were made on the way"
    assert np.array_equal(whole.reference[:], narrow.reference[:])


def test_narrowed_training_views_are_not_those_that_are_mined(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=6, test_places=4, view_size=(32, 64))
    trained = Trained(new_encoder(TINY), TINY, "step-00000007", 3)
    run = Run(store, layout, "one")
    narrow = embedded(run, trained, "train", 90.0)
    mined = run.embeddings("train", 3)
    assert narrow.name == "embeddings/train_fov90-epoch-0003.zarr" and run.embedded_epochs() == [3]
    assert not np.isclose(narrow.query[:], mined.query[:], atol=1e-3).all(axis=1).any()
