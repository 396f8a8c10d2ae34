"""`loom3d show-field`: what a trained Spa3R predicts at views that it has not seen, beside what is there."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import configs
from actors.evaluate import check_unchanged, load_trained
from actors.parts import check_recipe, open_run
from actors.recipes import open_recipe
from actors.recipes.pictures import FOLDER as PICTURES
from actors.recipes.pictures import LIST, Album
from actors.recipes.samples import load_samples
from actors.recipes.spa3r_judge import FieldScores, counted, look
from actors.recipes.spa3r_pictures import Shown, draw_field
from actors.trainers.feed import Feed
from configs import ConfigError, RunConfig
from models.spa3r.model import Spa3R
from services.contracts import PlanSample, Split
from services.data.manifest import Manifest
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
    """Target -> mean cosine at the unseen views of the sets that were read, of ``--scene`` alone where it is given."""


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
    _check_out(out)
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
        for wanted in _micro_batches(feed, split, scene):
            for batch, samples in load_samples(feed, wanted, split=split, batch_size=len(wanted)):
                kept, own = counted(batch, samples, device)
                if own:
                    seen = look(module, kept, config.recipe.spa3r.predict)
                    scores.update(seen)
                    shown += Shown.of(kept, seen, own)
            if len(shown) >= sets:
                break
    if not shown:
        raise DataError(_nothing(manifests, split, scene))
    album = Album(out)
    for example in shown[:sets]:
        draw_field(album, example)
    album.save()
    cosines = {name.removesuffix("/cosine"): row["value"] for name, row in scores.rows().items() if "cosine" in name}
    return Drawn(folder=out / LIST, pictures=len(shown[:sets]), cosines=cosines)


def _check_out(out: Path) -> None:
    """ConfigError for a folder whose ``pictures`` are others than those of an earlier call, which are replaced."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    if (out / "config.yaml").is_file():
        raise ConfigError(f"--out {out} is a run, whose {PICTURES!r} are those of its report; choose another folder")
    if (out / PICTURES).exists() and not (out / LIST).is_file():
        raise ConfigError(
            f"--out {out} holds {PICTURES!r}, which show-field did not write (there is no {LIST} beside it) and would "
            "replace; choose another folder"
        )


def _micro_batches(feed: Feed, split: Split, scene: str) -> Iterator[list[PlanSample]]:
    """The view sets of a split (of ``scene``), in order, as many at once as the plan has in a micro-batch: these have
    one number of views. Others are not read.
    """
    plan = feed.plan(split, complete=True)
    for step in range(plan.steps_per_epoch):
        for batch in plan.step(step).micro_batches:
            found = [sample for sample in batch.samples if sample.weight > 0 and _is_of(sample, scene)]
            if found:
                yield found


def _is_of(sample: PlanSample, scene: str) -> bool:
    return not scene or scene in (sample.item, f"{sample.source}/{sample.item}")


def _nothing(manifests: Mapping[str, Manifest], split: Split, scene: str) -> str:
    """Why there is nothing to draw."""
    splits = {
        (source, entry.id): entry.split
        for source, manifest in manifests.items()
        for entry in manifest.entries
        if entry.split is not None
    }
    found = [own for (source, item), own in splits.items() if scene in (item, f"{source}/{item}")]
    if found and split not in found:
        return f"--scene {scene} is of the {found[0].value} split: add --split {found[0].value}"
    if scene and not found:
        held = [item for (_, item), own in splits.items() if own is split]
        near = difflib.get_close_matches(scene.rpartition("/")[2], held, 3, 0.4) or held[:5]
        return f"--scene {scene}: the run's data has no such scene; the {split.value} split has {', '.join(near)} ..."
    where = f"scene {scene!r} of " if scene else ""
    return f"{where}the {split.value} split has no view set that can be read; see recipe.view_set.views"
