"""Spa3R's pre-training: latents of a few views, from which frozen networks' features at other views are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from actors.recipes.base import Built, Facts, Part, Recipe, seeded
from configs import ConfigError
from models.encoders.weights import RANDOM
from models.pretrained import load_part
from models.registry import build, spec
from models.spa3r.losses import FieldObjective, loss_terms
from models.spa3r.model import CLIP, GEO, SEM, Spa3R
from services.contracts import Split

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

PART = "spa3r"
MODELS = "spa3r-"
"""What names of models begin with that this recipe trains."""
ENCODERS: Mapping[str, str] = {GEO: "views", SEM: "semantic", CLIP: "clip"}
"""What is predicted -> the encoder (key under ``encoders``) that it is of."""


class Spa3rRecipe(Recipe):
    """One role: encoder, decoder, heads and depth probe on the features of view sets."""

    def terms(self, role: str) -> tuple[str, ...]:  # noqa: ARG002, D102
        spa3r = self.config.recipe.spa3r
        return loss_terms(spa3r.predict, spa3r.depth_probe)

    def describe(self, role: str, facts: Facts) -> dict[str, Any]:  # noqa: ARG002
        """A model for VGGT's channels, with a head for each target as wide as that target's encoder."""
        self._check_model()
        spa3r = self.config.recipe.spa3r
        targets = {name: facts.outputs(ENCODERS[name])["tokens"].shape[-1] for name in spa3r.predict}
        return {
            "channels": facts.outputs(ENCODERS[GEO])["tokens"].shape[-1],
            "targets": targets,
            "depth_probe": spa3r.depth_probe,
            **self.config.model.overrides,
        }

    def rebuild(self, role: str, settings: Mapping[str, Any]) -> Built:  # noqa: ARG002, D102
        self._check_model()
        with seeded(self.config.seed):
            module = build(self.config.model.name, **settings)
        assert isinstance(module, Spa3R), "the models of this name are"
        unknown = sorted(set(self.config.model.init) - {PART})
        if unknown:
            raise ConfigError(f"model.init has {unknown[0]!r}; recipe spa3r_pretrain starts from {PART}")
        weights = self.config.model.init.get(PART, RANDOM)
        if weights != RANDOM:
            load_part(module, weights)
        spa3r = self.config.recipe.spa3r
        objective = FieldObjective(
            loss=spa3r.loss,
            loss_views=spa3r.loss_views,
            targets=tuple(spa3r.predict),
            depth_probe=spa3r.depth_probe,
        )
        return Built(
            module=module, spec=spec(self.config.model.name).roles[0].bind(objective=objective), settings=settings
        )

    def parts(self, role: str, module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Part]:  # noqa: ARG002
        """``spa3r``: all of it, bound to the VGGT whose features it knows."""
        reads = self.config.encoders[ENCODERS[GEO]].digest
        return {PART: Part(module=module, model=self.config.model.name, settings=settings, reads=reads)}

    def evaluate(  # noqa: D102
        self, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
    ) -> dict[str, Any]:
        from actors.recipes.spa3r_judge import judge

        return judge(self, trained[self.roles[0]], feed, folder, split=split, device=device)

    def _check_model(self) -> None:
        """ConfigError for a model of another recipe, before its settings are compared with those of this one."""
        name = self.config.model.name
        if not name.startswith(MODELS):
            raise ConfigError(
                f"model.name={name}: recipe spa3r_pretrain trains a {MODELS}* model; `loom3d models '{MODELS}*'` lists "
                "them"
            )
