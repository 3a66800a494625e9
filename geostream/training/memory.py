"""Compute what training holds in the memory of its device, and which micro-batch fits.

The network is built without memory for its weights, and the very forward and backward passes of a training step are
carried out on torch's fake tensors, which have shapes and no content. So what lies in memory at the worst moment is
counted, not guessed: activations, copies of weights in half precision, what gradient checkpointing computes again, and
nothing of frozen stages. It takes some seconds, and no GPU. Two numbers of pairs are tried; others follow by a line.

The passes run by the rules of a CPU, also for a GPU, but for the layers that only a GPU's autocast computes in float32.
What torch does not allocate as tensors is not counted: the CUDA context, workspaces of cuDNN, gaps between blocks. The
augmentation is left out as well; it is over before the network begins, and needs less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geostream.settings import TrainSettings
from geostream.training.model import Encoder, as_float, autocast
from geostream.training.sizes import check_sizes

GPUS = (24, 48, 80)  # GiB of usual GPUs
USABLE = 0.9  # share of a GPU for tensors; the rest is for what is not counted here, an assumption
FLOAT = 4  # bytes of a weight, of its gradient, and of each of its moments
MOMENTS = 2  # that AdamW keeps of each weight
CPU = torch.device("cpu")
# What autocast computes in float32 on a GPU and in half precision on a CPU, by torch's lists of autocast operations.
FLOAT32_ON_GPU = (nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds on its device while it trains.

    Attributes:
        parameters: Number of parameters.
        trainable: Number of those that are not frozen.
        weights: Bytes of the encoder's weights and buffers.
        gradients: Bytes of their gradients; with several ranks twice, for the buckets of DistributedDataParallel.
        moments: Bytes of the optimizer's state.
        ema: Bytes of the EMA's weights.
        constant: Bytes of the passes that do not depend on the number of pairs, such as weights in half precision.
        per_pair: Bytes that each pair in the network adds.
        embedding: Bytes of a pass without gradients over a batch of views, as for evaluation and mining.
        pairs: Pairs that go through the network at once by the settings.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    moments: int
    ema: int
    constant: int
    per_pair: int
    embedding: int
    pairs: int

    @property
    def kept(self) -> int:
        """Bytes that lie there throughout."""
        return self.weights + self.gradients + self.moments + self.ema

    def activations(self, pairs: int) -> int:
        """Return the most bytes that a forward and backward pass adds.

        Args:
            pairs: Pairs that go through the network at once.
        """
        return max(0, self.constant + pairs * self.per_pair)

    def total(self, pairs: int) -> int:
        """Return the bytes at the worst moment of a step, or of an embedding if that takes more.

        Args:
            pairs: Pairs that go through the network at once.
        """
        return self.kept + max(self.activations(pairs), self.embedding)

    def most_pairs(self, limit: float) -> int:
        """Return how many pairs can go through the network at once; 0 if not one, or if embedding does not fit.

        Args:
            limit: Bytes that may be used.
        """
        left = limit - self.kept
        return 0 if left < self.embedding else max(0, int((left - self.constant) // self.per_pair))


def measure(settings: TrainSettings, ranks: int = 1, *, on_gpu: bool = True) -> Memory:
    """Measure what training by the settings holds, on fake tensors.

    Args:
        settings: The run's settings, with ``step_batches`` filled in.
        ranks: Number of ranks that train together.
        on_gpu: Whether it computes as a GPU does; as a CPU otherwise.

    Raises:
        BadInput: There is no such model, or it cannot take images of the settings' sizes.
    """
    optim = settings.optim
    own = optim.batch_size * optim.step_batches // ranks
    pairs = min(own, optim.micro_batch or own)
    with torch.device("meta"):
        encoder = Encoder.of(settings)
    precision = _precision(encoder, settings, on_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device=CPU)
        check_sizes(encoder.eval(), settings)
        embedding = _most_held(partial(_embed, encoder, settings, precision))
        encoder.train()
        trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        for parameter in trainable:  # as the micro-batch before has left it
            parameter.grad = torch.zeros_like(parameter)
        one, two = (_most_held(partial(_train, encoder, settings, precision, n)) for n in (pairs, 2 * pairs))
    numbers = sum(parameter.numel() for parameter in encoder.parameters())
    learned = sum(parameter.numel() for parameter in trainable)
    return Memory(
        parameters=numbers,
        trainable=learned,
        weights=sum(tensor.nbytes for tensor in chain(encoder.parameters(), encoder.buffers())),
        gradients=FLOAT * learned * (1 if ranks == 1 else 2),
        moments=FLOAT * learned * MOMENTS,
        ema=FLOAT * numbers if optim.ema_decay else 0,
        constant=2 * one - two,
        per_pair=(two - one) // pairs,
        embedding=embedding,
        pairs=pairs,
    )


def _embed(encoder: Encoder, settings: TrainSettings, precision: str) -> None:
    """Embed a batch of views without gradients, as :mod:`geostream.evaluation.embed` does."""
    images = _images(settings.optim.batch_size, settings.model.view_height, settings.model.view_width)
    with torch.no_grad(), autocast(CPU, precision):
        encoder.encode(images)


def _train(encoder: Encoder, settings: TrainSettings, precision: str, pairs: int) -> None:
    """Do what a step does with one micro-batch, with any gradient at the embeddings."""

    def embedded() -> tuple[Tensor, Tensor]:
        model = settings.model
        views = _images(pairs, model.view_height, model.view_width)
        tiles = _images(pairs, model.tile_size, model.tile_size)
        with autocast(CPU, precision):
            vectors: tuple[Tensor, Tensor] = encoder(as_float(views), as_float(tiles))
        return vectors

    vectors = embedded()
    torch.autograd.backward(vectors, [torch.zeros_like(one) for one in vectors])


def _images(number: int, height: int, width: int) -> Tensor:
    return torch.empty(number, 3, height, width, dtype=torch.uint8)


def _precision(encoder: Encoder, settings: TrainSettings, on_gpu: bool) -> str:
    """Return the precision for a CPU's autocast, and let norms be computed in float32 where a GPU's would."""
    precision: str = settings.model.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "float32"
    if on_gpu and precision != "float32":
        for module in encoder.modules():
            if isinstance(module, FLOAT32_ON_GPU):
                module.register_forward_pre_hook(_to_float)
    return precision


def _to_float(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in args)


def _most_held(work: Callable[[], object]) -> int:
    """Return the most bytes of new tensors that lie in memory at any moment of some work."""
    held = _Held()
    with held:
        work()
    return held.most


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the tensors that operations make, until nothing needs them any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), before)
        return made

    def _add(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        number = id(storage)
        if number in before or number in self._storages:
            return
        size = storage.nbytes()
        self._storages.add(number)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, number, size)

    def _free(self, number: int, size: int) -> None:
        self._storages.discard(number)
        self.now -= size
