"""Start or resume a run: fill in settings that depend on the number of ranks, store them, check which may change.

``step_batches`` and ``lanes`` keep their values for the whole run. ``step_batches`` defaults to the number of ranks at
the start, and ``lanes`` is raised until these ranks and their loader workers can share it. So a run that is resumed
with another number of ranks trains the same steps. The price: that number must divide ``step_batches``.

``epochs`` may grow where that leaves alone what was trained already, that is, where the learning rate stays constant
after its warm-up. Any other schedule is stretched over the epochs of the run, so a longer run would have trained
otherwise from the first step.
"""

from __future__ import annotations

from math import lcm
from typing import Any

from geostream.errors import AlreadyExists, BadInput
from geostream.layout import Layout
from geostream.mining.gps import has_positions
from geostream.runs.galleries import check_joined_kind
from geostream.runs.run import Run
from geostream.runs.stages import mining_due
from geostream.settings import TrainSettings

# Settings that may change on resume, because they do not change what is trained.
READING = {"look_ahead", "prefetch", "buffer_mib", "gap_kib", "replaced_limit"}
MAY_CHANGE = READING | {"workers", "threads", "decode_threads", "checkpoint_every", "keep_checkpoints", "test_on"}


def begin(run: Run, settings: TrainSettings, ranks: int) -> TrainSettings:
    """Store the settings of a new run, or compare them with those that an existing run was begun with.

    Args:
        run: The run to start or resume.
        settings: The settings asked for.
        ranks: Number of processes that train together.

    Returns:
        The settings to train with, ``step_batches`` and ``lanes`` filled in.

    Raises:
        BadInput: The run was begun with other settings, the ranks cannot share its steps or lanes evenly, or the loss
            needs coordinates that the layout lacks, or pictures would be trained on as panoramas.
    """
    check_coordinates(settings, run.layout)
    if not run.exists:
        check_joined_kind(run.store, run.layout, settings)
    wanted = resolve(settings, ranks)
    check_ranks(wanted, ranks)
    try:
        run.store_settings(wanted)
    except AlreadyExists:
        begun = run.settings
        wanted = settings.changed(**_as_begun(settings, begun))
        if run.predates_lag:
            wanted = wanted.changed(mining_lag=0)
        was, now = begun.flat(), wanted.flat()
        changed = [name for name in now if now[name] != was[name] and name not in MAY_CHANGE]
        if changed == ["epochs"] and now["epochs"] > was["epochs"]:
            check_growth(run.url, begun, wanted)
        elif changed:
            names = ", ".join(f"{name} {was[name]} → {now[name]}" for name in changed)
            raise BadInput(f"{run.url}: begun with other settings ({names}); choose another run name") from None
        check_ranks(wanted, ranks)
        if changed:
            run.replace_settings(wanted)
    return wanted


def check_coordinates(settings: TrainSettings, layout: Layout) -> None:
    """Check that the layout has the coordinates that the loss needs.

    Args:
        settings: The settings asked for.
        layout: The layout that the run begins on.

    Raises:
        BadInput: It has none.
    """
    if settings.loss.by_distance and not has_positions(layout):
        names = " and ".join(name for name in ("negative_radius", "soft_targets") if getattr(settings.loss, name))
        raise BadInput(f"layout {layout.name} has no coordinates, which {names} needs; set it to 0")


def check_growth(url: str, begun: TrainSettings, wanted: TrainSettings) -> None:
    """Check that a run may get more epochs.

    Args:
        url: URL of the run, for the error.
        begun: The settings that it was begun with.
        wanted: The same with more epochs.

    Raises:
        BadInput: What was trained already would have been trained otherwise, or the first new epoch would need a
            graph that was not mined.
    """
    epochs, new = begun.optim.epochs, wanted.optim.epochs
    instead = f"train {new - epochs} epochs more as a new run that begins with its weights (weights)"
    if begun.optim.schedule != "constant" or begun.optim.warmup_epochs > epochs:
        raise BadInput(
            f"{url}: epochs {epochs} → {new}: its learning rate follows the schedule {begun.optim.schedule} over "
            f"{epochs} epochs, and would have been another from the start; {instead}"
        )
    for epoch in range(epochs - begun.plan.mining_lag, epochs):
        if mining_due(epoch, wanted) and not mining_due(epoch, begun):
            raise BadInput(
                f"{url}: epochs {epochs} → {new}: this needs a graph of epoch {epoch}, which was not mined; {instead}"
            )


def resolve(settings: TrainSettings, ranks: int) -> TrainSettings:
    """Fill in ``step_batches`` and ``lanes`` for a run that begins on ``ranks`` processes.

    Args:
        settings: The settings asked for; ``step_batches`` 0 means one batch a rank.
        ranks: Number of processes that train together.

    Returns:
        A copy of the settings, in which ``lanes`` is a multiple of ``step_batches`` and of all loader workers.
    """
    step_batches = settings.optim.step_batches or ranks
    lanes = lcm(settings.plan.lanes, step_batches, ranks * max(settings.read.workers, 1))
    return settings.changed(step_batches=step_batches, lanes=lanes)


def _as_begun(settings: TrainSettings, begun: TrainSettings) -> dict[str, Any]:
    """Return values of the run as it was begun that ``settings`` need not repeat.

    These are ``step_batches`` and ``lanes``, where ``settings`` still allow them, and without ``birds_eye`` what only
    that needs, which recipes did not have before it.
    """
    same: dict[str, Any] = {}
    if not settings.model.birds_eye and not begun.model.birds_eye:
        same = {name: getattr(begun.model, name) for name in ("camera_height", "vertical_degrees")}
    if settings.optim.step_batches in (0, begun.optim.step_batches):
        same["step_batches"] = begun.optim.step_batches
    if begun.plan.lanes % settings.plan.lanes == 0:
        same["lanes"] = begun.plan.lanes
    return same


def check_ranks(settings: TrainSettings, ranks: int) -> None:
    """Check that the ranks can share each step's batches, and that their loader workers can share the lanes.

    Args:
        settings: Settings with ``step_batches`` and ``lanes`` filled in (:func:`resolve`).
        ranks: Number of processes that train together.

    Raises:
        BadInput: One of the two cannot be shared evenly; the error names numbers that fit.
    """
    steps, lanes = settings.optim.step_batches, settings.plan.lanes
    if steps % ranks:
        fit = _said([n for n in range(1, steps + 1) if steps % n == 0])
        raise BadInput(f"{ranks} ranks cannot share the {steps} batches of a step (step_batches); start {fit} of them")
    workers = max(settings.read.workers, 1)
    if lanes % (ranks * workers):
        fit = _said([n for n in range(1, lanes // ranks + 1) if lanes % (ranks * n) == 0])
        raise BadInput(
            f"{ranks} ranks with {workers} loader workers each cannot share {lanes} lanes evenly; set workers={fit}"
        )


def _said(numbers: list[int]) -> str:
    """Join numbers for an error text: ``1, 2 or 4``."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
