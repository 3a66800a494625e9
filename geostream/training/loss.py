"""Compute the loss: symmetric InfoNCE over a batch, in which the other pairs are the negatives.

Some of the other pairs may count less: what the loss aims at beside the positive, and which pairs are in no
denominator, is given by :class:`Targets` (:mod:`geostream.training.targets` makes them).

Similarities are computed in float32 even under autocast: at a scale of 100, a bfloat16 logit is off by up to 0.5.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 3.1), after CLIP (Radford et al. 2021). Decoupled: Yeh et al.,
ECCV 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from geostream.training.distributed import ProcessGroup


class Targets(NamedTuple):
    """What the loss of B pairs aims at. The same holds for query→reference and for reference→query."""

    share: Tensor  # (B, B) share of row i's target that pair j has; rows add up to 1, those left out have 0
    left_out: Tensor  # (B, B) whether pair j is in no denominator of row i; never i itself
    decoupled: bool = False  # whether each target is left out of its own denominator, too


def info_nce(queries: Tensor, references: Tensor, logit_scale: Tensor, targets: Targets | float = 0.0) -> Tensor:
    """Return the mean of the query→reference and the reference→query cross-entropies.

    Args:
        queries: (B, D) L2-normalised embeddings of the views.
        references: (B, D) L2-normalised embeddings of the tiles; row i is from the same place as row i of ``queries``.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        targets: What to aim at. A number is label smoothing: the share of the target that is spread over all rows.

    Returns:
        A scalar.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = logit_scale.float().exp() * queries.float() @ references.float().T
        if isinstance(targets, Targets):
            return (target_cross_entropy(logits, targets) + target_cross_entropy(logits.T, targets)) / 2
        truth = torch.arange(len(logits), device=logits.device)
        forward = cross_entropy(logits, truth, label_smoothing=targets)
        backward = cross_entropy(logits.T, truth, label_smoothing=targets)
    return (forward + backward) / 2


def target_cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """Return the mean over rows i of -Σ_j share_ij · (logit_ij - log Σ_k exp logit_ik).

    The inner sum is over all k that are not left out of row i; decoupled, without k = j. A row without any negative
    teaches nothing and counts as 0.

    Args:
        logits: (B, B) similarities, scaled.
        targets: What to aim at.

    Returns:
        A scalar.
    """
    alone = (~targets.left_out).sum(1, keepdim=True) < 2
    kept = logits.masked_fill(targets.left_out, -torch.inf).masked_fill(alone, 0.0)
    log_sum = _log_sum_of_others(kept) if targets.decoupled else kept.logsumexp(1, keepdim=True)
    return (targets.share * (log_sum - logits)).sum(1, keepdim=True).masked_fill(alone, 0.0).mean()


def _log_sum_of_others(logits: Tensor) -> Tensor:
    """Return for each entry the logarithm of the sum of exp over the other entries of its row.

    Only a row's largest entry can be nearly all of the sum, where a difference would lose all digits. So the sum is
    taken again without that one; the others are at most half of it.
    """
    largest = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.argmax(1, keepdim=True), True)
    whole = logits.logsumexp(1, keepdim=True)
    rest = logits.masked_fill(largest, -torch.inf).logsumexp(1, keepdim=True)
    part = (logits - whole).exp().masked_fill(largest, 0.0)
    return torch.where(largest, rest, whole + torch.log1p(-part))


def own_loss(
    queries: Tensor, references: Tensor, logit_scale: Tensor, targets: Sequence[Targets] | float, batches: int
) -> Tensor:
    """Return the mean loss of several batches, each with its own negatives only.

    Args:
        queries: (batches · B, D) embeddings of the views, one batch after the other.
        references: (batches · B, D) embeddings of the tiles, in the same order.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        targets: As in :func:`info_nce`, those of each batch; a number is for all.
        batches: Number of batches, all of the same size.

    Returns:
        A scalar.
    """
    aims: Sequence[Targets | float] = targets if isinstance(targets, Sequence) else [targets] * batches
    parts = zip(queries.chunk(batches), references.chunk(batches), aims, strict=True)
    return torch.stack([info_nce(query, reference, logit_scale, aim) for query, reference, aim in parts]).mean()


def shared_loss(
    queries: Tensor, references: Tensor, logit_scale: Tensor, targets: Targets | float, group: ProcessGroup
) -> Tensor:
    """Return the loss over the rows of all ranks at once, so that each rank's pairs are negatives for the others.

    The value is the same on each rank. Only this rank's rows carry a gradient, which is that of the whole loss there,
    so the ranks exchange nothing but embeddings. All ranks must call this together.

    Args:
        queries: (n, D) embeddings of this rank's views.
        references: (n, D) embeddings of this rank's tiles, in the same order.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        targets: As in :func:`info_nce`, over the rows of all ranks in the order of the ranks.
        group: The ranks; each must have the same n.

    Returns:
        A scalar.
    """
    everyone = (_with_own(queries, group), _with_own(references, group))
    return info_nce(*everyone, logit_scale, targets)


def _with_own(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks; this rank's are ``rows`` itself, with its graph."""
    if group.ranks == 1:
        return rows
    parts = list(group.gather(rows.detach()).chunk(group.ranks))
    parts[group.rank] = rows
    return torch.cat(parts)
