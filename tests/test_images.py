"""Any odd encoding of a picture is the same picture when it is stored resized, and when it is trained on as it was."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from geostream.errors import BadInput
from geostream.images import decode_jpeg, decode_png, is_jpeg
from geostream.streaming.decode import decode_image
from sharding.encode import BrokenImage, encode

HEIGHT, WIDTH = 24, 40
Array = npt.NDArray[np.uint8]


def photo() -> Array:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    channels = [rows / HEIGHT, columns / WIDTH, (rows + columns) / (HEIGHT + WIDTH)]
    return (np.stack(channels, axis=-1) * 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(depth: int, colour: int, samples: npt.NDArray[np.integer], *extra: bytes, interlace: int = 0) -> bytes:
    """A PNG written by hand: (H, W, channels) samples of ``depth`` bits; ``extra`` chunks before the data."""
    lines = samples.reshape(len(samples), -1)
    if depth == 16:
        rows = [line.astype(">u2").tobytes() for line in lines]
    elif depth == 8:
        rows = [line.astype(np.uint8).tobytes() for line in lines]
    else:
        bits = ((lines[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(len(lines), -1).astype(np.uint8)
        rows = [np.packbits(line).tobytes() for line in bits]
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def grey(depth: int) -> npt.NDArray[np.integer]:
    levels = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1)
    return levels % 2**depth if depth < 16 else levels * 65535 // (HEIGHT * WIDTH)


def grey_expected(depth: int) -> Array:
    full = grey(depth) * (255 // (2**depth - 1)) if depth <= 8 else grey(16) >> 8
    return np.repeat(full.astype(np.uint8), 3, axis=2)


def deep(channels: int) -> npt.NDArray[np.integer]:
    return (
        np.concatenate([photo(), np.full((HEIGHT, WIDTH, 1), 100, np.uint8)], axis=2)[..., :channels].astype(int) * 257
    )


PALETTE = chunk(b"PLTE", bytes(range(48)))
COLOURS = np.arange(48, dtype=np.uint8).reshape(16, 3)
ODD: dict[str, tuple[bytes, Array | None]] = {
    **{f"grey of {depth} bits": (raw_png(depth, 0, grey(depth)), grey_expected(depth)) for depth in (1, 2, 4, 8, 16)},
    "grey of 16 bits with a transparent one": (
        raw_png(16, 0, grey(16), chunk(b"tRNS", b"\0\5")), grey_expected(16)
    ),
    "RGB": (raw_png(8, 2, photo()), photo()),
    "RGB of 16 bits": (raw_png(16, 2, deep(3)), photo()),
    "RGB with a transparent one": (raw_png(8, 2, photo(), chunk(b"tRNS", bytes(6))), photo()),
    "RGB with gamma": (raw_png(8, 2, photo(), chunk(b"gAMA", struct.pack(">I", 100_000))), photo()),
    "RGB and alpha": (raw_png(8, 6, (deep(4) // 257)), photo()),
    "RGB and alpha of 16 bits": (raw_png(16, 6, deep(4)), photo()),
    "grey and alpha of 16 bits": (raw_png(16, 4, np.concatenate([grey(16), grey(16)], axis=2)), grey_expected(16)),
    **{
        f"palette of {depth} bits": (raw_png(depth, 3, grey(4) % min(16, 2**depth), PALETTE),
                                     COLOURS[(grey(4) % min(16, 2**depth))[..., 0]])
        for depth in (1, 2, 4, 8)
    },
    "palette with transparency": (
        raw_png(4, 3, grey(4), PALETTE, chunk(b"tRNS", bytes(range(16)))), COLOURS[grey(4)[..., 0]]
    ),
    "interlaced": (saved(Image.fromarray(photo()), "PNG", interlace=1), photo()),
}  # fmt: skip
IMAGE = Image.fromarray(photo())
EXIF = Image.Exif()
EXIF[274] = 6
WHOLE = saved(IMAGE, "JPEG", quality=95)
JPEGS: dict[str, bytes] = {
    "plain": WHOLE,
    "grey": saved(IMAGE.convert("L"), "JPEG"),
    "CMYK": saved(IMAGE.convert("CMYK"), "JPEG", quality=95),
    "progressive": saved(IMAGE, "JPEG", progressive=True),
    **{f"subsampling {kind}": saved(IMAGE, "JPEG", subsampling=kind) for kind in (0, 1, 2)},
    "4:1:1": simplejpeg.encode_jpeg(photo(), 90, colorsubsampling="411"),
    "RGB within": saved(IMAGE, "JPEG", keep_rgb=True),
    "restart marks": saved(IMAGE, "JPEG", restart_marker_blocks=2),
    "turned by EXIF": saved(IMAGE, "JPEG", exif=EXIF),
    "with a comment": saved(IMAGE, "JPEG", comment=b"hello"),
    "several in one": saved(IMAGE, "MPO", save_all=True, append_images=[IMAGE]),
    "padded with zeros": WHOLE[:-2] + bytes(9) + WHOLE[-2:],
    "something behind it": WHOLE + b"thumbnail",
}


def both_ways(data: bytes) -> tuple[Array, Array]:
    """What a training on the raw bytes sees, and what is resized when others are stored."""
    kept = encode(data, None, 90)
    assert kept.data == data
    trained = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    decode_image(kept.data, trained)
    return trained, decode_jpeg(data) if is_jpeg(data) else decode_png(data)


@pytest.mark.parametrize("name", ODD)
def test_a_png(name: str) -> None:
    data, expected = ODD[name]
    trained, stored = both_ways(data)
    assert expected is not None
    assert np.array_equal(trained, expected) and np.array_equal(stored, expected)
    # Stored as another size, it is made from the same pixels.
    assert encode(data, (12, 20), 90).data == encode(saved(Image.fromarray(trained), "PNG"), (12, 20), 90).data


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg(name: str) -> None:
    trained, stored = both_ways(JPEGS[name])
    assert np.array_equal(trained, stored)
    expected = photo() if name != "grey" else np.repeat(np.asarray(IMAGE.convert("L"))[..., None], 3, axis=2)
    assert np.abs(trained.astype(int) - expected).mean() < 6  # EXIF turns nothing
    assert encode(JPEGS[name], (12, 20), 90).data == encode(saved(Image.fromarray(trained), "PNG"), (12, 20), 90).data


def flipped(data: bytes) -> bytes:
    """A JPEG of one flipped bit, which libjpeg warns of just as of stray bytes."""
    large = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    begin = large.index(b"\xff\xda") + 20
    for at in range(begin, len(large) - 2):
        one = large[:at] + bytes([large[at] ^ 1]) + large[at + 1 :]
        try:
            simplejpeg.decode_jpeg(one)
        except ValueError as error:
            if "extraneous" in str(error):
                return one
    raise LookupError


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-2] + b"stray bytes" + data[-2:],
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + data[-2:],
        flipped,
    ],
    ids=["stray bytes", "cut off", "cut out", "a flipped bit"],
)
def test_what_is_refused_is_refused_both_ways(spoil: Callable[[bytes], bytes]) -> None:
    damaged = spoil(WHOLE)
    with pytest.raises(BrokenImage):
        encode(damaged, None, 90)
    with pytest.raises(BadInput):
        decode_image(damaged, np.empty((HEIGHT, WIDTH, 3), np.uint8))
