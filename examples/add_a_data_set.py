"""Add a data set of your own: an adapter for a folder of places, sharded into a store, and opened.

    python examples/add_a_data_set.py RAW /tmp/store

RAW holds a folder for each place, with one satellite tile and any number of views (JPEG or PNG):

    RAW/<place>/tile.jpg
    RAW/<place>/view-1.jpg, view-2.jpg, …

An adapter only describes what lies there. Reading, resizing, ordering, writing and going on after a crash are the same
for every data set. Where positions are known, give ``coordinates="latlon"`` (or ``"utm"``, in metres) and each place's
``north`` and ``east``: training then begins with geographic neighbours instead of random batches.
"""

import sys
from pathlib import Path

import geostream
from sharding import Place, RawDataset, RawImage, ShardOptions, View, shard
from sharding.places import assign_keys, sorted_places

TEST_EVERY = 5  # of five places, one is for testing
TILE_SIZE, VIEW_SIZE = (256, 256), (256, 512)  # height and width that images are stored at


def read_places(raw: Path) -> RawDataset:
    """Describe the raw folder as places."""
    folders = sorted(path.parent for path in raw.glob("*/tile.jpg"))
    if not folders:
        raise geostream.GeostreamError(f"{raw}: no folder with a tile.jpg")
    # A key names a place in the shards. It is made from the tile's name, here that of its folder.
    keys = assign_keys(("world", folder.name) for folder in folders)
    places = []
    for number, folder in enumerate(folders):
        split = "test" if number % TEST_EVERY == 0 else "train"
        views = [View(image(raw, path), split) for path in sorted(folder.glob("view-*"))]
        places.append(
            Place(
                key=keys["world", folder.name],
                area="world",
                splits=(split,),  # the galleries that the tile belongs to; without views it is a distractor
                tile=image(raw, folder / "tile.jpg"),
                views=tuple(views),
            )
        )
    return RawDataset(
        adapter="folders",
        root=raw,
        options={},
        coordinates="none",
        tile_size=TILE_SIZE,
        view_size=VIEW_SIZE,
        places=sorted_places(places),
    )


def image(raw: Path, path: Path) -> RawImage:
    """Describe an image: where it is, and what named it, which an error about it will tell."""
    return RawImage(path.relative_to(raw).as_posix(), named=str(path.parent))


def main(raw: str, store_url: str) -> None:
    """Shard the raw folder as the data set ``mine``, open the layout and stream a first batch."""
    store = geostream.Store.open(store_url)
    report = shard(read_places(Path(raw)), store, dataset="mine", options=ShardOptions(quality=90))
    for broken in report.broken:
        print(f"left out: {broken}")

    layout = geostream.open_layout(store, "mine")
    train, test = layout.pairs("train"), layout.pairs("test")
    print(f"{layout.n_places} places, {len(train)} pairs to train and {len(test)} to test: {layout.store.url}")
    settings = geostream.default_settings("mine").changed(strategy="random", batch_size=4)
    plan = geostream.make_plan(layout, None, settings, epoch=1, seed=0)
    sizes = geostream.ImageSizes(tile=TILE_SIZE, view=VIEW_SIZE)
    with geostream.Loader(geostream.plan_dataset(layout, plan, sizes)) as loader:
        tensors = next(iter(loader)).tensors
    print(f"first batch: {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items())}")
    print(f"next: geostream train {store.url} --dataset mine")


if __name__ == "__main__":  # sharding uses processes, which import this file
    main(*sys.argv[1:3])
