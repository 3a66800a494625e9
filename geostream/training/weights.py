"""Set a network's first weights: random ones, those that timm has for it, or those of a local file.

Tensors of a file are matched by name, without the prefixes that wrappers leave. Where that does not do, timm's filter
for this kind of network renames them and resamples position embeddings. Where that does not do either, they are taken
in order, but only if number, shapes and the last part of every name agree and the file keeps an order (safetensors
sorts by name). Anything else is an error that names the first mismatches, because a network that is half random trains,
and badly. Classifier heads and the temperature of another training are left out and logged. Files are never unpickled.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import timm.models
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from torch import Tensor

from geostream.errors import BadInput
from geostream.training.model import Encoder, make_network

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "network", "encoder")  # the first that is there
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "encoder.")
HEADS = ("head.", "fc.", "classifier.", "logit_scale")
COUNTER = "num_batches_tracked"  # of batch norm; older files have none, and nothing depends on it
HUB_TIMEOUT = 5.0  # seconds that the hub has to answer at all
SHOWN = 3  # mismatches that an error names


def begin_with(encoder: Encoder, weights: str) -> None:
    """Set the network's weights to what ``weights`` names: "scratch" (as they are), "timm", or a local file.

    Raises BadInput where they cannot be had, read safely, or do not fit.
    """
    if weights == "timm":
        encoder.network.load_state_dict(_from_hub(encoder))
    elif weights != "scratch":
        path = Path(weights).expanduser()
        load_tensors(encoder, read_tensors(path), str(path), in_order=path.suffix.lower() != ".safetensors")
        logger.info("%s: weights of %s", path, encoder.name)


def _from_hub(encoder: Encoder) -> Tensors:
    """Return the weights that timm has for the encoder's network, resampled to its sizes."""
    or_else = "or give a local file (--set weights=FILE.safetensors), or begin without any (--set weights=scratch)"
    config = timm.get_pretrained_cfg(encoder.name)
    if config is not None and not config.has_weights:
        raise BadInput(f"weights=timm: timm has none of {encoder.name}; choose a model that it has some of, {or_else}")
    offline = constants.HF_HUB_OFFLINE
    reached = not offline and _hub_answers()
    try:
        constants.HF_HUB_OFFLINE = not reached  # else the client retries before it looks for what is cached
        weights: Tensors = make_network(encoder.name, encoder.options, pretrained=True).state_dict()
    except OSError as error:  # what the hub's client makes of a hub that is not reached
        if offline:
            reason = f"HF_HUB_OFFLINE keeps it from {constants.ENDPOINT}; set HF_HUB_OFFLINE=0 to allow the download"
        elif not reached:
            reason = f"the hub {constants.ENDPOINT} cannot be reached; try again with a connection"
        else:
            reason = f"the hub {constants.ENDPOINT} does not give them ({str(error).splitlines()[0]}); try again"
        raise BadInput(
            f"weights=timm: those of {encoder.name} are not on this machine, and {reason}, {or_else}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
    return weights


def _hub_answers() -> bool:
    """Ask the hub once whether it is there: its own client retries for most of a minute before it gives up."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # of the HTTP library that the hub's client happens to use
        return False
    return True


def read_tensors(path: Path) -> Tensors:
    """The tensors of a file by name, out of the dictionaries that trainings nest them in; never by unpickling.

    Raises BadInput for a file that is not there, damaged, of another kind, or that only unpickling could read.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"weights={path}: choose scratch, timm, or a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise BadInput(f"weights={path}: there is no such file")
    try:
        # weights_only: nothing is unpickled that could run code
        content: Any = timm.models.load_state_dict(str(path), weights_only=True)
    except SafetensorError as error:
        raise BadInput(f"weights={path}: not a safetensors file, or a damaged one ({error})") from error
    except Exception as error:  # torch.load raises whatever its parsers do
        reason = str(error.__cause__ or error).partition("\n")[0] or type(error).__name__
        raise BadInput(
            f"weights={path}: cannot be read without running code that may be in it, or damaged; save its state_dict "
            f"as safetensors ({reason})"
        ) from error
    while inner := next((key for key in NESTED if isinstance(content.get(key), dict)), None):
        content = content[inner]
    tensors: Tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BadInput(f"weights={path}: holds no tensors by name")
    return tensors


def load_tensors(encoder: Encoder, tensors: Tensors, where: str, in_order: bool) -> None:
    """Set the network's weights to ``tensors``, as the module says. ``where``: the file, for messages.

    ``in_order``: whether the order of the tensors is that in which their network was made.

    Raises BadInput, and changes nothing, where they do not fit.
    """
    network = encoder.network
    wanted: Tensors = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}
    named = {_bare(name, wanted): tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    filtered = _filtered(network, named)
    for candidate in (named, filtered, _in_order(named, wanted, encoder.dim) if in_order else None):
        if candidate is None:
            continue
        left_out = candidate.keys() - wanted.keys()
        if not _misfits(candidate, wanted) and all(_is_head(name, network) for name in left_out):
            if left_out:
                logger.info("%s: left out %s", where, ", ".join(sorted(left_out)))
            network.load_state_dict({name: candidate[name] for name in wanted}, strict=False)
            return
    best = named if filtered is None else min((named, filtered), key=lambda tried: len(_misfits(tried, wanted)))
    surplus = [f"{name} is unknown there" for name in best if name not in wanted and not _is_head(name, network)]
    misfits = [*_misfits(best, wanted), *surplus]
    more = f" and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
    raise BadInput(
        f"weights={where}: does not fit model {encoder.name}: {'; '.join(misfits[:SHOWN])}{more} "
        f"({len(named)} tensors for {len(wanted)}); name the model that the file is of"
    )


def _bare(name: str, wanted: Tensors) -> str:
    """The name without the prefixes that wrappers left, as far as the network does not know it."""
    while name not in wanted and (prefix := next((p for p in PREFIXES if name.startswith(p)), None)):
        name = name.removeprefix(prefix)
    return name


def _filtered(network: Any, tensors: Tensors) -> Tensors | None:
    """What timm's filter of this kind of network makes of the tensors; None where it has none, or gives up."""
    filter_fn: Callable[[Tensors, Any], Tensors] | None
    filter_fn = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return None
    try:
        return dict(filter_fn(dict(tensors), network))
    except Exception:  # made for the files that timm knows, it may fall over any other
        return None


def _in_order(tensors: Tensors, wanted: Tensors, dim: int) -> Tensors | None:
    """The tensors under the network's names, in order, where shapes and last parts of all names agree; else None.

    A classifier on ``dim`` features may follow behind them.
    """
    surplus = list(tensors.values())[len(wanted) :]
    if surplus and [tensor.shape[1:] for tensor in surplus] != [(dim,), ()]:
        return None
    pairs = list(zip(tensors.items(), wanted.items(), strict=False))
    if len(pairs) < len(wanted):
        return None
    for (name, tensor), (wanted_name, other) in pairs:
        if tensor.shape != other.shape or name.rsplit(".", 1)[-1] != wanted_name.rsplit(".", 1)[-1]:
            return None
    return {wanted_name: tensor for (_, tensor), (wanted_name, _) in pairs}


def _misfits(tensors: Tensors, wanted: Tensors) -> list[str]:
    """What of the network the tensors do not set, in words."""
    missing = [f"{name} is missing" for name in wanted if name not in tensors]
    return missing + [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(other.shape)}"
        for name, other in wanted.items()
        if name in tensors and tensors[name].shape != other.shape
    ]


def _is_head(name: str, network: Any) -> bool:
    """Whether the tensor belongs to a classifier, or is another training's temperature."""
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return name.startswith((*HEADS, *(f"{one}." for one in names)))
