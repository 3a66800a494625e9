"""Take the optimizer steps of one epoch, and count what they come to.

The loss is read from the device only for the progress bar and for points of the curve, because reading it at every step
would make a GPU wait for the CPU. A request to stop is followed after the current step, with a checkpoint, so that no
training is lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from geostream.errors import BadInput, GeostreamError, Interrupted
from geostream.progress import Bar
from geostream.settings import TrainSettings
from geostream.streaming.loader import Loader
from geostream.streaming.stats import StreamStats
from geostream.training.model import device_of
from geostream.training.optimizer import learning_rate
from geostream.training.step import TrainStep

SHOW_EVERY = 10  # steps between two updates of the progress bar and the metrics
CURVE_POINTS = 50  # most points of an epoch's curve


@dataclass(frozen=True)
class EpochOutcome:
    """The outcome of an epoch's training so far, over all its sessions and all ranks.

    Attributes:
        steps: Number of optimizer steps.
        batches: Number of the plan's batches.
        pairs: Number of pairs.
        loss_sum: Sum of the losses of all steps.
        seconds: Training time.
        stream: Statistics of reading, for this rank only until :class:`~geostream.training.epoch.Epoch` adds up.
        curve: Points of (step of the run, mean loss since the last point, learning rate, and with fp16 the gradient
            scale).
    """

    steps: int = 0
    batches: int = 0
    pairs: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    stream: StreamStats = field(default_factory=StreamStats)
    curve: list[list[float]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean loss over the steps."""
        return self.loss_sum / max(self.steps, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as values that JSON can hold."""
        return asdict(self) | {"stream": self.stream.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochOutcome:
        """Return the outcome that :meth:`as_dict` stored."""
        return cls(**{**values, "stream": StreamStats.from_dict(values["stream"])})


def train_epoch(
    train_step: TrainStep,
    loader: Loader,
    settings: TrainSettings,
    epoch: int,
    before: EpochOutcome,
    save: Callable[[EpochOutcome], None],
    stopping: Callable[[], bool] = lambda: False,
    tell: Callable[[EpochOutcome], None] = lambda outcome: None,
) -> EpochOutcome:
    """Train once on each batch that the loader still has; all ranks must call this together.

    Args:
        train_step: The encoder and its optimizer.
        loader: Gives this rank's batches.
        settings: The run's settings.
        epoch: Number of the epoch, from 1.
        before: The outcome of earlier sessions of this epoch.
        save: Called with the outcome so far, every ``checkpoint_every`` steps and when training is interrupted.
        stopping: Called after each step but the last; True interrupts training. It must give the same answer on all
            ranks.
        tell: Called with the outcome so far, every ``SHOW_EVERY`` steps.

    Returns:
        The outcome, ``before`` included.

    Raises:
        BadInput: The loader's batches do not fill whole steps.
        GeostreamError: The loss is no longer a finite number.
        Interrupted: ``stopping`` returned True; ``save`` was called before.
    """
    if len(loader) % train_step.own_batches:
        raise BadInput(
            f"step_batches={train_step.step_batches} does not divide the batches of the plan; it must divide lanes"
        )
    train_step.encoder.train()
    steps = before.steps + len(loader) // train_step.own_batches
    count = _Count(train_step, loader, before, max(1, math.ceil(steps / CURVE_POINTS)))
    bar = Bar(f"epoch {epoch}/{settings.optim.epochs}", steps) if train_step.group.is_main else None
    with loader, bar or nullcontext():
        taken: list[dict[str, Tensor]] = []
        for batch in loader:
            taken.append(batch.tensors)
            if len(taken) < train_step.own_batches:
                continue
            rate = learning_rate((epoch - 1 + (count.steps + 0.5) / steps) / settings.optim.epochs, settings)
            count.add(train_step.step(taken, rate), rate, len(taken[0]["pair"]))
            taken = []
            last = count.steps == steps
            if count.steps % SHOW_EVERY == 0 or last:
                outcome = count.outcome()
                tell(outcome)
                if bar is not None:
                    shown = _rates(outcome.pairs - before.pairs, count.started, loader.stats)
                    bar.advance(count.steps - bar.done, loss=outcome.loss, **shown)
            stop = not last and stopping()
            if stop or (count.steps % settings.checkpoint_every == 0 and not last):
                save(count.outcome())
            if stop:
                raise Interrupted(f"epoch {epoch}: stopped after step {count.steps} of {steps}")
    return count.outcome()


class _Count:
    """Count an epoch's steps, pairs and losses; sums of losses stay on the device until they are read."""

    def __init__(self, train_step: TrainStep, loader: Loader, before: EpochOutcome, point_every: int) -> None:
        self.train_step, self.loader, self.before, self.point_every = train_step, loader, before, point_every
        self.steps, self.pairs, self.curve = before.steps, before.pairs, list(before.curve)
        self.losses = torch.tensor(before.loss_sum, dtype=torch.float64, device=device_of(train_step.encoder))
        self._of_point = torch.zeros_like(self.losses)
        self._steps_of_point = 0
        self.started = time.perf_counter()

    def add(self, loss: Tensor, rate: float, batch_size: int) -> None:
        """Count a step with its loss, its learning rate and the pairs in each of its batches."""
        self.steps += 1
        self.pairs += self.train_step.step_batches * batch_size
        self.losses += loss
        self._of_point += loss
        self._steps_of_point += 1
        if self.steps % self.point_every == 0:
            point = [self.train_step.steps, float(self._of_point) / self._steps_of_point, rate]
            self.curve.append([*point, *self.train_step.gradient_scale()])
            self._of_point.zero_()
            self._steps_of_point = 0

    def outcome(self) -> EpochOutcome:
        """Return the outcome so far; raise GeostreamError if the loss is no longer a finite number."""
        stream = StreamStats.total([self.before.stream, self.loader.stats])
        stream.peak_resident_bytes = max(self.before.stream.peak_resident_bytes, self.loader.stats.peak_resident_bytes)
        outcome = EpochOutcome(
            steps=self.steps,
            batches=self.steps * self.train_step.step_batches,
            pairs=self.pairs,
            loss_sum=float(self.losses),
            seconds=self.before.seconds + time.perf_counter() - self.started,
            stream=stream,
            curve=list(self.curve),
        )
        if not math.isfinite(outcome.loss):
            raise GeostreamError(
                f"the loss is {outcome.loss} after {self.train_step.steps} steps; lower learning_rate (now "
                f"{self.train_step.settings.optim.learning_rate}) and start another run"
            )
        return outcome


def _rates(pairs: int, started: float, stats: StreamStats) -> dict[str, object]:
    """Return what the progress bar shows of this session's reading; retries and replacements only if there are any."""
    seconds = time.perf_counter() - started
    shown: dict[str, object] = {
        "pairs/s": pairs / seconds,
        "MB/s": stats.bytes_fetched / 1e6 / seconds,
        "reads": f"{stats.requests} of {stats.merged_read_bytes / 1e6:.2g} MB",
        "held": f"{stats.resident_bytes / 1e6:.3g} MB",
        "waiting": f"{stats.stall_seconds / seconds:.0%}",
    }
    troubles = {"retries": stats.retries.total(), "replaced": stats.replaced_pairs}
    return shown | {name: count for name, count in troubles.items() if count}
