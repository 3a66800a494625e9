"""Stream batches of hard negatives into a training loop of your own, in plain PyTorch.

    python examples/render_a_store.py /tmp/store
    python examples/stream_into_your_loop.py /tmp/store

Any store with a layout will do, also ``s3://bucket/prefix``. The batches of an epoch are planned ahead from a graph of
geographic neighbours, so the loader knows what it will need, and reads each shard about once.
"""

import sys
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import geostream


def main(store_url: str) -> None:
    """Train a small network of our own for one epoch, and print how the stream kept up."""
    store = geostream.Store.open(store_url)
    layout = geostream.open_layout(store)
    settings = geostream.default_settings(layout.dataset).changed(batch_size=16)
    run = store.child(layout.dataset, "runs", "your-loop")  # what is made on the way is kept here

    graph = geostream.build_gps_graph(run, "gps.zarr", layout, k=32)
    plan = geostream.make_plan(layout, graph, settings, epoch=1, seed=0)
    dataset = geostream.plan_dataset(layout, plan, geostream.ImageSizes.of(settings))

    network = your_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    started = time.perf_counter()
    with geostream.Loader(dataset) as loader:
        for batch in loader:
            tiles, views = batch.tensors["tile"], batch.tensors["view"]  # uint8, (B, 3, H, W)
            loss = step(network, optimizer, tiles, views)
            position = loader.state_dict()  # keep it in your checkpoint; loader.load_state_dict goes on from there
            print(f"batch {batch.step + 1} of {plan.n_batches}: loss {loss:.3f}")
        stats = loader.stats
    seconds = time.perf_counter() - started
    print(f"{plan.place.size / seconds:,.0f} pairs/s, {stats.stall_seconds / seconds:.0%} of the time spent waiting")
    print(f"{stats.bytes_fetched / 1e6:.1f} MB in {stats.requests} requests; ended at batch {position['cursor']}")
    print(f"hardness of the plan: {plan.quality['hardness_score']:.2f} (0: random batches, 1: Sample4Geo's)")


def your_network() -> nn.Module:
    """Return any network that makes a vector of an image."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 64, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


def step(network: nn.Module, optimizer: torch.optim.Optimizer, tiles: torch.Tensor, views: torch.Tensor) -> float:
    """Take one step of any kind; here with InfoNCE, whose negatives are the other pairs of the batch."""
    queries, references = (normalize(network(images.float() / 255)) for images in (views, tiles))
    loss = cross_entropy(queries @ references.T / 0.07, torch.arange(len(tiles)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    main(sys.argv[1])
