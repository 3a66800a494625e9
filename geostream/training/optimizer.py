"""Make AdamW, compute its learning rate, and read and write its state by parameter name.

The learning rate is a pure function of how far the run is: there is no scheduler to store, and an epoch of more or
fewer batches does not shift it. The state is kept by name so that it can be read without this code.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 4, and the authors' code) for AdamW with decay on everything and
cosine with warm-up; the one-cycle shape is Smith and Topin's (2018), with torch's constants. Leaving norms and biases
undecayed is the custom of ConvNeXt's and the transformers' own trainings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor
from torch.optim import AdamW

from geostream.settings import TrainSettings
from geostream.training.model import Encoder


def learning_rate(done: float, settings: TrainSettings) -> float:
    """The rate when ``done`` (0…1) of the run's epochs are over.

    cosine, linear: in a line up from 0 over ``warmup_epochs``, then down to 0 by half a cosine, or in a line.
    one-cycle: half a cosine up from a 25th over the first 30 %, half a cosine down to almost nothing. constant: the
    rate, after the warm-up.
    """
    top = settings.optim.learning_rate
    if settings.optim.schedule == "one-cycle":
        if done < 0.3:
            return _half_cosine(top / 25, top, done / 0.3)
        return _half_cosine(top, top / 250_000, (done - 0.3) / 0.7)
    warmup = min(settings.optim.warmup_epochs / settings.optim.epochs, 1.0)
    if done < warmup:
        return top * done / warmup
    if settings.optim.schedule == "constant" or warmup == 1.0:
        return top
    part = (done - warmup) / (1 - warmup)
    return top * (1 - part) if settings.optim.schedule == "linear" else _half_cosine(top, 0.0, part)


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(encoder: Encoder, settings: TrainSettings) -> AdamW:
    """AdamW over all parameters; fused, which takes a quarter of the time on small networks.

    Without ``decay_all``, vectors and scalars do not decay (norms, biases, layer scales, the temperature), and neither
    does what timm exempts (position embeddings, class tokens).
    """
    optim = settings.optim
    if optim.decay_all:
        return AdamW(encoder.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True)
    exempt = {f"network.{name}" for name in getattr(encoder.network, "no_weight_decay", frozenset)()}
    groups = param_groups_weight_decay(encoder, optim.weight_decay, no_weight_decay_list=exempt)
    return AdamW(groups, optim.learning_rate, fused=True)


def optimizer_tensors(encoder: Encoder, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>/<field>``; empty before its first step."""
    return {
        f"{name}/{field}": value
        for name, parameter in encoder.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(encoder: Encoder, optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Go on from what :func:`optimizer_tensors` gave. Raises KeyError for a parameter that the encoder lacks."""
    parameters = dict(encoder.named_parameters())
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {id(parameter): i for i, parameter in enumerate(ordered)}
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, field = key.rsplit("/", 1)
        slots.setdefault(number[id(parameters[name])], {})[field] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
