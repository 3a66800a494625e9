"""Carry out one optimisation step, whole or in micro-batches, on one rank or several, with the same meaning.

Its batches are embedded one by one, in chunks of at most
``micro_batch`` pairs; the loss is of the embeddings of whole batches; and its gradient at the embeddings goes back
through the network. Where all of this rank's pairs fit in a chunk, or chunks have no limit, one pass with a graph does
it. Otherwise there are two (GradCache, Gao et al. 2021): first all embeddings without a graph, then chunk by chunk
again with one, which costs another forward pass and keeps memory to that of a chunk. What is random in the network,
dropout and dropped paths, is drawn from seed, step, batch and chunk, so that both passes and any number of ranks
agree. Batch norm is the exception: its statistics are those of a chunk.

With several ranks the network's gradients are averaged by DistributedDataParallel, while the backward pass goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import NamedTuple, cast

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from geostream.errors import BadInput, StaleArtefact
from geostream.settings import TrainSettings
from geostream.training.augment import augment_on_device
from geostream.training.distributed import ProcessGroup
from geostream.training.loss import own_loss, shared_loss
from geostream.training.model import Encoder, autocast, device_of
from geostream.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors

FIRST_SCALE = 2.0**10  # of fp16's gradients; Sample4Geo's
# After n steps the decay of the EMA is at most (1 + n) / (10 + n), as in TensorFlow: without that, the EMA of a short
# run would still be its random beginning. timm computes 1 - (1 + s / gamma) ** -power with s = step - 1.
EMA_WARMUP_GAMMA, EMA_WARMUP_POWER = 9.0, 1.0


class _MicroBatch(NamedTuple):
    """Pairs that go through the network at once, and the seed of what is random in it."""

    tensors: dict[str, Tensor]
    seed: int


class TrainStep:
    """An encoder, and what training it needs. ``steps``: optimisation steps done, in all sessions of the run."""

    def __init__(self, encoder: Encoder, settings: TrainSettings, group: ProcessGroup) -> None:
        """``encoder`` is on the group's device. With several ranks, all get the first one's weights.

        Raises BadInput where the ranks cannot share a step's batches evenly.
        """
        self.encoder, self.settings, self.group = encoder, settings, group
        self.steps = 0
        self.step_batches = settings.optim.step_batches or group.ranks
        if self.step_batches % group.ranks:
            raise BadInput(
                f"step_batches={self.step_batches}: {group.ranks} ranks cannot share so many batches of a step evenly"
            )
        self.own_batches = self.step_batches // group.ranks
        self.optimizer = make_optimizer(encoder, settings)
        self.scaler = torch.amp.GradScaler(
            device_of(encoder).type, init_scale=FIRST_SCALE, enabled=settings.model.precision == "fp16"
        )
        if settings.model.compile:
            encoder.network.compile()
        self._pairs = _PairEncoder(encoder)
        self._parallel = None
        if group.ranks > 1:
            # Said once on each rank of a few small gradients that are copied; nothing to act on.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            with warnings.catch_warnings():
                # It warns of the argument that torch advises to give.
                warnings.simplefilter("ignore", FutureWarning)
                self._parallel = DistributedDataParallel(self._pairs, broadcast_buffers=False)
        self.ema: ModelEmaV3 | None = None
        if settings.optim.ema_decay:
            self.ema = ModelEmaV3(
                encoder,
                settings.optim.ema_decay,
                use_warmup=True,
                warmup_gamma=EMA_WARMUP_GAMMA,
                warmup_power=EMA_WARMUP_POWER,
            )

    def step(self, batches: list[dict[str, Tensor]], rate: float) -> Tensor:
        """One step of the optimizer with learning rate ``rate``; the loss, detached, on the device, on all ranks.

        ``batches``: this rank's of the step, equally large, as the loader makes them. fp16 skips a step whose gradients
        overflow, and scales the next ones down.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        chunks = list(self._chunks(batches))
        limit = self.settings.optim.micro_batch
        fit = limit is None or sum(len(chunk.tensors["pair"]) for chunk in chunks) <= limit
        loss = self._one_pass(chunks) if fit else self._two_passes(chunks)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_value_(self.encoder.parameters(), self.settings.optim.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._share_statistics()
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.encoder, self.steps + 2)  # timm's s is then steps + 1
        return loss

    def gradient_scale(self) -> list[float]:
        """What fp16's gradients are multiplied by now; empty with another precision."""
        return [float(self.scaler.get_scale())] if self.scaler.is_enabled() else []

    @property
    def ema_encoder(self) -> Encoder:
        """The encoder to evaluate, embed and mine with: the EMA of the weights, or the trained ones without EMA."""
        return self.encoder if self.ema is None else cast(Encoder, self.ema.module)

    def tensors(self) -> dict[str, Tensor]:
        """All that a step changes but the encoder's weights: ``optimizer/<parameter>/<field>``, ``ema/<name>``,
        ``scaler/<number>`` and ``steps``. Not within :meth:`averaged`.
        """
        made = {"steps": torch.tensor(self.steps)}
        made |= {
            f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(self.encoder, self.optimizer).items()
        }
        if self.ema is not None:
            made |= {f"ema/{name}": tensor for name, tensor in _floating_point_state(self.ema.module).items()}
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            made |= {
                f"scaler/{name}": torch.tensor(state[name], dtype=torch.float64)
                for name in ("scale", "_growth_tracker")
            }
        return made

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`tensors` gave. Raises StaleArtefact where it is of another model or optimizer."""
        try:
            self.steps = int(tensors["steps"])
            load_optimizer_tensors(self.encoder, self.optimizer, _under("optimizer", tensors))
            if self.ema is not None:
                self._load_ema(_under("ema", tensors))
            if self.scaler.is_enabled():
                scale, tracker = (float(tensors[f"scaler/{name}"]) for name in ("scale", "_growth_tracker"))
                self.scaler.load_state_dict(
                    self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)}
                )
        except (KeyError, RuntimeError) as error:
            raise StaleArtefact(
                f"the optimizer's state is not of {self.encoder.name} with these settings ({error})"
            ) from error

    def _load_ema(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a stored EMA; whole numbers (batch norm's counts) are those of the trained encoder."""
        ema = cast(ModelEmaV3, self.ema).module
        stored = {name: tensors[name] for name in _floating_point_state(ema)}
        ema.load_state_dict({**self.encoder.state_dict(), **stored})

    def _chunks(self, batches: list[dict[str, Tensor]]) -> Iterator[_MicroBatch]:
        """The batches, cut to ``micro_batch`` pairs; a batch's seeds depend on its place in the whole step alone."""
        for i, tensors in enumerate(batches):
            pairs, at = len(tensors["pair"]), i * self.group.ranks + self.group.rank
            size = self.settings.optim.micro_batch or pairs
            for start in range(0, pairs, size):
                key = np.random.SeedSequence([self.settings.seed, self.steps, at, start])
                part = {name: tensor[start : start + size] for name, tensor in tensors.items()}
                yield _MicroBatch(part if size < pairs else tensors, int(key.generate_state(1, np.uint64)[0]))

    def _embed(self, chunk: _MicroBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of a chunk's views and tiles, float32; the same whenever it is called in a step."""
        device = device_of(self.encoder)
        images = {kind: chunk.tensors[kind].to(device, non_blocking=True) for kind in ("view", "tile")}
        views, tiles = augment_on_device(chunk.tensors | images, self.settings)
        network = self._parallel if self._parallel is not None and torch.is_grad_enabled() else self._pairs
        torch.manual_seed(chunk.seed)
        with autocast(device, self.settings.model.precision):
            embedded: tuple[Tensor, Tensor] = network(views, tiles)
        return embedded

    def _one_pass(self, chunks: list[_MicroBatch]) -> Tensor:
        """Embed with a graph, and go back through it; the step's loss."""
        embedded = [self._embed(chunk) for chunk in chunks]
        loss, gradients = self._at_embeddings(embedded)
        torch.autograd.backward(_flat(embedded), _flat(gradients))
        return loss

    def _two_passes(self, chunks: list[_MicroBatch]) -> Tensor:
        """As :meth:`_one_pass`, with the graph of one chunk at a time."""
        with torch.no_grad():
            statistics = [(buffer, buffer.clone()) for buffer in _statistics(self.encoder.network)]
            embedded = [self._embed(chunk) for chunk in chunks]
            for buffer, before in statistics:  # the second pass updates them
                buffer.copy_(before)
        loss, gradients = self._at_embeddings(embedded)
        for chunk, gradient in zip(chunks, gradients, strict=True):
            last = chunk is chunks[-1]
            with nullcontext() if self._parallel is None or last else self._parallel.no_sync():
                torch.autograd.backward(self._embed(chunk), gradient)
        return loss

    def _at_embeddings(self, embedded: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The step's loss, and its gradients, scaled for fp16, at the embeddings of each chunk; sets the temperature's.

        The ranks' gradients will be averaged. So each rank's are those of its own mean loss, or of the one loss over
        all rows, times the number of ranks because only one of them has any at a row.
        """
        settings, scale = self.settings, self.encoder.logit_scale
        queries, references = (torch.cat(part).detach().requires_grad_() for part in zip(*embedded, strict=True))
        if settings.optim.negatives == "own":
            loss = own_loss(queries, references, scale, settings.optim.label_smoothing, self.own_batches)
        else:
            loss = shared_loss(queries, references, scale, settings.optim.label_smoothing, self.group)
        *gradients, of_scale = torch.autograd.grad(loss, (queries, references, scale))
        same = self.group.mean(torch.stack([loss.detach(), of_scale]))
        scale.grad = self.scaler.scale(same[1].clone())
        whole = 1 if settings.optim.negatives == "own" else self.group.ranks
        sizes = [len(one) for one, _ in embedded]
        split = [torch.split(self.scaler.scale(gradient) * whole, sizes) for gradient in gradients]
        return same[0], list(zip(*split, strict=True))

    def _share_statistics(self) -> None:
        """Batch norm's running statistics become the mean of the ranks'."""
        buffers = [buffer for buffer in _statistics(self.encoder.network) if buffer.is_floating_point()]
        if self.group.ranks > 1 and buffers:
            flat = self.group.mean(torch.cat([buffer.flatten() for buffer in buffers]))
            for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(mean.reshape(buffer.shape))


def _floating_point_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's state that an EMA is kept of, by name; writing to them writes to the module."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


class _PairEncoder(nn.Module):
    """The encoder without its temperature, whose gradient does not come through the network."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network = encoder.network
        self._embed = encoder.forward

    def forward(self, views: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        return self._embed(views, tiles)


def _statistics(network: nn.Module) -> list[Tensor]:
    """What batch norm counts as it goes."""
    return [
        buffer for name, buffer in network.named_buffers() if name.endswith(("running_mean", "running_var", "_tracked"))
    ]


def _flat(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix/``, without it."""
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }
