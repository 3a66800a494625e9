"""A shard is a plain tar: the bytes that Python's tarfile writes, the same with every version of what writes it."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import google_crc32c

from geostream.store import Store
from sharding import Place, RawDataset, RawImage, ShardOptions, View, shard

# One grey pixel, and the sha256 of a shard of three of them, made before webdataset wrote the tars.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGOIiooCAAIgAQ/kH0CsAAAAAElFTkSuQmCC")
DIGEST = "5622f6dc48e12fb4c43cdc0834c5fcc21235b348c54a0966c8c5c171694a3640"


def test_a_shard_has_the_bytes_that_tarfile_writes_and_those_it_always_had(tmp_path: Path) -> None:
    names = ["one.png", "two.png", "three.png"]
    for name in names:
        (tmp_path / name).write_bytes(PNG)
    tile, *queries = (RawImage(name, "list:1") for name in names)
    views = tuple(View(query, split) for query, split in zip(queries, ("train", "test"), strict=True))
    place = Place("a_" + "k" * 78, "a", ("train", "test"), tile, 1.5, 2.5, views)
    raw = RawDataset("vigor", tmp_path, {}, "latlon", (1, 1), (1, 1), (place,))
    layout = shard(raw, Store.open(tmp_path / "store"), "tiny", options=ShardOptions(original=True), workers=1).layout
    [name] = layout.shard_names
    data = layout.store.read(name)
    assert hashlib.sha256(data).hexdigest() == DIGEST

    plain = io.BytesIO()
    tar = tarfile.TarFile(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT)
    for row in layout.members.to_pylist():
        info = tarfile.TarInfo(f"{place.key}.{row['member']}")
        info.size = row["size"]
        content = data[row["offset"] : row["offset"] + row["size"]]
        assert row["offset"] == tar.offset + tarfile.BLOCKSIZE and google_crc32c.value(content) == row["crc32c"]
        assert row["member"] == "json" or content == PNG
        tar.addfile(info, io.BytesIO(content))
    assert data == plain.getvalue() + bytes(2 * tarfile.BLOCKSIZE)
