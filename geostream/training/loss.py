"""The loss: symmetric InfoNCE over a batch, whose other pairs are the negatives.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 3.1), after CLIP (Radford et al. 2021). The similarities are
computed in float32 even under autocast: at a scale of 100 a bfloat16 logit is off by half a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from geostream.training.distributed import ProcessGroup


def info_nce(queries: Tensor, references: Tensor, logit_scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean of the query→reference and reference→query cross-entropies; a scalar.

    queries, references: (B, D), L2-normalised, row i of both from the same place. logit_scale: the logarithm of the
    inverse temperature.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = logit_scale.float().exp() * queries.float() @ references.float().T
        truth = torch.arange(len(logits), device=logits.device)
        forward = cross_entropy(logits, truth, label_smoothing=label_smoothing)
        backward = cross_entropy(logits.T, truth, label_smoothing=label_smoothing)
    return (forward + backward) / 2


def own_loss(queries: Tensor, references: Tensor, logit_scale: Tensor, label_smoothing: float, batches: int) -> Tensor:
    """Mean loss of ``batches`` batches of equal size, one behind the other in the rows: each has its own negatives."""
    parts = zip(queries.chunk(batches), references.chunk(batches), strict=True)
    return torch.stack([info_nce(*part, logit_scale, label_smoothing) for part in parts]).mean()


def shared_loss(
    queries: Tensor, references: Tensor, logit_scale: Tensor, label_smoothing: float, group: ProcessGroup
) -> Tensor:
    """The loss over the rows of all ranks at once, the same number on each; only the own rows carry a gradient.

    So each rank's gradient at its rows is that of the whole loss, and nothing but embeddings is exchanged.
    """
    everyone = (_with_own(queries, group), _with_own(references, group))
    return info_nce(*everyone, logit_scale, label_smoothing)


def _with_own(rows: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' rows, of which the own ones are ``rows`` themselves."""
    if group.ranks == 1:
        return rows
    parts = list(group.gather(rows.detach()).chunk(group.ranks))
    parts[group.rank] = rows
    return torch.cat(parts)
