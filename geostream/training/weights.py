"""Set a network's first weights: random ones, those that timm has for it, or those of a file.

A file is a local one, or one at the URL of a store, which is downloaded to a private temporary file first.
:mod:`geostream.runs.first_weights` adds those of earlier runs and models.

Tensors of a file are matched by name, without the prefixes that wrappers add. If they do not fit, timm's filter for
this kind of network is tried, which renames tensors and resamples position embeddings. If that fails too, the tensors
are taken in their order. This requires that their number, their shapes and the last part of every name agree, and that
the file keeps an order (safetensors sorts by name).

Anything else is an error that names the first mismatches, because a network that is half random trains badly without
a warning. Classifier heads and another training's temperature are left out and logged. Files are never unpickled.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import timm.models
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from torch import Tensor

from geostream.errors import BadInput, StoreError
from geostream.store import Store
from geostream.training.model import Encoder, make_network

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "network", "encoder")  # the first one found is taken
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "encoder.")
HEADS = ("head.", "fc.", "classifier.", "logit_scale")
COUNTER = "num_batches_tracked"  # batch norm's counter; older files lack it, and nothing depends on it
HUB_TIMEOUT = 5.0  # seconds that the hub has to answer
SHOWN = 3  # most mismatches that an error names


def begin_with(encoder: Encoder, weights: str) -> None:
    """Set an encoder's first weights.

    Args:
        encoder: The encoder to set.
        weights: "scratch" to leave them as they are, "timm" for timm's pretrained weights, or the path or URL of a
            file.

    Raises:
        BadInput: The weights are not available, cannot be read safely, or do not fit.
    """
    if weights == "timm":
        encoder.network.load_state_dict(_from_hub(encoder))
    elif weights != "scratch":
        tensors = _downloaded(weights) if "://" in weights else read_tensors(Path(weights).expanduser(), weights)
        load_tensors(encoder, tensors, weights, in_order=not weights.lower().endswith(".safetensors"))
        logger.info("%s: weights of %s", weights, encoder.name)


def _downloaded(url: str) -> Tensors:
    """Read the tensors of a file at the URL of a store."""
    folder, _, name = url.rpartition("/")
    _check_suffix(url)
    try:
        data = Store.open(folder).read(name)
    except (BadInput, StoreError) as error:
        raise BadInput(f"weights={url}: cannot be read ({error})") from error
    with TemporaryDirectory(prefix="geostream-weights-") as private:
        path = Path(private, f"weights{Path(name).suffix}")
        path.write_bytes(data)
        return read_tensors(path, url)


def _check_suffix(where: str) -> None:
    if Path(where).suffix.lower() not in SUFFIXES:
        raise BadInput(
            f"weights={where}: choose scratch, timm, model:current, model:NUMBER, run:NAME, run:NAME/CHECKPOINT, or a "
            f"file or URL that ends in {', '.join(SUFFIXES)}"
        )


def _from_hub(encoder: Encoder) -> Tensors:
    """Return the weights that timm has for the encoder's network, resampled to its sizes."""
    or_else = "or give a local file (--set weights=FILE.safetensors), or begin without any (--set weights=scratch)"
    config = timm.get_pretrained_cfg(encoder.name)
    if config is not None and not config.has_weights:
        raise BadInput(f"weights=timm: timm has none of {encoder.name}; choose a model that it has some of, {or_else}")
    offline = constants.HF_HUB_OFFLINE
    reached = not offline and _hub_answers()
    try:
        constants.HF_HUB_OFFLINE = not reached  # otherwise the client retries before it looks into its cache
        weights: Tensors = make_network(encoder.name, encoder.options, pretrained=True).state_dict()
    except OSError as error:  # raised by the hub's client when it cannot reach the hub
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
    """Return whether the hub answers one request; its own client retries for most of a minute before it gives up."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the type depends on the HTTP library that the hub's client uses
        return False
    return True


def read_tensors(path: Path, where: str | None = None) -> Tensors:
    """Read the tensors of a file without unpickling; look for them in nested dictionaries too.

    Args:
        path: A file with one of the suffixes in ``SUFFIXES``.
        where: How the person named it, for messages; None: by its path.

    Returns:
        The tensors by name.

    Raises:
        BadInput: The file is missing, damaged, of another kind, or could only be read by unpickling.
    """
    where = where or str(path)
    _check_suffix(where)
    if not path.is_file():
        raise BadInput(f"weights={where}: there is no such file")
    try:
        # weights_only: nothing that could run code is unpickled
        content: Any = timm.models.load_state_dict(str(path), weights_only=True)
    except SafetensorError as error:
        raise BadInput(f"weights={where}: not a safetensors file, or a damaged one ({error})") from error
    except Exception as error:  # torch.load passes on whatever its parsers raise
        reason = str(error.__cause__ or error).partition("\n")[0] or type(error).__name__
        raise BadInput(
            f"weights={where}: cannot be read without running code that may be in it, or damaged; save its state_dict "
            f"as safetensors ({reason})"
        ) from error
    while inner := next((key for key in NESTED if isinstance(content.get(key), dict)), None):
        content = content[inner]
    tensors: Tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BadInput(f"weights={where}: holds no tensors by name")
    return tensors


def load_tensors(encoder: Encoder, tensors: Tensors, where: str, in_order: bool) -> None:
    """Set an encoder's weights to tensors, matched as the module's docstring says.

    Args:
        encoder: The encoder to set.
        tensors: The tensors by name.
        where: The file they are from, for messages.
        in_order: Whether the tensors are in the order in which their network was built.

    Raises:
        BadInput: The tensors do not fit; the encoder is unchanged.
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
    """Remove the prefixes that wrappers added, until the network knows the name."""
    while name not in wanted and (prefix := next((p for p in PREFIXES if name.startswith(p)), None)):
        name = name.removeprefix(prefix)
    return name


def _filtered(network: Any, tensors: Tensors) -> Tensors | None:
    """Apply timm's filter for this kind of network to the tensors; return None if there is none or it fails."""
    filter_fn: Callable[[Tensors, Any], Tensors] | None
    filter_fn = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return None
    try:
        return dict(filter_fn(dict(tensors), network))
    except Exception:  # the filter is made for files that timm knows and may fail in any way on others
        return None


def _in_order(tensors: Tensors, wanted: Tensors, dim: int) -> Tensors | None:
    """Return the tensors under the network's names, in order; None if shapes or last parts of names do not agree.

    A classifier on ``dim`` features may follow after them and is left out.
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
    """Return, in words, which tensors of the network are missing or have another shape."""
    missing = [f"{name} is missing" for name in wanted if name not in tensors]
    return missing + [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(other.shape)}"
        for name, other in wanted.items()
        if name in tensors and tensors[name].shape != other.shape
    ]


def _is_head(name: str, network: Any) -> bool:
    """Return whether the tensor belongs to a classifier, or is another training's temperature."""
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return name.startswith((*HEADS, *(f"{one}." for one in names)))
