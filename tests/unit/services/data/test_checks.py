"""Every kind of fault, put into a clean source on disk, is found; the clean source has none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import ChecksConfig
from services.contracts import ImageRef, Item, Scene, Turn
from services.data.checks import CheckReport, EvaluationSet, Fault, check_source
from services.data.checks.evaluation_sets import normalised
from services.data.checks.findings import Finding, write_quarantine
from services.data.checks.geometry import best_overlap, small_depth, wrong_scales
from services.data.digests import content_digest
from services.data.rows import Entry
from services.errors import DataError
from services.streams.ledger import read_quarantine
from tests.unit.services.data import toy_scene

CONFIG = ChecksConfig(threads=2)


@dataclasses.dataclass
class FakeManifest:
    """As much of a manifest as a check looks at: scenes in memory, digests of the files as they are."""

    scenes: list[Scene | Item]
    name: str = "toy"
    root: str = "/toy"
    digest: str = "0" * 64
    broken: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def facts(self) -> FakeManifest:
        return self

    @property
    def entries(self) -> list[Entry]:
        return [
            Entry(
                id=s.id,
                kind="scene" if isinstance(s, Scene) else "item",
                split=s.split,
                digests=_digests(s),
                n_views=len(_images(s)),
                scene_type=None,
                length=0,
            )
            for s in self.scenes
        ]

    def scene(self, scene_id: str) -> Scene | Item:
        return next(s for s in self.scenes if s.id == scene_id)

    def count_views(self) -> int:
        return sum(len(_images(s)) for s in self.scenes)


def _images(scene: Scene | Item) -> list[ImageRef]:
    return [view.image for view in scene.views] if isinstance(scene, Scene) else list(scene.images)


def _digests(scene: Scene | Item) -> tuple[str, ...]:
    return tuple(content_digest(i) if Path(i.path).exists() else "gone" + i.path for i in _images(scene))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    room = toy_scene.furnished(2, cameras=0)
    # A camera that walks as well as turns: where it only turned, no scale of depth could be told from another.
    for i in range(8):
        angle = 2 * np.pi * i / 8
        eye = (room.width / 2 + 0.9 * np.cos(angle), room.length / 2 + 0.9 * np.sin(angle), 1.3 + 0.1 * (i % 3))
        target = (room.width / 2 - 2 * np.cos(angle + 0.3), room.length / 2 - 2 * np.sin(angle + 0.3), 0.6)
        room.cameras.append((eye, target))
    return toy_scene.write(room, tmp_path_factory.mktemp("clean"), "toy", mesh=False)


@pytest.fixture
def scene(clean: Scene, tmp_path: Path) -> Scene:
    """A copy of the clean scene that a test may damage."""
    folder = tmp_path / "scene"
    shutil.copytree(Path(clean.views[0].image.path).parent, folder)

    def moved(path: str) -> str:
        return str(folder / Path(path).name)

    views = tuple(
        dataclasses.replace(
            view,
            image=dataclasses.replace(view.image, path=moved(view.image.path)),
            depth=dataclasses.replace(view.depth, path=moved(view.depth.path)),
            instance_path=moved(view.instance_path),
        )
        for view in clean.views
    )
    return dataclasses.replace(clean, views=views)


def check(*scenes: Scene | Item, sets: tuple[EvaluationSet, ...] = ()) -> CheckReport:
    return check_source(FakeManifest(list(scenes)), CONFIG, sets)  # type: ignore[arg-type]


def with_view(scene: Scene, index: int, **changes: object) -> Scene:
    views = list(scene.views)
    views[index] = dataclasses.replace(views[index], **changes)
    return dataclasses.replace(scene, views=tuple(views))


def posed(scene: Scene, index: int, change: Callable[[np.ndarray], np.ndarray]) -> Scene:
    return with_view(scene, index, pose=toy_scene.as_matrix(change(np.array(scene.views[index].pose))))


def truncate(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def rescale_depth(path: str, factor: float) -> None:
    stored = np.array(Image.open(path)) * factor
    Image.fromarray(stored.round().clip(0, 65535).astype(np.uint16)).save(path)


def image_gone(scene: Scene) -> Scene:
    Path(scene.views[3].image.path).unlink()
    return scene


def depth_gone(scene: Scene) -> Scene:
    Path(scene.views[3].depth.path).unlink()
    return scene


def mask_gone(scene: Scene) -> Scene:
    Path(scene.views[3].instance_path).unlink()
    return scene


def image_truncated(scene: Scene) -> Scene:
    truncate(scene.views[3].image.path)
    return scene


def depth_truncated(scene: Scene) -> Scene:
    truncate(scene.views[3].depth.path)
    return scene


def mask_no_picture(scene: Scene) -> Scene:
    Path(scene.views[3].instance_path).write_text("nothing to see")
    return scene


def image_empty(scene: Scene) -> Scene:
    Path(scene.views[3].image.path).write_bytes(b"")
    return scene


def image_of_other_size(scene: Scene) -> Scene:
    Image.open(scene.views[3].image.path).resize((32, 24)).save(scene.views[3].image.path)
    return scene


def depth_of_other_size(scene: Scene) -> Scene:
    Image.open(scene.views[3].depth.path).resize((32, 24)).save(scene.views[3].depth.path)
    return scene


def mask_of_other_shape(scene: Scene) -> Scene:
    Image.open(scene.views[3].instance_path).resize((48, 48)).save(scene.views[3].instance_path)
    return scene


def intrinsics_of_other_image(scene: Scene) -> Scene:
    return with_view(scene, 3, K=dataclasses.replace(toy_scene.K, cx=320.0, cy=240.0))


def focal_length_zero(scene: Scene) -> Scene:
    return with_view(scene, 3, K=dataclasses.replace(toy_scene.K, fx=0.0))


def pose_lost(scene: Scene) -> Scene:
    return posed(scene, 3, lambda pose: np.full((4, 4), -np.inf))


def pose_nan_translation(scene: Scene) -> Scene:
    return posed(scene, 3, lambda pose: np.where(np.arange(16).reshape(4, 4) == 7, np.nan, pose))


def pose_mirrored(scene: Scene) -> Scene:
    return posed(scene, 3, lambda pose: pose @ np.diag([1, 1, -1, 1.0]))


def pose_scaled(scene: Scene) -> Scene:
    return posed(scene, 3, lambda pose: np.vstack([1.2 * pose[:3], pose[3:]]))


def depth_in_metres_for_one_view(scene: Scene) -> Scene:
    depth = dataclasses.replace(scene.views[3].depth, metres_per_unit=1.0)
    return with_view(scene, 3, depth=depth)


def depth_a_tenth_for_one_view(scene: Scene) -> Scene:
    rescale_depth(scene.views[3].depth.path, 0.1)
    return scene


def away(scene: Scene) -> Scene:
    return posed(scene, 3, lambda pose: pose + np.array([[0, 0, 0, 500.0]] + [[0] * 4] * 3))


def copied_frame(scene: Scene) -> Scene:
    shutil.copy(scene.views[2].image.path, scene.views[3].image.path)
    return scene


@pytest.mark.parametrize(
    ("damage", "fault", "says"),
    [
        (image_gone, Fault.MISSING, "3.png: there is no such file"),
        (depth_gone, Fault.MISSING, "3.depth.png: there is no such file"),
        (mask_gone, Fault.MISSING, "3.ids.png: there is no such file"),
        (image_truncated, Fault.UNREADABLE, "truncated or damaged"),
        (depth_truncated, Fault.UNREADABLE, "truncated or damaged"),
        (mask_no_picture, Fault.UNREADABLE, "3.ids.png"),
        (image_empty, Fault.UNREADABLE, "3.png"),
        (image_of_other_size, Fault.SIZE, "the image is 32x24, its intrinsics are for 64x48"),
        (depth_of_other_size, Fault.SIZE, "the depth map is 32x24, its intrinsics are for 64x48"),
        (mask_of_other_shape, Fault.SIZE, "the mask is 48x48, which is no resized 64x48"),
        (intrinsics_of_other_image, Fault.SIZE, "principal point 320.0, 240.0 lies outside"),
        (focal_length_zero, Fault.SIZE, "are no camera"),
        (pose_lost, Fault.POSE, "not finite"),
        (pose_nan_translation, Fault.POSE, "not finite"),
        (pose_mirrored, Fault.POSE, "determinant -1"),
        (pose_scaled, Fault.POSE, "not rigid"),
        (depth_in_metres_for_one_view, Fault.DEPTH_SCALE, "is the unit right?"),
        (depth_a_tenth_for_one_view, Fault.DEPTH_SCALE, "multiplied by 10"),
        (away, Fault.NO_OVERLAP, "shares 0.0 % of its pixels"),
        (copied_frame, Fault.DUPLICATE, "has the same content as"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_each_fault_is_found_and_nothing_else(
    scene: Scene, damage: Callable[[Scene], Scene], fault: Fault, says: str, tmp_path: Path
) -> None:
    report = check(damage(scene))
    assert [(f.fault, f.scene, f.view) for f in report.findings] == [(fault, "toy", 3)]
    assert says in report.findings[0].reason
    report.write(tmp_path / "out")
    assert read_quarantine(tmp_path / "out" / "quarantine.txt") == {"toy/toy#view3"}
    assert f"{fault[:1].upper()}{fault[1:]}" in (tmp_path / "out" / "report.html").read_text()


def test_a_clean_scene_has_no_finding(scene: Scene, tmp_path: Path) -> None:
    report = check(scene)
    assert report.findings == ()
    assert len(report.overlaps) == 8
    assert min(report.overlaps.values()) > 0.3
    report.write(tmp_path)
    assert read_quarantine(tmp_path / "quarantine.txt") == frozenset()
    assert report.lines()[-1] == "  no faults"


def test_a_whole_scene_in_the_wrong_unit_is_one_finding(scene: Scene) -> None:
    for view in scene.views:
        rescale_depth(view.depth.path, 0.1)
    report = check(scene)
    assert [(f.fault, f.view) for f in report.findings] == [(Fault.DEPTH_SCALE, None)]
    assert "multiplied by 10" in report.findings[0].reason


def test_a_camera_that_only_turns_says_nothing_about_scale(tmp_path: Path) -> None:
    room = toy_scene.furnished(5)
    eye = (3.0, 2.5, 1.5)
    room.cameras = [(eye, (3 + np.cos(a), 2.5 + np.sin(a), 1.3)) for a in np.linspace(0, 1.5, 6)]
    scene = toy_scene.write(room, tmp_path, mesh=False)
    depths = {i: toy_scene.cast(room, np.array(v.pose))[0] * 0.1 for i, v in enumerate(scene.views)}
    assert wrong_scales(small_depth(scene, depths)) == {}


def test_nearly_identical_frames_are_a_warning(scene: Scene, tmp_path: Path) -> None:
    image = np.array(Image.open(scene.views[2].image.path)).astype(int)
    noise = np.random.default_rng(0).integers(-3, 4, image.shape)
    Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)).save(scene.views[3].image.path)
    report = check(scene)
    assert [(f.fault, f.view) for f in report.findings] == [(Fault.NEAR_DUPLICATE, 3)]
    report.write(tmp_path)
    assert read_quarantine(tmp_path / "quarantine.txt") == frozenset()
    assert "nearly identical" in (tmp_path / "quarantine.txt").read_text()


def test_frames_repeated_in_another_scene(scene: Scene, clean: Scene) -> None:
    report = check(clean, dataclasses.replace(scene, id="copy"))
    assert {f.fault for f in report.findings} == {Fault.DUPLICATE}
    assert {f.scene for f in report.findings} == {"copy"}
    assert len(report.findings) == 8


@pytest.mark.parametrize(
    ("scene_id", "line", "found"),
    [
        ("scene0011_00", "scene0011_00", True),
        ("scene0011_00", "scannet/videos/Scene0011_00.mp4", True),
        ("scene0011_01", "scene0011_00", True),
        ("scene0012_00", "scene0011_00", False),
        ("val/a1b2c3", "a1b2c3   # a comment", True),
        ("a1b2c3d", "a1b2c3", False),
        ("anything", "# anything", False),
    ],
)
def test_scenes_of_an_evaluation_set(scene: Scene, tmp_path: Path, scene_id: str, line: str, found: bool) -> None:
    (tmp_path / "bench.txt").write_text(f"# scenes\n{line}\nother\n")
    report = check(dataclasses.replace(scene, id=scene_id), sets=(EvaluationSet.read("bench", tmp_path / "bench.txt"),))
    assert [f.fault for f in report.findings] == [Fault.EVALUATION] * found
    if found:
        assert "evaluation set bench" in report.findings[0].reason


def test_an_evaluation_set_by_content(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "digests.txt").write_text(content_digest(scene.views[5].image).upper() + "\n")
    report = check(scene, sets=(EvaluationSet.read("frames", tmp_path / "digests.txt"),))
    assert [(f.fault, f.view) for f in report.findings] == [(Fault.EVALUATION, None)]
    assert "1 of its pictures" in report.findings[0].reason


def test_an_evaluation_set_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: the list of ids cannot be read"):
        EvaluationSet.read("bench", tmp_path / "nowhere.txt")


def test_names_are_normalised() -> None:
    assert normalised(" ScanNet\\Scene0001_00.MP4 ") == normalised("scene0001_00") == "scene0001_00"
    assert normalised("room.5") == "room.5"


def test_items_are_read_too(scene: Scene, tmp_path: Path) -> None:
    truncate(scene.views[0].image.path)
    items = [Item(id=f"i{n}", images=(scene.views[n].image,)) for n in range(3)]
    gone = Item(id="gone", images=(ImageRef(path=str(tmp_path / "none.jpg")),))
    report = check(*items, gone)
    assert [(f.fault, f.scene) for f in report.findings] == [(Fault.MISSING, "gone"), (Fault.UNREADABLE, "i0")]


def test_conversations_answer_and_are_not_repeated(scene: Scene) -> None:
    asking, answer = Turn(role="user", text="<image>How many?"), Turn(role="assistant", text="Two")
    picture = (scene.views[0].image,)
    report = check(
        Item(id="a", images=picture, turns=(asking, answer)),
        Item(id="b", images=picture, turns=(asking, dataclasses.replace(answer, text="Three"))),
        Item(id="c", images=picture, turns=(asking, answer)),
        Item(id="d", images=picture, turns=(asking,)),
        Item(id="e", turns=(asking, dataclasses.replace(answer, text=" "))),
    )
    assert [(f.fault, f.scene) for f in report.findings] == [
        (Fault.DUPLICATE, "c"), (Fault.NO_ANSWER, "d"), (Fault.NO_ANSWER, "e"),
    ]  # fmt: skip
    assert "has no answer: its turns are ['user']" in report.findings[1].reason
    assert all(finding.quarantined for finding in report.findings)


def test_what_the_reader_left_out_is_reported(scene: Scene) -> None:
    manifest = FakeManifest([scene], broken={"lost": "lost/pose: there is no such folder"})
    report = check_source(manifest, CONFIG)  # type: ignore[arg-type]
    assert [(f.fault, f.scene) for f in report.findings] == [(Fault.LEFT_OUT, "lost")]


def test_overlap_of_many_views_agrees_with_all_pairs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.data.checks import geometry
    from services.data.images import load_depth

    small = small_depth(scene, {i: load_depth(view.depth) for i, view in enumerate(scene.views)})
    every = best_overlap(small)
    monkeypatch.setattr(geometry, "MANY_VIEWS", 3)
    assert best_overlap(small) == pytest.approx(every)


def test_progress_and_json(scene: Scene, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = FakeManifest([dataclasses.replace(scene, id=f"s{i}") for i in range(3)])
    report = check_source(manifest, CONFIG, progress=lambda done, total: seen.append((done, total)))  # type: ignore[arg-type]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    report.write(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["counts"]["identical frames"] == len(stored["findings"]) == 16
    assert stored["scenes"] == 3
    assert stored["views"] == 24


def test_the_page_is_self_contained_and_escaped(scene: Scene, tmp_path: Path) -> None:
    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href")]
            assert tag not in ("script", "link", "iframe")

    bad = dataclasses.replace(image_truncated(scene), id="<script>alert(1)</script>")
    report = check(bad, dataclasses.replace(scene, id="b"))
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert parser.found
    assert all(link.startswith("data:image/jpeg;base64,") for link in parser.found)
    assert "cannot be read" in page
    assert "<rect" in page


def test_the_quarantine_lists_a_scene_once(tmp_path: Path) -> None:
    findings = [
        Finding(fault=Fault.POSE, scene="a", view=1, reason="bad\npose"),
        Finding(fault=Fault.EVALUATION, scene="a", reason="in bench"),
        Finding(fault=Fault.SIZE, scene="b", view=2, reason="x"),
        Finding(fault=Fault.POSE, scene="b", view=2, reason="y"),
    ]
    assert write_quarantine(findings, tmp_path / "q.txt", "s") == 2
    assert read_quarantine(tmp_path / "q.txt") == {"s/a", "s/b#view2"}
