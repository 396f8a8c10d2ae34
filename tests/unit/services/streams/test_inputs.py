"""Several encoders a sample, by recipe and role: columns, chains, what takes another's place, what breaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import ConfigError, RunConfig
from configs.schema import AugmentConfig, UniuggConfig
from models import draws
from models.spec import TensorSpec
from services.contracts import (
    FeatureRequest,
    ImageRef,
    Lookups,
    Record,
    ViewRole,
)
from services.data.images import load_image
from services.errors import DataError
from services.features.client import FeatureClient
from services.features.encode import Encoder
from services.features.requests import feature_requests
from services.features.store import FeatureStore
from services.streams import inputs as declared
from services.streams.collate import TORCH_DTYPES
from services.streams.columns import column_specs
from services.streams.cut import cut_picture
from services.streams.inputs import (
    KindInputs,
    augmented_kinds,
    entry_kinds,
    kind_inputs,
    used_encoders,
    wanted_kinds,
)
from services.streams.loader import LoadedStep
from services.streams.plan import EpochPlan, draw_key, generator
from services.streams.requests import chosen_encoder, column_requests, sample_requests
from services.streams.targets import Targets
from tests.unit.services.streams.joint_world import (
    DEFAULT,
    SIZE,
    VIT,
    Manifest,
    Plan,
    World,
    encoded,
    generation,
    micro,
    pair,
    talk,
)
from tests.unit.services.streams.small_world import HEIGHT, WIDTH, SmallManifest, small_config, write_scenes


def test_each_role_gets_the_columns_and_micro_batches_that_it_declares(
    config: RunConfig, manifest: Manifest, client: FeatureClient
) -> None:
    (llm,) = World(config, manifest).load(client)
    (diffusion,) = World(config, manifest, "diffusion").load(client)
    assert [(m.index, m.kind) for m in llm.micro_batches] == [(0, "generation"), (1, "conversation"), (2, "pair")]
    assert [(m.index, m.kind) for m in diffusion.micro_batches] == [(0, "generation")]
    assert not llm.broken
    batch, other = llm.micro_batches[0].batch, diffusion.micro_batches[0].batch
    assert set(other) == {"latent", "kind", "draw", "id", "weight"}
    assert batch["tokens"].shape == (2, 1, 2, 2, 32)
    assert batch["latent"].shape == (2, 1, 1, 2, 32)
    assert batch["K"].shape == (2, 2, 3, 3)
    assert batch["pose"].shape == (2, 2, 4, 4)
    assert torch.allclose(batch["latent"], other["latent"], atol=1e-6)
    assert "input_ids_lengths" not in batch, "the prompt is the same for all"
    assert not batch["supervised"].any()
    context, target = encoded(config, "vit", manifest, dataclasses.replace(generation(1, 2, 0)))
    assert torch.allclose(batch["tokens"][1], context, atol=1e-6)
    assert not torch.allclose(context, target, atol=1e-3)
    latent = encoded(config, "vae", manifest, generation(1, 2, 0))[1]
    assert torch.allclose(batch["latent"][1], latent, atol=1e-6)


def test_pairs_have_two_views_everywhere(world: World, client: FeatureClient) -> None:
    (step,) = world.load(client)
    batch = step.micro_batches[2].batch
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "tokens": (2, 2, 1, 2, 2, 32), "image": (2, 2, 28, 28, 3), "depth": (2, 2, 28, 28), "K": (2, 2, 3, 3),
        "pose": (2, 2, 4, 4), "matches": (2, 2, 16), "match_valid": (2, 16), "weight": (2,), "draw": (2,),
    }  # fmt: skip
    assert batch["image"].dtype == torch.uint8
    assert (batch["depth"] > 0).float().mean() > 0.8
    assert batch["matches"].max() < 28 * 28


def test_conversations_are_ragged_and_texts_need_no_picture(
    config: RunConfig, world: World, client: FeatureClient
) -> None:
    (step,) = world.load(client)
    batch = step.micro_batches[1].batch
    assert batch["tokens_lengths"].tolist() == [[0], [2], [1]]
    assert batch["tokens"].shape == (3, 2, 1, 2, 2, 32)
    assert (batch["input_ids_lengths"] > 0).all()
    lengths = batch["input_ids_lengths"][:, 0]
    assert lengths[1] > lengths[2] > lengths[0]
    assert batch["supervised"].any(1).all()
    # A whole micro-batch of texts has the column too.
    (texts,) = world.load(client, [micro(1, talk("talk0", 0), talk("talk0", 0, seed=2))])
    only = texts.micro_batches[0].batch
    assert only["tokens"].shape == (2, 1, 1, 2, 2, 32)
    assert only["tokens_lengths"].tolist() == [[0], [0]]
    assert only["weight"].tolist() == [1.0, 1.0]
    # Nobody answers: broken. And what is too long is broken as well.
    (step,) = world.load(client, [micro(0, talk("mute", 1), talk("talk1", 1))])
    assert list(step.broken) == ["small/mute#conversation1"]
    assert step.micro_batches[0].weights == (0.0, 1.0)
    short = dataclasses.replace(config.data.text, max_length=int(lengths[2]))
    small = World(
        dataclasses.replace(config, data=dataclasses.replace(config.data, text=short)), world.manifests["small"]
    )
    (step,) = small.load(client, [micro(1, talk("talk2", 2), talk("talk1", 1))])
    assert list(step.broken) == ["small/talk2#conversation1"]
    assert "data.text.max_length" in step.broken["small/talk2#conversation1"]


def test_a_share_of_the_samples_is_read_by_another_encoder(
    config: RunConfig, manifest: Manifest, world: World, client: FeatureClient
) -> None:
    (feature,) = world.inputs["conversation"].features
    seeds = range(400)
    chosen = [chosen_encoder(feature, talk("talk1", 1, seed)) for seed in seeds]
    assert 160 < chosen.count("reconstruction") < 240
    assert set(chosen) == {"vit", "reconstruction"}
    other = dataclasses.replace(feature, share=0.0)
    assert {chosen_encoder(other, talk("talk1", 1, seed)) for seed in seeds} == {"vit"}
    all_of_them = dataclasses.replace(feature, share=1.0)
    assert {chosen_encoder(all_of_them, talk("talk1", 1, seed)) for seed in seeds} == {"reconstruction"}
    plain, replaced = (talk("talk1", 1, chosen.index(name)) for name in ("vit", "reconstruction"))
    (step,) = world.load(client, [micro(0, plain, replaced)])
    tokens = step.micro_batches[0].batch["tokens"][:, 0]
    assert torch.allclose(tokens[0], encoded(config, "vit", manifest, plain)[0], atol=1e-6)
    assert torch.allclose(tokens[1], encoded(config, "reconstruction", manifest, replaced)[0], atol=1e-6)


class Fake:
    """Features that follow from the key; ``breaks`` names encoders whose answer is a DataError."""

    def __init__(self, outputs: Callable[[str], Mapping[str, TensorSpec]], breaks: Callable[[FeatureRequest], bool]):
        self.outputs, self.breaks = outputs, breaks
        self.ahead: list[str] = []

    def get(self, requests: Sequence[FeatureRequest], step: int, lookups: Lookups | None = None) -> list[Any]:
        return [DataError(f"{r.encoder}: gone") if self.breaks(r) else self._record(r) for r in requests]

    def _record(self, request: FeatureRequest) -> Record:
        from services.contracts import Tensor

        random = np.random.default_rng(int.from_bytes(request.key.digest[:8], "little"))
        return {
            name: Tensor(data=random.random(spec.shape, np.float32), dtype="float32")  # type: ignore[arg-type]
            for name, spec in self.outputs(request.encoder).items()
        }

    def prefetch(self, requests: Sequence[FeatureRequest], step: int) -> None:
        self.ahead += [request.encoder for request in requests]

    def passed(self, step: int) -> None:
        assert step >= 0


def test_a_sample_breaks_on_one_encoder_and_its_neighbours_live(world: World, client: FeatureClient) -> None:
    bad = generation(0)
    fake = Fake(client.outputs, lambda r: r.encoder == "vae" and r.sample_id == bad.id)
    whole = Fake(client.outputs, lambda r: False)
    (step,), (good,) = world.load(fake), world.load(whole)
    assert step.broken == {bad.id: "vae: gone"}
    batch, complete = step.micro_batches[0].batch, good.micro_batches[0].batch
    assert batch["weight"].tolist() == [0.0, 1.0]
    for name in ("tokens", "latent", "K", "input_ids"):
        assert not batch[name][0].any(), name
        assert torch.equal(batch[name][1], complete[name][1])
    assert step.micro_batches[2].weights == (1.0, 1.0)
    # What was asked for ahead is what the columns need: four generation views, three pictures of talks, two pairs.
    assert len(whole.ahead) == 2 * 2 + 3 + 2 * 2
    assert whole.ahead.count("vae") == 2


def test_every_column_is_there_when_all_samples_are_broken(world: World, client: FeatureClient) -> None:
    (good,) = world.load(Fake(client.outputs, lambda r: False))
    (bad,) = world.load(Fake(client.outputs, lambda r: True), [DEFAULT[0], micro(1, talk("talk1", 1)), DEFAULT[2]])
    for one, other in zip(good.micro_batches, bad.micro_batches, strict=True):
        assert one.batch.keys() == other.batch.keys()
        assert other.batch["weight"].sum() == 0
        for name, column in one.batch.items():
            if isinstance(column, torch.Tensor):
                empty = other.batch[name]
                assert empty.dtype == column.dtype
                assert empty.ndim == column.ndim
                assert empty.numel() > 0, f"{name}: a model never meets an empty tensor"
                assert name == "draw" or not empty.any(), name


def test_views_of_a_role_that_a_sample_lacks_break_it(world: World, client: FeatureClient) -> None:
    lacks = dataclasses.replace(generation(2), id="small/lacks#generation0!", views=(ViewRole(index=0),))
    with pytest.raises(DataError, match=r"lacks.* has 0 views of role 'target' where encoder 'vae' reads exactly one"):
        column_requests(lacks, world.manifests["small"], world.config, world.inputs)
    (step,) = world.load(client, [micro(0, generation(0), lacks)])
    assert list(step.broken) == [lacks.id]
    assert step.micro_batches[0].weights == (1.0, 0.0)
    # A view without a pose cannot be in a generation.
    bare = World(world.config, world.manifests["small"])
    scene = bare.manifests["small"]._scenes["scene0"]
    view = dataclasses.replace(scene.views[1], pose=None)
    bare.manifests["small"]._scenes["scene0"] = dataclasses.replace(
        scene, views=(scene.views[0], view, *scene.views[2:])
    )
    (step,) = bare.load(client, [DEFAULT[0]])
    assert "there is no pose" in step.broken[generation(0).id]


def test_a_resumed_loader_gives_what_the_whole_run_gave(world: World, client: FeatureClient) -> None:
    fake = Fake(client.outputs, lambda r: False)
    whole, resumed = world.load(fake, steps=range(4)), world.load(fake, steps=range(2, 4))
    assert [step.step for step in resumed] == [2, 3]
    for one, other in zip(whole[2:], resumed, strict=True):
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            for name, value in a.batch.items():
                same = torch.equal(value, b.batch[name]) if isinstance(value, torch.Tensor) else value == b.batch[name]
                assert same, name
    # Correspondences are drawn anew at every step, and so is what hangs on the column `draw`.
    assert not torch.equal(whole[0].micro_batches[2].batch["matches"], whole[1].micro_batches[2].batch["matches"])


def test_the_draws_of_a_sample_follow_from_seed_step_and_id(world: World, client: FeatureClient) -> None:
    first, second = world.load(client, steps=range(2))
    ids = [sample.id for sample in DEFAULT[0].samples]
    assert first.micro_batches[0].batch["draw"].tolist() == [draw_key(7, 0, name) for name in ids]
    assert second.micro_batches[0].batch["draw"].tolist() == [draw_key(7, 1, name) for name in ids]
    assert first.micro_batches[0].batch["draw"].dtype == torch.int64
    assert first.micro_batches[0].batch["kind"] == "generation"
    drawn = torch.rand(3, generator=generator(7, 1, ids[0], "noise"))
    assert torch.equal(drawn, draws.uniform(second.micro_batches[0].batch["draw"][:1], (3,), "noise")[0])


def test_a_chain_and_what_it_reads_may_be_asked_for_at_once(config: RunConfig, manifest: Manifest) -> None:
    """The chained encoder is asked first: making its record needs one that the same call asks for."""
    view = dataclasses.replace(pair(0), views=(ViewRole(index=0),))
    requests = [r for name in ("vae", "reconstruction", "vit") for r in feature_requests(view, manifest, name, config)]
    impatient = dataclasses.replace(config, service=dataclasses.replace(config.service, deadline_s=1.0))
    with FeatureStore.from_config(config) as store:
        client = FeatureClient(impatient, store)
        client.prefetch(requests[:1], 0)
        answers = client.get(requests, 0)
        assert all(isinstance(answer, dict) for answer in answers)
        assert [r["tokens"].data.shape for r in answers] == [(1, 1, 2, 32), (1, 2, 2, 32), (1, 2, 2, 32)]
        client.close()


def test_features_from_the_cache_are_those_that_were_made(world: World) -> None:
    config = world.config

    def run() -> tuple[list[LoadedStep], float]:
        with FeatureStore.from_config(config) as store:
            client = FeatureClient(config, store)
            loaded = world.load(client, steps=range(2), store=store)
            client.close()
            return loaded, loaded[0].hit_rate

    (made, cold), (read, warm) = run(), run()
    assert cold < 0.5
    assert warm == 1.0
    for a, b in zip(made, read, strict=True):
        for one, other in zip(a.micro_batches, b.micro_batches, strict=True):
            for name, value in one.batch.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, other.batch[name]), name


# -- augmentation -----------------------------------------------------------------------------------------------------


def augmented(config: RunConfig, **settings: Any) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, augment=AugmentConfig(**settings)))


def test_features_of_augmented_pictures_are_made_of_them_and_never_kept(config: RunConfig, manifest: Manifest) -> None:
    jittered = augmented(config, jitter=[0.5, 0.5, 0.5, 0.1], crops=2, min_crop=0.5)
    world, plain = World(jittered, manifest), World(config, manifest)
    assert augmented_kinds(jittered, world.inputs) == {"pair"}
    assert augmented_kinds(config, plain.inputs) == frozenset()
    batches = [DEFAULT[0], DEFAULT[2]]
    with FeatureStore.from_config(jittered) as store:
        client = FeatureClient(jittered, store)
        first, second = world.load(client, batches, steps=range(2), store=store)
        (again,) = world.load(client, batches, steps=range(1, 2), store=store)
        (unchanged,) = plain.load(client, batches, store=store)
        client.sink.flush()
        kept = sum(info.stats.records for info in store.namespaces() if "PooledTokens" not in str(info.identity))
        client.close()
    batch, later = first.micro_batches[1].batch, second.micro_batches[1].batch
    for name in ("image", "depth", "K", "tokens"):
        assert not torch.equal(batch[name], later[name]), f"{name} changes from step to step"
        assert torch.equal(later[name], again.micro_batches[1].batch[name]), f"{name} is the same after a resume"
        assert not torch.equal(batch[name], unchanged.micro_batches[1].batch[name]), name
    assert first.micro_batches[1].weights == (1.0, 1.0)
    # The teacher saw the very pixels that the student sees.
    encoder = Encoder("vit", config)
    pictures = [picture.numpy() for picture in batch["image"].flatten(0, 1)]
    with torch.inference_mode():
        encoder.model.load() if hasattr(encoder.model, "load") else None
        seen = encoder.model([encoder.model.prepare(picture, {}) for picture in pictures])["tokens"]
    encoder.close()
    assert torch.allclose(batch["tokens"].flatten(0, 1), seen, atol=1e-5)
    # Kept are views of the generation batch (three for the ViT), the pairs of the plain run (four) and the depth maps.
    assert kept == 3 + 3 + 4


def test_a_pass_over_a_whole_split_is_not_augmented(config: RunConfig, manifest: Manifest) -> None:
    class Judging(Plan):
        complete = True

    client = FeatureClient(config, None)
    world = World(augmented(config, jitter=[0.9, 0.9, 0.9, 0.1]), manifest)
    (step,) = world.load(client, [DEFAULT[2]], plan=Judging)
    (plain,) = World(config, manifest).load(client, [DEFAULT[2]])
    client.close()
    for name in ("image", "tokens", "depth"):
        assert torch.equal(step.micro_batches[0].batch[name], plain.micro_batches[0].batch[name])
    view = manifest.views("scene0", [0])[0]
    assert np.array_equal(
        plain.micro_batches[0].batch["image"][0, 0].numpy(), cut_picture(load_image(view.image), *SIZE)
    )


def test_an_augmented_pair_without_depth_is_broken(config: RunConfig, manifest: Manifest) -> None:
    scene = manifest._scenes["scene0"]
    flat = tuple(dataclasses.replace(view, depth=None) for view in scene.views)
    manifest._scenes["scene0"] = dataclasses.replace(scene, views=flat)
    client = FeatureClient(config, None)
    (step,) = World(augmented(config, crops=2), manifest).load(client, [DEFAULT[2]])
    client.close()
    assert list(step.broken) == [pair(0).id]
    assert "needs depth and there is none" in step.broken[pair(0).id]


# -- what is declared -------------------------------------------------------------------------------------------------


def test_the_cameras_of_cut_pictures(config: RunConfig, manifest: Manifest) -> None:
    reader = Targets(config, {"small": manifest}, inputs=kind_inputs(config, "llm"))
    (record,) = reader.get([pair(0)])
    assert isinstance(record, dict)
    view = manifest.views("scene0", [0])[0]
    assert view.K is not None
    # 40x30 -> 30x30 in the middle -> 28x28.
    expected = view.K.cropped((WIDTH - HEIGHT) // 2, 0, HEIGHT, HEIGHT).resized(28, 28).matrix()
    assert np.allclose(record["K"].data[0], expected, atol=1e-5)
    assert record["K"].dtype == "float32"
    specs = reader.specs("pair")
    assert {name: tensor.data.shape for name, tensor in record.items()} == {n: s.shape for n, s in specs.items()}
    assert {name: tensor.dtype for name, tensor in record.items()} == {n: s.dtype for n, s in specs.items()}


def test_encoders_that_a_run_asks_for(config: RunConfig) -> None:
    assert wanted_kinds(config) == ("conversation", "generation", "pair")
    assert used_encoders(config, "diffusion") == ("vae",)
    assert set(used_encoders(config)) == {"vit", "reconstruction", "vae"}
    never = dataclasses.replace(
        config, recipe=dataclasses.replace(config.recipe, uniugg=UniuggConfig(reconstruction_share=0.0))
    )
    assert set(used_encoders(never)) == {"vit", "vae"}
    assert entry_kinds(config, "vae") == {"scene"}
    assert entry_kinds(config, "reconstruction") == {"item"}
    assert entry_kinds(config, "vit") == {"scene", "item"}


def replace_encoder(config: RunConfig, name: str, **changes: Any) -> RunConfig:
    encoders = {**config.encoders, name: dataclasses.replace(config.encoders[name], **changes)}
    return dataclasses.replace(config, encoders=encoders)


def test_declarations_that_cannot_be_met_are_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(changed: RunConfig, role: str = "llm") -> None:
        column_specs(changed, kind_inputs(changed, role), FeatureClient(changed, None).outputs)

    other = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, quotas={"view": 1.0}))
    with pytest.raises(ConfigError, match=r"recipe\.quotas gives 'view' a share.*reads \['conversation', 'generation'"):
        check(other)
    with pytest.raises(ConfigError, match=r"encoders\.reconstruction takes the place of encoders\.vit.*\(1, 2, 2, 8\)"):
        check(replace_encoder(config, "reconstruction", arch={"channels": 8}))
    monkeypatch.setitem(
        declared.INPUTS, "two_roles",
        lambda c, r: {"pair": KindInputs(features=(dataclasses.replace(VIT, columns={"mean": "mean"}),))},
    )  # fmt: skip
    pairs = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, quotas={"pair": 1.0}))
    with pytest.raises(ConfigError, match=r"reads 'mean' of encoders\.vit, which gives \['summary', 'tokens'\]"):
        check(pairs)
    monkeypatch.setitem(declared.INPUTS, "two_roles", lambda c, r: {"pair": KindInputs(targets=("colour",))})
    with pytest.raises(ConfigError, match=r"declares the target 'colour'; there are \['camera', 'depth'"):
        Targets(pairs, {}, inputs=kind_inputs(pairs))
    unknown = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, name="none"))
    with pytest.raises(ConfigError, match=r"recipe\.name='none' declares no inputs"):
        kind_inputs(unknown)


@pytest.mark.parametrize(
    ("recipe", "role", "kinds", "encoders"),
    [
        ("uniugg_encoder", "", {"pair", "view", "item"}, ("teacher",)),
        ("uniugg_vae", "", {"pair"}, ("vit",)),
        ("uniugg_align", "llm", {"conversation"}, ("vit",)),
        ("uniugg_joint", "llm", {"generation", "conversation"}, ("vit", "reconstruction")),
        ("uniugg_finetune", "diffusion", {"generation"}, ("vae",)),
        ("uniugg_direct", "llm", {"generation", "conversation"}, ("vit",)),
    ],
)
def test_uniuggs_recipes(config: RunConfig, recipe: str, role: str, kinds: set[str], encoders: tuple[str, ...]) -> None:
    named = {**config.encoders, "teacher": config.encoders["vit"]}
    changed = dataclasses.replace(config, encoders=named, recipe=dataclasses.replace(config.recipe, name=recipe))
    inputs = kind_inputs(changed, role)
    assert set(inputs) == kinds
    found = dict.fromkeys(n for made in inputs.values() for f in made.features for n in f.encoders)
    assert tuple(found) == encoders
    assert all(made.size == (28, 28) for made in inputs.values())
    columns = {column for f in inputs.get("generation", KindInputs()).features for column in f.columns.values()}
    assert columns == {
        "uniugg_joint": {"tokens"}, "uniugg_finetune": {"mean", "logvar"}, "uniugg_direct": {"tokens", "target_tokens"},
    }.get(recipe, set())  # fmt: skip
    without = dataclasses.replace(changed, encoders={"features": config.encoders["vit"]})
    with pytest.raises(ConfigError, match=rf"recipe {recipe} reads encoders\.\w+, which there is not"):
        kind_inputs(without, role)


def test_a_planned_probe_is_read_as_before(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    manifest = SmallManifest(write_scenes(tmp_path / "data"))
    sample = EpochPlan(config, {"small": manifest}).step(0).micro_batches[0].samples[0]
    (request,) = sample_requests(sample, manifest, config)
    assert request == feature_requests(sample, manifest, "features", config)[0]
    assert request.images == (ImageRef(path=manifest.views(sample.item, [sample.views[0].index])[0].image.path),)
    assert TORCH_DTYPES["uint8"] == torch.uint8
