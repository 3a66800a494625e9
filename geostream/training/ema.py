"""The average of the weights over the steps, to evaluate, embed and mine with.

Decides that the average is of everything with a fraction in the encoder's state, batch norm's statistics included, and
that it warms up: after n steps no weight of the past counts more than (1 + n) / (10 + n), or the average of a short run
would still be its random beginning. It costs a second copy of the weights and one pass over them a step.

Source: Polyak and Juditsky (1992); the warm-up is TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a module's state; ``tensors`` holds it by name."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.tensors = {name: tensor.clone() for name, tensor in _of(module).items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after ``steps`` steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.tensors.values()), list(_of(self.module).values()), 1 - decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a stored average. Raises KeyError where a name is missing."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the module has the average for its weights."""
        trained = {name: tensor.clone() for name, tensor in _of(self.module).items()}
        self._set(self.tensors)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in _of(self.module).items():
            tensor.copy_(tensors[name])


def _of(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors of the module's state; writing to them writes to the module."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
