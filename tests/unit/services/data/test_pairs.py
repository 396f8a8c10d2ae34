"""The co-visibility index: overlaps done by hand, what is pruned, what is left out, and how it is kept."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from configs import RunConfig
from configs.schema import PairsConfig, StorageConfig
from services.contracts import DepthRef, ImageRef, Intrinsics, Scene, Split, View
from services.data import pairs, pairs_report, pairs_scene
from services.data.overlap import load_small_depth, pairwise_overlap
from services.data.pairs import PairIndex, build_pairs, open_pairs, stored_pairs
from services.data.pairs_scene import frustum_share, measure_overlap, scene_pairs, spread
from services.errors import DataError
from tests.support import analytic
from tests.unit.services.data import toy_scene

WALL = Intrinsics(fx=64.0, fy=64.0, cx=31.5, cy=23.5, width=64, height=48)
ALL = PairsConfig(min_overlap=0.0, max_overlap=1.0, side=64)


def matrix(x: float = 0.0, z: float = 0.0, roll: float = 0.0) -> np.ndarray:
    cos, sin = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    pose = np.eye(4)
    pose[:2, :2] = [[cos, -sin], [sin, cos]]
    pose[0, 3], pose[2, 3] = x, z
    return pose


def view(folder: Path, name: str, depth: np.ndarray, pose: np.ndarray | None, K: Intrinsics = WALL) -> View:
    path = folder / f"{name}.npy"
    np.save(path, depth.astype(np.float32))
    return View(
        image=ImageRef(path=str(folder / f"{name}.png")),
        K=K,
        pose=None if pose is None else toy_scene.as_matrix(pose),
        depth=DepthRef(path=str(path), metres_per_unit=1.0, K=K),
    )


def wall(folder: Path, poses: Sequence[np.ndarray], name: str = "wall", distance: float = 2.0) -> Scene:
    """Cameras that look at the plane z = ``distance`` head on: at 2 m each sees 2 m of it, 64 pixels of 1/32 m."""
    folder.mkdir(parents=True, exist_ok=True)
    views = [view(folder, f"{name}{i}", np.full((48, 64), distance - pose[2, 3]), pose) for i, pose in enumerate(poses)]
    return Scene(id=name, views=tuple(views), split=Split.TRAIN)


@dataclass(frozen=True)
class Entry:
    id: str
    kind: str
    split: Split | None
    n_views: int


class Source:
    """As much of a manifest as an index reads."""

    name, root = "walls", "/walls"

    def __init__(self, scenes: Sequence[Scene], digest: str = "of walls") -> None:
        self.scenes = {scene.id: scene for scene in scenes}
        self.digest = digest
        self.entries = [Entry(s.id, "scene", s.split, len(s.views)) for s in scenes]

    def scene(self, name: str) -> Scene:
        return self.scenes[name]

    def views(self, name: str, places: Sequence[int]) -> list[View]:
        return [self.scenes[name].views[place] for place in places]


def walls(folder: Path, count: int = 4) -> Source:
    """Scenes of five cameras, 0.3 m apart (in the last scene 3 m: nothing is shared)."""
    steps = [0.3] * (count - 1) + [3.0]
    scenes = [wall(folder, [matrix(step * i) for i in range(5)], f"wall{n}") for n, step in enumerate(steps)]
    splits = [Split.TRAIN, Split.VAL, Split.TEST]
    return Source([dataclasses.replace(scene, split=splits[n % 3]) for n, scene in enumerate(scenes)])


def run_of(tmp_path: Path, settings: PairsConfig | None = None) -> RunConfig:
    config = RunConfig(storage=StorageConfig(root=str(tmp_path / "store")))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, pairs=settings or PairsConfig()))


def test_overlap_angle_and_distance_of_a_wall(tmp_path: Path) -> None:
    """Shifted by d metres, two cameras share 1 - d / 2 of the wall; one at half the distance sees a quarter of it."""
    scene = wall(
        tmp_path, [matrix(0.0), matrix(0.5), matrix(1.0, roll=0.0), matrix(0.0, z=1.0), matrix(0.0, roll=30.0)]
    )
    found = scene_pairs(scene, ALL)
    numbers = {tuple(pair): n for n, pair in enumerate(found.views.tolist())}
    assert list(numbers) == sorted(numbers)
    for pair, there, back, distance in (
        ((0, 1), 0.75, 0.75, 0.5),
        ((0, 2), 0.5, 0.5, 1.0),
        ((1, 2), 0.75, 0.75, 0.5),
        ((0, 3), 0.25, 1.0, 1.0),
    ):
        n = numbers[pair]
        np.testing.assert_allclose(found.overlap[n], [there, back], atol=0.02)
        np.testing.assert_allclose(found.distance[n], distance, atol=1e-6)
        np.testing.assert_allclose(found.angle[n], 0.0, atol=1e-3)
    np.testing.assert_allclose(found.angle[numbers[0, 4]], 30.0, atol=1e-3)
    np.testing.assert_allclose(found.distance[numbers[0, 4]], 0.0, atol=1e-6)


def test_both_directions_must_lie_between_the_bounds(tmp_path: Path) -> None:
    shifts = [0.0, 0.0625, 0.5, 1.0, 1.75]
    scene = wall(tmp_path, [*(matrix(x) for x in shifts), matrix(0.5, z=1.0)])
    found = scene_pairs(scene, PairsConfig(min_overlap=0.3, max_overlap=0.9, side=64))
    # 0-1 is too much alike (0.97), 0-4 and 1-4 share too little (0.125, 0.16); the close-up (5) is wholly inside of 2.
    wanted = {(i, j) for i in range(5) for j in range(i + 1, 5) if 0.3 <= 1 - (shifts[j] - shifts[i]) / 2 <= 0.9}
    assert {tuple(pair) for pair in found.views.tolist()} == wanted
    assert (0, 1) not in wanted
    assert found.facts.pairs == len(wanted) == len(found.views)


def test_what_stands_between_two_cameras_hides_them_from_each_other(tmp_path: Path) -> None:
    room = toy_scene.Room(things=[toy_scene.Thing("screen", 3, 3.7, (3.0, 0.6, 2.4))])
    room.cameras = [((3, 1, 1.5), (3, 5, 1.3)), ((3.3, 1.1, 1.5), (3, 5, 1.3)), ((3, 4.7, 1.5), (3, 1, 1.3))]
    scene = toy_scene.write(room, tmp_path)
    found = scene_pairs(scene, PairsConfig(max_overlap=1.0))
    assert [tuple(pair) for pair in found.views.tolist()] == [(0, 1)]
    # The frusta of views 0 and 2 do meet: it is the occlusion test that tells.
    shares = frustum_share(load_small_depth(scene))
    assert min(shares[0, 2], shares[2, 0]) > 0.2
    assert found.facts.measured >= 2


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Cameras all around in the analytic room, looking out of a circle: many pairs share nothing."""
    folder = tmp_path_factory.mktemp("ring")
    camera = Intrinsics(fx=70.0, fy=71.0, cx=46.3, cy=36.9, width=analytic.WIDTH, height=analytic.HEIGHT)
    views = []
    for n in range(36):
        angle, height = 2 * np.pi * n / 36, 1.2 + 0.3 * (n % 3)
        eye = (-0.7 + 0.4 * np.cos(angle), -0.4 + 0.4 * np.sin(angle), height)
        look = (-0.7 + 2.0 * np.cos(angle), -0.4 + 2.0 * np.sin(angle), 1.1)
        shot = analytic.render(analytic.look_at(eye, look, 0.1 * (n % 5)))
        views.append(view(folder, str(n), shot.depth, shot.pose, camera))
    return Scene(id="ring", views=tuple(views))


def test_pruning_loses_no_pair(ring: Scene) -> None:
    settings = PairsConfig(min_overlap=0.25, max_overlap=0.95)
    found = scene_pairs(ring, settings)
    every = pairwise_overlap(load_small_depth(ring, side=settings.side))
    fits = (every >= 0.25) & (every <= 0.95)
    expected = np.argwhere(np.triu(fits & fits.T, k=1))
    np.testing.assert_array_equal(found.views, expected)
    np.testing.assert_allclose(found.overlap[:, 0], every[expected[:, 0], expected[:, 1]], atol=1e-6)
    np.testing.assert_allclose(found.overlap[:, 1], every[expected[:, 1], expected[:, 0]], atol=1e-6)
    assert len(expected) > 60
    assert found.facts.measured < 0.6 * 36 * 35 / 2


def test_a_world_origin_far_away_changes_nothing(ring: Scene) -> None:
    moved = []
    for one in ring.views:
        pose = np.asarray(one.pose) + np.array([[0, 0, 0, 3e5], [0, 0, 0, 5e6], [0, 0, 0, 50], [0, 0, 0, 0]])
        moved.append(dataclasses.replace(one, pose=toy_scene.as_matrix(pose)))
    here, there = (scene_pairs(s, PairsConfig()) for s in (ring, dataclasses.replace(ring, views=tuple(moved))))
    np.testing.assert_array_equal(here.views, there.views)
    np.testing.assert_allclose(here.overlap, there.overlap, atol=2e-3)


def test_blocks_do_not_change_the_measure(ring: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_small_depth(ring, side=24)
    first, second = np.nonzero(np.ones((36, 36)))
    whole, shares = measure_overlap(small, first, second), frustum_share(small)
    monkeypatch.setattr(pairs_scene, "_BLOCK", 5000)
    np.testing.assert_array_equal(measure_overlap(small, first, second), whole)
    np.testing.assert_array_equal(frustum_share(small), shares)


def test_at_most_per_scene_spread_over_the_overlap(ring: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scene_pairs(ring, PairsConfig())
    few = scene_pairs(ring, PairsConfig(per_scene=20))
    assert len(few.views) == 20
    assert {tuple(pair) for pair in few.views.tolist()} < {tuple(pair) for pair in whole.views.tolist()}
    monkeypatch.setattr(pairs_scene, "TRIED", 3)
    tried = scene_pairs(ring, PairsConfig(per_scene=20))
    assert tried.facts.measured == 60
    assert 0 < len(tried.views) <= 20


def test_spread_takes_from_every_bin_in_turn() -> None:
    settings = PairsConfig(min_overlap=0.0, max_overlap=1.0, per_scene=23)
    overlap = np.concatenate([np.full(3, 0.05), np.full(500, 0.45), np.full(400, 0.95)])
    kept = spread(overlap, settings, key=1)
    assert [int(np.isclose(overlap[kept], value).sum()) for value in (0.05, 0.45, 0.95)] == [3, 10, 10]
    np.testing.assert_array_equal(kept, np.unique(kept))
    assert (spread(overlap, settings, key=1) == kept).all()
    assert (spread(overlap, settings, key=2) != kept).any()
    np.testing.assert_array_equal(spread(overlap[:5], settings, key=1), np.arange(5))


def test_views_that_cannot_be_used_are_left_out_and_named(tmp_path: Path) -> None:
    scene = wall(tmp_path, [matrix(0.25 * i) for i in range(7)])
    views = list(scene.views)
    assert views[1].depth is not None
    assert views[2].depth is not None
    Path(views[1].depth.path).write_bytes(b"torn")
    np.save(views[2].depth.path, np.zeros((48, 64), np.float32))
    views[3] = dataclasses.replace(views[3], pose=toy_scene.as_matrix(np.diag([-1.0, 1.0, 1.0, 1.0])))
    views[4] = dataclasses.replace(views[4], pose=None)
    views[5] = dataclasses.replace(views[5], depth=None)
    found = scene_pairs(dataclasses.replace(scene, views=tuple(views)), PairsConfig(min_overlap=0.2))
    assert [tuple(pair) for pair in found.views.tolist()] == [(0, 6)]
    facts = found.facts
    assert (facts.views, facts.usable, facts.without_pose, facts.without_depth) == (7, 2, 1, 1)
    assert sorted(facts.broken) == ["1", "2", "3"]
    assert facts.broken["1"].startswith(f"{views[1].depth.path}: not a readable array")
    assert facts.broken["2"] == f"{views[2].depth.path}: no pixel of the depth map is known"
    assert "wall3.png: its pose is no rotation and translation (off by 2" in facts.broken["3"]


def test_an_index_of_a_source(tmp_path: Path) -> None:
    source = walls(tmp_path)
    index = build_pairs(source, PairsConfig(side=64), threads=2)  # type: ignore[arg-type]
    assert index.splits() == {"train": (2, 1, 10), "val": (1, 1, 10), "test": (1, 1, 10)}
    assert len(index) == 30
    np.testing.assert_array_equal(index.of("wall1"), index.of("wall0"))
    assert index.of("wall1").dtype == np.int32
    assert index.overlap("wall1").shape == (10, 2)
    assert index.of("wall3").shape == (0, 2)
    assert index.of("unknown").shape == (0, 2)
    assert index.geometry("wall1", 3, 1) == pytest.approx((0.0, 0.6))
    with pytest.raises(DataError, match="views 0 and 4 of 'wall3' are no pair"):
        index.geometry("wall3", 0, 4)
    with pytest.raises(ValueError, match="read-only"):
        index.views[0, 0] = 7
    assert (
        "1 of 4 scenes have no pairs; of their 5 views 5 have depth and a pose but share too little" in index.missing()
    )
    assert "wall3" in index.missing()


def test_threads_that_start_later_keep_their_cores(tmp_path: Path) -> None:
    """torch hands what any thread set to those that start after it; a run may go on in this process."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        build_pairs(walls(tmp_path), PairsConfig(), threads=2)  # type: ignore[arg-type]
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_the_digest_names_the_pairs(tmp_path: Path) -> None:
    source = walls(tmp_path)
    one = build_pairs(source, PairsConfig(side=64), threads=1)  # type: ignore[arg-type]
    two = build_pairs(source, PairsConfig(side=64), threads=4)  # type: ignore[arg-type]
    assert one.digest == two.digest
    fewer = build_pairs(source, PairsConfig(side=64, max_overlap=0.8))  # type: ignore[arg-type]
    assert len({one.digest, fewer.digest}) == 2
    assert len({one.key, fewer.key, pairs.pairs_key("another manifest", PairsConfig(side=64))}) == 3


def test_an_index_is_made_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config, seen = walls(tmp_path), run_of(tmp_path), []
    made = open_pairs(config, {"walls": source}, progress=lambda *state: seen.append(state))["walls"]  # type: ignore[dict-item]
    assert seen == [(n, 4, "pairs of walls") for n in (1, 2, 3, 4)]
    monkeypatch.setattr(pairs, "scene_pairs", None)
    for again in (open_pairs(config, {"walls": source})["walls"], stored_pairs(config, {"walls": source})["walls"]):  # type: ignore[dict-item]
        assert again.digest == made.digest
        assert again.facts == made.facts
        for name in ("views", "overlaps", "angles", "distances"):
            np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
    (path,) = (tmp_path / "store" / "pairs").glob("*.parquet")
    assert path == pairs.pairs_path(config, "walls", source.digest)
    table = pq.read_table(path)
    assert table.column_names == ["scene", "i", "j", "overlap_ij", "overlap_ji", "angle", "distance"]
    assert table.num_rows == len(made)
    assert set(table.column("scene").to_pylist()) == {"wall0", "wall1", "wall2"}
    assert not path.with_suffix(".parts").exists()


def test_a_build_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = walls(tmp_path)
    config = run_of(tmp_path)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, checks=dataclasses.replace(config.data.checks, threads=1))
    )
    made, whole = [], scene_pairs

    def until_the_third(scene: Scene, settings: PairsConfig) -> object:
        made.append(scene.id)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(scene, settings)

    monkeypatch.setattr(pairs, "scene_pairs", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        open_pairs(config, {"walls": source})  # type: ignore[dict-item]
    parts = pairs.pairs_path(config, "walls", source.digest).with_suffix(".parts")
    assert sorted(path.name for path in parts.glob("*.parquet"))[:2] == ["0.parquet", "1.parquet"]
    (parts / "1.parquet").write_bytes(b"torn")
    made[:] = [""] * 3
    index = open_pairs(config, {"walls": source})["walls"]  # type: ignore[dict-item]
    assert {"wall1", "wall2"} <= set(made[3:])
    assert "wall0" not in made[3:]
    assert index.digest == build_pairs(source, config.data.pairs).digest  # type: ignore[arg-type]
    assert not parts.exists()


def test_a_damaged_index_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, config = walls(tmp_path), run_of(tmp_path)
    made = open_pairs(config, {"walls": source})["walls"]  # type: ignore[dict-item]
    path = pairs.pairs_path(config, "walls", source.digest)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"the file of pairs is damaged .*run `loom3d data pairs`"):
        PairIndex.load(path, made.key)
    with caplog.at_level(logging.WARNING):
        assert open_pairs(config, {"walls": source})["walls"].digest == made.digest  # type: ignore[dict-item]
    assert str(path) in caplog.text


def test_rows_that_are_not_the_scenes_are_refused(tmp_path: Path) -> None:
    source, config = walls(tmp_path), run_of(tmp_path)
    key = open_pairs(config, {"walls": source})["walls"].key  # type: ignore[dict-item]
    path = pairs.pairs_path(config, "walls", source.digest)
    with pytest.raises(DataError, match=f"it was made from {key[:16]}, not abc"):
        PairIndex.load(path, "abc")
    table = pq.read_table(path)
    for changed, why in ((table.slice(1), "29 rows for 30 pairs"), (table.take([1, 0, *range(2, 30)]), "not those")):
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
        with pytest.raises(DataError, match=why):
            PairIndex.load(path, key)


def test_without_an_index_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs/walls-.*\.parquet: there is no such file .*`loom3d data pairs`"):
        stored_pairs(run_of(tmp_path), {"walls": walls(tmp_path)})


def test_a_source_without_scenes_has_an_empty_index(tmp_path: Path) -> None:
    source = Source([])
    source.entries = [Entry("picture", "item", Split.TRAIN, 1)]
    index = open_pairs(run_of(tmp_path), {"walls": source})["walls"]  # type: ignore[dict-item]
    assert len(index) == 0
    assert index.facts == {}
    assert "has no scenes" in index.missing()


def test_a_source_without_depth_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = wall(tmp_path, [matrix(0.3 * i) for i in range(3)])
    bare = dataclasses.replace(scene, views=tuple(dataclasses.replace(v, depth=None) for v in scene.views))
    with caplog.at_level(logging.WARNING):
        index = open_pairs(run_of(tmp_path), {"walls": Source([bare])})["walls"]  # type: ignore[dict-item]
    assert "1 of 1 scenes have no pairs; of their 3 views 3 have no depth (e.g. scene 'wall')" in index.missing()
    assert index.missing() in caplog.text


def test_the_page_and_the_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = walls(tmp_path)
    broken = source.scenes["wall1"].views[2].depth
    assert broken is not None
    Path(broken.path).write_bytes(b"torn")
    config = run_of(tmp_path)
    index = open_pairs(config, {"walls": source})["walls"]  # type: ignore[dict-item]
    assert f"1 views are left out, e.g. wall1#view2: {broken.path}: not a readable array" in caplog.text
    text = "\n".join(pairs_report.summary(index))
    assert "train         10 pairs of 1 of 2 scenes" in text
    assert "left out 1 views, e.g. wall1#view2" in text
    page = pairs_report.render(index, source, config)  # type: ignore[arg-type]
    for part in ("data:image/png;base64,", "Left out: 1 views", "Without pairs: 1 scenes", broken.path, "0.30 m"):
        assert part in page
    assert "http" not in page
    assert pairs_report.histogram_png(index).startswith(b"\x89PNG")
    empty = pairs_report.render(build_pairs(Source([]), PairsConfig()), source, config)  # type: ignore[arg-type]
    assert "has no scenes" in empty
