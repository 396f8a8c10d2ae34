"""Spa3-VLM: Qwen2.5-VL's language model, and the adapter by which its visual tokens read a scene's spatial latents.

Vision tower, VGGT and Spa3R are frozen and never here: their outputs come from the feature service. What the geometry
is (``recipe.spa3_vlm.geometry``) makes the paper's Tables 3 and 5; ``none`` is Qwen2.5-VL finetuned plainly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.recipes.base import Baseline, Built, Facts, Part, Recipe, seeded
from actors.recipes.spa3_vlm_base import BASE, base_of, check_base
from actors.recipes.spa3_vlm_baseline import plain_run
from configs import ConfigError
from models.encoders.uniugg import READS
from models.encoders.weights import RANDOM, is_here, resolve_folder
from models.pretrained import StoredTensors, describe_pretrained, empty_weights, load_part
from models.registry import build, spec
from models.spa3r.vlm.adapter import APPEND, CROSS, NONE, make_adapter
from models.spa3r.vlm.model import Spa3VLM
from services.contracts import Split
from services.errors import WeightsError

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

MODELS = "spa3-vlm-"
"""What names of models begin with that this recipe trains."""
LLM, ADAPTER, LANGUAGE = "llm", "adapter", "language"
"""Parts of a run, and what a run can start from: another run's, or (language) a published Qwen2.5-VL."""
GEOMETRY: Mapping[str, tuple[str, str]] = {"vggt": ("views", "tokens"), "append": ("spa3r", "latents"),
                                           "cross": ("spa3r", "latents")}  # fmt: skip
"""``recipe.spa3_vlm.geometry`` -> encoder (key under ``encoders``) and output that the adapter reads."""


def adapter_kind(geometry: str) -> str:
    """The adapter's kind for a value of ``recipe.spa3_vlm.geometry``."""
    return {"none": NONE, "append": APPEND}.get(geometry, CROSS)


class VlmRecipe(Recipe):
    """One role, ``vlm``."""

    def terms(self, role: str) -> tuple[str, ...]:  # noqa: ARG002, D102
        return ("ce",)

    def describe(self, role: str, facts: Facts) -> dict[str, Any]:  # noqa: ARG002
        """A model for the run's tokenizer, vision tower and geometry."""
        _check_model(self.config.model.name)
        self._check_init()
        given = {**self._tokens(facts), **self._geometry(facts), **self.config.model.overrides}
        settings = {**spec(self.config.model.name).defaults, **given}
        language = settings["language"]
        width = int((language.get("text_config") or language)["hidden_size"])
        visual = facts.outputs("visual")["tokens"].shape[-1]
        if visual != width:
            raise ConfigError(
                f"encoders.visual gives tokens of {visual} channels, the language model of {self.config.model.name} is "
                f"{width} wide; they come from the same Qwen2.5-VL: choose encoder=[qwen-vision-...] of that size"
            )
        return given

    def rebuild(self, role: str, settings: Mapping[str, Any]) -> Built:  # noqa: ARG002, D102
        init = {key: value for key, value in self.config.model.init.items() if value != RANDOM}
        settings = {key: value for key, value in settings.items() if key != BASE}
        weights: Mapping[str, Tensor] | None = None
        with seeded(self.config.seed):
            if LANGUAGE in init and LLM not in init:  # billions of values that would be drawn to be overwritten
                with empty_weights():
                    module = _built(self.config.model.name, settings)
                weights = language_weights(init[LANGUAGE], module)
                heads = int(module.language.config.text_config.num_attention_heads)
                module.adapter = make_adapter(module.width, module.latent_channels, heads, module.settings["adapter"])
            else:
                module = _built(self.config.model.name, settings)
        if LLM in init:
            self._check_reads(LLM, init[LLM], module)
            load_part(module, init[LLM], new=(f"{ADAPTER}.*",))
        if module.adapter is not None:
            base = base_of(module, weights, init.get(LLM) or init.get(LANGUAGE) or f"random (seed {self.config.seed})")
            settings |= {BASE: base} if base else {}
        if ADAPTER in init:
            assert module.adapter is not None, "without geometry there is no adapter to start from"
            self._check_base(init[ADAPTER], module, settings.get(BASE))
            self._check_reads(ADAPTER, init[ADAPTER], module)
            load_part(module.adapter, init[ADAPTER])
        return Built(module=module, spec=spec(self.config.model.name).roles[0], settings=settings, weights=weights)

    def stored_dtype(self, role: str) -> torch.dtype:  # noqa: ARG002, D102
        init = self.config.model.init
        language = init.get(LANGUAGE, RANDOM)
        if language == RANDOM or init.get(LLM, RANDOM) != RANDOM:
            return torch.float32
        if not is_here(language):
            return torch.bfloat16  # as all of Qwen2.5-VL is published
        stored = StoredTensors.of(resolve_folder(language))
        return torch.bfloat16 if stored[min(stored)].dtype == torch.bfloat16 else torch.float32

    def parts(self, role: str, module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Part]:  # noqa: ARG002
        """``llm``: language model and adapter together; ``adapter``: the latter alone, where there is one."""
        assert isinstance(module, Spa3VLM), "the recipe makes this model"
        name, reads = self.config.model.name, self._reads()
        about = {BASE: settings[BASE]} if BASE in settings else {}
        settings = {key: value for key, value in settings.items() if key != BASE}
        found = {LLM: Part(module=module, model=name, settings=settings, reads=reads, about=about)}
        if module.adapter is not None:
            alone = {
                "width": module.width,
                "latent_channels": module.latent_channels,
                "heads": int(module.language.config.text_config.num_attention_heads),
                "adapter": dict(module.settings["adapter"]),
            }
            kind = name.replace("spa3-vlm-", "spa3-vlm-adapter-")
            found[ADAPTER] = Part(module=module.adapter, model=kind, settings=alone, reads=reads, about=about)
        return found

    def baseline(self, name: str) -> Baseline | None:  # noqa: D102
        return plain_run(self.config, name)

    def evaluate(  # noqa: D102
        self, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
    ) -> dict[str, Any]:
        from actors.recipes.spa3_vlm_judge import judge

        return judge(self, trained, feed, folder, split=split, device=device)

    # -- building --------------------------------------------------------------------------------------------

    def _reads(self) -> str:
        """Digest of the weights whose outputs the adapter reads."""
        encoder, _ = GEOMETRY.get(self.config.recipe.spa3_vlm.geometry, ("", ""))
        return self.config.encoders[encoder].digest if encoder else ""

    def _tokens(self, facts: Facts) -> dict[str, Any]:
        """Vocabulary and placeholder by the run's tokenizer, and the language model that it starts from."""
        from models.spa3r.vlm.qwen import qwen_settings
        from models.text.tokenizer import BYTES, VISION_TOKENS, check_fits, load_tokenizer, token_id

        name, language = self.config.data.text.tokenizer, self.config.model.init.get(LANGUAGE, RANDOM)
        given: dict[str, Any] = {}
        rows = int(spec(self.config.model.name).defaults["vocab_size"])
        if language != RANDOM and (not facts.assume or is_here(language)):
            given["language"] = qwen_settings(language)
            rows = int({**given["language"], **given["language"].get("text_config", {})}["vocab_size"])
        if name != BYTES and facts.assume and not is_here(name):
            return given
        tokenizer = load_tokenizer(name)
        given["vocab_size"] = max(rows, len(tokenizer))
        given["image_token_id"] = token_id(tokenizer, VISION_TOKENS[1])
        check_fits(tokenizer, {**given, **self.config.model.overrides}["vocab_size"])
        return given

    def _geometry(self, facts: Facts) -> dict[str, Any]:
        """The adapter, and the channels of what it reads."""
        vlm = self.config.recipe.spa3_vlm
        form = vlm.adapter
        adapter = {
            "kind": adapter_kind(vlm.geometry), "heads": form.heads, "projector": form.projector,
            "qk_norm": form.qk_norm, "norm": form.norm, "gate": form.gate,
        }  # fmt: skip
        if vlm.geometry not in GEOMETRY:
            return {"adapter": adapter}
        encoder, output = GEOMETRY[vlm.geometry]
        return {"adapter": adapter, "latent_channels": int(facts.outputs(encoder)[output].shape[-1] or 0)}

    def _check_init(self) -> None:
        known = (LLM, ADAPTER, LANGUAGE)
        for key in self.config.model.init:
            if key not in known:
                raise ConfigError(f"model.init has {key!r}; recipe spa3_vlm starts from {', '.join(known)}")
        if ADAPTER in self.config.model.init and self.config.recipe.spa3_vlm.geometry == "none":
            raise ConfigError("model.init.adapter is for a model with geometry; recipe.spa3_vlm.geometry=none has none")

    def _check_base(self, start: str, module: Spa3VLM, own: Mapping[str, Any] | None) -> None:
        """WeightsError for the adapter of another language model than the run's, or than what that was made from."""
        llm = self.config.model.init.get(LLM, RANDOM)
        earlier = {} if llm == RANDOM else describe_pretrained(llm).get(BASE) or {}
        check_base(
            f"model.init.adapter={start}",
            start,
            module,
            [own, earlier] if own else [],
            remedy="begin with the same one (model.init.language, model.init.llm, or the same seed where it is "
            "random), name the adapter of a run of this one, or leave it out",
        )

    def _check_reads(self, key: str, start: str, module: Spa3VLM) -> None:
        """WeightsError when an adapter was trained on latents of other weights than the run's."""
        learnt, now = describe_pretrained(start).get(READS), self._reads()
        if module.adapter is not None and learnt and now and learnt != now:
            encoder, _ = GEOMETRY[self.config.recipe.spa3_vlm.geometry]
            raise WeightsError(
                f"model.init.{key}={start} was trained on what weights with sha256 {learnt[:16]}... give, "
                f"encoders.{encoder} has {now[:16]}...: to its adapter these latents mean nothing. Name the encoder "
                "that it was trained behind, or start without it"
            )


def _check_model(name: str) -> None:
    """ConfigError for a model of another recipe, before its settings are compared with those of this one."""
    if not name.startswith(MODELS) or name.startswith(f"{MODELS}{ADAPTER}"):
        raise ConfigError(
            f"model.name={name}: recipe spa3_vlm trains a {MODELS}* model with a language model; "
            f"`loom3d models '{MODELS}*'` lists them"
        )


def _built(name: str, settings: Mapping[str, Any]) -> Spa3VLM:
    _check_model(name)
    module = build(name, **settings)
    assert isinstance(module, Spa3VLM), "the models of this name are"
    return module


def language_weights(weights: str, module: Spa3VLM) -> Mapping[str, Tensor]:
    """A published Qwen2.5-VL's tensors by the module's names, read one at a time, without its vision tower.

    The vocabulary may be larger than the stored one: new entries are the mean of the stored ones.
    """
    from models.spa3r.vlm.qwen import HEAD, TEXT, VISION, our_name

    def rename(published: str) -> str:
        name = our_name(published)
        return "" if name.startswith(VISION) else f"language.{name}"

    stored = StoredTensors.of(resolve_folder(weights)).renamed(rename)
    if not len(stored):
        raise WeightsError(f"{weights} holds no tensor of a language model")
    tables = {f"language.{TEXT}embed_tokens.weight", f"language.{HEAD}weight"}
    return GrownTables(stored, tables, module.vocab_size)


class GrownTables(Mapping[str, Tensor]):
    """Stored tensors, of which some tables get more rows."""

    def __init__(self, stored: Mapping[str, Tensor], tables: set[str], rows: int) -> None:
        self._stored, self._tables, self._rows = stored, tables, rows

    def __getitem__(self, name: str) -> Tensor:
        found = self._stored[name]
        missing = self._rows - len(found) if name in self._tables else 0
        if missing <= 0:
            return found
        mean = found.float().mean(0, keepdim=True).to(found.dtype)
        return torch.cat([found, mean.expand(missing, -1)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
