"""`loom3d show-field`: what a trained Spa3R predicts at views that it has not seen, beside what is there."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import configs
from actors.evaluate import check_unchanged, load_trained
from actors.parts import check_recipe, open_run
from actors.recipes import open_recipe
from actors.recipes.base import every_batch
from actors.recipes.pictures import LIST, Album
from actors.recipes.spa3r_judge import FieldScores, counted, look
from actors.recipes.spa3r_pictures import Shown, draw_field
from actors.trainers.feed import Feed
from configs import ConfigError, RunConfig
from models.spa3r.model import Spa3R
from models.spa3r.spec import VIEW_SET
from services.contracts import Split
from services.errors import DataError
from services.features.client import FeatureClient
from services.features.encode import pin_weights
from services.features.sink import open_store
from services.streams.inputs import JUDGE
from services.streams.plan import EpochPlan
from services.telemetry.progress import counting

RECIPES = ("spa3r_pretrain",)
FOLDER = "field"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was written."""

    folder: Path
    pictures: int
    cosines: dict[str, float]
    """Target -> mean cosine at the unseen views of the sets that were read."""


def run(args: argparse.Namespace) -> Drawn:
    """Draw view sets of a run's held-out rooms.

    ConfigError for a run of another recipe, or for keys that decided what was trained; DataError where the split (or
    ``--scene``) has no view set; ResumeError for a run that was not trained.
    """
    if args.sets < 1:
        raise ConfigError(f"--sets {args.sets}: at least one view set is drawn")
    folder, config = open_run(args.run, args.overrides, args.config)
    check_recipe(config, folder, RECIPES, "show a field")
    saved = configs.load(file=folder / "config.yaml")
    check_unchanged(saved, config)
    out = Path(args.out).expanduser().absolute() if args.out else folder / FOLDER
    return draw(pin_weights(config), folder, out, split=Split(args.split), scene=args.scene, sets=args.sets)


def draw(config: RunConfig, folder: Path, out: Path, *, split: Split, scene: str = "", sets: int = 4) -> Drawn:
    """Draw up to ``sets`` view sets of ``split`` (of ``scene``, as SCENE or SOURCE/SCENE) into the folder ``out``."""
    import torch

    from services.data.sources import open_sources

    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = open_store(config)
    with counting("", config.logger.progress) as show:
        manifests = open_sources(config, progress=show)
    with (
        closing(FeatureClient(config, store)) as client,
        closing(Feed.open(config, manifests, client, store, role=JUDGE)) as feed,
    ):
        recipe = open_recipe(config)
        plan = EpochPlan(config, manifests, quarantine=feed.quarantine)
        trained, _ = load_trained(recipe, feed, folder, plan=plan)
        module = trained[recipe.roles[0]].module.to(device)
        assert isinstance(module, Spa3R), "the recipe makes a Spa3R"
        scores, shown = FieldScores(), list[Shown]()
        for batch, samples in every_batch(feed, split, VIEW_SET):
            kept, own = counted(batch, samples, device)
            if not any(_is_of(sample.source, sample.item, scene) for sample in own):
                continue
            seen = look(module, kept, config.recipe.spa3r.predict)
            scores.update(seen)
            shown += [found for found in Shown.of(kept, seen, own) if not scene or _is_of(*_parts(found.name), scene)]
            if len(shown) >= sets:
                break
    if not shown:
        where = f"scene {scene!r} of " if scene else ""
        raise DataError(f"{where}the {split.value} split has no view set that can be read; see recipe.view_set.views")
    album = Album(out)
    for example in shown[:sets]:
        draw_field(album, example)
    album.save()
    cosines = {name.removesuffix("/cosine"): row["value"] for name, row in scores.rows().items() if "cosine" in name}
    return Drawn(folder=out / LIST, pictures=len(shown[:sets]), cosines=cosines)


def _parts(name: str) -> tuple[str, str]:
    source, _, item = name.partition("/")
    return source, item


def _is_of(source: str, item: str, scene: str) -> bool:
    return not scene or scene in (item, f"{source}/{item}")
