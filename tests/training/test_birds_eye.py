"""Panoramas seen from above: the picture is the ground around the camera, turned and mirrored as its tile is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

import geostream.settings
from geostream.errors import BadInput
from geostream.settings import ModelSettings, TrainSettings, default_settings, make_settings
from geostream.training.augment import turn
from geostream.training.birds_eye import BirdsEye
from geostream.training.field_of_view import narrow
from geostream.training.model import Encoder
from sharding.simcity.city import render_cities
from sharding.simcity.plan import CitySpec
from sharding.simcity.shots import TILE_METRES
from sharding.simcity.view import EYE
from tests.training.steps import do_steps, new_train_step, plain_settings

RECIPES = sorted(path.stem for path in Path(geostream.settings.__file__).with_name("recipes").glob("*.toml"))


def looking(size: int = 32, height: int = 64, width: int = 128, **more: Any) -> BirdsEye:
    return BirdsEye(ModelSettings(tile_size=size, view_height=height, view_width=width, **{"birds_eye": 20.0} | more))


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def noise(height: int = 64, width: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from([8, 15, 32]),
    shape=st.sampled_from([(64, 128), (32, 128), (140, 768)]),
    metres=st.floats(5, 100),
    camera=st.floats(0.5, 5),
    row=st.floats(0, 1, exclude_max=True),
    column=st.floats(0, 1, exclude_max=True),
)
def test_each_pixel_shows_its_point_of_the_ground(
    size: int, shape: tuple[int, int], metres: float, camera: float, row: float, column: float
) -> None:
    """Against trigonometry for one pixel, on a panorama whose colours are the angles of its own pixels."""
    height, width = shape
    i, j = int(row * size), int(column * size)
    east, north = (j + 0.5 - size / 2) * metres / size, (size / 2 - i - 0.5) * metres / size
    azimuth, below = np.arctan2(east, north), np.degrees(np.arctan2(camera, np.hypot(east, north)))
    turns = (np.arange(width) + 0.5) / width - 0.5
    degrees = (np.arange(height) + 0.5 - height / 2) * 360 / width  # of the rows below the horizon
    angles = np.stack(np.broadcast_arrays(np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns), degrees[:, None]))
    seen = looking(size, height, width, birds_eye=metres, camera_height=camera)(torch.from_numpy(angles[None]).float())
    found = seen[0, :, i, j].numpy()
    if below > 360 * height / width / 2 + 1e-3:
        assert (found == 0).all(), "lower than the panorama's lowest row"
    elif below < 360 * height / width / 2 - 1e-3:
        if np.hypot(east, north) > 0:
            assert np.allclose(found[:2], [np.cos(azimuth), np.sin(azimuth)], atol=2 * (np.pi / width) ** 2 + 1e-4)
        assert found[2] == pytest.approx(min(below, degrees[-1]), abs=1e-3)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_what_turns_and_mirrors_a_pair_does_so_to_the_picture(flip: bool, turns: int) -> None:
    """:func:`turn` rolls the panorama as it turns the tile: the picture from above is then turned as the tile is."""
    eye = looking()
    view = noise()
    plain = (eye(tensor(view))[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    turned, rolled = turn(plain, view, flip, turns, True)
    found = eye(tensor(rolled))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - turned).max() <= 0.51
    assert np.abs(found - plain).max() > 50 or not (flip or turns)


def test_only_the_ratio_of_ground_and_camera_matters() -> None:
    view = tensor(noise())
    torch.testing.assert_close(looking()(view), looking(birds_eye=10.0, camera_height=0.75)(view))
    assert not torch.equal(looking()(view), looking(birds_eye=10.0)(view))


def test_a_narrowed_panorama_is_seen_from_above_as_far_as_it_reaches() -> None:
    white = np.full((64, 128, 3), 255, dtype=np.uint8)
    assert looking()(tensor(white)).min() > 0.999, "a whole sphere shows all of the ground"
    seen = looking()(tensor(narrow(white, 90.0, 0.0)))[0, 0]
    ahead, behind = seen[:8, 12:20], seen[20:]
    assert ahead.min() > 0.999 and (behind == 0).all(), "it looks north, and not far down"
    assert (looking(height=32)(tensor(white[:32]))[0, 0, 15:17, 15:17] == 0).all(), "45 degrees below: no feet"


def test_a_squeezed_panorama_needs_its_degrees_told() -> None:
    tall = interpolate(tensor(noise(16, 128)), (64, 128), mode="bilinear", align_corners=False)
    squeezed = interpolate(tall, (32, 128), mode="area")
    told = looking(height=32, vertical_degrees=180)(squeezed)
    assert (told - looking()(tall)).abs().mean() < 0.03
    assert (looking(height=32)(squeezed) - looking()(tall)).abs().mean() > 0.1


def views_and_tiles(raw: Path) -> list[tuple[Tensor, Tensor]]:
    """The panoramas of a rendered city with their own tiles."""
    lines = (raw / "splits/Graz/pano_label_balanced.txt").read_text().splitlines()
    found = []
    for name, tile in (line.split()[:2] for line in lines):
        paths = raw / "Graz/panorama" / name, raw / "Graz/satellite" / tile
        images = (np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")) for path in paths)
        view, of_tile = map(tensor, images)
        found.append((view, of_tile))
    return found


def test_a_rendered_panorama_from_above_is_like_its_own_tile(tmp_path: Path) -> None:
    """Without any learning: correlation with the same ground of its own tile, against all other tiles."""
    metres, size = 20.0, 48
    render_cities(tmp_path, [CitySpec("Graz", 6, 6)], seed=3, tile_size=192, view_size=(96, 192), max_offset=0.01)
    pairs = views_and_tiles(tmp_path)
    assert len(pairs) > 15
    eye = looking(size, 96, 192, birds_eye=metres, camera_height=EYE)
    side = round(192 * metres / TILE_METRES / 2) * 2
    edge = (192 - side) // 2
    ground = [interpolate(tile[..., edge:-edge, edge:-edge], (size, size), mode="area") for _, tile in pairs]

    def flat(pictures: list[Tensor]) -> Tensor:
        return normalize((images := torch.cat(pictures).flatten(1)) - images.mean(1, keepdim=True), dim=1)

    likeness = flat([eye(view) for view, _ in pairs]) @ flat(ground).T
    own = likeness.diagonal()
    others = likeness[~torch.eye(len(pairs), dtype=torch.bool)]
    assert own.mean() > others.mean() + 0.3
    assert (likeness.argmax(1) == torch.arange(len(pairs))).float().mean() > 0.7
    turned = flat([eye(view).rot90(2, (2, 3)) for view, _ in pairs]) @ flat(ground).T
    assert turned.diagonal().mean() < own.mean() - 0.2, "north is up"


def test_a_views_vector_is_the_sum_of_both() -> None:
    settings = plain_settings(birds_eye=20.0, vertical_degrees=180)
    torch.manual_seed(0)
    encoder, tiles = Encoder.of(settings).eval(), torch.zeros(2, 3, 32, 32)
    views = torch.from_numpy(np.stack([noise(32, 64, seed) for seed in (1, 2)])).permute(0, 3, 1, 2)
    assert encoder.birds_eye is not None
    with torch.no_grad():
        one, above = encoder.encode(views), encoder.encode(encoder.birds_eye(views.float() / 255))
        both, _ = encoder(views, tiles)
        torch.testing.assert_close(both, encoder.encode_views(views.float() / 255))
        torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
        added = normalize(tiles.new_ones(1, encoder.dim), dim=1) @ (one + above).T  # similarities of any tile
        torch.testing.assert_close(
            normalize(tiles.new_ones(1, encoder.dim), dim=1) @ both.T, added / (one + above).norm(dim=1)
        )
        assert (both - one).abs().max() > 0.01
    assert encoder.state_dict().keys() == Encoder.of(plain_settings()).state_dict().keys()


def test_it_changes_what_is_trained_and_has_gradients_of_both_pictures() -> None:
    settings = plain_settings(birds_eye=20.0, vertical_degrees=180)
    torch.manual_seed(0)
    encoder = Encoder.of(settings).eval()
    views = torch.rand(2, 3, 32, 64)
    found: dict[str, list[Tensor]] = {}
    for way in ("both", "apart"):
        encoder.zero_grad()
        if way == "both":
            vectors = encoder.encode_views(views)
        else:
            assert encoder.birds_eye is not None
            vectors = normalize(encoder.encode(views) + encoder.encode(encoder.birds_eye(views)), dim=1)
        vectors[:, 0].sum().backward()
        found[way] = [p.grad.clone() for p in encoder.network.parameters() if p.grad is not None]
    assert len(found["both"]) > 50 and all(map(torch.equal, found["both"], found["apart"]))
    losses = [do_steps(new_train_step(plain_settings(**more)), range(2)) for more in ({}, {"birds_eye": 20.0})]
    assert losses[0] != losses[1]


def test_in_training_some_views_are_seen_one_way_alone() -> None:
    """So neither way relies on the other; each is drawn from torch's generator, as dropped paths are."""
    torch.manual_seed(0)
    encoder = Encoder.of(plain_settings(birds_eye=20.0)).train()
    views = torch.rand(60, 3, 32, 64)
    with torch.no_grad():
        torch.manual_seed(1)
        found = encoder.encode_views(views)
        torch.manual_seed(1)
        assert torch.equal(encoder.encode_views(views), found)
        assert encoder.birds_eye is not None
        around, above = encoder.encode(views), encoder.encode(encoder.birds_eye(views))
        ways = torch.stack([normalize(around + above, dim=1), above, around])
        which = ((ways - found).abs().amax(2) < 1e-5).int()
        assert (which.sum(0) == 1).all() and which.sum(1).min() > 10
        torch.testing.assert_close(encoder.eval().encode_views(views), ways[0])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"view_kind": "picture"}, "view_kind"),
        ({"view_height": 48, "view_width": 48}, "vertical_degrees"),
        ({"birds_eye": -1}, "birds_eye"),
        ({"camera_height": 0}, "camera_height"),
        ({"vertical_degrees": 200}, "vertical_degrees"),
    ],
)
def test_what_has_no_panoramas_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        plain_settings(**{"birds_eye": 30.72} | wrong)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_know_how_much_of_the_sphere_their_panoramas_show(recipe: str) -> None:
    settings = default_settings(recipe)
    if settings.augment.view_kind == "picture":
        with pytest.raises(BadInput, match="view_kind"):
            settings.changed(birds_eye=30.72)
        return
    model = settings.changed(birds_eye=30.72).model
    kind = recipe.removeprefix("simcity-").split("-")[0]
    shown = {"cvusa": 360 * 224 / 1232, "simcity": 90.0}.get(kind, 180.0)
    assert model.degrees_high == pytest.approx(shown, rel=0.005)
    assert model.camera_height == (EYE if recipe.startswith("simcity") else 1.5)


def test_a_run_from_before_the_setting_goes_on() -> None:
    old = TrainSettings().model_dump()
    for name in ("birds_eye", "camera_height", "vertical_degrees"):
        del old["model"][name]
    assert make_settings(old) == TrainSettings() and Encoder.of(plain_settings()).birds_eye is None
