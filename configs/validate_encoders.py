"""Rules over keys of ``encoders``, one message for every violation; called by :mod:`configs.validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from configs.convert import nearest
from configs.resolve import AUTO, OPTIONS, QK_NORM
from configs.schema import EncoderConfig, RunConfig

IMAGE_FAMILIES = (
    "dinov2", "dinov3", "radio", "siglip2", "clip", "uniugg_vit", "mast3r", "vggt_patches", "qwen2_5_vl",
)  # fmt: skip
TEXT_FAMILIES = ("siglip2_text", "clip_text")
RECORD_FAMILIES = ("pooled", "projection", "uniugg_vae", "uniugg_reconstruction", "vggt", "spa3r")
"""Families that read what another encoder made of pictures; vggt of all views of a sample together."""
_HUGGING_FACE = ("dinov2", "dinov3", "radio", "siglip2", "clip")

#: Patch size of a family's published networks, where ``arch`` or the name of the weights says nothing else.
PATCH_SIZE: Mapping[str, int] = {"dinov2": 14, "dinov3": 16, "radio": 16, "vggt_patches": 14, "qwen2_5_vl": 28}


def _encoders(config: RunConfig) -> Iterator[str]:
    for name, encoder in config.encoders.items():
        path = f"encoders.{name}"
        if encoder.family in IMAGE_FAMILIES:
            yield from _layers(path, encoder)
            yield from _patches(path, encoder)
        if encoder.window and (len(encoder.window) != 2 or min(encoder.window) < 1):
            yield f"{path}.window={encoder.window} must be [height,width], such as that of another encoder, or []"
        elif encoder.window and encoder.family not in _HUGGING_FACE:
            yield f"{path}.window={encoder.window} is for {', '.join(_HUGGING_FACE)}; {encoder.family} has none"
        if encoder.side and encoder.family != "qwen2_5_vl":
            yield f"{path}.side={encoder.side}: pictures of any shape are for qwen2_5_vl, not {encoder.family}"
        if encoder.side % 14:
            yield f"{path}.side={encoder.side} must be a multiple of 14, or 0"
        if not encoder.weights:
            yield f"{path}.weights is empty: give random, a folder, or a hub name such as facebook/dinov2-small"
        sizes = encoder.arch.keys() - OPTIONS.get(encoder.family, frozenset())
        if encoder.weights != "random" and sizes and encoder.family not in RECORD_FAMILIES:
            yield (
                f"{path}.arch={encoder.arch} contradicts {path}.weights={encoder.weights}: weights come with their "
                "architecture; remove arch, or set weights=random"
            )
        yield from _upstream(name, encoder, config.encoders)


def _upstream(name: str, encoder: EncoderConfig, encoders: Mapping[str, EncoderConfig]) -> Iterator[str]:
    path = f"encoders.{name}"
    if encoder.family in RECORD_FAMILIES and not encoder.upstream:
        yield f"{path}.upstream is empty: {encoder.family} reads the records of another encoder; name it"
    if encoder.upstream and encoder.family not in RECORD_FAMILIES:
        yield (
            f"{path}.upstream={encoder.upstream!r} contradicts {path}.family={encoder.family}, which reads no "
            f"records; families that do: {', '.join(RECORD_FAMILIES)}"
        )
    if encoder.upstream and encoder.upstream not in encoders:
        yield (
            f"{path}.upstream={encoder.upstream!r} names no encoder."
            f"{nearest(encoder.upstream, encoders)} Encoders: {', '.join(encoders)}"
        )
    elif _is_circular(name, encoders):
        yield f"{path}.upstream={encoder.upstream!r} reads, in the end, its own records; break the circle"


def _layers(path: str, encoder: EncoderConfig) -> Iterator[str]:
    layers = encoder.layers
    if any(layer < 1 for layer in layers) or sorted(set(layers)) != layers:
        yield f"{path}.layers={layers} must be increasing layer numbers counted from 1, each once"
    depth = encoder.arch.get("num_hidden_layers")
    if isinstance(depth, int) and layers and max(layers) > depth:
        yield f"{path}.layers={layers} goes beyond the {depth} layers of {path}.arch.num_hidden_layers"


def _patches(path: str, encoder: EncoderConfig) -> Iterator[str]:
    patch = encoder.arch.get("patch_size", PATCH_SIZE.get(encoder.family))
    if not isinstance(patch, int) or patch < 1:
        return  # the size of the weights is checked when they are opened
    for key, pixels in (("height", encoder.height), ("width", encoder.width)):
        if pixels % patch:
            below, above = pixels // patch * patch, (pixels // patch + 1) * patch
            yield (
                f"{path}.{key}={pixels} is not a multiple of the patch size {patch}; "
                f"the nearest that are: {', '.join(str(n) for n in (below, above) if n)}"
            )


def _is_circular(name: str, encoders: Mapping[str, EncoderConfig]) -> bool:
    seen, current = {name}, encoders[name].upstream
    while current in encoders:
        if current in seen:
            return True
        seen.add(current)
        current = encoders[current].upstream
    return False


def _qk_norms(config: RunConfig) -> Iterator[str]:
    wanted = config.recipe.spa3r.qk_norm_global
    for name, encoder in config.encoders.items():
        own = encoder.arch.get(QK_NORM, wanted) if QK_NORM in OPTIONS.get(encoder.family, ()) else wanted
        if wanted not in (AUTO, own):
            yield (f"encoders.{name}.arch.{QK_NORM}={own} contradicts recipe.spa3r.qk_norm_global={wanted}; set one")


ENCODER_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (_encoders, _qk_norms)
