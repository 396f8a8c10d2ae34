"""Rules over keys of ``recipe``, one message for every violation; called by :mod:`configs.validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from configs.convert import nearest
from configs.paths import RUN
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


def _recipe(config: RunConfig) -> Iterator[str]:
    quotas = config.recipe.quotas
    if not sum(quotas.values()) > 0:
        yield f"recipe.quotas={quotas} gives no kind of micro-batch a share; one must be above 0"
    # Other recipes say in services/streams/inputs.py which encoders they read.
    if config.recipe.name == "probe" and config.recipe.features not in config.encoders:
        names = ", ".join(config.encoders) or "none"
        yield (
            f"recipe.features={config.recipe.features!r} names no encoder."
            f"{nearest(config.recipe.features, config.encoders)} Encoders: {names}"
        )


def _view_sets(config: RunConfig) -> Iterator[str]:
    """What ``recipe.view_set`` breaks, and the intervals of sources that take its place."""
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


def _spa3r(config: RunConfig) -> Iterator[str]:
    if config.recipe.name != "spa3r_pretrain":
        return
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
    if config.recipe.name != "spa3_vlm":
        return
    baseline = config.recipe.spa3_vlm.baseline
    if baseline not in ("train", "off") and not (baseline.startswith(RUN) and baseline != RUN and "/" not in baseline):
        yield f"recipe.spa3_vlm.baseline={baseline!r} must be train, off, or run:NAME of a run without geometry"


RECIPE_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (_recipe, _view_sets, _spa3r, _spa3_vlm)
