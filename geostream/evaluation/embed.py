"""Embed a split: encode every tile and every view once, in the order in which they lie on disk.

Reading in physical order fetches each shard once and holds one or two at a time. The Zarr writer sorts the rows. With
several ranks each embeds some of the shards, and the first rank writes for all, because two writers would meet in one
Zarr shard. There is no augmentation and no dropout, but for :mod:`geostream.evaluation.tta` where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geostream.arrays import Int32, Pairs, distinct
from geostream.evaluation.protocols import split_pairs
from geostream.evaluation.tta import changed, changes, joined
from geostream.layout import Layout
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, create_embeddings, open_embeddings, read_rows
from geostream.progress import track
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import scan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import Change, ImageSizes
from geostream.training.distributed import ProcessGroup
from geostream.training.model import Encoder, autocast, device_of


@dataclass(frozen=True)
class Trained:
    """An encoder with the weights of a checkpoint.

    Attributes:
        encoder: The encoder.
        settings: The settings that it was trained with.
        checkpoint: The checkpoint's name.
        epoch: The epoch that the checkpoint belongs to.
        tta: Whether it embeds each image flipped and turned, too (:mod:`geostream.evaluation.tta`).
    """

    encoder: Encoder
    settings: TrainSettings
    checkpoint: str
    epoch: int
    tta: bool = False

    @property
    def dim(self) -> int:
        """Length of the vectors that it embeds images to."""
        return self.encoder.dim * (len(changes(self.settings)) if self.tta else 1)

    @torch.inference_mode()
    def embed(self, kind: str, images: Tensor) -> Tensor:
        """Embed images on the encoder's device, in eval mode.

        Args:
            kind: "tile" or "view".
            images: (B, 3, H, W), uint8 or float in 0…1.

        Returns:
            (B, dim) unit vectors, float32, on the CPU.
        """
        encoder, device = self.encoder.eval(), device_of(self.encoder)
        images = images.to(device, non_blocking=True)
        encode = encoder.encode if kind == "tile" else encoder.encode_views
        with autocast(device, self.settings.model.precision):
            if not self.tta:
                return encode(images).float().cpu()
            alike = changes(self.settings)
            return joined([encode(changed(images, kind, one, self.settings)).float() for one in alike]).cpu()


def split_references(layout: Layout, split: str) -> Int32:
    """Return the sorted place ids whose tiles are embedded for a split.

    For training these are the places with pairs, else the gallery with its distractors.
    """
    return distinct(layout.pairs(split).place) if split == "train" else layout.references(split)


def embed(
    run: Store,
    name: str,
    layout: Layout,
    split: str,
    trained: Trained,
    group: ProcessGroup | None = None,
    change: Change | None = None,
    tiles: Embeddings | None = None,
) -> Embeddings:
    """Embed a split of the layout, write the vectors to the run, and open what was written.

    Args:
        run: The run's folder.
        name: Path of the embeddings within the run; embeddings that are there are replaced.
        layout: Where images are read from.
        split: "train" or "test".
        trained: The network, on the device to use; the name of its checkpoint is stored with the embeddings.
        group: Ranks that call this together; None: this process alone.
        change: Applied to each decoded image.
        tiles: Embeddings of the same tiles by the same network, whose tiles are copied; None: tiles are embedded.

    Raises:
        BadInput: The split has no pairs. What the loader raises passes through.
    """
    group = group or ProcessGroup()
    pairs, references = split_pairs(layout, split), split_references(layout, split)
    writer = None
    if group.is_main:
        writer = create_embeddings(
            run,
            name,
            layout=layout,
            checkpoint=trained.checkpoint,
            split=split,
            pairs=pairs,
            reference_place=references,
            dim=trained.dim,
        )
    embedded = references if tiles is None else references[:0]
    for numbers, vectors in embed_images(layout, embedded, pairs, trained, group, f"embed {split}", change):
        if writer is not None and numbers is not None and vectors is not None:
            of_tiles, of_views = (numbers >= 0) & (numbers < len(embedded)), numbers >= len(embedded)
            writer.write_reference(numbers[of_tiles].numpy(), vectors[of_tiles].numpy())
            writer.write_query(numbers[of_views].numpy() - len(embedded), vectors[of_views].numpy())
    if writer is not None:
        if tiles is not None:
            for start in range(0, len(references), SHARD_ROWS):
                block = read_rows(tiles.reference, start, start + SHARD_ROWS)
                writer.write_reference(np.arange(start, start + len(block)), block)
        writer.commit()
    group.barrier()
    return open_embeddings(run, name, layout)


def embed_images(
    layout: Layout,
    references: Int32,
    pairs: Pairs,
    trained: Trained,
    group: ProcessGroup,
    title: str,
    change: Change | None = None,
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Encode tiles and views once each, in the order in which they lie on disk, and yield the vectors batch by batch.

    Args:
        layout: Where images are read from.
        references: (R,) places whose tiles are encoded.
        pairs: The views that are encoded.
        trained: The network, on the device to use. It is left in eval mode.
        group: Ranks that call this together.
        title: What the progress bar says.
        change: Applied to each decoded image, a sample with a "tile" and its "reference" or a "view" and its "query".

    Yields:
        Row numbers and vectors (n, D) of what all ranks have encoded; None on other ranks than the first. A tile's
        number is its row among the references, a view's is R plus its row among the pairs; -1 is no image.

    Raises:
        BadInput: The layout lacks one of the images. What the loader raises passes through.
    """
    encoder, settings = trained.encoder, trained.settings
    sizes, options = ImageSizes.of(settings), ReadOptions.of(settings)
    dataset = scan_dataset(
        layout, references, pairs, sizes, settings.optim.batch_size, options=options, rank=group.rank, ranks=group.ranks
    )
    dataset.change = change
    pin = device_of(encoder).type == "cuda"
    encoder.eval()
    rounds: Iterable[int] = range(-(-len(dataset.steps) // group.ranks))  # as many as the largest part has batches
    if group.is_main:
        rounds = track(rounds, title)
    with Loader(dataset, settings.read.workers, settings.read.decode_threads, pin, group.local_ranks) as loader:
        batches = iter(loader)
        for _ in rounds:
            batch = next(batches, None)
            tensors = {} if batch is None else batch.tensors
            numbers, vectors = map(group.collect, _embedded(trained, tensors, len(references)))
            yield numbers, vectors


def _embedded(trained: Trained, tensors: dict[str, Tensor], references: int) -> tuple[Tensor, Tensor]:
    """Return row numbers (batch size,) and vectors (batch size, D) of a scan's batch, on the CPU.

    A tile's number is its row among the ``references``; a view's is that count plus its row among the pairs. Short
    batches are filled up with number -1, so that all ranks exchange equal shapes.
    """
    size = trained.settings.optim.batch_size
    numbers, vectors = torch.full((size,), -1), torch.zeros(size, trained.dim)
    at = 0
    for kind, row, first in (("tile", "reference", 0), ("view", "query", references)):
        if kind in tensors:
            here = slice(at, at + len(tensors[kind]))
            vectors[here] = trained.embed(kind, tensors[kind])
            numbers[here] = tensors[row] + first
            at = here.stop
    return numbers, vectors
