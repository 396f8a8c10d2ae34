"""UniUGG's third phase: the language model that answers and asks, and the diffusion that imagines.

Stage i (``uniugg_align``) trains the projector of the LLM on conversations; stages ii and iii (``uniugg_joint``,
``uniugg_finetune``) train the LLM and the diffusion together; ``uniugg_direct`` is the simplified variant (A.4),
in which the LLM regresses the target's tokens. ViT, VAE and spatial decoder are frozen, and never here: their outputs
come from the feature service.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.recipes.base import Built, Facts, Part, Recipe, seeded
from configs import ConfigError
from models.encoders.uniugg import READS
from models.encoders.weights import RANDOM, is_here
from models.pretrained import describe_pretrained, load_part, read_pretrained
from models.registry import build, spec
from models.spec import RoleSpec
from models.uniugg.objectives import DiffusionObjective, DirectObjective, LanguageObjective
from models.uniugg.unified import DIFFUSION, LLM, part_settings
from services.contracts import Split
from services.errors import WeightsError

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

_log = logging.getLogger("loom3d")

_INIT = {LLM: ("llm", "language"), DIFFUSION: ("diffusion", "unet")}
"""Keys of ``model.init`` by role: the role as another run trained it, or public weights of its network."""
LATENTS = ("latent_mean", "latent_scale")
"""Statistics of the latents, which the VAE and the diffusion behind it both hold."""


class UnifiedRecipe(Recipe):
    """Stages i to iii, and the direct variant."""

    def terms(self, role: str) -> tuple[str, ...]:  # noqa: D102
        if role == DIFFUSION:
            return ("noise",)
        return ("ce", "token_regression") if self.is_direct else ("ce",)

    @property
    def is_direct(self) -> bool:
        """Whether the LLM regresses target tokens itself."""
        return self.config.recipe.name == "uniugg_direct"

    def describe(self, role: str, facts: Facts) -> dict[str, Any]:
        """The part of the registry that ``role`` is, and its settings for the run's tokenizer, encoder and latents."""
        self._check_init()
        name, settings = part_settings(self.config.model.name, self._overrides(role, facts))[role]
        return {"model": name, "settings": settings}

    def rebuild(self, role: str, settings: Mapping[str, Any]) -> Built:  # noqa: D102
        with seeded(self.config.seed):
            module = build(settings["model"], **settings["settings"])
        self._initialise(role, module)
        return Built(module=module, spec=self._bound(role), settings=settings)

    def parts(self, role: str, module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Part]:  # noqa: D102
        reads = self.config.encoders["vit"].digest if role == LLM else ""
        return {role: Part(module=module, model=settings["model"], settings=settings["settings"], reads=reads)}

    def evaluate(  # noqa: D102
        self, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
    ) -> dict[str, Any]:
        from actors.recipes.uniugg_judge import evaluate

        return evaluate(self, trained, feed, folder, split=split, device=device)

    # -- building --------------------------------------------------------------------------------------------

    def _bound(self, role: str) -> RoleSpec:
        """The role with the run's objective."""
        uniugg, found = self.config.recipe.uniugg, spec(self.config.model.name).role(role)
        if role == DIFFUSION:
            objective: Any = DiffusionObjective(
                latent=uniugg.latent,
                condition_dropout=uniugg.condition_dropout,
                min_snr=uniugg.min_snr,
                offset_noise=uniugg.offset_noise,
            )
        elif self.is_direct:
            objective = DirectObjective(
                translation_scale=uniugg.translation_scale,
                cosine=uniugg.semantic_cosine,
                smooth_l1=uniugg.semantic_smooth_l1,
            )
        else:
            objective = LanguageObjective(translation_scale=uniugg.translation_scale)
        return found.bind(objective=objective)

    def _overrides(self, role: str, facts: Facts) -> dict[str, Any]:
        """Settings of the model that follow from the run's tokenizer, encoders and weights, under the config's own."""
        given = self._tokens(facts)
        given |= self._grid(facts) if role == LLM else self._latents(facts)
        return {**given, **self.config.model.overrides}

    def _tokens(self, facts: Facts) -> dict[str, Any]:
        """Placeholders and size of the vocabulary by the run's tokenizer, and the language model of its weights."""
        from models.text.tokenizer import BYTES, IMAGE, RAYMAP, check_fits, load_tokenizer, token_id

        name, language = self.config.data.text.tokenizer, self.config.model.init.get("language", RANDOM)
        if name != BYTES and not _readable(name, facts):
            return {}
        tokenizer = load_tokenizer(name)
        vocabulary = max(int(spec(self.config.model.name).defaults["vocab_size"]), len(tokenizer))
        given: dict[str, Any] = {
            "vocab_size": vocabulary,
            "image_token_id": token_id(tokenizer, IMAGE),
            "ray_token_id": token_id(tokenizer, RAYMAP),
        }
        if _readable(language, facts):
            from models.uniugg.language import language_settings

            settings = language_settings(language)
            given["vocab_size"] = max(int(settings.pop("vocab_size")), len(tokenizer))
            given["llm"] = {"language": settings}
        check_fits(tokenizer, {**given, **self.config.model.overrides}["vocab_size"])
        return given

    def _grid(self, facts: Facts) -> dict[str, Any]:
        """Channels and patch of the tokens that the LLM reads."""
        _, rows, _, channels = (int(axis or 0) for axis in facts.outputs("vit")["tokens"].shape)
        return {"channels": channels, "patch": self.config.encoders["vit"].height // rows}

    def _latents(self, facts: Facts) -> dict[str, Any]:
        """Latents as the VAE left them, and the width of the language model that the LLM starts from."""
        given: dict[str, Any] = {"latent_channels": facts.outputs("vae")["mean"].shape[0]}
        vae, start = self.config.encoders["vae"].weights, self.config.model.init.get("llm", RANDOM)
        if _readable(vae, facts):
            given |= _latents(vae)
        if _readable(start, facts):
            described = describe_pretrained(start)
            settings = {**spec(described["model"]).defaults, **described["settings"]}
            given["llm"] = {"language": settings["language"]}
        return given

    def _check_init(self) -> None:
        known = [key for role in self.roles for key in _INIT[role]]
        for key in self.config.model.init:
            if key not in known:
                raise ConfigError(
                    f"model.init has {key!r}; recipe {self.config.recipe.name} starts from {', '.join(known)}"
                )

    def _initialise(self, role: str, module: nn.Module) -> None:
        """Load what ``model.init`` names for the role: its part first, or public weights of its network."""
        init = {key: value for key, value in self.config.model.init.items() if value != "random"}
        part, network = _INIT[role]
        if network in init:
            if role == LLM:
                from models.uniugg.language import load_language

                load_language(module.language, init[network])  # type: ignore[arg-type]
            else:
                from models.uniugg.diffusion import ConditionedUNet, load_unet

                assert isinstance(module, ConditionedUNet), "the diffusion role is a conditioned UNet"
                load_unet(module, init[network])
        if part in init:
            self._warn_of_other_tokens(init[part])
            expected = {name: getattr(module, name).clone() for name in LATENTS if hasattr(module, name)}
            load_part(module, init[part], new=("head.*",) if self.is_direct else ())
            _check_latents(module, expected, init[part])

    def _warn_of_other_tokens(self, start: str) -> None:
        """Say aloud that a part was trained on tokens of another ViT than the run's: a start, but a poor one."""
        learnt, vit = describe_pretrained(start).get(READS), self.config.encoders["vit"].digest
        if learnt and vit and learnt != vit:
            _log.warning(
                "model.init.llm=%s was trained on tokens of a ViT with sha256 %s..., encoders.vit has %s...: its "
                "projector must learn to read them anew; recipe=uniugg_align behind this ViT makes a better start",
                start, learnt[:16], vit[:16],
            )  # fmt: skip


def _readable(weights: str, facts: Facts) -> bool:
    """Whether there are weights to read settings from."""
    return weights != RANDOM and (not facts.assume or is_here(weights))


def _check_latents(module: nn.Module, expected: Mapping[str, Tensor], start: str) -> None:
    """WeightsError when the diffusion that was loaded had been trained on latents of another VAE than the run's."""
    for name, wanted in expected.items():
        found = getattr(module, name)
        if not torch.allclose(found, wanted):
            raise WeightsError(
                f"model.init.diffusion={start} was trained on latents with {name}={found.tolist()}, those of "
                f"encoders.vae have {wanted.tolist()}: they do not belong together; name the VAE that it was trained "
                "behind, or the diffusion of a run behind this VAE"
            )


def _latents(folder: str) -> dict[str, Any]:
    """Statistics of the latents that the VAE was left with. WeightsError when it holds none."""
    stored = read_pretrained(folder)
    try:
        mean, scale = stored["latent_mean"], stored["latent_scale"]
    except KeyError as error:
        raise WeightsError(
            f"{folder} holds no {error}: it is no Spatial-VAE of ours; train recipe=uniugg_vae"
        ) from error
    return {"latent_channels": len(mean), "latent_mean": tuple(mean.tolist()), "latent_scale": float(scale)}
