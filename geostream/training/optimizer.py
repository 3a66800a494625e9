"""Make AdamW, compute its learning rate, and read and write its state by parameter name.

The learning rate is a pure function of the run's progress. So there is no scheduler to store, and an epoch with more or
fewer batches does not shift it. The state is stored by name so that it can be read without this code.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 4, and the authors' code) for AdamW with weight decay on all
parameters, and for the cosine schedule with warm-up. The one-cycle schedule is Smith and Topin's (2018), with torch's
constants. ConvNeXt and vision transformers are usually trained without decay on norms and biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor
from torch.optim import AdamW

from geostream.settings import TrainSettings
from geostream.training.model import Encoder


def learning_rate(done: float, settings: TrainSettings) -> float:
    """Return the learning rate at a point of the run.

    - cosine, linear: rises linearly from 0 over ``warmup_epochs``, then falls to 0 along half a cosine, or linearly.
    - constant: rises in the same way, then stays.
    - one-cycle: rises along half a cosine from a 25th of the highest rate over the first 30 % of the run, then falls
      along half a cosine to almost 0.

    Args:
        done: Share of the run's epochs that are over, 0…1.
        settings: The run's settings.
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
    """Build AdamW over all parameters that train; the fused version takes a quarter of the time on small networks.

    Without ``decay_all``, vectors and scalars (norms, biases, layer scales, the temperature) do not decay, and
    neither do parameters that timm exempts (position embeddings, class tokens).

    With ``layer_decay``, timm's groups of layers have each an ``lr_scale``, by which the step multiplies the learning
    rate. The last layer and the temperature have the whole rate.

    Args:
        encoder: The encoder to train.
        settings: The run's settings.
    """
    optim = settings.optim
    exempt: set[str] = set() if optim.decay_all else set(getattr(encoder.network, "no_weight_decay", set)())
    if optim.layer_decay < 1:
        groups = param_groups_layer_decay(
            encoder.network,
            optim.weight_decay,
            no_weight_decay_list=exempt,
            weight_decay_exclude_1d=not optim.decay_all,
            layer_decay=optim.layer_decay,
        )
        decay = optim.weight_decay if optim.decay_all else 0.0
        groups.append({"params": [encoder.logit_scale], "weight_decay": decay})
    elif optim.decay_all:
        trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "weight_decay": optim.weight_decay}]
    else:
        exempt = {f"network.{name}" for name in exempt}
        groups = param_groups_weight_decay(encoder, optim.weight_decay, no_weight_decay_list=exempt)
    return AdamW(groups, optim.learning_rate, fused=True)


def optimizer_tensors(encoder: Encoder, optimizer: AdamW) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named ``<parameter>/<field>``; empty before its first step."""
    return {
        f"{name}/{field}": value
        for name, parameter in encoder.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(encoder: Encoder, optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Set the optimizer's state to stored tensors.

    Args:
        encoder: The encoder that the optimizer trains.
        optimizer: The optimizer to change.
        tensors: What :func:`optimizer_tensors` returned.

    Raises:
        KeyError: The encoder has no parameter of a name among them.
    """
    parameters = dict(encoder.named_parameters())
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {id(parameter): i for i, parameter in enumerate(ordered)}
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, field = key.rsplit("/", 1)
        slots.setdefault(number[id(parameters[name])], {})[field] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
