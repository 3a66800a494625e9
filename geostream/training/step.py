"""Take one optimizer step, whole or in micro-batches, on one rank or several, with the same result.

The batches of a step are embedded in chunks of at most ``micro_batch`` pairs. The loss is computed on the embeddings of
whole batches, and its gradient at the embeddings is propagated back through the network.

If all pairs of this rank fit into one chunk, or chunks have no limit, one forward pass with a graph is enough.
Otherwise there are two (GradCache, Gao et al. 2021): the first embeds all chunks without a graph, the second embeds
chunk by chunk again with a graph. This costs another forward pass, but needs only one chunk's memory. Dropout, dropped
paths and what ``birds_eye`` draws come from seed, step, batch and chunk, so they are the same in both passes and for
any number of ranks. Batch norm is the exception: its statistics are those of a chunk.

With several ranks, DistributedDataParallel averages the network's gradients during the backward pass.
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
from geostream.training.loss import Targets, own_loss, shared_loss
from geostream.training.model import Encoder, autocast, device_of
from geostream.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from geostream.training.targets import PairPlaces, batch_targets

FIRST_SCALE = 2.0**10  # where the gradient scale of fp16 begins, as in Sample4Geo
# After n steps the decay of the EMA is at most (1 + n) / (10 + n), as in TensorFlow. Otherwise the EMA of a short run
# would still be close to its random weights. timm computes 1 - (1 + s / gamma) ** -power with s = step - 1.
EMA_WARMUP_GAMMA, EMA_WARMUP_POWER = 9.0, 1.0


class _MicroBatch(NamedTuple):
    """Pairs that go through the network at once, and the seed for dropout and dropped paths."""

    tensors: dict[str, Tensor]
    seed: int


class TrainStep:
    """An encoder with its optimizer, EMA and gradient scaler.

    Args:
        encoder: The encoder, on the group's device. With several ranks, all get the main rank's weights.
        settings: The run's settings.
        group: The ranks that train together.

    Attributes:
        steps: Number of optimizer steps done, in all sessions of the run.
        step_batches: Number of batches in a step, over all ranks.
        own_batches: Number of these that this rank embeds.
        places: The places of the pairs, to be set before the first step where a setting of the loss needs them.

    Raises:
        BadInput: The ranks cannot share a step's batches evenly.
    """

    def __init__(self, encoder: Encoder, settings: TrainSettings, group: ProcessGroup) -> None:
        self.encoder, self.settings, self.group = encoder, settings, group
        self.steps = 0
        self.places: PairPlaces | None = None
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
            # torch warns once on each rank that a few small gradients are copied; there is nothing to do about it.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            with warnings.catch_warnings():
                # torch warns of the very argument that it advises to give.
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
        """Take one optimizer step; all ranks must call this together.

        With fp16, a step whose gradients overflow changes no weights, and later gradients are scaled down.

        Args:
            batches: This rank's batches of the step, all of the same size, as the loader makes them.
            rate: The learning rate; that of the last layer where it decays by layer.

        Returns:
            The loss, a scalar without graph on the device, the same on all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
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
        """Return the current gradient scale of fp16 as a list of one number; an empty list with other precisions."""
        return [float(self.scaler.get_scale())] if self.scaler.is_enabled() else []

    @property
    def ema_encoder(self) -> Encoder:
        """The encoder to evaluate, embed and mine with: that of the EMA, or the trained one if there is no EMA."""
        return self.encoder if self.ema is None else cast(Encoder, self.ema.module)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a step changes, except the encoder's weights.

        Returns:
            Tensors named ``steps``, ``optimizer/<parameter>/<field>``, ``ema/<name>`` and ``scaler/<number>``.
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
        """Set the state to stored tensors.

        Args:
            tensors: What :meth:`tensors` returned.

        Raises:
            StaleArtefact: They are of another model or optimizer.
        """
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
        """Set the EMA to stored tensors; integers (batch norm's counters) are taken from the trained encoder."""
        ema = cast(ModelEmaV3, self.ema).module
        stored = {name: tensors[name] for name in _floating_point_state(ema)}
        ema.load_state_dict({**self.encoder.state_dict(), **stored})

    def _chunks(self, batches: list[dict[str, Tensor]]) -> Iterator[_MicroBatch]:
        """Cut batches into chunks of ``micro_batch`` pairs; seeds depend only on a batch's place in the whole step."""
        for i, tensors in enumerate(batches):
            pairs, at = len(tensors["pair"]), i * self.group.ranks + self.group.rank
            size = self.settings.optim.micro_batch or pairs
            for start in range(0, pairs, size):
                key = np.random.SeedSequence([self.settings.seed, self.steps, at, start])
                part = {name: tensor[start : start + size] for name, tensor in tensors.items()}
                yield _MicroBatch(part if size < pairs else tensors, int(key.generate_state(1, np.uint64)[0]))

    def _embed(self, chunk: _MicroBatch) -> tuple[Tensor, Tensor]:
        """Embed a chunk's views and tiles as float32; every call within a step gives the same result."""
        device = device_of(self.encoder)
        images = {kind: chunk.tensors[kind].to(device, non_blocking=True) for kind in ("view", "tile")}
        views, tiles = augment_on_device(chunk.tensors | images, self.settings)
        network = self._parallel if self._parallel is not None and torch.is_grad_enabled() else self._pairs
        torch.manual_seed(chunk.seed)
        with autocast(device, self.settings.model.precision):
            embedded: tuple[Tensor, Tensor] = network(views, tiles)
        return embedded

    def _one_pass(self, chunks: list[_MicroBatch]) -> Tensor:
        """Embed all chunks with a graph, propagate the gradient back through it, and return the step's loss."""
        embedded = [self._embed(chunk) for chunk in chunks]
        loss, gradients = self._at_embeddings(embedded, torch.cat([chunk.tensors["pair"] for chunk in chunks]))
        torch.autograd.backward(_flat(embedded), _flat(gradients))
        return loss

    def _two_passes(self, chunks: list[_MicroBatch]) -> Tensor:
        """Do the same as :meth:`_one_pass` with the graph of only one chunk at a time."""
        with torch.no_grad():
            statistics = [(buffer, buffer.clone()) for buffer in _statistics(self.encoder.network)]
            embedded = [self._embed(chunk) for chunk in chunks]
            for buffer, before in statistics:  # the second pass updates them
                buffer.copy_(before)
        loss, gradients = self._at_embeddings(embedded, torch.cat([chunk.tensors["pair"] for chunk in chunks]))
        for chunk, gradient in zip(chunks, gradients, strict=True):
            last = chunk is chunks[-1]
            with nullcontext() if self._parallel is None or last else self._parallel.no_sync():
                torch.autograd.backward(self._embed(chunk), gradient)
        return loss

    def _at_embeddings(
        self, embedded: list[tuple[Tensor, Tensor]], pair: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the step's loss and its gradients at the embeddings of each chunk; set the temperature's gradient.

        Gradients are scaled for fp16. DistributedDataParallel will average those of the ranks. With negatives "own",
        each rank's gradients are therefore those of its own mean loss. Otherwise they are those of the one loss over
        all rows, times the number of ranks, because each row has a gradient on one rank only.

        A decoupled loss would fall without end as the temperature falls, so then the temperature has no gradient.
        """
        settings, scale = self.settings, self.encoder.logit_scale
        queries, references = (torch.cat(part).detach().requires_grad_() for part in zip(*embedded, strict=True))
        targets, smoothing = self._targets(pair), settings.optim.label_smoothing
        if settings.optim.negatives == "own":
            loss = own_loss(queries, references, scale, targets or smoothing, self.own_batches)
        else:
            loss = shared_loss(queries, references, scale, targets[0] if targets else smoothing, self.group)
        *gradients, of_scale = torch.autograd.grad(loss, (queries, references, scale))
        same = self.group.mean(torch.stack([loss.detach(), of_scale]))
        if not settings.loss.decoupled:
            scale.grad = self.scaler.scale(same[1].clone())
        whole = 1 if settings.optim.negatives == "own" else self.group.ranks
        sizes = [len(one) for one, _ in embedded]
        split = [torch.split(self.scaler.scale(gradient) * whole, sizes) for gradient in gradients]
        return same[0], list(zip(*split, strict=True))

    def _targets(self, pair: Tensor) -> list[Targets]:
        """Return what the loss aims at, for each batch with negatives of its own, or for all rows of all ranks.

        The list is empty where a loss setting asks for nothing but label smoothing.
        """
        settings = self.settings
        if not (settings.loss.decoupled or settings.loss.by_distance):
            return []
        own = settings.optim.negatives == "own"
        parts = pair.chunk(self.own_batches) if own else [self.group.gather(pair)]
        return [batch_targets(part, self.places, settings, device_of(self.encoder)) for part in parts]

    def _share_statistics(self) -> None:
        """Replace batch norm's running statistics by their mean over the ranks."""
        buffers = [buffer for buffer in _statistics(self.encoder.network) if buffer.is_floating_point()]
        if self.group.ranks > 1 and buffers:
            flat = self.group.mean(torch.cat([buffer.flatten() for buffer in buffers]))
            for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(mean.reshape(buffer.shape))


def _floating_point_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's state that have an EMA, by name; writing to them changes the module."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


class _PairEncoder(nn.Module):
    """The encoder without its temperature, whose gradient is computed apart from the network's."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network = encoder.network
        self._embed = encoder.forward

    def forward(self, views: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        return self._embed(views, tiles)


def _statistics(network: nn.Module) -> list[Tensor]:
    """Return the running statistics and counters of batch norm that training changes; frozen layers are left out."""
    return [
        buffer
        for module in network.modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith(("running_mean", "running_var", "_tracked"))
    ]


def _flat(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix/``, under the rest of their names."""
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }
