"""Begin a run from a model or from another run's checkpoint of the same data set.

The setting ``weights`` may be ``model:current``, ``model:7``, ``run:NAME`` (the checkpoint of its best evaluation) or
``run:NAME/CHECKPOINT``. What is current or best changes with time, so the setting is made definite when the run is
begun (``model:7``, ``run:NAME/CHECKPOINT``) and stored so. A run that is resumed keeps what it was begun with, although
the person asks for ``model:current`` again.

Taken over are the encoder's weights, as they are evaluated (with an EMA those of the EMA), and its learned temperature.
The optimizer begins anew.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from geostream.errors import BadInput
from geostream.runs.models import find_model, open_model
from geostream.runs.run import Run
from geostream.settings import ModelSettings
from geostream.training.checkpoint import read_weights
from geostream.training.checkpoint_files import read_position
from geostream.training.model import Encoder
from geostream.training.weights import begin_with, load_tensors

MODEL, RUN = "model:", "run:"
logger = logging.getLogger(__name__)


def resolve_weights(run: Run, weights: str) -> str:
    """Return the setting ``weights`` with a definite model or checkpoint; other values as they are.

    Args:
        run: The run that begins or is resumed.
        weights: The setting as it was asked for.

    Raises:
        BadInput: There is no such model, run or checkpoint.
    """
    if not weights.startswith((MODEL, RUN)):
        return weights
    if run.exists:
        begun = run.settings.model.weights
        if (weights == "model:current" and begun.startswith(MODEL)) or begun.startswith(f"{weights}/"):
            return begun
    if weights.startswith(MODEL):
        return f"{MODEL}{find_model(run.store, run.layout.dataset, weights.removeprefix(MODEL)).number}"
    name, _, checkpoint = weights.removeprefix(RUN).partition("/")
    source = Run(run.store, run.layout, name)
    _ = source.settings  # an error that names the run comes before one that names its checkpoint
    checkpoint = checkpoint or source.read_best()
    read_position(source.folder, checkpoint)
    return f"{RUN}{name}/{checkpoint}"


def set_first_weights(run: Run, encoder: Encoder, settings: ModelSettings) -> None:
    """Set an encoder's first weights.

    Args:
        run: The run that begins.
        encoder: The encoder to set.
        settings: The run's settings, with ``weights`` as :func:`resolve_weights` returns it.

    Raises:
        BadInput: The weights are not available, cannot be read safely, or are of another model.
        StoreError: They are damaged, or the store fails.
    """
    weights = settings.weights
    if not weights.startswith((MODEL, RUN)):
        begin_with(encoder, weights)
        return
    if weights.startswith(MODEL):
        source, model = open_model(run.store, run.layout, weights.removeprefix(MODEL))
        checkpoint = model.checkpoint
    else:
        name, _, checkpoint = weights.removeprefix(RUN).partition("/")
        source = Run(run.store, run.layout, name)
    _check_same_model(weights, source.settings.model, settings)
    _, tensors = read_weights(source.folder, checkpoint)
    temperature = tensors.pop("logit_scale")
    load_tensors(encoder, tensors, weights, in_order=False)
    with torch.no_grad():
        encoder.logit_scale.copy_(temperature)
    logger.info("%s: begins from %s, %s of %s", run.url, weights, checkpoint, source.url)


def _check_same_model(weights: str, theirs: ModelSettings, ours: ModelSettings) -> None:
    """Raise BadInput where the networks differ in more than what is dropped while they train."""
    was, now = _architecture(theirs), _architecture(ours)
    if was != now:
        names = ", ".join(
            f"{name} {was.get(name)} → {now.get(name)}" for name in was | now if was.get(name) != now.get(name)
        )
        raise BadInput(
            f"weights={weights}: is of another model than this run's ({names}); set the same, or other weights"
        )


def _architecture(settings: ModelSettings) -> dict[str, Any]:
    options = {name: value for name, value in settings.options.items() if "drop" not in name}
    return {"model": settings.name, **options}
