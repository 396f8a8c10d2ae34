"""Rules over keys of ``recipe``, one message for every violation; called by :mod:`configs.validate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from configs.paths import RUN
from configs.resolve import AUTO, OPTIONS, QK_NORM
from configs.schema import RunConfig

#: Values of single keys.
RECIPE_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "recipe.uniugg.latent": ("sample", "mode"),
    "recipe.uniugg.translation_scale": ("metres", "depth"),
    "recipe.view_set.scheme": ("windows", "walks"),
    "recipe.spa3r.loss": ("l1", "smooth_l1"),
    "recipe.spa3r.loss_views": ("targets", "all"),
    "recipe.spa3r.targets": ("joint", "symmetric"),
    "recipe.spa3r.qk_norm_global": ("auto", "layernorm", "rmsnorm"),
    "recipe.spa3_vlm.geometry": ("none", "vggt", "append", "cross"),
}

#: What Spa3R can predict.
PREDICTED = ("geo", "sem", "clip")


def view_sets(config: RunConfig) -> Iterator[str]:
    """What ``recipe.view_set`` breaks, and what the recipes that draw by it need."""
    sets = config.recipe.view_set
    ranges = {"views": sets.views, "interval": sets.interval}
    for key, ends in ranges.items():
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            yield f"recipe.view_set.{key}={ends} must be [smallest,largest], with 1 <= smallest <= largest"
    for name, source in config.data.sources.items():
        ends = source.interval
        if ends and (len(ends) != 2 or not 1 <= ends[0] <= ends[1]):
            yield f"data.sources.{name}.interval={ends} must be [smallest,largest], 1 <= smallest <= largest, or []"
    if sets.scheme != "walks" and (sets.plans_per_scene or sets.partitions != 1):
        yield (
            f"recipe.view_set.scheme={sets.scheme} has no plans_per_scene and no partitions; "
            "set recipe.view_set.scheme=walks"
        )
    yield from _qk_norms(config)
    if config.recipe.name == "spa3r_pretrain":
        yield from _spa3r(config)
    if config.recipe.name == "spa3_vlm":
        yield from _spa3_vlm(config)


def _qk_norms(config: RunConfig) -> Iterator[str]:
    wanted = config.recipe.spa3r.qk_norm_global
    for name, encoder in config.encoders.items():
        own = encoder.arch.get(QK_NORM, wanted) if QK_NORM in OPTIONS.get(encoder.family, ()) else wanted
        if wanted not in (AUTO, own):
            yield (f"encoders.{name}.arch.{QK_NORM}={own} contradicts recipe.spa3r.qk_norm_global={wanted}; set one")


def _spa3r(config: RunConfig) -> Iterator[str]:
    sets, spa3r = config.recipe.view_set, config.recipe.spa3r
    if sets.scheme != "walks":
        yield f"recipe.view_set.scheme={sets.scheme}: recipe spa3r_pretrain needs walks, whose view 0 is context"
    if len(sets.views) == 2 and sets.views[0] < 2:
        yield (
            f"recipe.view_set.views={sets.views}: a set of one view has nothing to predict; "
            "recipe spa3r_pretrain needs at least 2"
        )
    if sets.target_ratio == 0:
        yield "recipe.view_set.target_ratio=0: recipe spa3r_pretrain needs targets; the paper has 0.5"
    if not spa3r.asymmetric and spa3r.targets == "joint":
        yield (
            "recipe.spa3r.targets=joint contradicts recipe.spa3r.asymmetric=false, which makes two plain passes; "
            "set recipe.spa3r.targets=symmetric"
        )
    unknown = sorted(set(spa3r.predict) - set(PREDICTED))
    if unknown or not spa3r.predict or len(set(spa3r.predict)) != len(spa3r.predict):
        yield f"recipe.spa3r.predict={spa3r.predict} must be some of {', '.join(PREDICTED)}, each once"


def _spa3_vlm(config: RunConfig) -> Iterator[str]:
    baseline = config.recipe.spa3_vlm.baseline
    if baseline not in ("train", "off") and not (baseline.startswith(RUN) and baseline != RUN and "/" not in baseline):
        yield f"recipe.spa3_vlm.baseline={baseline!r} must be train, off, or run:NAME of a run without geometry"
    for name, encoder in config.encoders.items():
        if encoder.side and encoder.family != "qwen2_5_vl":
            yield f"encoders.{name}.side={encoder.side}: pictures of any shape are for qwen2_5_vl, not {encoder.family}"
        if encoder.side % 14:
            yield f"encoders.{name}.side={encoder.side} must be a multiple of 14, or 0"
