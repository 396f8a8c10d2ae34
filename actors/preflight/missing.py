"""What a run starts from that is not on this machine: parts of earlier runs, published weights, tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from actors.preflight.encoders import EncoderCost
from actors.preflight.trained import PUBLISHED_FAMILIES, is_there, missing_part, part_is_there, run_of
from configs.schema import RunConfig
from models.encoders.uniugg import PARTS
from models.encoders.weights import RANDOM, is_here, resolve_folder
from models.uniugg.diffusion import UNET_FILE, find_unet, unet_file
from services.errors import ModelError, WeightsError
from services.streams.inputs import kind_inputs, recipe_roles, wanted_kinds

#: Recipes whose loss looks at pictures, with LPIPS where it has weights.
_PAINTING = frozenset({"uniugg_encoder", "uniugg_vae"})


def missing(config: RunConfig, encoders: Mapping[str, EncoderCost], *, fetch: bool = False) -> list[str]:
    """One sentence for each input of the run that is not here.

    With ``fetch`` what has a hub name is tried to be had, as the run would. What only nodes of a running cluster need
    to have is not asked for; parts of earlier runs lie under ``storage.root``, which all of them see.
    """
    found = [*_encoder_weights(config, encoders, fetch), *_start(config, fetch)]
    if config.cluster.mode == "attach":
        return found
    return [*found, *_tokenizer(config, fetch), *missing_files(config)]


def _encoder_weights(config: RunConfig, encoders: Mapping[str, EncoderCost], fetch: bool) -> Iterator[str]:
    for name, cost in encoders.items():
        settings, key = config.encoders[name], f"encoders.{name}.weights"
        if settings.family in PUBLISHED_FAMILIES:
            remote = is_there(settings) or config.cluster.mode == "attach"
            if not remote and (reason := _unavailable(key, settings.weights, fetch)):
                yield (
                    f"{key}={settings.weights} is not on this machine{reason}: give the folder that holds its "
                    "model.safetensors or model.pt, or choose a random network such as encoder=vggt-tiny"
                )
        elif settings.family in PARTS:
            if not is_there(settings):
                yield missing_part(key, settings.weights, config)
        elif not cost.available and config.cluster.mode != "attach":
            yield (
                f"{key}={settings.weights} is not on this machine and cannot be fetched: give the folder that holds "
                "its config.json and model.safetensors, or choose a random encoder such as encoder=dinov2-tiny"
            )


def _start(config: RunConfig, fetch: bool) -> Iterator[str]:
    """What ``model.init`` names."""
    for part, weights in config.model.init.items():
        key = f"model.init.{part}"
        if weights == RANDOM:
            continue
        if run_of(weights, config) is not None:
            if not part_is_there(weights):
                yield missing_part(key, weights, config)
        elif config.cluster.mode == "attach":
            continue
        elif reason := _unavailable(part, weights, fetch):
            what = "a diffusion model's folder in diffusers' layout" if part == "unet" else "a folder"
            yield f"{key}={weights} is not on this machine{reason}: give {what}, or start at random: {key}={RANDOM}"


def _unavailable(part: str, weights: str, fetch: bool) -> str:
    """What is to be known about fetching weights that are not here; an empty text for those that are."""
    if find_unet(weights) if part == "unet" else is_here(weights):
        return ""
    if Path(weights).expanduser().exists():
        return f" (the folder holds no {UNET_FILE})"
    if Path(weights).expanduser().is_absolute():
        return " (there is no such folder)"
    if not fetch:
        return ", and is fetched when the run starts where the hub can be reached"
    try:
        unet_file(weights) if part == "unet" else resolve_folder(weights)
    except WeightsError as error:
        return f" ({error})"
    return ""


def _tokenizer(config: RunConfig, fetch: bool) -> Iterator[str]:
    """The tokenizer of a run that reads text."""
    from models.text.tokenizer import BYTES, load_tokenizer

    name, key = config.data.text.tokenizer, "data.text.tokenizer"
    inputs = [kind_inputs(config, role) for role in recipe_roles(config)]
    if name == BYTES or not any(kinds[kind].text for kinds in inputs for kind in wanted_kinds(config) if kind in kinds):
        return
    if not fetch and not is_here(name):
        where = "" if Path(name).is_absolute() else ", and is fetched when the run starts where the hub can be reached"
        yield f"{key}={name} is not on this machine{where}: give the folder of a language model, or {key}={BYTES}"
        return
    try:
        load_tokenizer(name)
    except ModelError as error:
        yield f"{key}={name} cannot be used ({error}): give the folder of a language model, or {key}={BYTES}"


def missing_files(config: RunConfig) -> Iterator[str]:
    """One sentence for each network that losses and metrics look through, and that is not where it is said to be."""
    paths = {
        "evaluate.lpips_weights": config.evaluate.lpips_weights,
        "evaluate.inception_weights": config.evaluate.inception_weights,
        "evaluate.dinov2_weights": config.evaluate.dinov2_weights,
    }
    if config.recipe.name in _PAINTING:
        paths["recipe.uniugg.lpips_weights"] = config.recipe.uniugg.lpips_weights
    for key, path in paths.items():
        if path and not Path(path).expanduser().exists():
            yield f"{key}={path} is not there: give the path of the weights, or leave it empty to do without"
