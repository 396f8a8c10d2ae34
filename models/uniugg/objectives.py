"""Settings of the losses of UniUGG's second and third training, as the step functions take them (``RoleSpec.bind``).

Their defaults are those of ``recipe.uniugg`` in the run's config; here is none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LanguageObjective:
    """What the LLM's step needs to know."""

    translation_scale: str
    """metres | depth: what the relative translation is divided by in the raymap (1, or the reference's median)."""


@dataclass(frozen=True, kw_only=True)
class DirectObjective(LanguageObjective):
    """The variant that regresses target tokens (A.4): the mixture of the semantic token loss."""

    cosine: float
    """Weight of 1 - cosine."""
    smooth_l1: float
    """Weight of smooth L1 (beta 1), averaged over channels."""


@dataclass(frozen=True, kw_only=True)
class DiffusionObjective:
    """Noise prediction (Eq. 4) and its options."""

    latent: str
    """sample | mode of the target's posterior."""
    condition_dropout: float
    """Share of samples whose condition is the learned null sequence, for classifier-free guidance."""
    min_snr: float
    """Min-SNR weighting (Hang et al. 2023) with this gamma; 0 for none."""
    offset_noise: float
    """Strength of noise that is constant over a channel; 0 for none."""
