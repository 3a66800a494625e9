"""Build the model: one timm encoder for tiles and views, and one learnable temperature.

Images enter as the loader makes them (uint8, or float in 0…1 after augmentation). The encoder's mean and standard
deviation are applied here, on the device, so batches travel as bytes, a quarter of the size of floats. A network that
is built for one image size is built for that of the tiles; where timm can, it also accepts the size of the views.

With the setting ``birds_eye``, a panorama is also seen from above (:mod:`geostream.training.birds_eye`), by the same
network, and its vector is the normalised sum of both. A tile's similarity to the sum is that to the panorama plus that
to its picture from above, up to a factor of the view, so that what compares vectors need not know of it. Views cost
another pass of a picture of the tiles' size. In training, a third of the views is embedded one way alone, and a third
the other: with the sum alone, one way learns to lean on the other (docs/notes/training.md). Which views these are is
drawn like dropout, from torch's generator.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 3.1): shared weights, no head, L2-normalised features,
``logit_scale`` learnt from ln(1 / 0.07). EP-BEV (Ye et al., ECCV 2024) adds both similarities; its code has a network
for each, trained apart, and two vectors a tile.
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
from geostream.training.birds_eye import BirdsEye
from geostream.training.freezing import freeze_stages
from geostream.training.sizes import check_patches

Options = Mapping[str, Any]
# Options that make timm's networks of a fixed input size accept others: the first for networks with position
# embeddings, the second for those with windows. Some networks need none.
FLEXIBLE: tuple[Options, ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class Encoder(nn.Module):
    """A network that turns images into unit vectors, with random weights from torch's global generator.

    Args:
        name: timm's name of the network.
        temperature: Where the learnable temperature begins.
        options: timm's options for the network.

    Attributes:
        name: timm's name of the network.
        options: timm's options for the network.
        network: The network without its classifier.
        dim: Length D of the vectors.
        logit_scale: The logarithm of the inverse temperature, learnable.
        mean: (1, 3, 1, 1) subtracted from images in 0…1.
        std: (1, 3, 1, 1) by which they are then divided.
        frozen: Modules of the network that stay in eval mode (:mod:`geostream.training.freezing`).
        birds_eye: The projection to the ground; None: views are embedded as they are.

    Raises:
        BadInput: timm does not know the name or an option.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, temperature: float = 0.07, options: Options | None = None) -> None:
        super().__init__()
        self.name, self.options = name, dict(options or {})
        try:
            self.network = make_network(name, self.options)
        except OSError as error:  # for a name that begins with "hf-hub:", the hub also holds the network's description
            raise BadInput(f"model {name!r}: {str(error).splitlines()[0]} HF_HUB_OFFLINE=0 allows downloads") from error
        self.frozen: list[nn.Module] = []
        self.dim = int(self.network.num_features)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        config = timm.data.resolve_model_data_config(self.network)  # type: ignore[attr-defined,no-untyped-call]
        self.register_buffer("mean", torch.tensor(config["mean"]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).reshape(1, 3, 1, 1), persistent=False)
        self.birds_eye: BirdsEye | None = None

    @classmethod
    def of(cls, settings: TrainSettings) -> Encoder:
        """Build the encoder that the settings ask for, with random weights from torch's global generator.

        Args:
            settings: The run's settings.

        Raises:
            BadInput: timm does not know the model or an option, the model has no gradient checkpointing, or it cannot
                cut images of the settings' sizes into patches or freeze so many stages.
        """
        encoder = cls._sized(settings)
        check_patches(encoder.network, settings)
        if settings.optim.frozen_stages:
            encoder.frozen = freeze_stages(encoder.network, settings.optim.frozen_stages, settings.model.name)
        if settings.model.birds_eye:
            encoder.birds_eye = BirdsEye(settings.model)
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
        """Build the encoder; make a network of a fixed image size accept tiles and views of the settings' sizes."""
        name, temperature, options = settings.model.name, settings.optim.initial_temperature, settings.model.options
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.fixed_input_size or "img_size" in options:
            return cls(name, temperature, options)
        model = settings.model
        tile, view = (model.tile_size, model.tile_size), (model.view_height, model.view_width)
        if tile == view and not options.get("dynamic_img_pad"):
            return cls(name, temperature, {**options, "img_size": tile})
        for flexible in FLEXIBLE:
            try:
                return cls(name, temperature, {**options, "img_size": tile, **flexible})
            except BadInput as error:
                refusal = error
        raise refusal

    def train(self, mode: bool = True) -> Encoder:
        """Set training or eval mode, as torch's modules do; frozen layers stay in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, H, W), uint8 or float in 0…1.

        Returns:
            (B, D) unit vectors, float32.
        """
        features: Tensor = self.network(as_float(images).sub(self.mean).div_(self.std))
        return normalize(features.float(), dim=1)

    def encode_views(self, views: Tensor) -> Tensor:
        """Embed views. Those that are also seen from above go through the network twice.

        In training, a third of these is embedded from the panorama alone, and a third from above alone.

        Args:
            views: (B, 3, H, W), uint8 or float in 0…1.

        Returns:
            (B, D) unit vectors, float32.
        """
        views = as_float(views)
        around = self.encode(views)
        if self.birds_eye is None:
            return around
        above = self.encode(self.birds_eye(views))
        if self.training:
            which = torch.randint(3, (views.shape[0], 1), device=above.device)
            around, above = around.masked_fill(which == 1, 0), above.masked_fill(which == 2, 0)
        return normalize(around + above, dim=1)

    def forward(self, views: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the views (queries) and the tiles (references) of a batch; (B, D) each."""
        return self.encode_views(views), self.encode(tiles)


def make_network(name: str, options: Options, **more: Any) -> Any:
    """Build a timm network without its classifier.

    Args:
        name: timm's name of the network.
        options: timm's options for the network.
        **more: More arguments for ``timm.create_model``.

    Raises:
        BadInput: timm does not know the name or an option.
        OSError: The Hugging Face hub is needed and cannot be reached.
    """
    try:
        return timm.create_model(name, num_classes=0, **options, **more)
    except RuntimeError as error:
        raise BadInput(f"model {name!r}: {error}; timm.list_models() names those there are") from error
    except TypeError as error:
        raise BadInput(f"model {name!r} with model_options {dict(options)}: {error}") from error


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in 0…1; return others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def device_of(encoder: Encoder) -> torch.device:
    """Return the device of the encoder's weights."""
    return encoder.logit_scale.device


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Return the context in which the network computes in a precision.

    Args:
        device: The device of the network.
        precision: "float32", "bf16", "fp16", or "auto": bfloat16 on a GPU, float32 on a CPU, where that is faster.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "float32"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "float32")
