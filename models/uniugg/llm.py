"""The language side of UniUGG's unified model (arXiv 2508.11952, section 3.3): reads views, answers, and is asked
by rays what another camera would see.

Placeholders in the text become projected patch tokens of views and queries made of rays. On conversations the
language model answers; on generation samples its last hidden states at the queries condition the diffusion. Samples
are padded on the right: under causal attention padding then reaches no real position, so no mask is needed, which
keeps the fast attention kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.layers.block import Mlp
from models.layers.supervision import token_cross_entropy
from models.spec import Batch
from models.uniugg.language import build_language
from models.uniugg.raymap import RayQueries, median_depth, relative_pose

GENERATION, CONVERSATION = "generation", "conversation"


class UniuggLLM(nn.Module):
    """A causal language model with a projector for view tokens and queries for rays.

    Args:
        channels: of a patch token.
        patch: pixels of a patch's side, so that a grid of h x w tokens is a picture of (h * patch) x (w * patch).
        grid: of the learned positions of the queries; other grids interpolate it.
        rays: pixels | centres, see :func:`models.uniugg.raymap.ray_patches`.
        language: config of transformers with ``model_type``.
        vocab_size: entries of the embedding.
        image_token_id: placeholder of a patch token.
        ray_token_id: placeholder of a query.
        bidirectional_queries: queries see each other in both directions; the rest stays causal.
    """

    network = "language"
    """Child that its library can load alone, see :mod:`models.pretrained`."""
    language: Any
    """A causal language model of transformers."""

    def __init__(
        self,
        *,
        channels: int,
        patch: int,
        grid: tuple[int, int],
        rays: str,
        language: Mapping[str, Any],
        vocab_size: int,
        image_token_id: int,
        ray_token_id: int,
        bidirectional_queries: bool,
    ) -> None:
        super().__init__()
        ids = (image_token_id, ray_token_id)
        if not all(0 <= token < vocab_size for token in ids) or image_token_id == ray_token_id:
            raise ModelError(
                f"image_token_id={image_token_id} and ray_token_id={ray_token_id} must be two different tokens of the "
                f"vocabulary of {vocab_size}; take them from the tokenizer of the run"
            )
        self.settings: dict[str, Any] = {
            "channels": channels, "patch": patch, "grid": list(grid), "rays": rays, "language": dict(language),
            "vocab_size": vocab_size, "image_token_id": image_token_id, "ray_token_id": ray_token_id,
            "bidirectional_queries": bidirectional_queries,
        }  # fmt: skip
        self.channels, self.patch, self.bidirectional_queries = channels, patch, bidirectional_queries
        self.vocab_size, self.image_token_id, self.ray_token_id = vocab_size, image_token_id, ray_token_id
        self.language = build_language(language, vocab_size)
        self.width = int(self.language.config.get_text_config().hidden_size)
        self.projector = Mlp(channels, self.width, self.width)
        self.queries = RayQueries(self.width, patch=patch, grid=(grid[0], grid[1]), mode=rays)

    # -- one call a micro-batch ------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, translation_scale: str) -> dict[str, Tensor]:
        """``ce``: sum of the cross-entropy over supervised tokens (of a generation batch 0, with its graph);
        of a generation batch also ``condition`` (B, queries, width), zeros for a broken sample.

        Every trained parameter takes part in both kinds, with weight zero where the kind has no use for it.
        """
        hidden = self.hidden(self.embed(batch, translation_scale), batch["input_ids"])
        out = {"ce": self._cross_entropy(hidden, batch)}
        if batch["kind"] == GENERATION:
            out["condition"] = self._at_queries(hidden, batch)
        return out

    def embed(self, batch: Batch, translation_scale: str) -> Tensor:
        """Token embeddings (B, L, width) with views and queries in the place of their placeholders."""
        ids = batch["input_ids"]
        self._check_ids(ids)
        embeds = self.language.get_input_embeddings()(ids)
        tokens, valid = view_tokens(batch)
        if tokens is None:  # text alone: the projector takes part all the same
            embeds = embeds + 0.0 * self.projector(embeds.new_zeros(1, 1, self.channels)).sum()
            tokens, valid = embeds.new_zeros(len(ids), 0, self.channels), ids.new_zeros(len(ids), 0).bool()
        if tokens.shape[-1] != self.channels:
            raise ModelError(f"the LLM projects tokens of {self.channels} channels, got {tokens.shape[-1]}")
        projected = self.projector(tokens.to(self.projector.fc1.weight.dtype))
        embeds = place(embeds, ids == self.image_token_id, projected, valid, batch, "patch tokens")
        if batch["kind"] != GENERATION:
            eye = torch.eye(4, device=ids.device)[None]
            return embeds + 0.0 * self.queries(eye[:, :3, :3], eye, (1, 1)).sum()
        queries = self.queries(*target_camera(batch, translation_scale), target_grid(batch))
        everywhere = torch.ones(queries.shape[:2], dtype=torch.bool, device=ids.device)
        return place(embeds, ids == self.ray_token_id, queries, everywhere, batch, "queries")

    def hidden(self, embeds: Tensor, ids: Tensor) -> Tensor:
        """Hidden states (B, L, width) after the final norm."""
        mask = self._mask(embeds, ids == self.ray_token_id) if self.bidirectional_queries else None
        out = self.language.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> float32 logits (..., vocabulary)."""
        return self.language.get_output_embeddings()(hidden).float()

    # -- parts -----------------------------------------------------------------------------------------------

    def _mask(self, embeds: Tensor, queries: Tensor) -> Tensor:
        """Additive mask (B, 1, L, L): causal, but queries (B, L) see each other."""
        length = embeds.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
        seen = causal | (queries[:, :, None] & queries[:, None, :])
        return torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)[:, None]

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.max()) < self.vocab_size:
            raise ModelError(
                f"input_ids has token {int(ids.max())}, the vocabulary has {self.vocab_size}: the tokenizer of the run "
                "is not the one that the LLM was built for; set vocab_size and the placeholders from it"
            )

    def _cross_entropy(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Weighted sum over supervised tokens, in float32."""
        rows, source = predicted(batch).nonzero(as_tuple=True)
        labels, weight = batch["input_ids"][rows, source + 1], batch["weight"][rows]
        return token_cross_entropy(self.language.get_output_embeddings(), hidden, rows, source, labels, weight)

    def _at_queries(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states at the queries, (B, h * w, width); zeros for a broken sample, which has none."""
        mask = batch["input_ids"] == self.ray_token_id
        height, width = target_grid(batch)
        out = hidden.new_zeros(len(hidden), height * width, hidden.shape[-1])
        return out.masked_scatter(mask.any(1)[:, None, None], hidden[mask]).float()


def predicted(batch: Batch) -> Tensor:
    """(B, L - 1) bool: the next token is supervised, and the sample counts. The first token has none before it."""
    return batch["supervised"][:, 1:] & (batch["weight"] > 0)[:, None]


def counts(batch: Batch) -> float:
    """Weighted number of supervised tokens."""
    return float((predicted(batch).sum(1) * batch["weight"].double()).sum())


def target_grid(batch: Batch) -> tuple[int, int]:
    """Rows and columns of queries of a generation batch: those of the context's tokens (B, 1, h, w, C)."""
    return int(batch["tokens"].shape[-3]), int(batch["tokens"].shape[-2])


def target_camera(batch: Batch, translation_scale: str) -> tuple[Tensor, Tensor]:
    """K (B, 3, 3) of the target and T (B, 4, 4), target -> reference. A broken sample gets a camera that exists."""
    whole = (batch["weight"] > 0)[:, None, None]
    K, pose = batch["K"].float(), batch["pose"]
    eye = torch.eye(4, dtype=pose.dtype, device=pose.device)
    pose = torch.where(whole[..., None], pose, eye)
    scale = None
    if translation_scale == "depth":
        if "depth" not in batch:
            raise ModelError("translation_scale=depth needs the depth of the reference view in the batch")
        scale = median_depth(batch["depth"][:, 0])
    elif translation_scale != "metres":
        raise ModelError(f"translation_scale={translation_scale!r} must be metres or depth")
    return torch.where(whole, K[:, 1], eye[:3, :3].float()), relative_pose(pose, scale)


def view_tokens(batch: Batch) -> tuple[Tensor | None, Tensor]:
    """All patch tokens of each sample in the order of its views, (B, N, C), and which of them exist (B, N).

    ``tokens`` is (B, 1, h, w, C) of one view or (B, V, 1, h, w, C) with ``tokens_lengths``; absent for text alone.
    """
    tokens = batch.get("tokens")
    if tokens is None:
        return None, torch.zeros(0, dtype=torch.bool)
    if tokens.ndim == 5:
        flat = tokens.flatten(1, 3)
        return flat, torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
    views, each = tokens.shape[1], tokens.shape[2] * tokens.shape[3] * tokens.shape[4]
    valid = torch.ones(len(tokens), views, dtype=torch.bool, device=tokens.device)
    if "tokens_lengths" in batch:
        number = batch["tokens_lengths"].reshape(len(tokens), -1)[:, :1]
        valid = torch.arange(views, device=tokens.device) < number
    return tokens.flatten(1, 4), valid.repeat_interleave(each, dim=1)


def place(embeds: Tensor, holes: Tensor, values: Tensor, valid: Tensor, batch: Batch, what: str) -> Tensor:
    """``embeds`` (B, L, width) with the valid rows of ``values`` (B, N, width) at ``holes`` (B, L), in order.

    A broken sample has neither text nor picture and is left alone. ModelError names a sample whose placeholders are
    not as many as what should stand there.
    """
    valid = valid & ((batch["weight"] > 0) | holes.any(1))[:, None]
    have, want = holes.sum(1), valid.sum(1)
    if bool((have != want).any()):
        index = int((have != want).nonzero()[0])
        name = batch["id"][index] if "id" in batch else f"number {index} of the batch"
        raise ModelError(
            f"sample {name}: the text has {int(have[index])} placeholders for {int(want[index])} {what}; the text must "
            "be made for the same number of views and tokens a view (cut by data.text.max_length, perhaps)"
        )
    return embeds.masked_scatter(holes[..., None], values[valid].to(embeds.dtype))
