"""Cross-entropy at the tokens that are supervised, as sums, for any language model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def token_cross_entropy(
    head: nn.Module, hidden: Tensor, rows: Tensor, source: Tensor, labels: Tensor, weight: Tensor
) -> Tensor:
    """Weighted sum of the cross-entropy of labels, in float32.

    Logits are made at the positions that predict one, never of a whole sequence: at 150,000 entries of a vocabulary
    they would be the largest tensor of the step. The head is called once in any case, with weight zero where nothing
    is supervised: ranks that shard it must agree on the calls.

    Args:
        head: hidden states (..., width) -> logits (..., vocabulary).
        hidden: (B, L, width).
        rows: (N,) sample of each label.
        source: (N,) position whose state predicts it.
        labels: (N,) token ids.
        weight: (N,).
    """
    if not len(rows):
        return 0.0 * head(hidden[:1, 0]).float().sum()
    losses = F.cross_entropy(head(hidden[rows, source]).float(), labels, reduction="none")
    return (losses * weight).sum()
