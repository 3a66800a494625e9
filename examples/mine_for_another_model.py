"""Mine hard negatives for a model that geostream knows nothing of.

    python examples/render_a_store.py /tmp/store
    python examples/mine_for_another_model.py /tmp/store

Embed every tile and view of the training split with your model, in whatever framework, and write the vectors down as
embeddings. The neighbour graph, the plan and the stream then work as for geostream's own models.
"""

import sys

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

import geostream

Vectors = npt.NDArray[np.float32]
NAME = "embeddings/another-model.zarr"
GRAPH = "neighbours/another-model.zarr"


def another_model(images: torch.Tensor) -> Vectors:
    """Return unit vectors (B, D) of images (B, 3, H, W); put your own model here.

    This one needs no training: it counts how often each of 64 colours occurs, compared with the rest of the batch.
    """
    bins = (images // 64).long()
    colours = (bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(images), 64).scatter_add_(1, colours, torch.ones(colours.shape)).sqrt()
    return np.asarray(normalize(counts - counts.mean(dim=0)), dtype=np.float32)


def embed(run: geostream.Store, layout: geostream.Layout, sizes: geostream.ImageSizes) -> geostream.Embeddings:
    """Embed the training split: each image is read once, in the order in which the shards lie on the store."""
    pairs = layout.pairs("train")
    tiles = np.unique(pairs.place)  # the places whose tiles are candidates
    writer = geostream.create_embeddings(
        run,
        NAME,
        layout=layout,
        checkpoint="another model",
        split="train",
        pairs=pairs,
        reference_place=tiles,
        dim=64,
    )
    with geostream.Loader(geostream.scan_dataset(layout, tiles, pairs, sizes, batch_size=64)) as loader:
        for batch in loader:
            found = batch.tensors
            if "tile" in found:
                writer.write_reference(found["reference"].numpy(), another_model(found["tile"]))
            if "view" in found:
                writer.write_query(found["query"].numpy(), another_model(found["view"]))
    writer.commit()
    return geostream.open_embeddings(run, NAME, layout)


def show_score(plan: geostream.EpochPlan) -> str:
    """Return the plan's hardness score, or why it has none."""
    score = plan.quality["hardness_score"]
    return f"{score:.2f}" if score is not None else f"unknown: {plan.quality['hardness_note']}"


def main(store_url: str) -> None:
    """Embed, build the neighbour graph, plan an epoch, and show how hard its batches are."""
    store = geostream.Store.open(store_url)
    layout = geostream.open_layout(store)
    settings = geostream.default_settings(layout.dataset).changed(batch_size=16)
    run = store.child(layout.dataset, "runs", "another-model")

    embeddings = embed(run, layout, geostream.ImageSizes.of(settings))
    graph = geostream.build_visual_graph(run, GRAPH, layout, embeddings, k=16)
    place = graph.places[0]
    print(
        f"place {layout.keys[place]} looks most like {', '.join(layout.keys[other] for other in graph.indices[0][:3])}"
    )

    plan = geostream.make_plan(layout, graph, settings, epoch=1, seed=0, embeddings=embeddings)
    geostream.save_plan(run, plan)
    quality = plan.quality
    print(f"{plan.n_batches} batches of {plan.batch_size}, {quality['left_out']} of {quality['pairs']} pairs left out")
    print(f"hardness score {show_score(plan)} (0: random batches, 1: Sample4Geo's with random access)")
    print(
        f"the shards are read {quality['amplification']:.2f} times over, {quality['requests_per_gib']:.0f} requests/GiB"
    )


if __name__ == "__main__":
    main(sys.argv[1])
