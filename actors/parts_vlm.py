"""The trained part of a Spa3-VLM run, opened to be asked: it must belong to the encoders whose outputs it will read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.parts import part_folder
from actors.recipes.spa3_vlm import ADAPTER, GEOMETRY, LLM, adapter_kind
from actors.recipes.spa3_vlm_base import BASE, check_base
from configs import ConfigError, RunConfig
from models.encoders.uniugg import READS
from models.errors import WeightsError
from models.pretrained import CONFIG, describe_pretrained, load_part, load_pretrained
from models.spa3r.vlm.adapter import APPEND, CROSS, NONE
from models.spa3r.vlm.pipeline import Spa3VlmPipeline
from models.text.tokenizer import check_fits
from services.streams.frames import FrameColumns

PARTS = (LLM, ADAPTER)
_HAS: Mapping[str, str] = {
    NONE: "no adapter", CROSS: "an adapter by cross-attention", APPEND: "an adapter that appends tokens",
}  # fmt: skip


def open_vlm(
    config: RunConfig, folder: Path, *, given: Mapping[str, str | Path] | None = None, device: str = "cpu"
) -> Spa3VlmPipeline:
    """Language model and adapter of a run.

    Args:
        config: of the run, its encoders bound to the weights that they have now.
        folder: of the run.
        given: folders, or ``run:NAME/PART``, that replace the run's ``llm`` (with the adapter in it) or ``adapter``.
        device: where it runs.

    Raises:
        ConfigError: a part that there is not, or an adapter for a model without one.
        WeightsError: a part is missing, was trained behind other encoders, or for another base or tokenizer.
    """
    places = {name: part_folder(place, config) for name, place in (given or {}).items()}
    unknown = sorted(set(places) - set(PARTS))
    if unknown:
        raise ConfigError(f"--part {unknown[0]}: a run of recipe {config.recipe.name} has the parts {', '.join(PARTS)}")
    place = places.get(LLM, folder / "weights" / LLM)
    if not (place / CONFIG).is_file():
        raise WeightsError(
            f"part {LLM!r} is missing: {place} holds none. Train it with `loom3d train recipe={config.recipe.name} "
            f"size={config.size}` (to its end: parts are saved when a run is evaluated), or name its folder with "
            f"--part {LLM}=FOLDER"
        )
    pipeline = Spa3VlmPipeline(load_pretrained(place))
    _check_adapter(config, pipeline, place)
    if ADAPTER in places:
        _put_adapter(config, pipeline, places[ADAPTER], place)
    else:
        _check_reads(config, place)
    _check_tokenizer(config, pipeline, place)
    pipeline.llm.to(device)
    return pipeline


def _check_adapter(config: RunConfig, pipeline: Spa3VlmPipeline, place: Path) -> None:
    """WeightsError unless the model reads the geometry that the run gives it, and as the run has it read."""
    geometry, own = config.recipe.spa3_vlm.geometry, kind_of(pipeline.llm.settings)
    if own != adapter_kind(geometry):
        raise WeightsError(
            f"{place} has {_HAS[own]}, the run's recipe.spa3_vlm.geometry={geometry} needs "
            f"{_HAS[adapter_kind(geometry)]}: name the part of a run with the same"
        )


def kind_of(settings: Mapping[str, Any]) -> str:
    """The kind of adapter that a part's settings describe."""
    return str((settings.get("adapter") or {}).get("kind", NONE))


def _put_adapter(config: RunConfig, pipeline: Spa3VlmPipeline, place: Path, llm: Path) -> None:
    """The adapter of folder ``place`` in the place of the one that the part ``llm`` holds."""
    adapter = pipeline.llm.adapter
    if adapter is None:
        raise ConfigError(
            f"--part {ADAPTER}: the model has none (recipe.spa3_vlm.geometry={config.recipe.spa3_vlm.geometry})"
        )
    settings = describe_pretrained(place)["settings"]
    if kind_of(settings) != kind_of(pipeline.llm.settings):
        raise WeightsError(
            f"{place} is {_HAS[kind_of(settings)]}, the run's recipe.spa3_vlm.geometry="
            f"{config.recipe.spa3_vlm.geometry} needs {_HAS[kind_of(pipeline.llm.settings)]}: name that of a run with "
            "the same"
        )
    behind = describe_pretrained(llm).get(BASE) or {}
    remedy = "name that of a run that began with this language model"
    check_base(str(place), place, pipeline.llm, [behind], remedy=remedy)
    _check_reads(config, place)
    load_part(adapter, place)


def _check_reads(config: RunConfig, place: Path) -> None:
    """WeightsError when an adapter was trained on what other weights give."""
    encoder, _ = GEOMETRY.get(config.recipe.spa3_vlm.geometry, ("", ""))
    learnt = describe_pretrained(place).get(READS)
    now = config.encoders[encoder].digest if encoder else ""
    if learnt and now and learnt != now:
        raise WeightsError(
            f"{place} was trained on what weights with sha256 {learnt[:16]}... give, encoders.{encoder} has "
            f"{now[:16]}...: to its adapter these latents mean nothing. Restore that part, train this run again, or "
            f"name another with --part {ADAPTER}=FOLDER"
        )


def _check_tokenizer(config: RunConfig, pipeline: Spa3VlmPipeline, place: Path) -> None:
    """WeightsError unless the model was built for the run's tokenizer."""
    text = FrameColumns(config)
    check_fits(text.tokenizer, pipeline.llm.vocab_size)
    if text.image_token_id != pipeline.llm.image_token_id:
        raise WeightsError(
            f"{place}: the model was trained with image_token_id={pipeline.llm.image_token_id}, tokenizer "
            f"{config.data.text.tokenizer!r} has {text.image_token_id}: set data.text.tokenizer to the one that the "
            "run was trained with"
        )
