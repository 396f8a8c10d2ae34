"""What a micro-batch of each kind is made of: features of which encoders under which columns, targets, text.

Every recipe declares it here, for each of its roles; the loader, prefetch, `features warm` and preflight read nothing
else to know what a sample needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from configs import ConfigError, RunConfig
from configs.roles import ROLES

ALL, CONTEXT, TARGET = "all", "context", "target"

JUDGE = "judge"
"""In the place of a role: what a recipe is judged by, where that is more than what its roles train on."""

_AUGMENTED = frozenset({"pair", "view", "item"})
ITEM_KINDS = frozenset({"item", "conversation"})
"""Kinds that are made of items, not of scenes."""
_VIEW_AXES: Mapping[str, tuple[int | None, ...]] = {"view": (), "pair": (2,), "generation": (2,)}


@dataclass(frozen=True, kw_only=True)
class FeatureInput:
    """Outputs of one encoder for some views of a sample, as columns."""

    encoder: str
    """Key under ``encoders``."""
    columns: Mapping[str, str]
    """Output of the encoder -> name of the column; outputs that are not named are left out."""
    views: str = ALL
    """all | context | target: the views, by role, that are encoded."""
    plain: bool = False
    """An encoder of view sets is given every view as context: its features do not depend on the partition then, and one
    record serves all partitions of a set."""
    stacked: bool = True
    """The column has the views as its first axis (after the samples); False for exactly one view without that axis."""
    flat: bool = False
    """The column holds the last axis of all views' tensors, one after the other (N, C), whatever grids they have."""
    grids: str = ""
    """Of a flat column of grids of tokens: name of a column with their rows and columns, int64 (views, 2)."""
    instead: str = ""
    """Another encoder with the same outputs that takes this one's place for a share of the samples; "" for none."""
    share: float = 0.0
    """That share; which samples it meets follows from the sample's seed, and so changes from epoch to epoch."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Every encoder that may be asked."""
        return (self.encoder, self.instead) if self.instead and self.share > 0 else (self.encoder,)


@dataclass(frozen=True, kw_only=True)
class KindInputs:
    """A kind of sample as one role of a recipe reads it."""

    features: tuple[FeatureInput, ...] = ()
    targets: tuple[str, ...] = ()
    """Readers of ``services.streams.targets``: depth | labels | scene_type | image | camera | matches | roles | size.
    """
    size: tuple[int, int] = (0, 0)
    """(height, width) at which pictures and targets are cut and resized."""
    text: bool = False
    """Token columns of the conversation: input_ids, supervised."""
    frames: bool = False
    """The text has a block for each picture, as long as its grid; and segments, several conversations to a sample."""
    appended: str = ""
    """With frames: a column whose rows stand at placeholders of their own behind the last picture's."""


Inputs = Mapping[str, KindInputs]
"""Kind -> what it is made of."""


def view_axes(kind: str) -> tuple[int | None, ...]:
    """The axes that count views in a column of ``kind``: none, a fixed number, or any number (None)."""
    return _VIEW_AXES.get(kind, (None,))


def _encoder_size(config: RunConfig, name: str) -> tuple[int, int]:
    """(height, width) of what encoder ``name`` reads. ConfigError when there is none of that name."""
    if name not in config.encoders:
        raise ConfigError(
            f"recipe {config.recipe.name} reads encoders.{name}, which there is not; the config has "
            f"{sorted(config.encoders)}: choose an option of the group encoder that has it (configs/encoder), or "
            f"describe it with encoders.{name}.family and encoders.{name}.weights"
        )
    return config.encoders[name].height, config.encoders[name].width


def _probe(config: RunConfig, role: str) -> dict[str, KindInputs]:  # noqa: ARG001
    name = config.recipe.features
    size, columns = _encoder_size(config, name), {"tokens": "tokens", "summary": "summary"}
    targets = ("depth", "labels", "scene_type")
    sets = FeatureInput(encoder=name, columns=columns)
    view = FeatureInput(encoder=name, columns=columns, stacked=False)
    return {
        "view": KindInputs(features=(view,), targets=targets, size=size),
        "view_set": KindInputs(features=(sets,), targets=targets, size=size),
        "item": KindInputs(features=(sets,), size=size),
    }


_PAIR_TARGETS = ("image", "depth", "camera", "matches")


def _uniugg_encoder(config: RunConfig, role: str) -> dict[str, KindInputs]:  # noqa: ARG001
    """P1: pictures for the student, the teacher's features to compare with, geometry for pairs alone."""
    size, columns = _encoder_size(config, "teacher"), {"tokens": "teacher_tokens", "summary": "teacher_summary"}
    teacher = FeatureInput(encoder="teacher", columns=columns)
    one = FeatureInput(encoder="teacher", columns=columns, stacked=False)
    return {
        "pair": KindInputs(features=(teacher,), targets=_PAIR_TARGETS, size=size),
        "view": KindInputs(features=(one,), targets=("image",), size=size),
        "item": KindInputs(features=(teacher,), targets=("image",), size=size),
    }


def _uniugg_vae(config: RunConfig, role: str) -> dict[str, KindInputs]:  # noqa: ARG001
    """P2: both views' tokens of the frozen ViT, and what the spatial losses compare with."""
    vit = FeatureInput(encoder="vit", columns={"tokens": "tokens"})
    return {"pair": KindInputs(features=(vit,), targets=_PAIR_TARGETS, size=_encoder_size(config, "vit"))}


def _conversation(config: RunConfig, role: str) -> KindInputs:
    """Image tokens and text; while training, a share of the conversations sees what the VAE makes of the tokens."""
    size, share = _encoder_size(config, "vit"), config.recipe.uniugg.reconstruction_share
    instead = "reconstruction" if share > 0 and config.recipe.name in _WITH_VAE and role != JUDGE else ""
    if instead:
        _encoder_size(config, instead)
    vit = FeatureInput(encoder="vit", columns={"tokens": "tokens"}, instead=instead, share=share if instead else 0.0)
    return KindInputs(features=(vit,), size=size, text=True)


_WITH_VAE = frozenset({"uniugg_joint", "uniugg_finetune"})
"""Recipes that come after the VAE was trained and build on it."""


def _reference(config: RunConfig, *more: FeatureInput) -> KindInputs:
    """A generation sample as the LLM reads it: the context view's tokens, both cameras, the prompt."""
    context = FeatureInput(encoder="vit", columns={"tokens": "tokens"}, views=CONTEXT, stacked=False)
    scaled = config.recipe.uniugg.translation_scale == "depth"
    targets = ("camera", "depth") if scaled else ("camera",)
    return KindInputs(features=(context, *more), targets=targets, size=_encoder_size(config, "vit"), text=True)


def _judged(config: RunConfig, *more: FeatureInput) -> KindInputs:
    """A generation sample as it is judged: the reference as the LLM reads it, and all that is known of both views."""
    reference = _reference(config, *more, _TARGET_TOKENS)
    return dataclasses.replace(reference, targets=("image", "depth", "camera"))


_TARGET_TOKENS = FeatureInput(encoder="vit", columns={"tokens": "target_tokens"}, views=TARGET, stacked=False)


def _uniugg_align(config: RunConfig, role: str) -> dict[str, KindInputs]:
    return {"conversation": _conversation(config, role)}


def _uniugg_joint(config: RunConfig, role: str) -> dict[str, KindInputs]:
    """P3, stages ii and iii: the reference goes through the LLM, the target is what the diffusion learns."""
    if role == "llm":
        return {"generation": _reference(config), "conversation": _conversation(config, role)}
    _encoder_size(config, "vae")
    target = FeatureInput(encoder="vae", columns={"mean": "mean", "logvar": "logvar"}, views=TARGET, stacked=False)
    if role == JUDGE:
        return {"generation": _judged(config, target), "conversation": _conversation(config, role)}
    return {"generation": KindInputs(features=(target,), size=_encoder_size(config, "vit"))}


def _uniugg_direct(config: RunConfig, role: str) -> dict[str, KindInputs]:
    """The variant without VAE and diffusion: the LLM regresses the target view's tokens."""
    reference = _judged(config) if role == JUDGE else _reference(config, _TARGET_TOKENS)
    return {"generation": reference, "conversation": _conversation(config, role)}


_SEMANTIC: Mapping[str, str] = {"sem": "semantic", "clip": "clip"}
"""What Spa3R predicts beside VGGT's features -> key under ``encoders``, and name of the column."""


def _spa3r(config: RunConfig, role: str) -> dict[str, KindInputs]:
    """Sets of views: VGGT's features, cameras and depth of all views, and what else is to be predicted there.

    ``joint``: one pass, in which targets see everything and the context itself alone. ``symmetric``: a plain pass over
    all views, and one over the context alone.
    """
    spa3r, size = config.recipe.spa3r, _encoder_size(config, "patches")
    plain = spa3r.targets == "symmetric"
    _encoder_size(config, "views")
    columns = {name: name for name in ("tokens", "pose", *(("depth",) if spa3r.depth_probe or role == JUDGE else ()))}
    features = [FeatureInput(encoder="views", columns=columns, plain=plain)]
    if plain:
        features.append(FeatureInput(encoder="views", columns={"tokens": "context_tokens"}, views=CONTEXT))
    for name, encoder in _SEMANTIC.items():
        if name in spa3r.predict:
            _encoder_size(config, encoder)
            features.append(FeatureInput(encoder=encoder, columns={"tokens": encoder}))
    targets = ("roles", "size", "image") if role == JUDGE else ("roles", "size")
    return {"view_set": KindInputs(features=tuple(features), targets=targets, size=size)}


def _spa3_vlm(config: RunConfig, role: str) -> dict[str, KindInputs]:  # noqa: ARG001
    """Merged visual tokens of every frame, and what all frames together are made of: latents, or VGGT's features."""
    geometry, size = config.recipe.spa3_vlm.geometry, _encoder_size(config, "visual")
    features = [FeatureInput(encoder="visual", columns={"tokens": "visual"}, flat=True, grids="grids")]
    if geometry == "vggt":
        _encoder_size(config, "views")
        features.append(FeatureInput(encoder="views", columns={"tokens": "latents"}, plain=True, flat=True))
    elif geometry != "none":
        _encoder_size(config, "spa3r")
        features.append(FeatureInput(encoder="spa3r", columns={"latents": "latents"}, plain=True))
    appended = "latents" if geometry == "append" else ""
    made = KindInputs(features=tuple(features), size=size, text=True, frames=True, appended=appended)
    return {"conversation": made}


#: Recipe -> (config, role) -> inputs by kind.
INPUTS: dict[str, Callable[[RunConfig, str], dict[str, KindInputs]]] = {
    "probe": _probe,
    "uniugg_encoder": _uniugg_encoder,
    "uniugg_vae": _uniugg_vae,
    "uniugg_align": _uniugg_align,
    "uniugg_joint": _uniugg_joint,
    "uniugg_finetune": _uniugg_joint,
    "uniugg_direct": _uniugg_direct,
    "spa3r_pretrain": _spa3r,
    "spa3_vlm": _spa3_vlm,
}


def recipe_roles(config: RunConfig) -> tuple[str, ...]:
    """Roles of the recipe; those of ``cluster.roles`` for one that no table names."""
    return ROLES.get(config.recipe.name) or tuple(config.cluster.roles)


def kind_inputs(config: RunConfig, role: str = "") -> Inputs:
    """What every kind of the recipe is made of for ``role`` (by default the recipe's only, or first, role).

    ConfigError for a recipe without a declaration, or for an encoder that is not described.
    """
    if config.recipe.name not in INPUTS:
        raise ConfigError(f"recipe.name={config.recipe.name!r} declares no inputs; there are {sorted(INPUTS)}")
    return INPUTS[config.recipe.name](config, role or recipe_roles(config)[0])


def wanted_kinds(config: RunConfig) -> tuple[str, ...]:
    """Kinds that ``recipe.quotas`` gives a share, sorted. ConfigError when no role of the recipe reads one of them."""
    wanted = tuple(sorted(kind for kind, share in config.recipe.quotas.items() if share > 0))
    known = {kind for role in recipe_roles(config) for kind in kind_inputs(config, role)}
    for kind in wanted:
        if kind not in known:
            raise ConfigError(
                f"recipe.quotas gives {kind!r} a share, which recipe {config.recipe.name} does not read; it reads "
                f"{sorted(known)}"
            )
    return wanted


def used_encoders(config: RunConfig, role: str | None = None) -> tuple[str, ...]:
    """Keys under ``encoders`` that the run asks for, of one role or (None) of all, each once, in order of first use.

    Those that they read from in turn are not among them.
    """
    wanted = wanted_kinds(config)
    names: dict[str, None] = {}
    for name in recipe_roles(config) if role is None else (role,):
        inputs = kind_inputs(config, name)
        for kind in wanted:
            for feature in inputs[kind].features if kind in inputs else ():
                names |= dict.fromkeys(feature.encoders)
    return tuple(names)


def needed_encoders(config: RunConfig) -> tuple[str, ...]:
    """Keys under ``encoders`` that training and judging ask for, and those that they read from; all of them of a recipe
    that declares nothing.
    """
    if config.recipe.name not in INPUTS:
        return tuple(config.encoders)
    found: dict[str, None] = {}
    for role in (*recipe_roles(config), JUDGE):
        for kind in kind_inputs(config, role).values():
            for name in (name for feature in kind.features for name in feature.encoders):
                while name and name not in found and name in config.encoders:
                    found[name] = None
                    name = config.encoders[name].upstream
    return tuple(found)


def augmented_kinds(config: RunConfig, inputs: Inputs) -> frozenset[str]:
    """Kinds whose pictures ``data.augment`` changes while training: those that a trained network reads itself.

    What frozen encoders make of them is then made anew each time, from the changed pictures, and not cached.
    """
    with_pixels = frozenset(kind for kind in _AUGMENTED if kind in inputs and "image" in inputs[kind].targets)
    if not with_pixels:
        return with_pixels
    from services.data.augment import Augment

    return with_pixels if Augment(config.data.augment).active else frozenset()


def behind(name: str, config: RunConfig) -> Iterator[str]:
    """``name`` and, one after the other, the encoders that it reads from; unknown ones end it."""
    while name in config.encoders:
        yield name
        name = config.encoders[name].upstream


def wanted_features(config: RunConfig) -> Iterator[tuple[str, FeatureInput]]:
    """(kind, features of an encoder) of every kind that the run draws, over all roles."""
    for role in recipe_roles(config):
        inputs = kind_inputs(config, role)
        for kind in wanted_kinds(config):
            for feature in inputs[kind].features if kind in inputs else ():
                yield kind, feature


def entry_kinds(config: RunConfig, encoder: str) -> frozenset[str]:
    """Kinds of entries of a manifest (scene, item) whose pictures ``encoder`` reads in this run; those of the encoders
    that read from it, where the recipe declares only these.
    """
    direct, through = set(), set()
    for kind, feature in wanted_features(config):
        entry = "item" if kind in ITEM_KINDS else "scene"
        if encoder in feature.encoders:
            direct.add(entry)
        elif any(encoder in behind(name, config) for name in feature.encoders):
            through.add(entry)
    return frozenset(direct or through)
