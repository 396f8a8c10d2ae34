"""What recipes know of: part of the typed configuration (see ``schema``), in a file of its own for its size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ViewSetConfig:
    # windows (one distance of neighbouring views a set, and no two sets of an epoch alike) | walks (the distance drawn
    # anew for every view, view 0 always context, one number of views a micro-batch).
    scheme: str = "windows"
    # Smallest and largest number of views of a set.
    views: list[int] = field(default_factory=lambda: [2, 4])
    # Share of the views of a set that are targets (at least one where > 0, and at least one stays context).
    target_ratio: float = 0.5
    # Smallest and largest distance of neighbouring views, in frames of the source (as many as frame_stride leaves); of
    # walks, where data.sources.*.interval says nothing else.
    interval: list[int] = field(default_factory=lambda: [1, 1])
    # First frames of two sets of an epoch lie in different windows of this many frames (windows).
    stride: int = 1
    # View sets that a scene has in all, drawn again in every epoch so that the cache can serve them (walks); 0 draws
    # new ones in every epoch, of which the cache serves single pictures at most.
    plans_per_scene: int = 0
    # Ways to divide a planned set into context and targets, each encoded by itself; 0 divides anew in every epoch.
    partitions: int = 1
    # Seed of planned sets: runs that differ in `seed` alone share what is cached.
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class UniuggConfig:
    """UniUGG's settings (arXiv 2508.11952). Weights of loss terms are in ``recipe.losses``."""

    # Pixel correspondences sampled of an image pair.
    matches: int = 8192
    # At most this share of them are true matches; the rest are false ones.
    match_share: float = 0.5
    # Temperature of the matching loss.
    match_temperature: float = 0.05
    # Side of the blocks in which the matching loss is computed.
    match_block: int = 1024
    # Weight of the log-confidence in the loss of the pointmaps (alpha).
    point_alpha: float = 0.2
    # Weight of the log-confidence in the matching loss (beta).
    match_beta: float = 10.0
    # Divide the prediction by the ground truth's scale (metric data); false divides it by its own.
    metric: bool = True
    # Weight of LPIPS beside L1 in the loss of the RGB head; needs `lpips_weights`.
    rgb_lpips: float = 0.2
    # Weight of 1 - SSIM beside L1 in the loss of the RGB head.
    rgb_ssim: float = 0.0
    # Folder or file of the AlexNet trunk that LPIPS needs; "" leaves LPIPS out of the loss.
    lpips_weights: str = ""
    # Weight of 1 - cosine in the semantic losses.
    semantic_cosine: float = 0.9
    # Weight of smooth L1 in the semantic losses.
    semantic_smooth_l1: float = 0.1
    # Share of the tokens of an image that the semantic loss looks at, drawn for each image.
    semantic_share: float = 1 / 3
    # Every pair also appears swapped.
    symmetrise: bool = True
    # Random viewport of the student's position table while training (RADIO's CPE).
    cpe_augment: bool = False
    # The VAE trains the spatial decoder too; false is the paper's ablation (c).
    finetune_spatial_decoder: bool = True
    # Share of pairs in which exactly one of the two representations is the reconstruction.
    mixed_share: float = 0.5
    # Latents that the diffusion learns: sample | mode of the posterior.
    latent: str = "sample"
    # Share of conversations whose image tokens are the VAE's reconstruction.
    reconstruction_share: float = 0.1
    # Share of generation samples whose condition is replaced by the learned null sequence.
    condition_dropout: float = 0.1
    # Min-SNR weighting of the noise loss (0: none).
    min_snr: float = 0.0
    # Strength of offset noise (0: none).
    offset_noise: float = 0.0
    # Scale of the relative translation in the raymap: metres | depth (of the reference, needs depth).
    translation_scale: str = "metres"


@dataclass(frozen=True, kw_only=True)
class Spa3rConfig:
    """Spa3R's settings (arXiv 2602.21186). ``variant=released`` presets them as the released code has them; the default
    is the paper. Which numbers of views, partitions and repeats: ``recipe.view_set``.
    """

    # Distance beside 1 - cosine: l1 (the paper) | smooth_l1 (the released code).
    loss: str = "l1"
    # Views whose features are compared: targets (the paper) | all (the released code).
    loss_views: str = "targets"
    # Context and targets in one pass of VGGT in which the context sees nothing of the targets; false makes two plain
    # passes, of the context alone and of all views (the released code), and needs targets=symmetric.
    asymmetric: bool = True
    # What the targets are of: joint (the one pass, so each partition is encoded by itself) | symmetric (a plain pass
    # over all views, one for all partitions; the context is encoded apart).
    targets: str = "joint"
    # Normalisation of queries and keys in VGGT's global blocks: auto (layernorm where the weights have its biases) |
    # layernorm (VGGT) | rmsnorm (what the released weights were trained with). Becomes arch.qk_norm of every VGGT.
    qk_norm_global: str = "auto"
    # What is predicted: geo (VGGT's own features), sem (those of encoders.semantic: DINOv3), clip (those of
    # encoders.clip).
    predict: list[str] = field(default_factory=lambda: ["geo", "sem"])
    # Read VGGT's depth from the decoded features, by a probe that teaches them nothing.
    depth_probe: bool = True


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is in the cross-attention to spatial latents beside the paper's equation; the released weights have all."""

    # Two linear layers before the attention, from the latents' width to the language model's.
    projector: bool = False
    # Norms of the attention's queries and keys.
    qk_norm: bool = False
    # A norm behind the attention.
    norm: bool = False
    # A gate on what is added to a visual token.
    gate: bool = False
    # Heads of the attention (0: those of the language model).
    heads: int = 0


@dataclass(frozen=True, kw_only=True)
class Spa3VlmConfig:
    """Spa3-VLM's settings (arXiv 2602.21186, section 3.3). Frames of a video: options of its source."""

    # What the visual tokens get to know of space: none (plain Qwen2.5-VL) | vggt (VGGT's own features, by
    # cross-attention) | append (Spa3R's latents, as tokens of their own) | cross (Spa3R's latents, by cross-attention).
    geometry: str = "cross"
    # Conversations about the same pictures that share one visual prefix, at most; 1 packs none.
    questions_per_sample: int = 1
    # The form of the cross-attention.
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    # What a run with geometry is compared with: train (Qwen2.5-VL finetuned plainly, with everything else as in this
    # run, as a run NAME-plain that is trained first, or found again) | run:NAME (another run, without geometry) | off.
    baseline: str = "train"


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    # What is trained: probe | uniugg_encoder | uniugg_vae | uniugg_align | uniugg_joint | uniugg_finetune |
    # uniugg_direct | spa3r_pretrain | spa3_vlm.
    name: str = "probe"
    # Relative share of micro-batches of each kind in every step (largest remainder).
    quotas: dict[str, float] = field(default_factory=lambda: {"view": 1.0})
    # How samples of the kind view_set are drawn.
    view_set: ViewSetConfig = field(default_factory=ViewSetConfig)
    # Loss terms and their weights.
    losses: dict[str, float] = field(default_factory=dict)
    # Which encoder (key under `encoders`) feeds the model of the probe; the other recipes name theirs (teacher, vit,
    # vae, reconstruction).
    features: str = "features"
    # Role -> globs of the parameters that are trained; a role that is not named trains all of its parameters. With
    # peft=lora the parameters that are trained beside the low-rank updates; by default the new layers (projector,
    # queries, conditioning).
    train: dict[str, list[str]] = field(default_factory=dict)
    # Settings of UniUGG's recipes.
    uniugg: UniuggConfig = field(default_factory=UniuggConfig)
    # Settings of Spa3R's pre-training.
    spa3r: Spa3rConfig = field(default_factory=Spa3rConfig)
    # Settings of the language model behind Spa3R.
    spa3_vlm: Spa3VlmConfig = field(default_factory=Spa3VlmConfig)
    # Settings that only this recipe knows (documented in its spec).
    options: dict[str, Any] = field(default_factory=dict)
