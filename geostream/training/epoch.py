"""One epoch of a run on its ranks: who reads which batches of the plan, and what it comes to over all of them.

Decides that loss and pairs are the same on every rank, because steps are common, while each rank counts its own
reading: that is added up whenever somebody wants to know. Of the ranks' waiting for data it is the mean.
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
from geostream.training.augment import Augmentation
from geostream.training.distributed import ProcessGroup
from geostream.training.step import TrainStep
from geostream.training.steps import EpochOutcome, train_epoch

Save = Callable[[EpochOutcome, State], None]


class Epoch:
    """The epoch of a plan, of which ``before`` was trained in earlier sessions, up to position ``state``."""

    def __init__(
        self, train_step: TrainStep, layout: Layout, plan: EpochPlan, before: EpochOutcome, state: State | None
    ) -> None:
        """Raises StaleArtefact where ``state`` is of another plan."""
        settings, group = train_step.settings, train_step.group
        self.train_step, self.before, self.number = train_step, before, plan.epoch
        dataset = plan_dataset(
            layout,
            plan,
            ImageSizes.of(settings),
            change=Augmentation.of(settings, plan.epoch, len(layout.pairs("train"))),
            options=ReadOptions.of(settings),
            rank=group.rank,
            ranks=group.ranks,
        )
        pin = group.device.type == "cuda"
        self.loader = Loader(dataset, settings.read.workers, settings.read.decode_threads, pin, group.local_ranks)
        if state is not None:
            self.loader.load_state_dict(state)

    def train(self, save: Save, asked: Callable[[], bool]) -> EpochOutcome:
        """Train what is left; what the whole epoch came to.

        ``save`` gets what it came to so far, and the position; every so many steps, and after the step that ``asked``
        ends. Then Interrupted is raised.
        """

        def save_all(outcome: EpochOutcome) -> None:
            save(self._of_all(outcome), self.loader.state_dict())

        here = replace(self.before, stream=StreamStats())
        settings = self.train_step.settings
        return self._of_all(train_epoch(self.train_step, self.loader, settings, self.number, here, save_all, asked))

    def _of_all(self, outcome: EpochOutcome) -> EpochOutcome:
        """With what all ranks have read in all sessions; so on the first rank, the others know their own only."""
        stream = self.before.stream
        session = _together(self.train_step.group, outcome.stream)
        whole = StreamStats.total([stream, session])
        whole.peak_resident_bytes = max(stream.peak_resident_bytes, session.peak_resident_bytes)
        return replace(outcome, stream=whole)


def _together(group: ProcessGroup, stream: StreamStats) -> StreamStats:
    parts = [StreamStats.from_dict(one) for one in group.collect_objects(stream.as_dict())]
    if not parts:
        return stream
    whole = StreamStats.total(parts)
    whole.stall_seconds /= len(parts)
    return whole


def measured(outcome: EpochOutcome) -> dict[str, Any]:
    """What the log tells of an epoch, or of the part of it that is trained."""
    return {
        "loss": outcome.loss,
        "pairs": outcome.pairs,
        "pairs_per_second": outcome.pairs / outcome.seconds,
        "wait_share": outcome.stream.stall_seconds / outcome.seconds,
        "stream": outcome.stream.as_dict(),
    }
