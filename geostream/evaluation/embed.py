"""Embed a split: encode every tile and every view once, in the order in which they lie on disk.

Reading in physical order fetches each shard once and holds one or two at a time. The Zarr writer sorts the rows. With
several ranks each embeds some of the shards, and the first rank writes for all, because two writers would meet in one
Zarr shard. There is no augmentation and no dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from geostream.arrays import Int32, Pairs, distinct
from geostream.evaluation.protocols import split_pairs
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings
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
    """

    encoder: Encoder
    settings: TrainSettings
    checkpoint: str
    epoch: int


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
            dim=trained.encoder.dim,
        )
    for numbers, vectors in embed_images(layout, references, pairs, trained, group, f"embed {split}", change):
        if writer is not None and numbers is not None and vectors is not None:
            tiles, views = (numbers >= 0) & (numbers < len(references)), numbers >= len(references)
            writer.write_reference(numbers[tiles].numpy(), vectors[tiles].numpy())
            writer.write_query(numbers[views].numpy() - len(references), vectors[views].numpy())
    if writer is not None:
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
            numbers, vectors = map(group.collect, _embedded(encoder, tensors, settings, len(references)))
            yield numbers, vectors


@torch.inference_mode()
def _embedded(
    encoder: Encoder, tensors: dict[str, Tensor], settings: TrainSettings, references: int
) -> tuple[Tensor, Tensor]:
    """Return row numbers (batch size,) and vectors (batch size, D) of a scan's batch, on the CPU.

    A tile's number is its row among the ``references``; a view's is that count plus its row among the pairs. Short
    batches are filled up with number -1, so that all ranks exchange equal shapes.
    """
    device = device_of(encoder)
    numbers = torch.full((settings.optim.batch_size,), -1)
    vectors = torch.zeros(settings.optim.batch_size, encoder.dim)
    at = 0
    for kind, row, first, encode in (
        ("tile", "reference", 0, encoder.encode),
        ("view", "query", references, encoder.encode_views),
    ):
        if kind in tensors:
            here = slice(at, at + len(tensors[kind]))
            with autocast(device, settings.model.precision):
                vectors[here] = encode(tensors[kind].to(device, non_blocking=True)).float().cpu()
            numbers[here] = tensors[row] + first
            at = here.stop
    return numbers, vectors
