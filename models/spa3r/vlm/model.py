"""Spa3-VLM (arXiv 2602.21186, section 3.3): Qwen2.5-VL whose visual tokens have read a scene's spatial latents.

The network is transformers' own class. The one thing that is changed is what its image-feature hook gives: visual
tokens, from its own tower or from the feature service, go through the adapter, and its forward pass takes them from
there. Every sample attends to its own latents alone, however many frames it has and of whatever size.

Samples are padded on the right: under causal attention padding then reaches no real position, so that only packed
questions need a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.layers.supervision import token_cross_entropy
from models.spa3r.vlm import packing
from models.spa3r.vlm.adapter import AppendAdapter, CrossAdapter, make_adapter
from models.spa3r.vlm.qwen import build_qwen, published_name, qwen_config
from models.spec import Batch


class Spa3VLM(nn.Module):
    """Qwen2.5-VL with a geometry adapter.

    Args:
        language: config of Qwen2.5-VL: ``text_config`` and ``vision_config`` (or the layout of a published folder).
        vocab_size: entries of the embedding.
        image_token_id: placeholder of a merged visual token.
        latent_channels: of a latent.
        adapter: see :func:`models.spa3r.vlm.adapter.make_adapter`.
        vision: whether the vision tower is built, frozen; without it merged visual tokens must be given.
        attention: implementation of transformers: sdpa, eager, or one that packed questions cannot have.
    """

    network = "language"
    """Child that its library can load alone, see :mod:`models.pretrained`."""
    language: Any
    """``transformers.Qwen2_5_VLForConditionalGeneration``."""

    def __init__(
        self,
        *,
        language: Mapping[str, Any],
        vocab_size: int,
        image_token_id: int,
        latent_channels: int,
        adapter: Mapping[str, Any],
        vision: bool,
        attention: str,
    ) -> None:
        super().__init__()
        if not 0 <= image_token_id < vocab_size:
            raise ModelError(
                f"image_token_id={image_token_id} must be a token of the vocabulary of {vocab_size}; take both from "
                "the tokenizer of the run"
            )
        self.settings: dict[str, Any] = {
            "language": dict(language), "vocab_size": vocab_size, "image_token_id": image_token_id,
            "latent_channels": latent_channels, "adapter": dict(adapter), "vision": vision, "attention": attention,
        }  # fmt: skip
        config = qwen_config(language, vocab_size=vocab_size, image_token_id=image_token_id)
        self.vocab_size, self.image_token_id, self.latent_channels = vocab_size, image_token_id, latent_channels
        self.attention = attention
        self.language = build_qwen(config, vision=vision, attention=attention)
        if vision:
            self.language.model.visual.eval().requires_grad_(False)
        self.width = int(config.text_config.hidden_size)
        # Outside of the network on purpose: transformers initialises what a folder lacks, and this must start at zero.
        self.adapter = make_adapter(self.width, latent_channels, int(config.text_config.num_attention_heads), adapter)

    # -- one call a micro-batch ------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``ce``: weighted sum of the cross-entropy over supervised tokens.

        Columns: ``input_ids``, ``supervised``, ``segments`` (B, L), ``visual`` (B, N, C) with ``visual_lengths``,
        ``grids`` (B, F, 2) with ``grids_lengths``, ``latents`` (B, Q, D), ``weight`` (B,). Without images every
        trained parameter takes part all the same.
        """
        hidden = self.hidden(batch)
        rows, source, target = supervised_tokens(batch)
        return {
            "ce": token_cross_entropy(
                self.language.lm_head, hidden, rows, source, batch["input_ids"][rows, target], batch["weight"][rows]
            )
        }

    def hidden(self, batch: Batch, *, past: Any = None) -> Tensor:
        """Hidden states (B, L, width) after the final norm; ``past`` is a cache that is filled."""
        ids = batch["input_ids"]
        self._check_ids(ids)
        segments = segments_of(batch)
        tokens = self.visual_tokens(batch)
        embeds = self.language.get_input_embeddings()(ids)
        images = None
        if tokens is not None:
            placed, valid = tokens
            self._check_places(batch, valid)
            if bool(valid.any()):
                images = {"image": _features(placed[valid])}
            else:  # the adapter takes part all the same
                embeds = embeds + 0.0 * placed.sum()
        mask = None
        if packing.is_packed(segments):
            mask = packing.block_mask(segments, self.attention, embeds.dtype)
        return self.run(embeds, self.positions(batch), mask=mask, past=past, ids=ids, images=images)

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None = None,
        past: Any = None,
        ids: Tensor | None = None,
        images: Any = None,
    ) -> Tensor:
        """The network's own forward pass up to its last norm, (B, L, width)."""
        out = self.language.model(
            input_ids=ids,
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=past,
            use_cache=past is not None,
            mm_encoder_outputs=images,
        )
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> float32 logits (..., vocabulary)."""
        return self.language.lm_head(hidden).float()

    # -- parts -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
        """Merged visual tokens (gh * gw, width) of each image, by the network's own hook.

        Args:
            pixels: (patches, 3 * 2 * 14 * 14) of all images, as Qwen's image processor lays them out.
            grid: int64 (images, 3) patches in time, rows and columns.
        """
        if not self.settings["vision"]:
            raise ModelError("this model was built without a vision tower (vision=false); give merged visual tokens")
        return self.language.model.get_image_features(pixels, grid, return_dict=True).pooler_output

    def visual_tokens(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """What stands at the placeholders, (B, N, width), and which of it exists (B, N); None where nothing can.

        The adapter is called once, whatever the batch holds: ranks that shard it must agree on the calls.
        """
        size = len(batch["input_ids"])
        visual, valid = _padded(batch, "visual", self.width, "the language model is as wide as visual tokens")
        like = self.language.get_input_embeddings().weight
        if visual is None:
            if self.adapter is None:
                return None
            visual = torch.zeros(size, 1, self.width, device=like.device, dtype=like.dtype)
            valid = torch.zeros(size, 1, dtype=torch.bool, device=like.device)
        if self.adapter is None:
            return visual, valid
        latents, there = _padded(batch, "latents", self.latent_channels, "latent_channels of the model")
        if latents is None:
            if bool(valid.any()):
                raise ModelError(
                    "the batch has visual tokens and no latents, which the adapter reads: chain the geometry encoder "
                    "in the recipe, or build the model with adapter.kind=none"
                )
            latents = torch.zeros(size, 1, self.latent_channels, device=like.device, dtype=like.dtype)
            there = torch.zeros(size, 1, dtype=torch.bool, device=like.device)
        if isinstance(self.adapter, AppendAdapter):
            tokens = torch.cat([visual, self.adapter(latents)], dim=1)
            return tokens, torch.cat([valid, there & valid.any(1, keepdim=True)], dim=1)
        whole = "latents_lengths" not in batch and "latents" in batch
        return self.adapter(visual, latents, None if whole else there), valid

    def positions(self, batch: Batch) -> Tensor:
        """M-RoPE positions (3, B, L)."""
        ids = batch["input_ids"]
        grids = batch.get("grids")
        if grids is None:
            grids = ids.new_zeros(len(ids), 0, 2)
        lengths = batch.get("grids_lengths")
        frames = None if lengths is None else lengths.reshape(len(ids), -1)[:, 0]
        return packing.mrope_positions(ids == self.image_token_id, segments_of(batch), grids, frames)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.max()) < self.vocab_size:
            raise ModelError(
                f"input_ids has token {int(ids.max())}, the vocabulary has {self.vocab_size}: the tokenizer of the run "
                "is not the one that the model was built for; set vocab_size and image_token_id from it"
            )

    def _check_places(self, batch: Batch, valid: Tensor) -> None:
        have, want = (batch["input_ids"] == self.image_token_id).sum(1), valid.sum(1)
        if bool((have != want).any()):
            index = int((have != want).nonzero()[0])
            name = batch["id"][index] if "id" in batch else f"number {index} of the batch"
            raise ModelError(
                f"sample {name}: the text has {int(have[index])} image tokens for {int(want[index])} visual tokens; "
                "the text must be made for the same frames and their sizes (cut by data.text.max_length, perhaps)"
            )

    # -- published weights -----------------------------------------------------------------------------------

    def reference_names(self) -> dict[str, str]:
        """Our tensor name -> its name in the published checkpoint, which has the layout of transformers 4."""
        network = {f"language.{name}": published_name(name) for name in self.language.state_dict()}
        if not isinstance(self.adapter, (CrossAdapter, AppendAdapter)):
            return network
        return {**network, **{f"adapter.{ours}": theirs for ours, theirs in self.adapter.published_names().items()}}

    @property
    def reference_ignored(self) -> tuple[str, ...]:
        """Published tensors that have no place here: the geometry encoder, and the tower where it is not built."""
        return ("geometry_encoder.*",) if self.settings["vision"] else ("geometry_encoder.*", "visual.*")

    def adapt_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tied head may be stored once."""
        adapted = dict(state)
        if self.language.config.tie_word_embeddings and "model.embed_tokens.weight" in adapted:
            adapted.setdefault("lm_head.weight", adapted["model.embed_tokens.weight"])
        return adapted


def segments_of(batch: Batch) -> Tensor:
    """``segments`` (B, L), padding beyond each sample's length; without that column a sample is one prefix."""
    ids = batch["input_ids"]
    segments = batch["segments"] if "segments" in batch else torch.zeros_like(ids)
    if "input_ids_lengths" not in batch:
        return segments
    order = torch.arange(ids.shape[1], device=ids.device)
    return segments.masked_fill(order >= batch["input_ids_lengths"].reshape(len(ids), -1)[:, :1], packing.PADDING)


def supervised_tokens(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(sample, index of the token that predicts it, index) of every supervised token of samples that count."""
    source = packing.predictors(segments_of(batch))
    rows, target = (batch["supervised"] & (source >= 0) & (batch["weight"] > 0)[:, None]).nonzero(as_tuple=True)
    return rows, source[rows, target], target


def _padded(batch: Batch, name: str, width: int, what: str) -> tuple[Tensor | None, Tensor]:
    """Column ``name`` (B, N, width) and which of its rows exist (B, N); None where there is none at all."""
    column = batch.get(name)
    if column is None or not column.shape[1]:
        return None, torch.zeros(0, dtype=torch.bool)
    if column.ndim != 3 or column.shape[-1] != width:
        raise ModelError(f"{name} has shape {tuple(column.shape)}; it must be (samples, tokens, {width}): {what}")
    valid = torch.ones(column.shape[:2], dtype=torch.bool, device=column.device)
    if f"{name}_lengths" in batch:
        number = batch[f"{name}_lengths"].reshape(len(column), -1)[:, :1].to(column.device)
        valid = torch.arange(column.shape[1], device=column.device) < number
    return column, valid


def _features(tokens: Tensor) -> Any:
    """What the network's image-feature hook would give."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    merged: Any = (tokens,)  # one tensor a picture, or all of them in one
    return BaseModelOutputWithPooling(pooler_output=merged)
