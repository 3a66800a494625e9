"""Freeze the first layers of a network, so that what they learned in pretraining stays as it is.

Frozen layers have no gradients and no optimizer state, and nothing is kept of their forward pass, which saves memory
and time. They stay in eval mode while the others train: batch norm keeps its statistics, and nothing is dropped.

Layers are counted in timm's own groups. timm's ``freeze`` is not used: it exchanges batch norm for a layer with other
tensors, so that checkpoints would no longer fit, and cannot freeze parameters of the network itself (position
embeddings, class tokens).
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models import group_parameters
from torch import nn

from geostream.errors import BadInput


def freeze_stages(network: nn.Module, count: int, name: str) -> list[nn.Module]:
    """Freeze the first groups of a network's layers.

    Args:
        network: A network of timm.
        count: Number of groups to freeze: the stem, then stages (ConvNeXt, ResNet) or blocks (vision transformers).
        name: timm's name of the network, for errors.

    Returns:
        The modules to keep in eval mode: the largest ones of which every parameter is frozen.

    Raises:
        BadInput: timm does not know groups of this network, or none would be left to train.
    """
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise BadInput(f"frozen_stages={count}: timm knows no stages of model {name}; set frozen_stages=0")
    groups = group_parameters(network, matcher(coarse=True))
    if count >= len(groups):
        raise BadInput(
            f"frozen_stages={count}: model {name} has {len(groups)} stages, and one must be left to train; set at most "
            f"{len(groups) - 1}"
        )
    for group in range(count):
        for parameter in groups[group]:
            network.get_parameter(parameter).requires_grad_(False)
    return list(_frozen_modules(network))


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Find the largest modules that have parameters, and only frozen ones."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
    else:
        for child in module.children():
            yield from _frozen_modules(child)
