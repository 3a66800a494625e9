"""The model: one timm encoder for both views, and one learnable temperature.

Decides that images enter as the loader makes them (uint8, or 0…1 after colour) and that the encoder's own mean and
standard deviation are applied here, on the device: batches travel as bytes, a quarter of the size.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 3.1): shared weights, no head, L2-normalised features,
``logit_scale`` learnt from ln(1 / 0.07).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from geostream.errors import BadInput


class Encoder(nn.Module):
    """Images to unit vectors. ``dim`` is their length, ``name`` timm's name of the network."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, temperature: float = 0.07, options: Mapping[str, Any] | None = None) -> None:
        """A network from scratch; weights come from torch's global generator. ``options``: timm's, for this network.

        Raises BadInput for an unknown name or option.
        """
        super().__init__()
        try:
            network: Any = timm.create_model(name, pretrained=False, num_classes=0, **(options or {}))
        except RuntimeError as error:
            raise BadInput(f"model {name!r}: {error}; timm.list_models() names those there are") from error
        except TypeError as error:
            raise BadInput(f"model {name!r} with model_options {options}: {error}") from error
        self.name = name
        self.network = network
        self.dim = int(network.num_features)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        config = timm.data.resolve_model_data_config(network)  # type: ignore[attr-defined,no-untyped-call]
        self.register_buffer("mean", torch.tensor(config["mean"]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).reshape(1, 3, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """(B, D) unit vectors of images (B, 3, H, W), uint8 or float in 0…1."""
        features: Tensor = self.network(as_float(images).sub(self.mean).div_(self.std))
        return normalize(features.float(), dim=1)

    def forward(self, views: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the views (queries) and of the tiles (references), (B, D) each."""
        return self.encode(views), self.encode(tiles)


def as_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0…1; others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def device_of(encoder: Encoder) -> torch.device:
    """Where the encoder's weights are."""
    return encoder.logit_scale.device


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; plain float32 on a CPU, where it is faster."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
