"""Photos and panoramas reach the model in the same form."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ExifTags, Image

from geostream.images import Pixels
from geostream.locating.view import as_view, draw_into_panorama
from geostream.settings import TrainSettings
from geostream.training.field_of_view import narrow
from tests.training.settings import TINY

HEIGHT, WIDTH = 128, 256


def panorama() -> Pixels:
    """A smooth picture of the sphere: each direction has its own colour."""
    azimuth = (np.arange(WIDTH) + 0.5 - WIDTH / 2) * 2 * np.pi / WIDTH
    elevation = (np.arange(HEIGHT) + 0.5 - HEIGHT / 2) * 2 * np.pi / WIDTH
    planes = [np.sin(azimuth)[None] + 0 * elevation[:, None], np.cos(azimuth)[None] + 0 * elevation[:, None]]
    planes.append(elevation[:, None] + 0 * azimuth[None])
    return (127 + 100 * np.stack(planes, axis=2) / [1, 1, np.pi / 2]).astype(np.uint8)


def photo(sphere: Pixels, degrees: float, width: int = 400, height: int = 300) -> Image.Image:
    """What a camera sees of it that looks at the panorama's middle: projected by hand, pixel by pixel."""
    focal = width / 2 / np.tan(np.radians(degrees) / 2)
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    azimuth, elevation = np.arctan2(x, focal), np.arctan2(y, np.hypot(x, focal))
    column = ((azimuth / (2 * np.pi) + 0.5) * WIDTH).astype(int)
    row = (elevation / (2 * np.pi) * WIDTH + HEIGHT / 2).astype(int)
    return Image.fromarray(sphere[row, column])


@pytest.mark.parametrize("degrees", [50, 70, 90, 110])
def test_a_photo_is_drawn_where_the_panorama_shows_the_same(degrees: float) -> None:
    sphere = panorama()
    drawn = draw_into_panorama(photo(sphere, degrees), degrees, HEIGHT, WIDTH)
    shown = np.asarray(drawn.any(axis=2))
    assert np.abs(drawn[shown].astype(int) - sphere[shown]).mean() < 3
    columns = np.flatnonzero(shown[HEIGHT // 2])
    assert len(columns) == pytest.approx(WIDTH * degrees / 360, abs=2)
    assert columns.mean() == pytest.approx((WIDTH - 1) / 2, abs=0.6), "in the middle"
    assert not shown[0].any() and not shown[:, 0].any()
    # Training narrows to the same part: nearly all that a photo shows, and little that it does not.
    trained = np.asarray(narrow(sphere, degrees, 0.0).any(axis=2))
    assert (trained & shown).sum() / (trained | shown).sum() > 0.75


def test_a_panorama_and_a_photo_without_a_lens_are_resized_as_they_are() -> None:
    sphere = Image.fromarray(panorama())
    view = as_view(sphere, TINY)
    assert view.shape == (32, 64, 3)
    assert np.array_equal(view, np.asarray(sphere.resize((64, 32), Image.Resampling.LANCZOS)))


def test_a_lens_counts_for_panoramas_only() -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 24
    image = photo(panorama(), 73.7)
    image.info["exif"] = exif.tobytes()
    drawn = as_view(image, TINY)
    assert (drawn[0] == 0).all() and (drawn[16, 28:36] > 0).any()
    pictures: TrainSettings = TINY.changed(view_kind="picture")
    assert (as_view(image, pictures)[0] > 0).any()
