"""UniUGG's second phase: the Spatial-VAE, end to end with the spatial decoder that reads its reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from actors.recipes.base import Built, Facts, Part, Recipe, every_batch, kept_rows, seeded
from actors.recipes.uniugg_encoder import spatial_objective
from configs import ConfigError
from models.encoders.weights import RANDOM, is_here
from models.pretrained import describe_pretrained, load_part
from models.registry import build, spec
from models.uniugg.latent import PAIR, LatentModel, LatentObjective, pair_tokens
from services.contracts import Split

if TYPE_CHECKING:
    from actors.trainers.feed import Feed
    from services.streams.plan import EpochPlan

_INIT = ("vae", "spatial_decoder")
CALIBRATION_SAMPLES = 512
"""Training pairs that the statistics of tokens, and at the end of latents, are measured on."""


class VaeRecipe(Recipe):
    """P2: one role that trains the VAE and, unless told otherwise, the spatial decoder."""

    def terms(self, role: str) -> tuple[str, ...]:  # noqa: ARG002, D102
        return ("reconstruction", "kl", "confidence", "matching", "rgb")

    def describe(self, role: str, facts: Facts) -> dict[str, Any]:  # noqa: ARG002
        """Both parts' settings: a VAE for the ViT's channels, and the decoder that the run starts from."""
        start = self.config.model.init.get("spatial_decoder", RANDOM)
        unread = start == RANDOM or (facts.assume and not is_here(start))
        decoder = {} if unread else describe_pretrained(start)["settings"]
        return {
            "vae": {"channels": facts.outputs("vit")["tokens"].shape[-1]},
            "spatial_decoder": decoder,
            "finetune_spatial_decoder": self.config.recipe.uniugg.finetune_spatial_decoder,
            **self.config.model.overrides,
        }

    def build(self, role: str, feed: Feed, plan: EpochPlan) -> Built:
        """A VAE for the ViT's channels, its token statistics measured on the plan's first samples.

        Every rank reads the same global samples, so the statistics do not depend on the number of ranks.
        """
        built = self.rebuild(role, self.describe(role, Facts.of(feed)))
        assert isinstance(built.module, LatentModel), "the recipe makes this model"
        per_step = plan.micro_batch * len(plan.kinds)
        steps = max(1, min(plan.steps_per_epoch, CALIBRATION_SAMPLES // per_step))
        with closing(feed.load(plan, stop=steps)) as loader:
            batches = (micro.batch for step in loader for micro in step.micro_batches)
            built.module.vae.calibrate_tokens(_tokens(batches))
        return built

    def rebuild(self, role: str, settings: Mapping[str, Any]) -> Built:  # noqa: D102
        with seeded(self.config.seed):
            module = build(self.config.model.name, **settings)
        assert isinstance(module, LatentModel), "the recipe makes this model"
        unknown = sorted(set(self.config.model.init) - set(_INIT))
        if unknown:
            raise ConfigError(f"model.init has {unknown[0]!r}; recipe uniugg_vae starts from {', '.join(_INIT)}")
        for part, weights in self.config.model.init.items():
            if weights != RANDOM:
                load_part(getattr(module, part), weights)
        objective = LatentObjective(
            spatial=spatial_objective(self.config), mixed_share=self.config.recipe.uniugg.mixed_share
        )
        found = spec(self.config.model.name).role(role).bind(objective=objective)
        return Built(module=module, spec=found, settings=settings)

    def complete(self, trained: Mapping[str, Built], feed: Feed) -> None:
        """Measure the latents of the training split with the trained VAE: the diffusion is scaled by them."""
        module = trained[self.roles[0]].module
        assert isinstance(module, LatentModel), "the recipe makes this model"
        module.vae.calibrate_latents(_tokens(_first(feed, CALIBRATION_SAMPLES)))

    def parts(self, role: str, module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Part]:  # noqa: ARG002
        """``vae`` and ``spatial_decoder``, bound to the ViT whose tokens they know."""
        assert isinstance(module, LatentModel), "the recipe makes this model"
        vit = self.config.encoders["vit"].digest
        size = self.config.model.name.rpartition("-")[2]
        decoder = "large" if size == "base" else size
        return {
            "vae": Part(module=module.vae, model=f"spatial-vae-{size}", settings=settings["vae"], reads=vit),
            "spatial_decoder": Part(
                module=module.spatial_decoder,
                model=f"uniugg-spatial-decoder-{decoder}",
                settings=module.spatial_decoder.settings,
                reads=vit,
            ),
        }

    def evaluate(  # noqa: D102
        self, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
    ) -> dict[str, Any]:
        from actors.recipes.uniugg_pairs import judge_latents

        return judge_latents(self, trained[self.roles[0]], feed, folder, split=split, device=device)


def _first(feed: Feed, samples: int) -> Iterator[Mapping[str, Any]]:
    """Batches of the training split in order, until ``samples`` were seen."""
    seen = 0
    for batch, _ in every_batch(feed, Split.TRAIN, PAIR):
        yield batch
        seen += len(batch["weight"])
        if seen >= samples:
            return


def _tokens(batches: Iterator[Mapping[str, Any]]) -> Iterator[Tensor]:
    """Tokens (2B, h, w, C) of the samples that count."""
    for batch in batches:
        yield pair_tokens(kept_rows(batch, batch["weight"] > 0)).flatten(0, 1).float()
