"""The loss: symmetric InfoNCE over a batch, whose other pairs are the negatives.

Source: Sample4Geo (Deuser et al., ICCV 2023, section 3.1), after CLIP (Radford et al. 2021). The similarities are
computed in float32 even under autocast: at a scale of 100 a bfloat16 logit is off by half a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


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
