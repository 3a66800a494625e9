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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from geostream.errors import GeostreamError
from geostream.progress import Bar
from geostream.settings import TrainSettings
from geostream.streaming.loader import Loader
from geostream.streaming.stats import StreamStats
from geostream.training.augment import colour_jitter
from geostream.training.loss import info_nce
from geostream.training.model import Encoder, as_float, autocast, device_of

SHOW_EVERY = 10  # steps between two looks at the loss


@dataclass(frozen=True)
class EpochOutcome:
    """What an epoch of training came to so far, over all the sessions that it took."""

    batches: int = 0
    pairs: int = 0
    loss_sum: float = 0.0  # over the batches
    seconds: float = 0.0
    stream: StreamStats = field(default_factory=StreamStats)

    @property
    def loss(self) -> float:
        """Mean over the batches."""
        return self.loss_sum / max(self.batches, 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"stream": self.stream.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochOutcome:
        return cls(**{**values, "stream": StreamStats.from_dict(values["stream"])})


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
    encoder: Encoder,
    optimizer: AdamW,
    loader: Loader,
    settings: TrainSettings,
    epoch: int,
    before: EpochOutcome,
    save: Callable[[EpochOutcome], None],
) -> EpochOutcome:
    """Train on every batch that the loader has before it, once.

    ``before``: what the epoch came to in earlier sessions. ``save`` is called with what it came to so far every
    ``checkpoint_every`` batches. Raises GeostreamError where the loss is no longer a number.
    """
    device = device_of(encoder)
    encoder.train()
    steps = before.batches + len(loader)
    step, pairs = before.batches, before.pairs
    total = torch.tensor(before.loss_sum, dtype=torch.float64, device=device)
    started = time.perf_counter()

    def so_far() -> EpochOutcome:
        stream = StreamStats.total([before.stream, loader.stats])
        stream.peak_resident_bytes = max(before.stream.peak_resident_bytes, loader.stats.peak_resident_bytes)
        seconds = before.seconds + time.perf_counter() - started
        return EpochOutcome(step, pairs, float(total), seconds, stream)

    with loader, Bar(f"epoch {epoch}/{settings.epochs}", steps) as bar:
        bar.advance(step)
        for batch in loader:
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch - 1 + (step - 0.5) / steps) / settings.epochs, settings)
            total += _update(encoder, optimizer, batch.tensors, settings)
            pairs += len(batch.tensors["pair"])
            if step % SHOW_EVERY == 0 or step == steps:
                outcome = so_far()
                if not math.isfinite(outcome.loss):
                    raise GeostreamError(
                        f"epoch {epoch}, step {step}: the loss is {outcome.loss}; lower learning_rate (now "
                        f"{settings.learning_rate}) and start another run"
                    )
                bar.advance(step - bar.done, loss=outcome.loss, **_rates(pairs - before.pairs, started, loader.stats))
            if step % settings.checkpoint_every == 0 and step < steps:
                save(so_far())
    return so_far()


def _rates(pairs: int, started: float, stats: StreamStats) -> dict[str, object]:
    """What the bar says of this session's stream; retries and replacements only where there are any."""
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
