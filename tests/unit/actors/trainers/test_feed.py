"""What a role's feed opens and hands out for recipes of several encoders, over procedural rooms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from actors.trainers.feed import Feed
from configs import ConfigError, RunConfig, load
from services.contracts import Split
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.sink import open_store
from services.streams.loader import LoadedStep
from services.streams.pipeline import FeatureKeys
from services.streams.requests import sample_requests

ROOMS = ["data.rooms.scenes=4", "data.rooms.views=4", "data.rooms.width=64", "data.rooms.height=48"]
RANDOM = ["encoders.vit.weights=random", "model.init={}"]


def config_of(folder: Path, recipe: str, *overrides: str) -> RunConfig:
    return load([f"recipe={recipe}", f"storage.root={folder}", "cluster=inline", *ROOMS, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("rooms")


def first_step(config: RunConfig, role: str = "", complete: bool | None = None) -> tuple[LoadedStep, Feed]:
    """The first step as the role reads it, and the feed, closed."""
    manifests, store = open_sources(config), open_store(config)
    client = FeatureClient(config, store)
    with closing(client), closing(Feed.open(config, manifests, client, store, role=role)) as feed:
        plan = feed.plan(Split.TRAIN, complete=complete)
        with feed.load(plan, stop=1) as loader:
            step = next(loader)
        for micro in step.micro_batches:
            for name, spec in feed.columns[micro.kind].items():
                column = micro.batch[name]
                assert len(spec.shape) + 1 == column.ndim, name
                assert all(want in (None, size) for want, size in zip(spec.shape, column.shape[1:], strict=True)), name
                assert str(column.dtype) == f"torch.{spec.dtype}"
        return step, feed


def test_the_encoders_pretraining_reads_pictures_teacher_and_geometry(folder: Path) -> None:
    config = config_of(folder, "uniugg_encoder")
    step, feed = first_step(config)
    batches = {micro.kind: micro.batch for micro in step.micro_batches}
    assert set(batches) == {"pair", "view"}
    assert not step.broken
    height, width = config.encoders["teacher"].height, config.encoders["teacher"].width
    samples, matches = config.trainer.micro_batch, config.recipe.uniugg.matches
    assert batches["pair"]["image"].shape == (samples, 2, height, width, 3)
    assert batches["pair"]["teacher_tokens"].shape[:3] == (samples, 2, 1)
    assert batches["view"]["image"].shape == (samples, height, width, 3)
    assert "depth" not in batches["view"]
    assert batches["pair"]["matches"].shape == (samples, 2, matches)
    assert batches["pair"]["match_valid"].any(1).all(), "pairs see the same things"
    assert (batches["pair"]["depth"] > 0).float().mean() > 0.9
    rotation = batches["pair"]["pose"][..., :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5)
    # The rows of the pipeline carry the keys that this role asks for.
    planned = feed.plan(Split.TRAIN).step(0)
    keys = FeatureKeys(config)(planned)
    sample = planned.micro_batches[0].samples[0]
    requests = sample_requests(sample, feed.manifests[sample.source], config, feed.inputs)
    assert list(keys[sample.id]) == [request.key for request in requests]
    assert len(keys) == sum(len(batch.samples) for batch in planned.micro_batches)


def test_with_augmentation_the_teacher_sees_what_the_student_sees(folder: Path) -> None:
    jitter = ["data.augment.jitter=[0.4,0.4,0.4,0.1]", "recipe.quotas={pair: 1, view: 0}", "trainer.accumulation=1"]
    plain, _ = first_step(config_of(folder, "uniugg_encoder", *jitter[1:]))
    config = config_of(folder, "uniugg_encoder", *jitter)
    changed, feed = first_step(config)
    judged, _ = first_step(config, complete=True)
    one, other = plain.micro_batches[0].batch, changed.micro_batches[0].batch
    assert one["id"] == other["id"]
    for name in ("image", "teacher_tokens"):
        assert not torch.equal(one[name], other[name]), name
    assert changed.hit_rate == 0.0, "they are never looked for"
    assert FeatureKeys(config)(feed.plan(Split.TRAIN).step(0)) == {}, "nobody knows them beforehand"
    before = dict(zip(one["id"], one["image"], strict=True))
    same = [name for name in judged.micro_batches[0].batch["id"] if name in before]
    for name, image in zip(judged.micro_batches[0].batch["id"], judged.micro_batches[0].batch["image"], strict=True):
        assert name not in before or torch.equal(image, before[name]), "what judges is not augmented"
    assert len(set(same)) == len(same)


def test_the_vaes_training_reads_the_frozen_vit(folder: Path) -> None:
    config = config_of(folder, "uniugg_vae", *RANDOM)
    step, _ = first_step(config)
    batch = step.micro_batches[0].batch
    assert batch["tokens"].shape[:3] == (config.trainer.micro_batch, 2, 1)
    assert batch["tokens"].float().std() > 0
    assert not step.broken


def test_kinds_and_encoders_that_do_not_fit_the_recipe(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"recipe\.quotas gives 'item' a share, which recipe uniugg_vae does not read"
    ):
        first_step(
            config_of(folder, "uniugg_vae", *RANDOM, "recipe.quotas={pair: 1, item: 1}", "trainer.accumulation=2")
        )


def test_both_roles_of_the_joint_stage_read_the_same_samples(folder: Path) -> None:
    config = config_of(
        folder, "uniugg_joint", *RANDOM, "encoders.vae.weights=random", "encoders.reconstruction.weights=random"
    )
    llm, feed = first_step(config, "llm")
    diffusion, _ = first_step(config, "diffusion")
    told = {micro.kind: micro for micro in llm.micro_batches}
    (drawn,) = diffusion.micro_batches
    assert set(told) == {"generation", "conversation"}
    batch = told["generation"].batch
    assert (drawn.kind, drawn.index) == ("generation", told["generation"].index)
    assert drawn.batch["id"] == batch["id"]
    assert torch.equal(drawn.batch["draw"], batch["draw"])
    samples, (height, width) = config.trainer.micro_batch, batch["tokens"].shape[2:4]
    assert drawn.batch["mean"].shape == drawn.batch["logvar"].shape
    assert drawn.batch["mean"].shape[2:] == (2 * height, 2 * width)
    assert batch["K"].shape == (samples, 2, 3, 3)
    assert batch["input_ids"].shape[0] == samples
    assert not batch["supervised"].any()
    answers = told["conversation"].batch
    images = answers["tokens_lengths"][:, 0]
    assert answers["tokens"].shape[1] == images.max()
    assert answers["supervised"].any(1).all()
    # One placeholder a token of an image, images in order.
    for ids, count in zip(answers["input_ids"], images, strict=True):
        assert int((ids == ids[_longest_run(ids)]).sum()) == int(count) * height * width
    assert FeatureKeys(config, "diffusion")(feed.plan(Split.TRAIN).step(0)).keys() == set(drawn.batch["id"])


def _longest_run(ids: torch.Tensor) -> int:
    """A place within the longest run of equal tokens that is no padding."""
    best, length, begin = 0, 0, 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[begin]:
            if ids[begin] != 0 and place - begin > length:
                best, length = begin, place - begin
            begin = place
    return best
