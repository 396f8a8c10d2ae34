"""Targets: the same pixels as the image's, the same bits from the store as from the files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import CacheConfig
from models.encoders.preprocess import crop_nearest
from services.contracts import Intrinsics, PlanSample, Record, ViewRole
from services.errors import CacheError, DataError
from services.features.store import FeatureStore
from services.streams import maps as under_test
from services.streams.cut import depth_window, picture_size, sample_nearest
from services.streams.maps import Maps, open_target_store, read_maps
from services.streams.targets import IGNORE, Targets
from tests.unit.services.streams.small_world import (
    HEIGHT,
    WIDTH,
    SmallManifest,
    small_config,
    write_scenes,
    write_view,
)


def sample(scene: str = "scene0", views: tuple[int, ...] = (0,), kind: str = "view") -> PlanSample:
    roles = tuple(ViewRole(index=index) for index in views)
    return PlanSample(id=f"small/{scene}#{kind}{views[0]}", source="small", item=scene, kind=kind, views=roles, seed=0)


def good(answer: Record | DataError) -> Record:
    assert not isinstance(answer, DataError), answer
    return answer


def maps_of(reader: Targets) -> Maps:
    """Where the reader of a probe has depth and labels from."""
    (maps,) = reader.maps.values()
    return maps


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    with FeatureStore(tmp_path / "store", seal_s=0.2) as opened:
        yield opened


def test_depth_and_labels_are_cut_like_the_image(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path)
    reader = Targets(small_config(tmp_path), {"small": SmallManifest(scenes)})
    record = good(reader.get([sample()])[0])
    view = scenes[0].views[0]
    assert view.depth is not None
    assert view.label_path is not None
    millimetres = np.asarray(Image.open(view.depth.path))
    expected = (crop_nearest(millimetres, 28, 28) * 0.001).astype(np.float32)
    assert np.allclose(record["depth"].data, expected, rtol=1e-6)
    assert (record["depth"].data == 0).any(), "unknown depth stays 0"
    ids = crop_nearest(np.asarray(Image.open(view.label_path)), 28, 28).astype(np.int64)
    # 0 is nothing, class 2 has no name, 4 is beyond the table.
    assert np.array_equal(record["labels"].data, np.where(np.isin(ids, [1, 3]), ids, IGNORE))
    assert reader.scene_types == ("kitchen", "office")
    answers = [good(a)["scene_type"].data.item() for a in reader.get([sample(f"scene{i}") for i in range(3)])]
    assert answers == [0, 1, IGNORE]


def test_a_view_without_a_camera_is_cut_as_its_file_says(tmp_path: Path) -> None:
    scene = write_scenes(tmp_path)[0]
    with_camera = scene.views[0]
    without = dataclasses.replace(with_camera, K=None)
    assert picture_size(without) == picture_size(with_camera) == (HEIGHT, WIDTH)
    expected, seen = (read_maps(view, 28, 28) for view in (with_camera, without))
    assert np.array_equal(seen["depth"].data, expected["depth"].data)
    assert np.array_equal(seen["ids"].data, expected["ids"].data)


def test_the_store_gives_the_same_bits_and_no_file_is_decoded_again(
    tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = SmallManifest(write_scenes(tmp_path))
    samples = [sample("scene1", (view,)) for view in range(3)] + [sample("scene2", (4, 2), "view_set")]
    config = small_config(tmp_path)
    fresh = Targets(config, {"small": manifest}).get(samples)
    writing = Targets(config, {"small": manifest}, store=store)
    first = writing.get(samples)
    writing.close()
    monkeypatch.setattr(under_test, "load_depth", lambda _: pytest.fail("decoded again"))
    monkeypatch.setattr(under_test, "load_ids", lambda _: pytest.fail("decoded again"))
    again = Targets(config, {"small": manifest}, store=store).get(samples)
    for a, b, c in zip(fresh, first, again, strict=True):
        for name, tensor in good(a).items():
            for other in (good(b)[name], good(c)[name]):
                assert other.dtype == tensor.dtype
                assert other.data.tobytes() == tensor.data.tobytes()
    assert good(fresh[3])["depth"].data.shape == (2, 28, 28)


def test_a_changed_file_is_read_again_and_a_touched_one_is_not(tmp_path: Path, store: FeatureStore) -> None:
    scenes = write_scenes(tmp_path)
    config, manifest = small_config(tmp_path), {"small": SmallManifest(scenes)}
    reader = Targets(config, manifest, store=store)
    before = good(reader.get([sample()])[0])["depth"].data.copy()
    reader.flush()
    depth = scenes[0].views[0].depth
    assert depth is not None
    os.utime(depth.path, ns=(1, 1))
    hits = store.open(maps_of(reader).identity()).stats.hits
    assert np.array_equal(good(reader.get([sample()])[0])["depth"].data, before)
    assert store.open(maps_of(reader).identity()).stats.hits == hits + 1
    Image.fromarray(np.full((HEIGHT, WIDTH), 1500, np.uint16)).save(depth.path)
    after = good(reader.get([sample()])[0])["depth"].data
    assert np.allclose(after, 1.5)
    # And what the unit or the camera says is part of the key.
    view = dataclasses.replace(scenes[0].views[0], depth=dataclasses.replace(depth, metres_per_unit=0.002))
    other = dataclasses.replace(scenes[0], views=(view, *scenes[0].views[1:]))
    doubled = Targets(config, {"small": SmallManifest([other])}, store=store).get([sample()])[0]
    assert np.allclose(good(doubled)["depth"].data, 3.0)


def test_a_depth_map_of_half_the_size_and_one_of_another_camera(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = write_view(tmp_path, "small", rng, scale=2)
    scene = dataclasses.replace(write_scenes(tmp_path / "other", (1,))[0], id="scene0", views=(small,))
    reader = Targets(small_config(tmp_path), {"small": SmallManifest([scene])})
    record = good(reader.get([sample()])[0])
    assert small.depth is not None
    millimetres = np.asarray(Image.open(small.depth.path))
    assert np.allclose(record["depth"].data, crop_nearest(millimetres, 28, 28) * 0.001, rtol=1e-6)

    # A depth camera that sees half the angle: what it does not see is unknown, the rest is stretched.
    K = Intrinsics(fx=30.0, fy=30.0, cx=19.5, cy=14.5, width=40, height=30)
    narrow = dataclasses.replace(K, fx=60.0, fy=60.0)
    window = depth_window((0.0, 0.0, 40.0, 30.0), K, narrow, (30, 40))
    assert window == pytest.approx((-20.0, -15.0, 60.0, 45.0))
    seen = sample_nearest(np.arange(1, 1201, dtype=np.float32).reshape(30, 40), window, 30, 40)
    assert (seen[:7] == 0).all()
    assert (seen[:, :10] == 0).all()
    # The centre of the image is the centre of the depth map.
    assert seen[14, 19] == np.arange(1, 1201).reshape(30, 40)[14, 19]
    assert (seen[8:22, 10:30] > 0).all()


def test_broken_files_are_named_and_neighbours_live(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path)
    views = scenes[0].views
    assert all(view.depth and view.label_path for view in views)
    Path(views[0].depth.path).write_bytes(b"no png")  # type: ignore[union-attr]
    Path(str(views[1].label_path)).unlink()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(views[2].depth.path)  # type: ignore[union-attr]
    answers = Targets(small_config(tmp_path), {"small": SmallManifest(scenes)}).get(
        [sample(views=(i,)) for i in range(4)]
    )
    for answer, name in zip(answers[:3], ("0-depth.png", "1-label.png", "2-depth.png"), strict=True):
        assert isinstance(answer, DataError)
        assert name in str(answer)
    assert "intrinsics are for 40x30" in str(answers[2])
    assert isinstance(answers[3], dict)


def test_views_without_targets_and_items(tmp_path: Path) -> None:
    scene = write_scenes(tmp_path, (1,))[0]
    bare = dataclasses.replace(scene, views=(dataclasses.replace(scene.views[0], depth=None, label_path=None, K=None),))
    reader = Targets(small_config(tmp_path), {"small": SmallManifest([bare], classes=())})
    record = good(reader.get([sample()])[0])
    assert (record["depth"].data == 0).all()
    assert (record["labels"].data == IGNORE).all()
    assert set(reader.specs("view")) == set(record)
    item = sample(kind="item")
    assert Targets(small_config(tmp_path), {"small": SmallManifest([])}).get([item]) == [{}]
    assert reader.specs("item") == {}


def test_classes_of_several_sources_are_joined_by_name(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path)
    sources = {
        "small": SmallManifest(scenes),
        "other": SmallManifest(scenes, classes=("none", "chair", "door")),
    }
    reader = Targets(small_config(tmp_path), sources)
    assert reader.classes == ("none", "chair", "door", "wall")
    one = good(reader.get([sample()])[0])["labels"].data
    view = scenes[0].views[0]
    ids = crop_nearest(np.asarray(Image.open(str(view.label_path))), 28, 28)
    assert np.array_equal(one, np.choose(np.clip(ids, 0, 4), [-1, 3, -1, 1, -1]))


def test_a_full_cache_only_costs_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = Targets(
        small_config(tmp_path), {"small": SmallManifest(write_scenes(tmp_path))}, store=FeatureStore(tmp_path / "store")
    )

    def full(*_: object) -> bool:
        raise CacheError("no space left on the device")

    maps_of(reader)._namespace.put = full
    assert all(isinstance(a, dict) for a in reader.get([sample(views=(i,)) for i in range(4)]))
    assert [r.message for r in caplog.records if "no space left" in r.message] == [
        "the cache keeps nothing more, what it refuses is computed again when needed: no space left on the device"
    ]


def test_a_cache_that_cannot_be_written_is_used_without_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeatureStore(tmp_path / "store")

    def read_only(*_: object) -> None:
        raise CacheError("the file system is read-only")

    monkeypatch.setattr(store, "lease", read_only)
    reader = Targets(small_config(tmp_path), {"small": SmallManifest(write_scenes(tmp_path))}, store=store)
    monkeypatch.setattr(maps_of(reader)._namespace, "flush", read_only)
    assert isinstance(reader.get([sample()])[0], dict)
    reader.close()
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert said[0].endswith("is used without a lease: the file system is read-only")
    assert said[1].startswith("the cache keeps nothing more")
    store.close()


def test_the_store_of_targets_has_no_codec(tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(tmp_path), cache=CacheConfig(codec="fp8_e4m3"))
    store = open_target_store(config)
    assert store is not None
    assert store.codec == "none"
    assert open_target_store(dataclasses.replace(config, cache=CacheConfig(mode="never"))) is None
    manifest = {"small": SmallManifest(write_scenes(tmp_path))}
    plain = Targets(config, manifest).get([sample()])[0]
    with FeatureStore.from_config(config) as lossy:
        for _ in range(2):
            reader = Targets(config, manifest, store=lossy)
            kept = reader.get([sample()])[0]
            reader.close()
            assert good(kept)["depth"].data.tobytes() == good(plain)["depth"].data.tobytes()
