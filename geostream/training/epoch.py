"""Train one epoch of a run on its ranks, and add up what they have read.

Each rank reads its share of the plan's batches. Loss and number of pairs are the same on every rank, because all ranks
take the same steps. Each rank counts its own reading; the counts are added up over the ranks for each report, except
the time spent waiting for data, of which the mean is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from geostream.layout import Layout
from geostream.planning.plan import EpochPlan
from geostream.streaming.dataset import State, plan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import ImageSizes
from geostream.streaming.stats import StreamStats
from geostream.training.augment import Augmenter
from geostream.training.distributed import ProcessGroup
from geostream.training.step import TrainStep
from geostream.training.steps import EpochOutcome, train_epoch
from geostream.training.targets import PairPlaces

Save = Callable[[EpochOutcome, State], None]


class Epoch:
    """An epoch of a plan, perhaps partly trained in earlier sessions.

    Args:
        train_step: The encoder and its optimizer.
        layout: The layout that the plan is for.
        plan: The epoch's plan.
        before: The outcome of earlier sessions of this epoch.
        state: The position in the plan to continue from; None for the beginning.

    Raises:
        StaleArtefact: ``state`` belongs to another plan, or the plan to another layout.
        BadInput: The ranks and their workers cannot share the plan's lanes evenly.
    """

    def __init__(
        self, train_step: TrainStep, layout: Layout, plan: EpochPlan, before: EpochOutcome, state: State | None
    ) -> None:
        settings, group = train_step.settings, train_step.group
        self.train_step, self.before, self.number = train_step, before, plan.epoch
        if settings.loss.by_distance and train_step.places is None:
            train_step.places = PairPlaces(layout)  # the same for every generation that the run may read
        dataset = plan_dataset(
            layout,
            plan,
            ImageSizes.of(settings),
            change=Augmenter(settings, plan.epoch),
            options=ReadOptions.of(settings),
            rank=group.rank,
            ranks=group.ranks,
        )
        pin = group.device.type == "cuda"
        self.loader = Loader(dataset, settings.read.workers, settings.read.decode_threads, pin, group.local_ranks)
        if state is not None:
            self.loader.load_state_dict(state)

    def train(
        self, save: Save, asked: Callable[[], bool], tell: Callable[[EpochOutcome], None] = lambda outcome: None
    ) -> EpochOutcome:
        """Train the rest of the epoch.

        Args:
            save: Called with the outcome so far and the position in the plan, every ``checkpoint_every`` steps and when
                training is interrupted.
            asked: Called after each step; True interrupts training. It must give the same answer on all ranks.
            tell: Called every few steps with the outcome so far, in which the reading is that of this rank and session.

        Returns:
            The outcome of the whole epoch.

        Raises:
            Interrupted: ``asked`` returned True; ``save`` was called before.
            GeostreamError: The loss is no longer a finite number.
        """

        def save_all(outcome: EpochOutcome) -> None:
            save(self._of_all(outcome), self.loader.state_dict())

        here = replace(self.before, stream=StreamStats())
        settings = self.train_step.settings
        outcome = train_epoch(self.train_step, self.loader, settings, self.number, here, save_all, asked, tell)
        return self._of_all(outcome)

    def _of_all(self, outcome: EpochOutcome) -> EpochOutcome:
        """Return the outcome with the reading of all sessions: of all ranks on the main one, elsewhere of this rank."""
        stream = self.before.stream
        session = _together(self.train_step.group, outcome.stream)
        whole = StreamStats.total([stream, session])
        whole.peak_resident_bytes = max(stream.peak_resident_bytes, session.peak_resident_bytes)
        return replace(outcome, stream=whole)


def _together(group: ProcessGroup, stream: StreamStats) -> StreamStats:
    """Return the statistics of all ranks together on the main rank; the others get their own back."""
    parts = [StreamStats.from_dict(one) for one in group.collect_objects(stream.as_dict())]
    if not parts:
        return stream
    whole = StreamStats.total(parts)
    whole.stall_seconds /= len(parts)
    return whole


def measured(outcome: EpochOutcome) -> dict[str, Any]:
    """Return the values that the run's log records of an epoch's outcome so far."""
    return {
        "loss": outcome.loss,
        "pairs": outcome.pairs,
        "pairs_per_second": outcome.pairs / outcome.seconds,
        "wait_share": outcome.stream.stall_seconds / outcome.seconds,
        "stream": outcome.stream.as_dict(),
    }
