"""Our own networks that are frozen in a run: whether they are there, which run makes them, their shapes before that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import EncoderConfig, RunConfig
from configs.validate import ALLOWED, RECIPES
from models.encoders.uniugg import PARTS, PartViT, TrainedPart
from models.encoders.vggt.frozen import OPTIONS as VGGT_OPTIONS
from models.encoders.weights import RANDOM, is_here
from models.errors import ModelError
from models.pretrained import CONFIG, WEIGHTS
from models.spec import TensorSpec

#: Size of a recipe -> size of the parts that its first two phases train, by prefix of their registry names.
SIZES: Mapping[str, Mapping[str, str]] = {
    "uniugg-vit-": {"tiny": "tiny", "small": "small", "paper": "large"},
    "mast3r-": {"tiny": "tiny", "small": "small", "paper": "large"},
    "spatial-vae-": {"tiny": "tiny", "small": "small", "paper": "base"},
    "spa3r-": {"tiny": "tiny", "small": "small", "paper": "base"},
    "vggt-": {"tiny": "tiny", "small": "small", "paper": "1b"},
}

#: Families whose weights are published; no run trains them.
PUBLISHED_FAMILIES = ("mast3r", "vggt_patches", "vggt")


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """A frozen part: its parameters, the work of one input, and what it gives."""

    parameters: int
    flops: int
    outputs: dict[str, TensorSpec]


def is_there(settings: EncoderConfig) -> bool:
    """Whether the weights are random or on this machine."""
    published = settings.family in PUBLISHED_FAMILIES and is_here(settings.weights)
    return settings.weights == RANDOM or published or part_is_there(settings.weights)


def part_is_there(folder: str) -> bool:
    """Whether ``folder`` holds a part that a run has trained."""
    path = Path(folder).expanduser()
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def run_of(folder: str, config: RunConfig) -> tuple[str, str] | None:
    """(run, part) of the folder that ``run:NAME/PART`` stands for; None for any other folder."""
    path, runs = Path(folder), Path(config.storage.root) / "runs"
    if not path.is_relative_to(runs):
        return None
    name, *rest = path.relative_to(runs).parts
    return (name, rest[1]) if len(rest) == 2 and rest[0] == "weights" else None


def how_to_train(run: str) -> str:
    """The command that makes a run of that name: its recipe and size where the name says them."""
    recipe, _, size = run.rpartition("-")
    if recipe in RECIPES and size in ALLOWED["size"]:
        return f"loom3d train recipe={recipe} size={size}"
    return f"loom3d train name={run} recipe=... size=..."


def missing_part(key: str, folder: str, config: RunConfig) -> str:
    """Why the run cannot start: ``key`` names a part that is not there, and what makes it."""
    found = run_of(folder, config)
    if found is None:
        return (
            f"{key}={folder} is not there: give a folder that holds {CONFIG} and {WEIGHTS} (the part of a run: "
            f"run:NAME/PART), or start from {RANDOM}"
        )
    run, part = found
    return f"{key}=run:{run}/{part} is not there ({folder}): train it first with `{how_to_train(run)}`"


def describe(name: str, config: RunConfig, upstream: Mapping[str, TensorSpec] | None) -> PartCost:
    """``encoders.<name>`` of a family that UniUGG trains; one that is not there yet is of the run's size.

    ``upstream`` is what the encoder gives that it reads from. ModelError for a part that does not fit it.
    """
    settings = stand_in(config.encoders[name], config.size)
    if settings.family in ("vggt", "spa3r"):
        return _of_view_sets(name, config)
    if settings.upstream:
        return _behind_vae(name, settings, upstream or {})
    from services.features.encode import build_encoder

    vit = build_encoder(name, dataclasses.replace(config, encoders={name: settings}))
    assert isinstance(vit, PartViT), "families of trained parts that read pictures are ViTs"
    return PartCost(parameters=vit.parameter_count(), flops=vit.flops_per_image(), outputs=dict(vit.outputs()))


def stand_in(settings: EncoderConfig, size: str) -> EncoderConfig:
    """The encoder with random weights of the run's size where its own are not there; any other as it is."""
    if settings.family not in PARTS or is_there(settings):
        return settings
    prefix = PARTS[settings.family][0]
    options = {key: value for key, value in settings.arch.items() if key in VGGT_OPTIONS}
    arch = {"model": prefix + SIZES[prefix][size], **options}
    return dataclasses.replace(settings, weights=RANDOM, arch=arch, digest="")


def _of_view_sets(name: str, config: RunConfig) -> PartCost:
    """An encoder of view sets, or one behind it: the work of a middling set of ``recipe.view_set``."""
    from services.features.encode import build_encoder, ragged_length

    chain, before = {}, name
    while before:
        chain[before] = stand_in(config.encoders[before], config.size)
        before = chain[before].upstream
    encoder: Any = build_encoder(name, dataclasses.replace(config, encoders=chain))
    views = ragged_length(name, config)
    targets: tuple[int, ...] = ()
    divided = config.recipe.quotas.get("view_set", 0) > 0 and config.recipe.spa3r.targets == "joint"
    if config.encoders[name].family == "vggt" and divided:
        targets = (views - int(views * (1 - config.recipe.view_set.target_ratio) + 1e-9),)
    return PartCost(
        parameters=encoder.parameter_count(), flops=encoder.flops(views, *targets), outputs=dict(encoder.outputs())
    )


def _behind_vae(name: str, settings: EncoderConfig, upstream: Mapping[str, TensorSpec]) -> PartCost:
    tokens = upstream["tokens"].shape if "tokens" in upstream else ()
    if len(tokens) != 4:
        raise ModelError(
            f"encoders.{name} reads tokens (layers, h, w, C) of encoders.{settings.upstream}, got {tokens}"
        )
    _, rows, columns, channels = (int(axis or 0) for axis in tokens)
    arch = {"channels": channels, **settings.arch} if settings.weights == RANDOM else settings.arch
    part = TrainedPart(settings.family, settings.weights, arch, settings.seed)
    latent = part.settings["latent_channels"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae: Any = part.make()
        mean, _ = vae.encode(torch.empty(1, rows, columns, part.settings["channels"]))
        if settings.family == "uniugg_reconstruction":
            vae.decode(mean)
    assert isinstance(vae, nn.Module), "a registry entry builds a module"
    if settings.family == "uniugg_vae":
        shape = (latent, 2 * rows, 2 * columns)
        outputs = {output: TensorSpec(shape=shape, dtype="float32", exact=True) for output in ("mean", "logvar")}
    else:
        outputs = {
            output: TensorSpec(shape=upstream[output].shape, dtype=settings.dtype) for output in ("tokens", "summary")
        }
    return PartCost(
        parameters=sum(p.numel() for p in vae.parameters()), flops=int(counter.get_total_flops()), outputs=outputs
    )
