"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; DINO's and RADIO's protocol)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

K = 20
TEMPERATURE = 0.07


def knn_classify(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, *, k: int = K, temperature: float = TEMPERATURE
) -> Tensor:
    """Class of each query: its ``k`` nearest of the bank by cosine vote with weight ``exp(similarity / temperature)``.

    Args:
        queries: (Q, D) features; normalised here.
        bank: (N, D) features of the training set; with N < k all of them vote.
        labels: (N,) class ids of the bank.
        classes: number of classes.
        k: neighbours that vote.
        temperature: the smaller, the more the nearest ones decide.

    Returns:
        (Q,) class ids; a tie goes to the smaller id.
    """
    if not len(bank):
        raise ValueError("k-NN needs at least one training feature")
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(bank.float(), dim=-1).T
    nearest = similarity.topk(min(k, len(bank)), dim=-1)
    # Relative to the nearest one, so that a small temperature cannot overflow; the vote's winner stays the same.
    weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp().double()
    votes = torch.zeros(len(queries), classes, dtype=torch.float64, device=weights.device)
    votes.scatter_add_(1, labels.to(weights.device)[nearest.indices], weights)
    return votes.argmax(-1)
