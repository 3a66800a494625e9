"""Decoding: right pixels at the right size, and a clear error for what is no image."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from geostream.errors import BadInput
from geostream.streaming.decode import decode_image
from tests.helpers import jpeg


def photo(height: int, width: int) -> npt.NDArray[np.uint8]:
    """A smooth picture, which survives JPEG and resizing."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [rows / height, columns / width, 0.5 + 0.3 * np.sin(6 * (rows / height + columns / width))]
    return (np.stack(channels, axis=-1) * 255).astype(np.uint8)


def decoded(data: bytes | memoryview, height: int, width: int) -> npt.NDArray[np.uint8]:
    into = np.empty((height, width, 3), np.uint8)
    assert decode_image(data, into) is into
    return into


def png(pixels: npt.NDArray[np.uint8], mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "PNG")
    return out.getvalue()


def test_jpeg_at_its_own_size_is_what_libjpeg_decodes() -> None:
    data = jpeg(photo(48, 192))
    assert np.array_equal(decoded(data, 48, 192), simplejpeg.decode_jpeg(data))
    assert np.array_equal(decoded(memoryview(data), 48, 192), simplejpeg.decode_jpeg(data))


def test_jpeg_is_scaled_while_decoding_where_smaller_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = simplejpeg.decode_jpeg

    def watched(*args: object, **kwargs: object) -> npt.NDArray[np.uint8]:
        pixels: npt.NDArray[np.uint8] = original(*args, **kwargs)
        sizes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    big = photo(512, 1024)
    small = decoded(jpeg(big), 192, 384)
    assert small.shape == (192, 384, 3) and sizes == [(192, 384, 3)]  # 3/8 is one of libjpeg's scales
    reference = np.asarray(Image.fromarray(big).resize((384, 192), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - reference).mean() < 2


@pytest.mark.parametrize("wanted", [(40, 100), (100, 300), (384, 768)])
def test_other_sizes_are_resized(wanted: tuple[int, int]) -> None:
    pixels = decoded(jpeg(photo(96, 256)), *wanted)
    reference = np.asarray(Image.fromarray(photo(96, 256)).resize(wanted[::-1], Image.Resampling.BILINEAR))
    assert pixels.shape == (*wanted, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - reference).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_png_of_any_mode_becomes_rgb(mode: str) -> None:
    pixels = decoded(png(photo(40, 60), mode), 40, 60)
    expected = np.asarray(Image.fromarray(photo(40, 60)).convert(mode).convert("RGB"))
    assert np.array_equal(pixels, expected)


def test_grey_jpeg_becomes_rgb() -> None:
    grey = simplejpeg.encode_jpeg(photo(32, 32)[..., :1].copy(), 95, colorspace="GRAY")
    pixels = decoded(grey, 32, 32)
    assert pixels.shape == (32, 32, 3) and np.array_equal(pixels[..., 0], pixels[..., 1])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"not an image at all",
        jpeg(photo(64, 64))[:-300],
        jpeg(photo(64, 64))[:100],
        png(photo(64, 64))[:-300],
        b"GIF89a" + bytes(50),
    ],
    ids=["empty", "two bytes", "text", "cut JPEG", "JPEG header", "cut PNG", "GIF"],
)
def test_what_is_no_whole_image_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(BadInput, match="JPEG"):
        decoded(data, 64, 64)
