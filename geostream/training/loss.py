"""Compute the loss: symmetric InfoNCE over a batch, in which the other pairs are the negatives.

Similarities are computed in float32 even under autocast: at a scale of 100, a bfloat16 logit is off by up to 0.5.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 3.1), after CLIP (Radford et al. 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from geostream.training.distributed import ProcessGroup


def info_nce(queries: Tensor, references: Tensor, logit_scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean of the query→reference and the reference→query cross-entropies.

    Args:
        queries: (B, D) L2-normalised embeddings of the views.
        references: (B, D) L2-normalised embeddings of the tiles; row i is from the same place as row i of ``queries``.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        label_smoothing: Share of the target probability that is spread over all rows.

    Returns:
        A scalar.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = logit_scale.float().exp() * queries.float() @ references.float().T
        truth = torch.arange(len(logits), device=logits.device)
        forward = cross_entropy(logits, truth, label_smoothing=label_smoothing)
        backward = cross_entropy(logits.T, truth, label_smoothing=label_smoothing)
    return (forward + backward) / 2


def own_loss(queries: Tensor, references: Tensor, logit_scale: Tensor, label_smoothing: float, batches: int) -> Tensor:
    """Return the mean loss of several batches, each with its own negatives only.

    Args:
        queries: (batches · B, D) embeddings of the views, one batch after the other.
        references: (batches · B, D) embeddings of the tiles, in the same order.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        label_smoothing: As in :func:`info_nce`.
        batches: Number of batches, all of the same size.

    Returns:
        A scalar.
    """
    parts = zip(queries.chunk(batches), references.chunk(batches), strict=True)
    return torch.stack([info_nce(*part, logit_scale, label_smoothing) for part in parts]).mean()


def shared_loss(
    queries: Tensor, references: Tensor, logit_scale: Tensor, label_smoothing: float, group: ProcessGroup
) -> Tensor:
    """Return the loss over the rows of all ranks at once, so that each rank's pairs are negatives for the others.

    The value is the same on each rank. Only this rank's rows carry a gradient, which is that of the whole loss there,
    so the ranks exchange nothing but embeddings. All ranks must call this together.

    Args:
        queries: (n, D) embeddings of this rank's views.
        references: (n, D) embeddings of this rank's tiles, in the same order.
        logit_scale: Scalar, the logarithm of the inverse temperature.
        label_smoothing: As in :func:`info_nce`.
        group: The ranks; each must have the same n.

    Returns:
        A scalar.
    """
    everyone = (_with_own(queries, group), _with_own(references, group))
    return info_nce(*everyone, logit_scale, label_smoothing)


def _with_own(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks; this rank's are ``rows`` itself, with its graph."""
    if group.ranks == 1:
        return rows
    parts = list(group.gather(rows.detach()).chunk(group.ranks))
    parts[group.rank] = rows
    return torch.cat(parts)
