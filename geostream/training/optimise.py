"""One epoch of optimisation: a plan's batches in, updated weights and what it cost out.

Decides that the learning rate is a pure function of how far the run is, so that there is no scheduler to store or to
restore, and an epoch of more or fewer batches does not shift it. The loss stays on the device between two updates of
the progress bar: reading it at every step would make a GPU wait for the CPU.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 4) for AdamW, cosine with warm-up and clipped gradient values; the
one-cycle shape is Smith and Topin's (2018), with torch's constants.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW

from geostream.errors import GeostreamError
from geostream.progress import Bar
from geostream.settings import TrainSettings
from geostream.streaming.fetch import StreamStats
from geostream.streaming.loader import Batch, StreamDataset, load
from geostream.training.augment import colour_jitter
from geostream.training.loss import info_nce
from geostream.training.model import Encoder, as_float, autocast, device_of

SHOW_EVERY = 10  # steps between two looks at the loss


@dataclass(frozen=True)
class EpochOutcome:
    """What an epoch of training came to."""

    loss: float  # mean over its batches
    batches: int
    pairs: int
    seconds: float
    wait_seconds: float  # that the trainer waited for batches
    stream: StreamStats  # of all loader workers together


def learning_rate(done: float, settings: TrainSettings) -> float:
    """The rate when ``done`` (0…1) of the run's epochs are over.

    cosine: linear from 0 over ``warmup_epochs``, then half a cosine down to 0. one-cycle: half a cosine up from a 25th
    over the first 30 %, half a cosine down to almost nothing. constant: the rate, after the warm-up.
    """
    top = settings.learning_rate
    if settings.schedule == "one-cycle":
        if done < 0.3:
            return _half_cosine(top / 25, top, done / 0.3)
        return _half_cosine(top, top / 250_000, (done - 0.3) / 0.7)
    warmup = min(settings.warmup_epochs / settings.epochs, 1.0)
    if done < warmup:
        return top * done / warmup
    if settings.schedule == "constant" or warmup == 1.0:
        return top
    return _half_cosine(top, 0.0, (done - warmup) / (1 - warmup))


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(encoder: Encoder, settings: TrainSettings) -> AdamW:
    """AdamW over all parameters in order; fused, which takes a quarter of the time on small networks."""
    return AdamW(encoder.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def train_epoch(
    encoder: Encoder, optimizer: AdamW, dataset: StreamDataset, settings: TrainSettings, epoch: int
) -> EpochOutcome:
    """Train on every batch of the dataset once. Raises GeostreamError where the loss is no longer a number."""
    device = device_of(encoder)
    encoder.train()
    steps, pairs, waited = len(dataset.steps), 0, 0.0
    total = torch.zeros((), device=device)
    stats: dict[int, StreamStats] = {}
    started = time.perf_counter()
    batches = load(dataset, settings.workers, pin=device.type == "cuda")
    with closing(batches), Bar(f"epoch {epoch}/{settings.epochs}", steps) as bar:
        for step, (batch, wait) in enumerate(_timed(batches), start=1):
            waited += wait
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch - 1 + (step - 0.5) / steps) / settings.epochs, settings)
            total += _update(encoder, optimizer, batch.tensors, settings)
            pairs += len(batch.tensors["pair"])
            stats[batch.worker] = batch.stats
            if step % SHOW_EVERY == 0 or step == steps:
                mean = float(total) / step
                if not math.isfinite(mean):
                    raise GeostreamError(
                        f"epoch {epoch}, step {step}: the loss is {mean}; lower learning_rate (now "
                        f"{settings.learning_rate}) and start another run"
                    )
                bar.advance(min(SHOW_EVERY, step - bar.done), loss=mean, **{"pairs/s": pairs / _since(started)})
    return EpochOutcome(float(total) / max(steps, 1), steps, pairs, _since(started), waited, _sum(list(stats.values())))


def _update(encoder: Encoder, optimizer: AdamW, tensors: dict[str, Tensor], settings: TrainSettings) -> Tensor:
    """One step of the optimizer; the loss, detached, still on the device."""
    device = device_of(encoder)
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    images = {kind: as_float(on_device[kind]) for kind in ("view", "tile")}
    if settings.color_jitter > 0:
        images = {kind: colour_jitter(image, on_device[f"{kind}_colour"]) for kind, image in images.items()}
    with autocast(device):
        queries, references = encoder(images["view"], images["tile"])
    loss = info_nce(queries, references, encoder.logit_scale, settings.label_smoothing)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_value_(encoder.parameters(), settings.clip_value)
    optimizer.step()
    return loss.detach()


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds that each was waited for."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, _since(started)


def _since(started: float) -> float:
    return time.perf_counter() - started


def _sum(stats: list[StreamStats]) -> StreamStats:
    """Of all workers; each holds its own shards, so the peaks add up."""
    total = StreamStats()
    for one in stats:
        for name, value in one.as_dict().items():
            setattr(total, name, getattr(total, name) + value)
    return total
