"""What both peers do with an image: Pillow decodes it, resizes it by Lanczos, saves a JPEG of quality 90, 4:2:0."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tests.benchmarks.shard_run import Listed


def stored(raw: Path, image: Listed) -> bytes:
    height, width = image.size
    buffer = io.BytesIO()
    with Image.open(raw / image.path) as opened:
        resized = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    resized.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()
