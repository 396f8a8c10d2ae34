"""View sets from the plan to the batch, on a tiny VGGT: keys, what is shared and cached, columns, faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import configs
from actors.preflight.sizes import DataSize
from actors.preflight.view_sets import describe_choices, drawn
from configs import ConfigError, RunConfig
from services.contracts import ImageRef, PlanSample, Role, Scene, View, ViewRole
from services.errors import DataError
from services.features.client import FeatureClient
from services.features.encode import Encoder, as_stored
from services.features.maintain import warm
from services.features.requests import feature_requests, view_requests
from services.features.sink import open_store
from services.features.view_sets import set_requests
from services.features.why import why
from services.streams.collate import Collate
from services.streams.columns import column_specs
from services.streams.inputs import kind_inputs, used_encoders
from services.streams.loader import Loader
from services.streams.plan import EpochPlan
from services.streams.requests import column_requests
from services.streams.targets import Targets
from tests.support.encoders import Counting
from tests.support.films import write_video
from tests.unit.services.streams.small_world import SmallManifest

SCENES, VIEWS = 4, 6


class Manifest(SmallManifest):
    """With what `features why` looks for."""

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, item: str) -> bool:
        return any(entry.id == item for entry in self.entries)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder, rng, scenes = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0), []
    for number in range(SCENES):
        views = []
        for place in range(VIEWS):
            path = folder / f"{number}-{place}.png"
            # Two shapes of picture: all are cut to the encoder's.
            size = (30, 40) if place % 2 else (36, 40)
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
            views.append(View(image=ImageRef(path=str(path))))
        scenes.append(Scene(id=f"room{number}", views=tuple(views)))
    return Manifest(scenes)


def config_of(root: Path, *overrides: str) -> RunConfig:
    settings = [
        "recipe=spa3r_pretrain", f"storage.root={root}", "recipe.view_set.views=[3,4]", "cluster=inline",
        "recipe.view_set.plans_per_scene=2", "trainer.micro_batch=2", "recipe.view_set.interval=[1,1]",
        "encoders.patches.height=28", "encoders.patches.width=42", "encoders.semantic.height=32",
        "encoders.semantic.width=48", "service.replicas=0",
    ]  # fmt: skip
    by_key = {setting.split("=", 1)[0]: setting for setting in (*settings, *overrides)}
    return configs.load(list(by_key.values()))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return config_of(tmp_path)


def sample(*views: int, targets: tuple[int, ...] = (), item: str = "room0") -> PlanSample:
    roles = tuple(ViewRole(index=v, role=Role.TARGET if v in targets else Role.CONTEXT) for v in views)
    return PlanSample(id=f"rooms/{item}#view_set0", source="rooms", item=item, kind="view_set", views=roles, seed=1)


def key(config: RunConfig, manifest: Manifest, *views: int, targets: tuple[int, ...] = ()) -> bytes:
    (request,) = feature_requests(sample(*views, targets=targets), manifest, "views", config)
    return request.key.digest


@pytest.fixture
def counting() -> Counting:
    return Counting()


def steps_of(config: RunConfig, manifest: Manifest, client: FeatureClient, epochs: int = 1) -> Iterator[Any]:
    manifests, inputs = {"rooms": manifest}, kind_inputs(config)
    plan = EpochPlan(config, manifests)
    with closing(Targets(config, manifests, inputs=inputs)) as targets:
        specs = column_specs(config, inputs, client.outputs, targets=targets)
        with Loader(
            plan, rank=0, world_size=1, client=client, manifests=manifests, config=config, start_step=0,
            stop_step=epochs * plan.steps_per_epoch, collate=Collate(specs), targets=targets, reuse=False,
        ) as loader:  # fmt: skip
            yield from loader


def batch_of(config: RunConfig, manifest: Manifest, one: PlanSample, client: FeatureClient) -> dict[str, torch.Tensor]:
    """Columns of the features of one sample."""
    from services.features.encode import to_torch

    record = {}
    for columns in column_requests(one, manifest, config, kind_inputs(config)):
        record |= columns.record(client.get(columns.requests, 0))
    return {name: to_torch(tensor) for name, tensor in record.items()}


def test_order_and_roles_are_in_the_key_of_a_set(config, manifest) -> None:
    keys = {
        key(config, manifest, 0, 1, 2), key(config, manifest, 0, 2, 1), key(config, manifest, 0, 1),
        key(config, manifest, 0, 1, 2, targets=(1,)), key(config, manifest, 0, 1, 2, targets=(2,)),
    }  # fmt: skip
    assert len(keys) == 5
    assert key(config, manifest, 0, 1, 2, targets=(1,)) in keys


def test_of_mixed_aspect_ratios_vggt_sees_the_central_part_of_its_own(config, tmp_path) -> None:
    """One size a run, 28x42 here: other shapes are cut around their middle; none is stretched or refused."""
    draw = np.random.default_rng(5)
    tall, wide = (draw.integers(0, 256, (*size, 3), np.uint8) for size in ((90, 60), (28, 90)))
    # Of the tall one rows 25 to 65 are seen, of the wide one columns 24 to 66, and a little of what the filter touches.
    beside = [tall.copy(), wide.copy()]
    beside[0][:15], beside[0][75:], beside[1][:, :18], beside[1][:, 72:] = 0, 255, 255, 0
    within = [tall.copy(), wide.copy()]
    within[0][40:50] = 0
    found = []
    for place, pictures in enumerate(([tall, wide], beside, within)):
        for name, picture in zip("ab", pictures, strict=True):
            Image.fromarray(picture).save(tmp_path / f"{place}{name}.png")
        views = tuple(View(image=ImageRef(path=str(tmp_path / f"{place}{name}.png"))) for name in "ab")
        (request,) = feature_requests(sample(0, 1), Manifest([Scene(id="room0", views=views)]), "views", config)
        found += Encoder("views", config).encode([request])
    whole, same, other = found
    assert whole["tokens"].data.shape[:4] == (2, 1, 2, 3)
    assert all(np.array_equal(same[name].data, tensor.data) for name, tensor in whole.items())
    assert not np.array_equal(other["tokens"].data, whole["tokens"].data)


def test_sets_share_what_is_made_of_single_pictures(config, manifest, counting) -> None:
    store = open_store(config)
    with closing(FeatureClient(config, store, make_encoder=counting)) as client:
        for one in (sample(0, 1, 2), sample(0, 1, 2, targets=(1,)), sample(1, 2, 3, targets=(3,))):
            (request,) = feature_requests(one, manifest, "views", config)
            (record,) = client.get([request], 0)
            assert record["tokens"].data.shape == (3, 1, 2, 3, 128)
        assert counting.counts == {"views": 3, "patches": 4}
        # And with a run that reads the pictures by themselves.
        alone = feature_requests(sample(2), manifest, "patches", config)
        assert view_requests(request, config)[1].key == alone[0].key
        client.get(alone, 0)
    assert counting.counts == {"views": 3, "patches": 4}


def test_the_columns_of_a_batch(config, manifest, counting) -> None:
    with closing(FeatureClient(config, open_store(config), make_encoder=counting)) as client:
        seen = set()
        for step in steps_of(config, manifest, client):
            for micro in step.micro_batches:
                batch, views = micro.batch, len(micro.samples[0].views)
                seen.add(views)
                assert not step.broken
                assert batch["tokens"].shape == (2, views, 1, 2, 3, 128)
                assert batch["pose"].shape == (2, views, 9)
                assert batch["depth"].shape == (2, views, 2, 3)
                assert batch["semantic"].shape == (2, views, 1, 2, 3, 64)
                assert batch["roles"].dtype == torch.bool
                assert batch["roles"].tolist() == [[v.role is Role.TARGET for v in s.views] for s in micro.samples]
                assert batch["size"].tolist() == [[28, 42]] * 2
                assert "context_tokens" not in batch
        assert seen == {3, 4}


def test_joint_and_two_pass_give_the_same_context(tmp_path, manifest, counting) -> None:
    joint = config_of(tmp_path, "recipe.view_set.views=[4,4]")
    symmetric = config_of(
        tmp_path, "recipe.view_set.views=[4,4]", "recipe.spa3r.asymmetric=false", "recipe.spa3r.targets=symmetric"
    )
    one = sample(0, 1, 2, 3, targets=(1, 3))
    with closing(FeatureClient(joint, open_store(joint), make_encoder=counting)) as client:
        together = batch_of(joint, manifest, one, client)
        apart = batch_of(symmetric, manifest, one, client)
        other = batch_of(symmetric, manifest, sample(0, 1, 2, 3, targets=(2, 3)), client)
    assert apart["context_tokens"].shape == (2, 1, 2, 3, 128)
    torch.testing.assert_close(together["tokens"][[0, 2]], apart["context_tokens"], atol=1e-4, rtol=1e-4)
    # Targets of plain passes are of no partition: one encoding serves all.
    assert torch.equal(apart["tokens"], other["tokens"])
    assert not torch.allclose(together["tokens"], apart["tokens"], atol=1e-3)
    assert counting.counts["views"] == 1 + 2 + 1
    assert counting.counts["patches"] == 4


def test_a_plan_is_measured_as_it_was_foreseen(config, manifest, counting) -> None:
    epochs = 3
    with closing(FeatureClient(config, open_store(config), make_encoder=counting)) as client:
        rates = [step.hit_rate for step in steps_of(config, manifest, client, epochs)]
    size = DataSize(source="rooms", scenes=SCENES, views={}, classes=0, scene_views={"train": [VIEWS] * SCENES})
    found = drawn(config, [size])
    assert found is not None
    measured = np.array(rates).reshape(epochs, -1).mean(1)
    assert found.steps_per_epoch == len(rates) // epochs
    np.testing.assert_allclose(found.hit_rates, measured, atol=0.12)
    assert found.stored == {"views": 2 * SCENES}
    assert counting.counts["views"] <= 2 * SCENES
    assert sum(epoch["views"] for epoch in found.encodings) == pytest.approx(counting.counts["views"], abs=2)
    text = describe_choices(config, found, {"views": 10**9})
    assert "2 of each scene" in text
    assert "4: 16 GB" in text


def test_sets_of_one_epoch_alone_are_not_kept(tmp_path, manifest, counting) -> None:
    config = config_of(tmp_path, "recipe.view_set.plans_per_scene=0")
    store = open_store(config)
    with closing(FeatureClient(config, store, make_encoder=counting)) as client:
        steps = list(steps_of(config, manifest, client, 2))
        client.sink.flush()
        kept = {info.identity["identity"]["model"]: info.stats.records for info in store.namespaces()}
    assert kept.get("VggtViews", 0) == 0
    assert kept["VggtPatches"] == counting.counts["patches"]
    sets = sum(len(micro.samples) for step in steps for micro in step.micro_batches)
    assert counting.counts["views"] == sets
    assert counting.counts["patches"] <= SCENES * VIEWS
    size = DataSize(source="rooms", scenes=SCENES, views={}, classes=0, scene_views={"train": [VIEWS] * SCENES})
    found = drawn(config, [size])
    assert found is not None
    assert found.stored == {"views": 0}
    assert found.encodings[2]["views"] == SCENES


def test_warm_and_why_know_planned_sets(config, manifest, counting) -> None:
    store = open_store(config)
    report = warm(config, store, "rooms", manifest, encoder="views")
    assert (report.inputs, report.encoded >= 2 * SCENES, report.broken) == (2 * SCENES, True, {})
    again = warm(config, store, "rooms", manifest, encoder="views")
    assert (again.stored, again.encoded) == (2 * SCENES, 0)
    found = why(config, store, {"rooms": manifest}, "rooms/room1#view_set1", encoder="views")
    assert found.stored
    assert "view set 0" in str(found)
    with closing(FeatureClient(config, store, make_encoder=counting)) as client:
        assert len(list(steps_of(config, manifest, client))) > 1
    assert counting.counts["views"] == counting.counts["patches"] == 0
    assert counting.counts["semantic"] > 0
    with pytest.raises(DataError, match="room1 has no view set 2: it has sets 0 to 1"):
        why(config, store, {"rooms": manifest}, "rooms/room1#view_set2", encoder="views")
    other = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, view_set=dataclasses.replace(
        config.recipe.view_set, seed=5)))  # fmt: skip
    differs = why(other, store, {"rooms": manifest}, "rooms/room1#view_set1", encoder="views")
    assert not differs.stored
    assert "the key differs in" in str(differs)


def test_latents_of_another_fingerprint_are_not_taken(config, manifest) -> None:
    store = open_store(config)
    warm(config, store, "rooms", manifest, encoder="views")
    views = dataclasses.replace(config.encoders["views"], seed=1)
    patches = dataclasses.replace(config.encoders["patches"], seed=1)
    other = dataclasses.replace(config, encoders={**config.encoders, "views": views, "patches": patches})
    found = why(other, store, {"rooms": manifest}, "rooms/room0#view_set0", encoder="views")
    assert not found.stored
    assert "the fingerprint differs in" in str(found)
    assert "identity.weights" in str(found)


def test_a_lossy_cache_keeps_cameras_and_depth_to_the_bit(tmp_path, manifest, counting) -> None:
    """Features are coded; poses and depths are metric, and come back as they were."""
    lossy = config_of(tmp_path / "lossy", "cache=fp8")
    store, one = open_store(lossy), sample(0, 1, 2, targets=(1,))
    with closing(FeatureClient(lossy, store, make_encoder=counting)) as client:
        made = batch_of(lossy, manifest, one, client)
        client.sink.flush()
    with closing(FeatureClient(lossy, open_store(lossy), make_encoder=counting)) as client:
        before = dict(counting.counts)
        read = batch_of(lossy, manifest, one, client)
        assert dict(counting.counts) == before, "the second time is a hit"
        (request,) = feature_requests(one, manifest, "views", lossy)
        views = client.sink.namespace("views")
        (stored,) = views.get_many([request.key])
    assert all(torch.equal(made[name], read[name]) for name in made), "a miss and a hit are the same numbers"
    # What the network gave, before any codec: its patches were coded, as its fingerprint says.
    (raw,) = Encoder("views", lossy, upstream=coded_patches(lossy)).encode([request])
    assert all(np.array_equal(raw[name].data, stored[name].data) for name in ("pose", "depth"))
    assert not np.array_equal(raw["tokens"].data, stored["tokens"].data)
    assert views.exact == {"pose", "depth"}
    assert set(views.disk_stats().codec_error) == {"tokens"}
    assert views.identity["upstream_codec"] == "fp8_e4m3"
    label = next(i.identity["codec"] for i in store.namespaces() if i.fingerprint == views.fingerprint)
    assert label == "fp8_e4m3 except depth pose"
    (reason,) = why(lossy, store, {"rooms": manifest}, "rooms/room1#view_set0", encoder="views").reasons
    assert not reason.stored


def coded_patches(config: RunConfig) -> Any:
    patches = Encoder("patches", config)
    return lambda requests: as_stored(patches.encode(requests), config, patches)


def test_only_planned_sets_can_be_made_ahead(tmp_path, manifest) -> None:
    config = config_of(tmp_path, "recipe.view_set.plans_per_scene=0")
    with pytest.raises(ConfigError, match="they are cached by running"):
        set_requests(config, "views", "rooms", manifest)


def test_an_encoder_of_sets_reads_records_of_pictures(config) -> None:
    views = dataclasses.replace(config.encoders["views"], upstream="views2")
    wrong = dataclasses.replace(
        config, encoders={**config.encoders, "views": views, "views2": config.encoders["views"]}
    )
    with pytest.raises(ConfigError, match="takes the records of single pictures"):
        Encoder("views", wrong)


def test_a_broken_picture_breaks_the_sets_that_hold_it(config, manifest, tmp_path, counting) -> None:
    film, empty = tmp_path / "film.mp4", tmp_path / "empty.mp4"
    write_video(film, [np.full((32, 48, 3), 90, np.uint8)] * 4)
    film.write_bytes(film.read_bytes()[:200])
    empty.write_bytes(b"")
    whole = list(manifest.views("room0", range(VIEWS)))
    broken = [View(image=ImageRef(path=str(path), frame=0)) for path in (film, empty)]
    scene = Scene(id="room0", views=(*whole[:4], *broken))

    class Faulty(Manifest):
        def digests(self, entry_id: str, places: list[int]) -> list[str]:
            return [f"{entry_id}/{place}" for place in places]

    faulty = Faulty.__new__(Faulty)
    faulty._scenes = {"room0": scene}
    requests = [
        request
        for views in ((0, 1, 4), (0, 1, 2), (0, 5))
        for request in feature_requests(sample(*views), faulty, "views", config)
    ]
    with closing(FeatureClient(config, None, make_encoder=counting)) as client:
        cut, good, nothing = client.get(requests, 0)
    assert isinstance(cut, DataError)
    assert "film.mp4" in str(cut)
    assert isinstance(good, dict)
    assert isinstance(nothing, DataError)
    assert "empty.mp4" in str(nothing)


def test_clip_as_a_target_is_an_option_of_the_encoders(tmp_path: Path) -> None:
    base = ["recipe=spa3r_pretrain", "size=tiny", f"storage.root={tmp_path}", "recipe.spa3r.predict=[geo,clip]"]
    with pytest.raises(ConfigError, match=r"reads encoders\.clip.*choose an option of the group encoder"):
        kind_inputs(configs.load(base))
    chosen = configs.load([*base, "encoder=[vggt-tiny,semantic-clip-tiny]"])
    assert {"views", "clip"} <= set(used_encoders(chosen))
    assert "semantic" not in used_encoders(chosen)
    grid = {name: (chosen.encoders[name].height, chosen.encoders[name].width) for name in ("patches", "clip")}
    assert (grid["patches"][0] // 14, grid["patches"][1] // 14) == (grid["clip"][0] // 16, grid["clip"][1] // 16)
