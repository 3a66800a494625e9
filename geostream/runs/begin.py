"""Start or resume a run: fill in settings that depend on the number of ranks, store them, check which may change.

Batches belong to steps and lanes from a run's beginning to its end: ``step_batches`` is the number of ranks it begins
with, ``lanes`` enough for these ranks and their loader workers. So every plan suits them, and a run that goes on with
other ranks trains the same steps. The price: only a number of ranks that divides ``step_batches`` fits.
"""

from __future__ import annotations

from math import lcm

from geostream.errors import AlreadyExists, BadInput
from geostream.settings import TrainSettings
from geostream.runs.run import Run

# Settings that do not change what is trained.
READING = {"look_ahead", "prefetch", "buffer_mib", "gap_kib", "replaced_limit"}
MAY_CHANGE = READING | {"workers", "threads", "decode_threads", "checkpoint_every", "keep_checkpoints"}


def begin(run: Run, settings: TrainSettings, ranks: int) -> TrainSettings:
    """Return the settings to train with on so many ranks: stored with a new run, compared with those of one that exists.

    Raises:
        BadInput: The run was begun with other settings, or its steps cannot be shared by the ranks.
    """
    wanted = resolve(settings, ranks)
    check_ranks(wanted, ranks)
    try:
        run.store_settings(wanted)
    except AlreadyExists:
        begun = run.settings
        wanted = settings.changed(**_as_begun(settings, begun))
        was, now = begun.flat(), wanted.flat()
        if changed := [name for name in now if now[name] != was[name] and name not in MAY_CHANGE]:
            names = ", ".join(f"{name} {was[name]} → {now[name]}" for name in changed)
            raise BadInput(f"{run.url}: begun with other settings ({names}); choose another run name") from None
        check_ranks(wanted, ranks)
    return wanted


def resolve(settings: TrainSettings, ranks: int) -> TrainSettings:
    """The settings with ``step_batches`` and ``lanes`` as a run begins with them on so many ranks."""
    step_batches = settings.optim.step_batches or ranks
    lanes = lcm(settings.plan.lanes, step_batches, ranks * max(settings.read.workers, 1))
    return settings.changed(step_batches=step_batches, lanes=lanes)


def _as_begun(settings: TrainSettings, begun: TrainSettings) -> dict[str, int]:
    """The numbers that were made whole when the run began, where they still are what ``settings`` ask for."""
    same = {}
    if settings.optim.step_batches in (0, begun.optim.step_batches):
        same["step_batches"] = begun.optim.step_batches
    if begun.plan.lanes % settings.plan.lanes == 0:
        same["lanes"] = begun.plan.lanes
    return same


def check_ranks(settings: TrainSettings, ranks: int) -> None:
    """Raise BadInput where so many ranks cannot share the steps, or they and their workers the lanes."""
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
    """``1, 2 or 4``."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
