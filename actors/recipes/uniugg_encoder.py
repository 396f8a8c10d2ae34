"""UniUGG's first phase: a student ViT learns geometry from pairs of views, and semantics from a frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from actors.recipes.base import Built, Facts, Part, Recipe, seeded
from configs import ConfigError
from configs.schema import RunConfig
from models.checkpoints import load_reference
from models.encoders.weights import RANDOM, read_tensors
from models.pretrained import CONFIG, describe_pretrained, load_part
from models.registry import build, spec
from models.uniugg.losses import SemanticObjective, SpatialObjective
from models.uniugg.pretraining import EncoderPretraining
from models.uniugg.spatial import load_mast3r
from services.contracts import Split
from services.errors import WeightsError

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

_INIT = ("encoder", "spatial_decoder", "mast3r")


def spatial_objective(config: RunConfig) -> SpatialObjective:
    """The spatial losses as the run's config wants them; LPIPS counts only where its trunk's weights are given."""
    uniugg = config.recipe.uniugg
    return SpatialObjective(
        temperature=uniugg.match_temperature,
        block=uniugg.match_block,
        alpha=uniugg.point_alpha,
        beta=uniugg.match_beta,
        metric=uniugg.metric,
        lpips=uniugg.rgb_lpips if uniugg.lpips_weights else 0.0,
        ssim=uniugg.rgb_ssim,
        lpips_weights=uniugg.lpips_weights,
        symmetrise=uniugg.symmetrise,
    )


def semantic_objective(config: RunConfig) -> SemanticObjective:
    """The distillation from the teacher as the run's config wants it."""
    uniugg = config.recipe.uniugg
    return SemanticObjective(
        cosine=uniugg.semantic_cosine, smooth_l1=uniugg.semantic_smooth_l1, share=uniugg.semantic_share
    )


class EncoderRecipe(Recipe):
    """P1: one role that trains the ViT and the spatial decoder."""

    def terms(self, role: str) -> tuple[str, ...]:  # noqa: ARG002, D102
        return ("confidence", "matching", "rgb", "semantic_tokens", "semantic_summary")

    def describe(self, role: str, facts: Facts) -> dict[str, Any]:
        """A student of the teacher's form. ConfigError when their tokens could not be compared one by one."""
        settings = super().describe(role, facts)
        self._check_teacher(facts, settings)
        return settings

    def rebuild(self, role: str, settings: Mapping[str, Any]) -> Built:  # noqa: D102
        with seeded(self.config.seed):
            module = build(self.config.model.name, **settings)
        self._initialise(module)
        found = (
            spec(self.config.model.name)
            .role(role)
            .bind(
                spatial=spatial_objective(self.config),
                semantic=semantic_objective(self.config),
                cpe_augment=self.config.recipe.uniugg.cpe_augment,
            )
        )
        return Built(module=module, spec=found, settings=settings)

    def parts(self, role: str, module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Part]:  # noqa: ARG002
        """``encoder`` and ``spatial_decoder``."""
        assert isinstance(module, EncoderPretraining), "the recipe makes this model"
        return {
            "encoder": Part(module=module.encoder, model=self._part("vit"), settings=module.encoder.settings),
            "spatial_decoder": Part(
                module=module.spatial_decoder,
                model=self._part("spatial-decoder"),
                settings=module.spatial_decoder.settings,
            ),
        }

    def evaluate(  # noqa: D102
        self, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
    ) -> dict[str, Any]:
        from actors.recipes.uniugg_pairs import judge_encoder

        return judge_encoder(self, trained[self.roles[0]], feed, folder, split=split, device=device)

    def _part(self, what: str) -> str:
        """Registry name of a part of the size of this model."""
        return f"uniugg-{what}-{self.config.model.name.rpartition('-')[2]}"

    def _check_teacher(self, facts: Facts, settings: Mapping[str, Any]) -> None:
        outputs, teacher = facts.outputs("teacher"), self.config.encoders["teacher"]
        _, rows, columns, channels = outputs["tokens"].shape
        patch, summaries = settings["patch"], outputs["summary"].shape[0]
        wrong = {
            "grid of tokens": ((rows, columns), (teacher.height // patch, teacher.width // patch)),
            "channels": (channels, settings["width"]),
            "summary tokens": (summaries, settings["summaries"]),
        }
        for what, (theirs, ours) in wrong.items():
            if theirs != ours:
                raise ConfigError(
                    f"encoders.teacher gives {what} {theirs}, {self.config.model.name} has {ours}; the losses compare "
                    "them one by one: choose a teacher of that form, or set model.overrides (width, patch, summaries)"
                )

    def _initialise(self, module: nn.Module) -> None:
        """Load ``model.init``: encoder (a part of ours, or RADIO), spatial_decoder (a part), mast3r."""
        assert isinstance(module, EncoderPretraining), "the recipe makes this model"
        init = {key: value for key, value in self.config.model.init.items() if value != RANDOM}
        unknown = sorted(set(init) - set(_INIT))
        if unknown:
            raise ConfigError(f"model.init has {unknown[0]!r}; recipe uniugg_encoder starts from {', '.join(_INIT)}")
        if "mast3r" in init:
            load_mast3r(module.spatial_decoder, read_tensors(init["mast3r"]))
        if "spatial_decoder" in init:
            load_part(module.spatial_decoder, init["spatial_decoder"])
        if "encoder" in init:
            if _is_part(init["encoder"]):
                load_part(module.encoder, init["encoder"])
            else:
                load_reference(module.encoder, read_tensors(init["encoder"]))


def _is_part(weights: str) -> bool:
    """Whether a folder holds a part of ours rather than published weights."""
    if not (Path(weights).expanduser() / CONFIG).exists():
        return False
    try:
        describe_pretrained(weights)
    except WeightsError:
        return False
    return True
