"""The loss against the formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from geostream.training.distributed import ProcessGroup
from geostream.training.loss import Targets, info_nce, own_loss, shared_loss, target_cross_entropy


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


def random_targets(n: int, seed: int, decoupled: bool, left_out: float = 0.3) -> Targets:
    """Rows of shares that add up to 1, with most of it at the pair itself; a symmetric mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, n, generator=generator, dtype=torch.double).triu(1) > 1 - left_out
    mask = mask | mask.T
    share = torch.rand(n, n, generator=generator, dtype=torch.double).masked_fill(mask, 0.0)
    share = 0.7 * torch.eye(n, dtype=torch.double) + 0.3 * share / share.sum(1, keepdim=True)
    return Targets(share, mask, decoupled)


def plain_one_way(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The formula in loops; keeps the graph, so that autograd gives the gradient of the formula."""
    n, rows = len(logits), []
    for i in range(n):
        kept = [k for k in range(n) if not targets.left_out[i, k]]
        row = torch.zeros((), dtype=torch.double)
        for j in kept if len(kept) > 1 else []:
            others = [logits[i, k] for k in kept if not (targets.decoupled and k == j)]
            row = row + targets.share[i, j] * (sum(x.exp() for x in others).log() - logits[i, j])  # type: ignore[union-attr]
        rows.append(row)
    return torch.stack(rows).mean()


@pytest.mark.parametrize("decoupled", [False, True])
@given(n=st.integers(2, 5), seed=st.integers(0, 1000), left_out=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
@settings(deadline=None, max_examples=25)
def test_targets_and_their_gradient_are_the_formula(decoupled: bool, n: int, seed: int, left_out: float) -> None:
    targets = random_targets(n, seed, decoupled, left_out)
    logits = (4 * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.double)).requires_grad_()
    made, wanted = target_cross_entropy(logits, targets), plain_one_way(logits, targets)
    torch.testing.assert_close(made, wanted)
    (gradient,) = torch.autograd.grad(made, logits)
    if wanted.requires_grad:
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logits)[0])
    else:  # all rows are alone
        assert not gradient.any()


@pytest.mark.parametrize("decoupled", [False, True])
def test_gradients_are_the_differences(decoupled: bool) -> None:
    targets = random_targets(5, 3, decoupled)
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: target_cross_entropy(z, targets), logits)


@pytest.mark.parametrize("gap", [0.0, 30.0, 90.0])
def test_decoupled_keeps_its_digits_where_one_pair_is_nearly_all_of_the_sum(gap: float) -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) + gap * torch.eye(4)
    targets = random_targets(4, 0, True)
    single = target_cross_entropy(logits.requires_grad_(), Targets(targets.share.float(), *targets[1:]))
    double = logits.detach().double().requires_grad_()
    exact = plain_one_way(double, targets)
    assert single.item() == pytest.approx(exact.item(), rel=1e-5)
    gradients = (torch.autograd.grad(*one)[0] for one in ((single, logits), (exact, double)))
    torch.testing.assert_close(next(gradients).double(), next(gradients), rtol=1e-4, atol=1e-6)


def test_without_targets_the_loss_is_torchs_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = (normalize(torch.randn(16, 8, generator=generator)).requires_grad_() for _ in range(2))
    scale, truth = torch.tensor(2.0, requires_grad=True), torch.arange(16)
    logits = scale.exp() * q @ r.T
    forward, backward = (cross_entropy(z, truth, label_smoothing=0.1) for z in (logits, logits.T))
    wanted = (forward + backward) / 2
    made = info_nce(q, r, scale, 0.1)
    assert torch.equal(made, wanted)
    for one, other in zip(*(torch.autograd.grad(loss, (q, r, scale)) for loss in (made, wanted)), strict=True):
        assert torch.equal(one, other)


def test_even_targets_are_label_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = (normalize(torch.randn(6, 8, generator=generator)).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.0, requires_grad=True)
    even = Targets(0.9 * torch.eye(6) + 0.1 / 6, torch.zeros(6, 6, dtype=torch.bool))
    made, wanted = info_nce(q, r, scale, even), info_nce(q, r, scale, 0.1)
    torch.testing.assert_close(made, wanted)
    for one, other in zip(*(torch.autograd.grad(loss, (q, r, scale)) for loss in (made, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_left_out_has_no_gradient_in_either_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = (normalize(torch.randn(4, 8, generator=generator)).requires_grad_() for _ in range(2))
    apart = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    loss = info_nce(q, r, torch.tensor(2.0), Targets(torch.eye(4), apart))
    for gradient in torch.autograd.grad(loss, (q, r)):
        assert not gradient[0].any() and gradient[1:].any(1).all()


def test_each_batch_has_its_own_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = (normalize(torch.randn(8, 8, generator=generator)) for _ in range(2))
    aims = [Targets(one.share.float(), *one[1:]) for one in (random_targets(4, seed, True) for seed in (0, 1))]
    parts = [float(info_nce(q[at : at + 4], r[at : at + 4], torch.tensor(2.0), aims[at // 4])) for at in (0, 4)]
    assert float(own_loss(q, r, torch.tensor(2.0), aims, 2)) == pytest.approx(sum(parts) / 2, rel=1e-6)


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
