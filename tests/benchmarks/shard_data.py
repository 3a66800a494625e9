"""A raw folder like VIGOR's, in real sizes: panoramas 2048 × 1024 (JPEG, 0.9 MB), tiles 640 × 640 (PNG, 0.8 MB).

Decides that a few rendered pictures get the fine detail that photographs have (noise whose strength falls with its
frequency, and a little that does not), so that they weigh what real ones weigh and are as hard to decode; each is then
rolled, flipped and tinted for many places, since rendering hundreds would take longer than the benchmark. Half a
minute of two cores for 300 places.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from sharding.simcity import CitySpec, render_cities
from tests.vigor_raw import CORNERS, write_city

TILE, VIEW = (640, 640), (1024, 2048)  # height, width
COLUMNS = 5  # places in a row of a city
PICTURES = 10  # of each kind
QUALITY = 90

Pixels = npt.NDArray[np.uint8]


def make_raw(raw: Path, places: int, seed: int, tick: Callable[[], object]) -> int:
    """Four cities with ``places`` tiles together (a multiple of 20), zero to two panoramas each, one on average.

    Returns the number of images; ``tick`` is called after each.
    """
    for city in CORNERS:  # names and lists, with images of a few pixels in the place of what comes now
        write_city(raw, city, places // len(CORNERS) // COLUMNS, COLUMNS)
    files = sorted(path for path in raw.rglob("*") if path.suffix in (".jpg", ".png"))
    with TemporaryDirectory() as folder:
        pool = Path(folder, "pictures.npz")
        np.savez(pool, allow_pickle=False, **_pictures(Path(folder), seed))
        chunks = [(pool, files[at : at + 50], (seed, at)) for at in range(0, len(files), 50)]
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
            for count in workers.map(_write_images, chunks):
                for _ in range(count):
                    tick()
    return len(files)


def _pictures(folder: Path, seed: int) -> dict[str, Pixels]:
    """PICTURES of each kind, (PICTURES, height, width, 3)."""
    spec = CitySpec("City", 4, 4)
    render_cities(folder / "city", [spec], seed=seed, tile_size=TILE[0], view_size=VIEW)
    rng = np.random.default_rng(seed)
    made = {}
    for kind, suffix in (("tile", "png"), ("view", "jpg")):
        paths = sorted((folder / "city").rglob(f"*.{suffix}"))[:PICTURES]
        made[kind] = np.stack([_detailed(rng, np.asarray(Image.open(path))) for path in paths])
    return made


def _detailed(rng: np.random.Generator, picture: Pixels) -> Pixels:
    height, width = picture.shape[:2]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    detail = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, s=(height, width))
    noise = rng.normal(0.0, 2.0, picture.shape)
    return np.clip(picture + 14.0 * (detail / detail.std())[..., None] + noise, 0, 255).astype(np.uint8)


def _write_images(chunk: tuple[Path, list[Path], tuple[int, int]]) -> int:
    pool, files, seed = chunk
    rng = np.random.default_rng(seed)
    with np.load(pool) as pictures:
        tiles, views = pictures["tile"], pictures["view"]
    for path in files:
        if path.suffix == ".png":
            buffer = io.BytesIO()
            Image.fromarray(_varied(rng, tiles)).save(buffer, "PNG")
            path.write_bytes(buffer.getvalue())
        else:
            path.write_bytes(simplejpeg.encode_jpeg(_varied(rng, views), QUALITY, colorsubsampling="420"))
    return len(files)


def _varied(rng: np.random.Generator, pictures: Pixels) -> Pixels:
    picture = np.roll(pictures[rng.integers(len(pictures))], rng.integers(pictures.shape[2]), axis=1)
    flipped = picture[:, ::-1] if rng.random() < 0.5 else picture
    tinted = flipped.astype(np.int16) + rng.integers(-12, 13, 3, dtype=np.int16)
    return np.ascontiguousarray(np.clip(tinted, 0, 255).astype(np.uint8))
