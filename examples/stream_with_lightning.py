"""Stream planned batches into PyTorch Lightning: a plan and a loader for each epoch, a share of it for each rank.

    pip install 'geostream[examples]'
    python examples/render_a_store.py /tmp/store
    python examples/stream_with_lightning.py /tmp/store

Lightning asks for a new loader each epoch (``reload_dataloaders_every_n_epochs=1``), because each epoch has a plan of
its own. It leaves the ranks to geostream (``use_distributed_sampler=False``): every rank reads its own lanes.
"""

import sys
from collections.abc import Iterator

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import geostream


class Batches:
    """Yield the batches of an epoch as plain dictionaries of tensors, which Lightning moves to its device."""

    def __init__(self, loader: geostream.Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        with self.loader:
            for batch in self.loader:
                yield batch.tensors


class PlannedEpochs(lightning.LightningDataModule):
    """Plan each epoch when it begins, and stream it."""

    def __init__(self, store_url: str) -> None:
        super().__init__()
        self.prepare_data_per_node = False  # all machines read the same store
        store = geostream.Store.open(store_url)
        self.layout = geostream.open_layout(store)
        self.settings = geostream.default_settings(self.layout.dataset).changed(batch_size=16)
        self.run = store.child(self.layout.dataset, "runs", "lightning")

    def prepare_data(self) -> None:
        """Build the graph; Lightning calls this on the first rank alone."""
        geostream.build_gps_graph(self.run, "gps.zarr", self.layout, k=32)

    def train_dataloader(self) -> Batches:
        """Plan the epoch that begins, and return this rank's share of its batches."""
        trainer = self.trainer
        assert trainer is not None
        settings = self.settings.changed(lanes=trainer.world_size)  # the ranks share the lanes evenly
        graph = geostream.open_graph(self.run, "gps.zarr", self.layout)
        plan = geostream.make_plan(self.layout, graph, settings, epoch=trainer.current_epoch + 1, seed=0)
        print(f"epoch {plan.epoch}: {plan.n_batches} batches, hardness {plan.quality['hardness_score']:.2f}")
        sizes = geostream.ImageSizes.of(settings)
        dataset = geostream.plan_dataset(
            self.layout, plan, sizes, rank=trainer.global_rank, ranks=trainer.world_size
        )  # fmt: skip
        return Batches(geostream.Loader(dataset))


class Matcher(lightning.LightningModule):
    """Train a small encoder of tiles and views with InfoNCE."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 64, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        """Return the loss of a batch, whose other pairs are each pair's negatives."""
        queries, references = (normalize(self.network(batch[kind].float() / 255)) for kind in ("view", "tile"))
        loss = cross_entropy(queries @ references.T / 0.07, torch.arange(len(queries), device=self.device))
        print(f"  batch {number}: loss {loss.detach():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that Lightning steps."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(store_url: str) -> None:
    """Train for two epochs."""
    trainer = lightning.Trainer(
        max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Matcher(), datamodule=PlannedEpochs(store_url))
    print(f"trained {trainer.global_step} steps")


if __name__ == "__main__":
    main(sys.argv[1])
