"""The losses that P1 and P2 share (UniUGG, equations 1 to 3), as sums over a batch and the counts they are means over.

The trainer divides each sum by its count over the whole global batch, so a gradient does not depend on how the batch
is cut. Everything is float32, inside autocast too, and a sample of weight 0 adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import draws
from models.errors import ModelError
from models.spec import Batch
from models.uniugg.losses_matching import matching_terms
from models.uniugg.losses_points import confidence_regression, pair_targets, point_errors
from models.uniugg.losses_rgb import colour_terms

View = Mapping[str, Tensor]
"""Maps of one view, see :meth:`models.uniugg.spatial.SpatialDecoder.forward`."""

_PAIR_COLUMNS = ("image", "depth", "K", "pose", "matches")


@dataclass(frozen=True, kw_only=True)
class SpatialObjective:
    """Settings of the spatial losses; their defaults are those of ``recipe.uniugg`` in the run's config."""

    temperature: float
    """Of the matching softmax."""
    block: int
    """Rows of the matching similarities that exist at a time."""
    alpha: float
    """Weight of the log-confidence of points."""
    beta: float
    """Weight of the log-confidence of matches."""
    metric: bool
    """Points must be right in metres; False leaves their scale free."""
    lpips: float
    ssim: float
    lpips_weights: str
    """See :func:`models.uniugg.losses_rgb.colour_terms`."""
    symmetrise: bool
    """Every pair is decoded in both orders."""


@dataclass(frozen=True, kw_only=True)
class SemanticObjective:
    """Settings of the distillation from the teacher."""

    cosine: float
    """Weight of 1 - cosine."""
    smooth_l1: float
    """Weight of smooth L1 (beta 1), averaged over channels."""
    share: float
    """Share of the tokens of an image that are compared, drawn anew for each image and step."""


def both_orders(batch: Batch, symmetrise: bool) -> dict[str, Any]:
    """The pair columns of a batch with, behind it, the same pairs in the other order (2B samples)."""
    columns = {name: batch[name] for name in (*_PAIR_COLUMNS, "match_valid", "weight")}
    if not symmetrise:
        return columns
    swapped = {name: torch.cat([columns[name], columns[name].flip(1)]) for name in _PAIR_COLUMNS}
    return swapped | {name: torch.cat([columns[name]] * 2) for name in ("match_valid", "weight")}


def spatial_counts(batch: Batch, objective: SpatialObjective) -> dict[str, float]:
    """Weighted elements of each term, over both views and all orders: pixels with a target, true matches, pixels."""
    weight = batch["weight"].double() * (2 if objective.symmetrise else 1)
    depth = batch["depth"]
    counted = (torch.isfinite(depth) & (depth != 0)).sum((1, 2, 3))
    return {
        "confidence": float((counted * weight).sum()),
        "matching": float((batch["match_valid"].sum(1) * weight).sum()),
        "rgb": float(weight.sum()) * depth[0].numel(),
    }


def spatial_sums(view1: View, view2: View, batch: Batch, objective: SpatialObjective) -> dict[str, Tensor]:
    """Sums of ``confidence``, ``matching`` and ``rgb`` for the decoder's output of :func:`both_orders`.

    Equation 2 adds the means over the pixels of the two views. The count of ``confidence`` is over both, so its sum
    is taken twice: that is the same where both orders of a pair are decoded, since each image then is once the first
    and once the second.
    """
    with torch.autocast(view1["pts3d"].device.type, enabled=False):
        columns = both_orders(batch, objective.symmetrise)
        weight, targets = columns["weight"], pair_targets(columns["depth"], columns["K"], columns["pose"])
        points, confidence = (_stack(view1, view2, name) for name in ("pts3d", "conf"))
        metric = torch.full((len(weight),), objective.metric, device=weight.device)
        error = point_errors(points, targets, metric)
        pixels = confidence_regression(error, confidence, targets.valid | targets.sky, objective.alpha)
        return {
            "confidence": 2 * _weighted(pixels, weight),
            "matching": _weighted(_matches(view1, view2, columns, objective), weight),
            "rgb": _colours(view1, view2, columns, objective),
        }


def _matches(view1: View, view2: View, columns: Mapping[str, Tensor], objective: SpatialObjective) -> Tensor:
    ends = []
    for number, view in enumerate((view1, view2)):
        index = columns["matches"][:, number].long()
        descriptors = view["desc"].float().flatten(1, 2)
        at = descriptors.gather(1, index[..., None].expand(-1, -1, descriptors.shape[-1]))
        ends.append((at, view["desc_conf"].float().flatten(1).gather(1, index)))
    return matching_terms(
        (ends[0][0], ends[1][0]),
        (ends[0][1], ends[1][1]),
        columns["match_valid"],
        temperature=objective.temperature,
        beta=objective.beta,
        block=objective.block,
    )


def _colours(view1: View, view2: View, columns: Mapping[str, Tensor], objective: SpatialObjective) -> Tensor:
    """Loss of each picture times its pixels; 0 for a decoder without colours."""
    if "rgb" not in view1:
        return view1["conf"].sum() * 0
    predicted, image = _stack(view1, view2, "rgb"), columns["image"]
    losses = colour_terms(
        predicted.flatten(0, 1),
        image.flatten(0, 1),
        lpips=objective.lpips,
        ssim_weight=objective.ssim,
        lpips_weights=objective.lpips_weights,
    )
    pixels = image.shape[2] * image.shape[3]
    return _weighted(losses.unflatten(0, (-1, 2)), columns["weight"]) * pixels


def semantic_counts(images: Tensor, tokens: int, objective: SemanticObjective) -> dict[str, float]:
    """Weighted elements of the two terms: compared tokens, and summaries.

    ``images`` (B, V) holds the weight of every image, ``tokens`` is how many one has.
    """
    total = float(images.double().sum())
    return {"semantic_tokens": total * compared(tokens, objective), "semantic_summary": total}


def semantic_sums(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    images: Tensor,
    draw: Tensor,
    objective: SemanticObjective,
) -> dict[str, Tensor]:
    """Sums of ``semantic_tokens`` (equation 3) and ``semantic_summary`` over the images of a batch.

    Args:
        student: tokens (B, V, h, w, C) and summary (B, V, k, C).
        teacher: the same of the teacher.
        images: (B, V) weight of every image.
        draw: (B,) keys of the samples' draws: which tokens are compared.
        objective: settings.

    ModelError where student and teacher differ in shape.
    """
    for what, own, true in (("tokens", student[0], teacher[0]), ("summary", student[1], teacher[1])):
        if own.shape != true.shape:
            raise ModelError(
                f"the student's {what} are {tuple(own.shape[2:])} an image and the teacher's {tuple(true.shape[2:])}; "
                "patch, width and summaries of model.overrides must be those of encoders.teacher"
            )
    with torch.autocast(images.device.type, enabled=False):
        own, true = (tokens.float().flatten(2, 3) for tokens in (student[0], teacher[0]))
        count = compared(own.shape[2], objective)
        index = torch.stack(
            [draws.permutations(draw, own.shape[2], f"semantic{view}")[:, :count] for view in range(own.shape[1])],
            dim=1,
        )
        index = index[..., None].expand(-1, -1, -1, own.shape[-1])
        tokens = distillation(own.gather(2, index), true.gather(2, index), objective.cosine, objective.smooth_l1)
        summary = distillation(
            student[1].float().flatten(2), teacher[1].float().flatten(2), objective.cosine, objective.smooth_l1
        )
        return {"semantic_tokens": (tokens.sum(2) * images).sum(), "semantic_summary": (summary * images).sum()}


def compared(tokens: int, objective: SemanticObjective) -> int:
    """How many of ``tokens`` are compared: the share rounded down, but at least one."""
    return max(1, int(tokens * objective.share + 1e-9))


def distillation(student: Tensor, teacher: Tensor, cosine: float, smooth_l1: float) -> Tensor:
    """``cosine (1 - cos) + smooth_l1 mean SmoothL1`` of vectors (..., C) -> (...); float32."""
    student, teacher = student.float(), teacher.float()
    angle = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return cosine * angle + smooth_l1 * F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


def _stack(view1: View, view2: View, name: str) -> Tensor:
    return torch.stack([view1[name], view2[name]], dim=1).float()


def _weighted(terms: Tensor, weight: Tensor) -> Tensor:
    return (terms.flatten(1).sum(1) * weight).sum()
