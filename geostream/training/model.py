"""The model: one timm encoder for both views, and one learnable temperature.

Decides that images enter as the loader makes them (uint8, or 0…1 after colour) and that the encoder's own mean and
standard deviation are applied here, on the device: batches travel as bytes, a quarter of the size. A network that is
built for one size of image gets the settings' size, and is told to take another beside it where timm can do that.

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
from geostream.settings import TrainSettings

Options = Mapping[str, Any]
# How timm's networks of a fixed input size are told to take others, too: those with position embeddings, and those
# with windows. Some do without being told.
FLEXIBLE: tuple[Options, ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class Encoder(nn.Module):
    """Images to unit vectors. ``dim`` is their length, ``name`` timm's name of the network, ``options`` what it got."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, temperature: float = 0.07, options: Options | None = None) -> None:
        """A network from scratch; weights come from torch's global generator. ``options``: timm's, for this network.

        Raises BadInput for an unknown name or option.
        """
        super().__init__()
        self.name, self.options = name, dict(options or {})
        try:
            self.network = make_network(name, self.options)
        except OSError as error:  # of a name that begins with hf-hub: even what the network is comes from there
            raise BadInput(f"model {name!r}: {str(error).splitlines()[0]} HF_HUB_OFFLINE=0 allows downloads") from error
        self.dim = int(self.network.num_features)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        config = timm.data.resolve_model_data_config(self.network)  # type: ignore[attr-defined,no-untyped-call]
        self.register_buffer("mean", torch.tensor(config["mean"]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).reshape(1, 3, 1, 1), persistent=False)

    @classmethod
    def of(cls, settings: TrainSettings) -> Encoder:
        """The encoder that the settings ask for, from scratch; its weights come from torch's global generator.

        Raises BadInput for an unknown model or option, and where the network cannot do what the settings want.
        """
        encoder = cls._sized(settings)
        if settings.model.gradient_checkpointing:
            try:
                encoder.network.set_grad_checkpointing(True)
            except (AttributeError, AssertionError, NotImplementedError) as error:
                raise BadInput(
                    f"model {settings.model.name} has no gradient checkpointing; set gradient_checkpointing=false, and "
                    "micro_batch to save memory"
                ) from error
        return encoder.to(memory_format=torch.channels_last) if settings.model.channels_last else encoder

    @classmethod
    def _sized(cls, settings: TrainSettings) -> Encoder:
        """The encoder that takes tiles and views of the settings' sizes, where the network is built for one size."""
        name, temperature, options = settings.model.name, settings.optim.initial_temperature, settings.model.options
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.fixed_input_size or "img_size" in options:
            return cls(name, temperature, options)
        model = settings.model
        tile, view = (model.tile_size, model.tile_size), (model.view_height, model.view_width)
        if tile == view:
            return cls(name, temperature, {**options, "img_size": tile})
        for flexible in FLEXIBLE:
            try:
                return cls(name, temperature, {**options, "img_size": tile, **flexible})
            except BadInput as error:
                refusal = error
        raise refusal

    def encode(self, images: Tensor) -> Tensor:
        """(B, D) unit vectors of images (B, 3, H, W), uint8 or float in 0…1."""
        features: Tensor = self.network(as_float(images).sub(self.mean).div_(self.std))
        return normalize(features.float(), dim=1)

    def forward(self, views: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the views (queries) and of the tiles (references), (B, D) each."""
        return self.encode(views), self.encode(tiles)


def make_network(name: str, options: Options, **more: Any) -> Any:
    """timm's network without its classifier; ``more`` goes to timm with the options.

    Raises BadInput for an unknown name or option, OSError where a hub is needed and not reached.
    """
    try:
        return timm.create_model(name, num_classes=0, **options, **more)
    except RuntimeError as error:
        raise BadInput(f"model {name!r}: {error}; timm.list_models() names those there are") from error
    except TypeError as error:
        raise BadInput(f"model {name!r} with model_options {dict(options)}: {error}") from error


def as_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0…1; others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def device_of(encoder: Encoder) -> torch.device:
    """Where the encoder's weights are."""
    return encoder.logit_scale.device


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """The context in which the network computes in ``precision``, as the settings name it.

    auto: bfloat16 on a GPU; plain float32 on a CPU, where it is faster.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "float32"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "float32")
