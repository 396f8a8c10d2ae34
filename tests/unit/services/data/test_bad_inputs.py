"""What is wrong with the data is said: the file, what was seen, what is allowed. One line of the table an input."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.schema import SourceConfig
from services.contracts import DepthRef, ImageRef, Intrinsics, Scene
from services.data.images import load_depth, load_ids, load_image
from services.data.ingest import check_sizes
from services.data.readers import open_reader
from services.errors import USER_ERRORS
from tests.support.layouts import SMALL_K, matrix_text, save_color, small_views, write_scannet

Act = Callable[[Path], Any]
CAMERA = Intrinsics(fx=1, fy=1, cx=0, cy=0, width=4, height=3)
META = {"fl_x": 20.0, "fl_y": 20.0, "cx": 4.0, "cy": 3.0}
POSE = np.eye(4).tolist()


def noise(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    save_color(path, np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    return path


def cut(path: Path, share: float = 0.5) -> str:
    data = noise(path).read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return str(path)


def written(path: Path, data: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def depth_of(path: Path, array: np.ndarray) -> DepthRef:
    Image.fromarray(array).save(path)
    return DepthRef(path=str(path), metres_per_unit=0.001, K=CAMERA)


def scannet(change: Callable[[Path], Any], **settings: Any) -> Act:
    """Reads a ScanNet scene after ``change`` was made to its folder."""

    def act(root: Path) -> None:
        change(write_scannet(root, views=small_views(), camera=SMALL_K))
        reader = open_reader(root, SourceConfig(format="scannet", **settings))
        reader.classes()
        scene = reader.read(reader.list_ids()[0])
        assert isinstance(scene, Scene)
        for view in scene.views:
            check_sizes(view)

    return act


def nerfstudio(**meta: Any) -> Act:
    """Reads a ``transforms.json`` of one 8x6 picture with these changes."""

    def act(root: Path) -> None:
        noise(root / "a.png", (8, 6))
        frames = [{"file_path": "a.png", "transform_matrix": POSE}]
        facts = {name: value for name, value in {**META, "frames": frames, **meta}.items() if value is not None}
        written(root / "transforms.json", json.dumps(facts))
        open_reader(root, SourceConfig(format="nerfstudio")).read(root.name)

    return act


def corpus(name: str, text: str) -> Act:
    """Reads the first record of a corpus file."""

    def act(root: Path) -> None:
        reader = open_reader(written(root / name, text), SourceConfig(format="corpus"))
        reader.read(reader.list_ids()[0])

    return act


def source(name: str, write: Callable[[Path], Any] = lambda root: None, file: str = "", **settings: Any) -> Act:
    """Reads the first scene of a source that ``write`` makes."""

    def act(root: Path) -> None:
        write(root)
        reader = open_reader(root / file, SourceConfig(format=name, **settings))
        reader.read(reader.list_ids()[0])

    return act


def arkit(line: str) -> Callable[[Path], Any]:
    def write(root: Path) -> None:
        noise(root / "1/lowres_wide/1_5.000.png")
        written(root / "1/lowres_wide_intrinsics/1_5.000.pincam", "64 48 50 50 32 24")
        written(root / "1/lowres_wide.traj", line)

    return write


def colmap_without_pictures(root: Path) -> None:
    written(root / "sparse/0/cameras.txt", "1 PINHOLE 8 6 9 9 4 3\n")
    written(root / "sparse/0/images.txt", "1 1 0 0 0 0 0 0 1 a.png\n\n")
    written(root / "sparse/0/points3D.txt", "")


def parquet_row(path: Path) -> ImageRef:
    pq.write_table(pa.table({"image": [1, 2]}), path)
    return ImageRef(path=str(path), member="image:0")


def gzipped(path: Path) -> ImageRef:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "a.png")
    return ImageRef(path=str(path), member="a.png")


def torn_tar(root: Path) -> ImageRef:
    with tarfile.open(root / "a.tar", "w") as archive:
        archive.add(noise(root / "n.png"), "a.png")
    data = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(data[:2000])
    return ImageRef(path=str(root / "a.tar"), member="a.png")


def group(text: str) -> Callable[[Path], Any]:
    return lambda scene: written(scene / f"{scene.name}.aggregation.json", text)


def pose(text: str) -> Callable[[Path], Any]:
    return lambda scene: written(scene / "pose/0.txt", text)


TABLE: dict[str, tuple[Act, str]] = {
    # pixels
    "truncated PNG": (lambda r: load_image(ImageRef(path=cut(r / "a.png"))), r"a\.png: the image is truncated"),
    "truncated JPEG": (lambda r: load_image(ImageRef(path=cut(r / "a.jpg"))), r"a\.jpg: the image is truncated"),
    "header only": (lambda r: load_image(ImageRef(path=cut(r / "a.png", 0.001))), r"a\.png: not a readable image"),
    "empty image": (lambda r: load_image(ImageRef(path=written(r / "a.png", b""))), r"a\.png: not a readable image"),
    "no image file": (lambda r: load_image(ImageRef(path=str(r / "a.png"))), r"a\.png: there is no such file"),
    "depth as colour": (
        lambda r: load_image(ImageRef(path=depth_of(r / "a.png", np.zeros((3, 4), np.uint16)).path)),
        r"a\.png: a picture of mode 'I;16' where an 8-bit .*depth map\?",
    ),
    "colour as depth": (
        lambda r: load_depth(depth_of(r / "a.png", np.zeros((3, 4, 3), np.uint8))),
        r"one channel.*\(3, 4, 3\)",
    ),
    "depth of another size": (
        lambda r: load_depth(depth_of(r / "a.png", np.zeros((6, 8), np.uint16))),
        r"a\.png: the depth map is 8x6 but its intrinsics are for 4x3",
    ),
    "float ids": (
        lambda r: load_ids((np.save(r / "a.npy", np.zeros((2, 2))), r / "a.npy")[1]),
        r"holds integers.*float64",
    ),
    "pickled array": (
        lambda r: load_ids((np.save(r / "a.npy", np.array([[{}]]), allow_pickle=True), r / "a.npy")[1]),
        r"a\.npy: not a readable array",
    ),
    "video that is none": (
        lambda r: load_image(ImageRef(path=written(r / "a.mp4", b"x" * 500), frame=0)),
        r"a\.mp4: not a readable video",
    ),
    "compressed archive": (lambda r: load_image(gzipped(r / "a.tar")), r"a\.tar: not a readable, uncompressed tar"),
    "truncated archive": (lambda r: load_image(torn_tar(r)), r"a\.tar: .*(truncated|unexpected end)"),
    "column without bytes": (
        lambda r: load_image(parquet_row(r / "a.parquet")),
        r"a\.parquet: row 0 .* holds no image bytes",
    ),
    "no Parquet": (
        lambda r: load_image(ImageRef(path=written(r / "a.parquet", b"PAR1" * 9), member="image:0")),
        r"a\.parquet: not a readable Parquet file",
    ),
    # which source
    "unknown format": (source("scanet"), r"format='scanet' is not one of arkitscenes, .*; did you mean 'scannet'\?"),
    "unknown option": (
        source("nerfstudio", options={"depth_units": 1}),
        r"options\.depth_units is unknown to the format 'nerfstudio'; .*did you mean 'depth_unit'\?",
    ),
    "no root": (source("scannet", file="nowhere"), r"nowhere: there is no such folder or file"),
    "no scenes": (source("scannet"), r"no scannet scenes or items below it \(expected scans/<scene>/color"),
    "no split file": (source("scannet", splits={"train": "t.txt"}), r"t\.txt: there is no such file"),
    # ScanNet
    "missing intrinsics": (
        scannet(lambda s: (s / "intrinsic/intrinsic_color.txt").unlink()),
        r"intrinsic_color\.txt: there is no such file",
    ),
    "intrinsics of 3x3": (
        scannet(lambda s: written(s / "intrinsic/intrinsic_color.txt", matrix_text(np.eye(3)))),
        r"intrinsic_color\.txt: holds 9 numbers, 4x4 are needed",
    ),
    "intrinsics of another size": (
        scannet(lambda s: written(s / "intrinsic/intrinsic_color.txt", "577 0 320 0 0 577 240 0 0 0 1 0 0 0 0 1")),
        r"intrinsic_color\.txt: the principal point \(320\.0, 240\.0\) lies outside of the image of 24x18",
    ),
    "negative focal length": (
        scannet(lambda s: written(s / "intrinsic/intrinsic_color.txt", "-9 0 9 0 0 9 9 0 0 0 1 0 0 0 0 1")),
        r"focal lengths and centre must be finite and positive, got \(-9\.0",
    ),
    "an image of another size": (
        scannet(lambda s: noise(s / "color/10.png", (48, 36))),
        r"10\.png: the picture is 48x36 but its intrinsics are for 24x18",
    ),
    "transposed pose": (
        scannet(pose("1 0 0 0 0 1 0 0 0 0 1 0 1 2 3 1")),
        r"0\.txt: the last row of a pose is 0 0 0 1.*transposed",
    ),
    "pose of words": (scannet(pose("1 0 0 x")), r"0\.txt: holds something that is no number"),
    "label table without a column": (
        scannet(lambda s: written(s.parents[1] / "scannetv2-labels.combined.tsv", "id\tcategory\n1\twall\n")),
        r"combined\.tsv: the label table lacks the column raw_category",
    ),
    "label table without ids": (
        scannet(
            lambda s: written(s.parents[1] / "scannetv2-labels.combined.tsv", "id\traw_category\tcategory\nx\ta\ta\n")
        ),
        r"combined\.tsv: line 2 has no integer id",
    ),
    "broken JSON": (scannet(group('{"segGroups": [}')), r"aggregation\.json: broken JSON at line 1, column 16"),
    "no segment groups": (scannet(group("{}")), r"aggregation\.json: has no list 'segGroups'"),
    "a group without label": (
        scannet(group('{"segGroups": [{"objectId": 1}]}')),
        r"segment group is incomplete.*label",
    ),
    "axis alignment of 12 numbers": (
        scannet(lambda s: written(s / f"{s.name}.txt", "axisAlignment = " + "1 " * 12)),
        r"axisAlignment has 12 numbers, 4x4 are needed",
    ),
    # nerfstudio, COLMAP
    "no frames": (nerfstudio(frames=[]), r"transforms\.json: has no frames"),
    "frames without paths": (nerfstudio(frames=[{}]), r"'frames' must be a list of frames with 'file_path'"),
    "pose of 3x3": (
        nerfstudio(frames=[{"file_path": "a.png", "transform_matrix": np.eye(3).tolist()}]),
        r"transform_matrix of a\.png has the shape \(3, 3\), 4x4 is needed",
    ),
    "ragged pose": (
        nerfstudio(frames=[{"file_path": "a.png", "transform_matrix": [[1, 2], [3]]}]),
        r"frame a\.png has no readable transform_matrix",
    ),
    "picture that is missing": (
        nerfstudio(frames=[{"file_path": "b.png", "transform_matrix": POSE}]),
        r"b\.png: there is no such file",
    ),
    "no focal length": (
        nerfstudio(fl_x=None),
        r"has no intrinsics \(fl_x, fl_y, cx, cy or camera_angle_x\) for a\.png",
    ),
    "size against intrinsics": (nerfstudio(w=16, h=12), r"the intrinsics are for 16x12 but a\.png is 8x6"),
    "panorama": (
        nerfstudio(camera_model="EQUIRECTANGULAR"),
        r"camera_model='EQUIRECTANGULAR' cannot be turned into a pinhole",
    ),
    "broken model": (
        source("colmap", lambda r: written(r / "sparse/0/cameras.bin", b"xx")),
        r"sparse/0: not a readable COLMAP model",
    ),
    "registered picture missing": (
        source("colmap", colmap_without_pictures),
        r"a\.png: there is no such file \(it is registered",
    ),
    # phones
    "trajectory too short": (
        source("arkitscenes", arkit("5.0 0 0 0 1 2")),
        r"lowres_wide\.traj: line 1 has 6 numbers, 7 are needed",
    ),
    "empty trajectory": (source("arkitscenes", arkit("\n")), r"lowres_wide\.traj: holds no pose"),
    "camera line too short": (
        source(
            "re10k", lambda r: (written(r / "c.txt", "url\n0 1 1 .5 .5 0 0 1\n"), (r / "frames/c").mkdir(parents=True))
        ),
        r"c\.txt: line 2 has 8 numbers, 19 are needed",
    ),
    "clip without pictures": (
        source("re10k", lambda r: written(r / "c.txt", "https://x/watch?v=abc\n" + " ".join(["0"] * 19))),
        r"c\.txt: there is neither a folder .*frames/c nor a video of c or abc",
    ),
    "video that does not decode": (
        source("images", lambda r: written(r / "v.mp4", b"\0" * 4000)),
        r"v\.mp4: not a readable video",
    ),
    # corpora
    "no list of records": (corpus("a.json", "{}"), r"a\.json: must hold a list of records, holds dict"),
    "a record that is none": (corpus("a.json", "[3]"), r"a\.json: record 0 \(id '0'\): a record is an object, got int"),
    "conversation without turns": (
        corpus("a.json", '[{"id": "q", "conversations": []}]'),
        r"\(id 'q'\): 'conversations' has no turns",
    ),
    "unknown speaker": (
        corpus("a.json", '[{"conversations": [{"from": "bot", "value": "x"}]}]'),
        r"from='bot' is not one of human, user, gpt, assistant, system",
    ),
    "turn without text": (
        corpus("a.json", '[{"conversations": [{"from": "gpt"}]}]'),
        r"a turn needs 'from' and 'value', or 'role' and 'content', as text",
    ),
    "image of a record missing": (
        corpus("a.json", '[{"image": "x.png"}]'),
        r"x\.png: there is no such file.*options\.images",
    ),
    "broken line": (corpus("a.jsonl", '{"id": "x"\n'), r"a\.jsonl: line 1: broken JSON"),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_message(name: str, tmp_path: Path) -> None:
    act, message = TABLE[name]
    with pytest.raises(USER_ERRORS, match=message):
        act(tmp_path)
