"""Check that a network takes images of the sizes that the settings ask for, before anything is trained.

Vision transformers cut images into patches. timm's networks leave out the right and lower edge of an image that is no
multiple of the patches, without a word, if they are built for one size; those that take several sizes fail. Both are
refused here, with the sizes that fit.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from geostream.errors import BadInput
from geostream.settings import TrainSettings

if TYPE_CHECKING:
    from geostream.training.model import Encoder

PADDING = "dynamic_img_pad"  # timm's option that fills images up to whole patches


def check_patches(network: nn.Module, settings: TrainSettings) -> None:
    """Check that the network's patches fill tiles and views of the settings' sizes.

    Args:
        network: A network of timm; one without patches takes any size.
        settings: The run's settings.

    Raises:
        BadInput: A size is no multiple of the patches; the error names sizes that fit.
    """
    embed = getattr(network, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return
    model = settings.model
    height, width = embed.patch_size
    sizes = [
        ("tile_size", model.tile_size, height),
        ("view_height", model.view_height, height),
        ("view_width", model.view_width, width),
    ]
    wrong = [
        f"{name}={size} (choose {f'{size // patch * patch} or ' if size >= patch else ''}{-(-size // patch) * patch})"
        for name, size, patch in sizes
        if size % patch
    ]
    if wrong:
        pads = PADDING in inspect.signature(type(network).__init__).parameters
        instead = f", or --set 'model_options={{\"{PADDING}\": true}}' fills the edges up with gray" if pads else ""
        raise BadInput(
            f"model {model.name} cuts images into patches of {height}×{width} pixels, which do not fill "
            f"{', '.join(wrong)}{instead}"
        )


def check_sizes(encoder: Encoder, settings: TrainSettings) -> None:
    """Check that the network takes images of the settings' sizes, by embedding one of each.

    Args:
        encoder: The encoder, in eval mode.
        settings: The run's settings.

    Raises:
        BadInput: It does not; the error has timm's or torch's reason.
    """
    model, device = settings.model, encoder.logit_scale.device
    for height, width in ((model.tile_size, model.tile_size), (model.view_height, model.view_width)):
        try:
            with torch.inference_mode():
                encoder.encode(torch.zeros(1, 3, height, width, device=device))
        except (RuntimeError, AssertionError) as error:
            raise BadInput(
                f"model {model.name} cannot take images of {height}×{width}: {str(error).splitlines()[0]}; "
                "choose larger tile_size, view_height and view_width, or another model"
            ) from error
