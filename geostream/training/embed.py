"""Embedding a split: every tile and every view once, in the order in which they lie on disk.

Decides that embedding reads shards in physical order whatever the split, so each is fetched once and one or two are
held; rows reach the Zarr writer in that order and it puts them in theirs. No augmentation, no dropout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from geostream.layout import Int32, Layout
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings
from geostream.progress import Bar
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import scan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.pipeline import ImageSizes
from geostream.streaming.reading import ReadOptions
from geostream.training.model import Encoder, autocast, device_of


def image_sizes(settings: TrainSettings) -> ImageSizes:
    """The sizes that the settings ask for."""
    return ImageSizes((settings.tile_size, settings.tile_size), (settings.view_height, settings.view_width))


def read_options(settings: TrainSettings) -> ReadOptions:
    """What the settings let a reader spend."""
    return ReadOptions(
        look_ahead=settings.look_ahead,
        prefetch=settings.prefetch,
        budget_bytes=settings.buffer_mib * 2**20,
        gap_bytes=settings.gap_kib * 2**10,
        replaced_limit=settings.replaced_limit,
    )


def split_references(layout: Layout, split: str) -> Int32:
    """Sorted place ids to embed as references: those with pairs for training, else the gallery with its distractors."""
    return np.unique(layout.pairs(split).place) if split == "train" else layout.references(split)


def embed(
    run: Store, name: str, layout: Layout, split: str, encoder: Encoder, checkpoint: str, settings: TrainSettings
) -> Embeddings:
    """Embed a split of the layout with ``encoder``, write it to the run at ``name``, and open what was written.

    ``checkpoint``: name of the checkpoint that the weights are from, kept with the embeddings. Raises BadInput for a
    split without pairs, and what the loader raises.
    """
    pairs, references = layout.pairs(split), split_references(layout, split)
    writer = create_embeddings(
        run,
        name,
        layout=layout,
        checkpoint=checkpoint,
        split=split,
        pairs=pairs,
        reference_place=references,
        dim=encoder.dim,
    )
    sizes, options = image_sizes(settings), read_options(settings)
    dataset = scan_dataset(layout, references, pairs, sizes, settings.batch_size, options=options)
    device = device_of(encoder)
    encoder.eval()
    loader = Loader(dataset, settings.workers, settings.decode_threads, pin=device.type == "cuda")
    with loader, Bar(f"embed {split}", len(loader)) as bar, torch.inference_mode():

        def vectors(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            with autocast(device):
                encoded: Tensor = encoder.encode(images.to(device, non_blocking=True))
            return encoded.cpu().numpy()

        for batch in loader:
            tensors = batch.tensors
            if "tile" in tensors:
                writer.write_reference(tensors["reference"].numpy(), vectors(tensors["tile"]))
            if "view" in tensors:
                writer.write_query(tensors["query"].numpy(), vectors(tensors["view"]))
            bar.advance()
    writer.commit()
    return open_embeddings(run, name, layout)
