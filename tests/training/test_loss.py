"""The loss against the formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from geostream.training.distributed import ProcessGroup
from geostream.training.loss import info_nce, own_loss, shared_loss


def plain(queries: torch.Tensor, references: torch.Tensor, scale: float, smoothing: float) -> float:
    """-Σ target · log softmax, in both directions, element by element in Python."""
    n = len(queries)
    q, r = queries.double().tolist(), references.double().tolist()
    logits = [
        [math.exp(scale) * sum(a * b for a, b in zip(q[i], r[j], strict=True)) for j in range(n)] for i in range(n)
    ]
    total = 0.0
    for rows in (logits, [list(column) for column in zip(*logits, strict=True)]):
        for i, row in enumerate(rows):
            normaliser = math.log(sum(math.exp(x) for x in row))
            for j, x in enumerate(row):
                target = (1 - smoothing) * (i == j) + smoothing / n
                total -= target * (x - normaliser) / n
    return total / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n", [2, 5, 16])
def test_loss_equals_the_formula(n: int, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(n)
    q, r = (normalize(torch.randn(n, 8, generator=generator)) for _ in range(2))
    loss = info_nce(q, r, torch.tensor(math.log(1 / 0.07)), smoothing)
    assert float(loss) == pytest.approx(plain(q, r, math.log(1 / 0.07), smoothing), rel=1e-5)


def test_right_order_costs_less_than_wrong_order() -> None:
    q = normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    scale = torch.tensor(3.0)
    assert info_nce(q, q, scale) < info_nce(q, q.roll(1, 0), scale)
    constant = torch.ones(8, 16) / 4
    assert float(info_nce(constant, constant, scale)) == pytest.approx(math.log(8), rel=1e-5)


def test_gradients_reach_both_views_and_the_temperature() -> None:
    q, r = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.0, requires_grad=True)
    info_nce(normalize(q), normalize(r), scale, 0.1).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, r, scale))


def test_own_negatives_are_the_mean_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = (normalize(torch.randn(12, 8, generator=generator)) for _ in range(2))
    scale = torch.tensor(2.0)
    parts = [float(info_nce(q[at : at + 4], r[at : at + 4], scale, 0.1)) for at in (0, 4, 8)]
    assert float(own_loss(q, r, scale, 0.1, 3)) == pytest.approx(sum(parts) / 3, rel=1e-6)


class FirstOfTwo(ProcessGroup):
    """A rank whose partner has the rows that follow its own in ``rows``."""

    def __init__(self, *rows: torch.Tensor) -> None:
        super().__init__(0, 2)
        self.rows = list(rows)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        everyone = self.rows.pop(0)
        assert torch.equal(everyone[: len(tensor)], tensor) and not tensor.requires_grad
        return everyone


def test_the_shared_loss_and_its_gradient_at_the_own_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = (normalize(torch.randn(8, 4, generator=generator)).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.0, requires_grad=True)
    wanted = info_nce(q, r, scale, 0.1)
    wanted_gradients = torch.autograd.grad(wanted, (q, r, scale))
    own_q, own_r = (rows[:4].detach().requires_grad_() for rows in (q, r))
    loss = shared_loss(own_q, own_r, scale, 0.1, FirstOfTwo(*(rows.detach() for rows in (q, r))))
    torch.testing.assert_close(loss, wanted)
    for made, whole in zip(torch.autograd.grad(loss, (own_q, own_r, scale)), wanted_gradients, strict=True):
        torch.testing.assert_close(made, whole[:4] if whole.ndim else whole)
