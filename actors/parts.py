"""A trained run, opened to be used: where its parts lie, whether they belong together, and the pipeline of them.

The language model and the diffusion are the run's own; the ViT and the VAE are those that its configuration names; the
spatial decoder is the one that was trained together with the VAE, beside which it lies (of the direct variant, which
has no VAE: the one trained with the ViT). A ViT of another family (RADIO, MASt3R's) is no part that a run wrote: it is
built as the feature service builds it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import configs
from actors.driver import run_folder
from actors.recipes.uniugg_unified import LATENTS
from configs import ConfigError, RunConfig
from configs.paths import RUN, moved
from models.encoders.uniugg import READS
from models.encoders.weights import stored_digest
from models.errors import WeightsError
from models.pretrained import CONFIG, describe_pretrained, load_pretrained
from models.text.tokenizer import IMAGE, RAYMAP, check_fits, load_tokenizer, token_id
from models.uniugg.pipeline import PARTS, Pipeline, check_kinds
from services.errors import DataError

if TYPE_CHECKING:
    from models.encoders.base import FrozenEncoder
    from services.streams.text import TextColumns

IMAGINING = ("uniugg_joint", "uniugg_finetune", "uniugg_direct")
"""Recipes whose runs imagine views."""
ANSWERING = ("uniugg_align", *IMAGINING)
"""Recipes whose runs answer questions about pictures."""
FRAMES = ("spa3_vlm",)
"""Recipes whose runs answer questions about frames of a scene; see :mod:`actors.parts_vlm`."""
_FAMILY: Mapping[str, str] = {"vit": "uniugg_vit", "vae": "uniugg_vae"}
"""Encoder of the configuration -> family of the part that a run trains."""
_DESCRIBING = ("recipe", "size")
"""Groups whose choice says which run is meant."""


# -- the run -------------------------------------------------------------------------------------------------


def open_run(run: str, overrides: Sequence[str] = (), file: str | None = None) -> tuple[Path, RunConfig]:
    """A run's folder, and its saved configuration with the keys of ``overrides`` on top.

    Args:
        run: the folder, or the name of a run under ``storage.root``; "" for the run that ``overrides`` describe
            (``name=...``, or ``recipe=... size=...``).
        overrides: of the command line; ``recipe=`` and ``size=`` say which run, single keys change how it is used.
        file: a saved configuration that says which run, as ``--config``.

    Where the storage that it was trained in was moved as a whole, the run is used where it lies now.

    DataError lists similar names when there is no such run; ConfigError when it is described twice.
    """
    if run and file:
        raise ConfigError(f"--run {run} and --config {file} both say which run is meant; keep one")
    keys = [text for text in overrides if run or text.partition("=")[0] not in _DESCRIBING]
    folder = Path(run).expanduser().absolute() if run else run_folder(configs.load(overrides, file=file))
    if run and not (folder / "config.yaml").is_file() and "/" not in run:
        root = [text for text in keys if text.startswith("storage.root=")]
        folder = run_folder(configs.load([f"name={run}", *root]))
    saved = folder / "config.yaml"
    if not saved.is_file():
        near = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        similar = difflib.get_close_matches(folder.name, near, 3, 0.3) or near[:5]
        hint = f"; beside it there are {', '.join(similar)}" if similar else ""
        raise DataError(
            f"{folder} is no run: it has no config.yaml{hint}. Give the folder of a run with --run, or its name= and "
            "storage.root="
        )
    config = configs.load([key for key in keys if not key.startswith("name=")], file=saved)
    return folder, _where_it_lies(config, folder, configs.load(file=saved).storage.root)


def _where_it_lies(config: RunConfig, folder: Path, old: str) -> RunConfig:
    """The configuration of a run whose storage, once at ``old``, was moved: other runs are found beside it."""
    if Path(old).exists():
        return config
    if config.storage.root != old:  # the user says where it is
        return moved(config, old, config.storage.root)
    return moved(config, old, str(folder.parents[1])) if folder.parent.name == "runs" else config


def check_recipe(config: RunConfig, folder: Path, allowed: Sequence[str], wish: str) -> None:
    """ConfigError unless the run's recipe is among ``allowed``; ``wish`` says what it should do."""
    if config.recipe.name not in allowed:
        raise ConfigError(
            f"run {folder.name} is of recipe {config.recipe.name}, which cannot {wish}; runs of these can: "
            f"{', '.join(allowed)}"
        )


# -- its parts -----------------------------------------------------------------------------------------------


def find_parts(
    config: RunConfig,
    folder: Path,
    *,
    imagine: bool = True,
    given: Mapping[str, str | Path] | None = None,
    without: Collection[str] = (),
) -> dict[str, Path]:
    """Name of each part (see :data:`models.uniugg.pipeline.PARTS`) -> its folder. Encoders of other families have none.

    Args:
        config: of the run.
        folder: of the run.
        imagine: all that imagining needs; else what answering needs.
        given: folders, or ``run:NAME/PART``, that replace those of the run.
        without: parts that are not looked for.

    WeightsError names the first part that is not there and the recipe that trains it.
    """
    given = given or {}
    unknown = sorted(set(given) - set(PARTS))
    if unknown:
        raise ConfigError(f"--part {unknown[0]}: a run has the parts {', '.join(PARTS)}")
    direct = config.recipe.name == "uniugg_direct"
    decoder = ("vit" if direct else "vae", "spatial_decoder")
    places = {
        "encoder": lambda: _encoder(config, "vit"),
        "llm": lambda: folder / "weights" / "llm",
        "spatial_decoder": lambda: _encoder(config, decoder[0]).with_name(decoder[1]),
        "vae": lambda: _encoder(config, "vae"),
        "diffusion": lambda: folder / "weights" / "diffusion",
    }
    wanted = ["encoder", "llm"]
    if imagine:
        wanted += ["spatial_decoder"] if direct else ["spatial_decoder", "vae", "diffusion"]
    found: dict[str, Path] = {}
    for name in wanted:
        if name in without or (name == "encoder" and name not in given and not _is_own_vit(config)):
            continue
        found[name] = part_folder(given[name], config) if name in given else places[name]()
        if not (found[name] / CONFIG).is_file():
            raise WeightsError(
                f"part {name!r} is missing: {found[name]} holds none. Train it with `loom3d train "
                f"recipe={_trained_by(name, config)} size={config.size}` (to its end: parts are saved when a run is "
                f"evaluated), or name its folder with --part {name}=FOLDER"
            )
    return found


def _is_own_vit(config: RunConfig) -> bool:
    """Whether the ViT is one that UniUGG trains; a run without any is none of these recipes, which is said later."""
    return "vit" not in config.encoders or config.encoders["vit"].family == _FAMILY["vit"]


def _trained_by(name: str, config: RunConfig) -> str:
    """The recipe that trains a part, for messages."""
    if name in ("llm", "diffusion"):
        return config.recipe.name if config.recipe.name in IMAGINING else "uniugg_finetune"
    if name == "spatial_decoder":
        return "uniugg_encoder" if config.recipe.name == "uniugg_direct" else "uniugg_vae"
    return {"encoder": "uniugg_encoder", "vae": "uniugg_vae"}[name]


def _encoder(config: RunConfig, name: str) -> Path:
    """Folder of the trained part behind an encoder of the configuration."""
    family, settings = _FAMILY[name], config.encoders.get(name)
    if settings is None:
        raise ConfigError(f"the run has no encoder {name!r} (encoders.{name}); it was not trained with one")
    if settings.family != family:
        raise ConfigError(
            f"encoders.{name}.family={settings.family}: beside a {family} lies the spatial decoder that reads its "
            "tokens, beside this one none; name one that was trained on them (recipe=uniugg_vae) with "
            "--part spatial_decoder=FOLDER"
        )
    if settings.weights == "random":
        raise WeightsError(
            f"encoders.{name}.weights=random: nothing was trained there that could see or draw; train "
            f"recipe={_trained_by('encoder' if name == 'vit' else 'vae', config)} first"
        )
    return Path(settings.weights)


def part_folder(place: str | Path, config: RunConfig) -> Path:
    """The folder that ``--part`` names: a folder, or ``run:NAME/PART`` of a part that a run left."""
    text = str(place)
    if text.startswith(RUN):
        name, _, part = text.removeprefix(RUN).partition("/")
        return Path(config.storage.root, "runs", name, "weights", part)
    return Path(text).expanduser().absolute()


def _other_vit(config: RunConfig) -> FrozenEncoder:
    """The run's ViT of another family, with its weights. WeightsError when they are not here, or not the run's."""
    from models.encoders.base import InputKind
    from services.features.encode import build_encoder

    found: Any = build_encoder("vit", config)
    if found.input_kind is not InputKind.IMAGE:
        raise ConfigError(
            f"encoders.vit.family={config.encoders['vit'].family} reads {found.input_kind}s; a picture can be shown to "
            "encoders of images only"
        )
    return found.load()


def _check_together(
    config: RunConfig, parts: Mapping[str, Path], given: Collection[str], vit: FrozenEncoder | None
) -> None:
    """WeightsError when a part was trained on another ViT, or again after the run had used it (but for ``given``).

    ``vit`` is one that is no part.
    """
    pinned = {"encoder": config.encoders["vit"].digest}
    if "vae" in config.encoders:
        pinned["vae"] = config.encoders["vae"].digest
    digests = {name: stored_digest(parts[name]) for name in ("encoder", "vae") if name in parts}
    if vit is not None:
        digests["encoder"] = str(vit.identity()["weights"])
    for name, digest in digests.items():
        if name not in given and pinned.get(name, digest) not in ("", digest):
            raise WeightsError(
                f"{parts[name]} has sha256 {digest[:16]}..., the run was trained with {pinned[name][:16]}...: that "
                "part was trained again since, or replaced; train this run again too, or name the part that it was "
                f"trained with by --part {name}=FOLDER"
            )
    for name in ("vae", "spatial_decoder", "llm"):
        reads = describe_pretrained(parts[name]).get(READS) if name in parts else None
        if reads and reads != digests.get("encoder", reads):
            raise WeightsError(
                f"{parts[name]} was trained on tokens of a ViT with sha256 {str(reads)[:16]}..., the run's has "
                f"{digests['encoder'][:16]}...; train recipe={_trained_by(name, config)} again behind this ViT"
            )


# -- opened --------------------------------------------------------------------------------------------------


def open_pipeline(
    run: str | Path | RunConfig,
    *,
    folder: Path | None = None,
    imagine: bool = True,
    given: Mapping[str, str | Path | nn.Module] | None = None,
    device: str = "cpu",
) -> Pipeline:
    """The trained parts of a run together, in eval mode.

    Args:
        run: its folder, or its configuration.
        folder: of the run, beside a configuration; by default ``<storage.root>/runs/<name>``.
        imagine: views will be imagined; else encoder and LLM are enough.
        given: folders, ``run:NAME/PART`` or modules in memory that replace those of the run.
        device: where it runs.

    Raises:
        DataError: there is no such run.
        ConfigError: its recipe trains nothing of this kind.
        WeightsError: a part is missing, does not belong to the others, or was made for another tokenizer.
    """
    if isinstance(run, RunConfig):
        folder, config = folder or run_folder(run), run
    else:
        folder, config = open_run(str(run))
    check_recipe(
        config, folder, IMAGINING if imagine else ANSWERING, "imagine views" if imagine else "answer questions"
    )
    modules = {name: part for name, part in (given or {}).items() if isinstance(part, nn.Module)}
    places = {name: part for name, part in (given or {}).items() if not isinstance(part, nn.Module)}
    found = find_parts(config, folder, imagine=imagine, given=places, without=modules)
    other = None if "encoder" in {*found, *modules} else _other_vit(config)
    _check_together(config, found, places, other)
    loaded = {name: load_pretrained(place) for name, place in found.items()} | modules
    if other is not None:
        loaded["encoder"] = other
    check_kinds(loaded, found)
    check_tokenizer(config, loaded["llm"], found.get("llm", folder))
    if "diffusion" in loaded and "vae" in loaded:
        check_latents(loaded["diffusion"], loaded["vae"])
    size = (config.encoders["vit"].height, config.encoders["vit"].width)
    text = text_columns(config, loaded["llm"])
    return Pipeline(
        {name: module.to(device) for name, module in loaded.items()},
        prompt=text.generation()["input_ids"].data.tolist(),
        size=size,
        translation_scale=config.recipe.uniugg.translation_scale,
        imagines=imagine,
    )


def text_columns(config: RunConfig, llm: nn.Module) -> TextColumns:
    """What turns text into tokens as in training: as many placeholders an image as its picture has patches."""
    from services.streams.text import TextColumns

    vit, patch = config.encoders["vit"], int(llm.patch)  # type: ignore[arg-type]
    return TextColumns(config, (vit.height // patch) * (vit.width // patch))


def check_latents(diffusion: nn.Module, vae: nn.Module) -> None:
    """WeightsError unless the diffusion was trained on the latents of this VAE, which it keeps the statistics of."""
    mine, theirs = ({name: getattr(part, name) for name in LATENTS} for part in (diffusion, vae))
    for name in LATENTS:
        if mine[name].shape != theirs[name].shape or not torch.allclose(mine[name].cpu(), theirs[name].cpu()):
            raise WeightsError(
                f"the diffusion was trained on latents with {name}={mine[name].tolist()}, those of the VAE have "
                f"{theirs[name].tolist()}: they do not belong together; train the run again behind this VAE, or name "
                "the VAE that it was trained behind with --part vae=FOLDER"
            )


def check_tokenizer(config: RunConfig, llm: nn.Module, where: Path) -> None:
    """WeightsError unless the LLM was built for the tokenizer of the configuration."""
    tokenizer = load_tokenizer(config.data.text.tokenizer)
    check_fits(tokenizer, int(llm.vocab_size))  # type: ignore[arg-type]
    for token, attribute in ((IMAGE, "image_token_id"), (RAYMAP, "ray_token_id")):
        wanted, found = token_id(tokenizer, token), getattr(llm, attribute)
        if wanted != found:
            raise WeightsError(
                f"{where}: the LLM was trained with {attribute}={found}, tokenizer "
                f"{config.data.text.tokenizer!r} has {wanted} for {token}: set data.text.tokenizer to the one that "
                "the run was trained with"
            )
