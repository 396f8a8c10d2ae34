"""Writes one room in ScanNet's layout: colour, depth, poses, masks, mesh, segments, instances with boxes.

Boxes (``obb`` of a segment group) are given as in ScanNet++ and ARKitScenes: ``centroid``, ``axesLengths`` and
``normalizedAxes``, the three unit axes one after the other (nine numbers), in the frame of the poses and the
mesh, that is before ``axisAlignment``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image
from trimesh.exchange.ply import export_ply

from configs.schema import RoomsConfig
from services.contracts import Instance, Intrinsics
from services.data.rooms.paths import walk
from services.data.rooms.plan import GENERATOR_VERSION
from services.data.rooms.render import Picture, Renderer
from services.data.rooms.room import Room, build_room

DONE = "done"
"""Name of the marker that is written into a room's folder last."""
MESH_EDGE = 0.25
"""Longest edge in metres of the written mesh: walls are cut up, so that its vertices cover the room."""
FIELD_OF_VIEW = (66.0, 80.0)
"""Horizontal, degrees; one value a room."""


def cameras(room: Room, renderer: Renderer, config: RoomsConfig) -> tuple[Intrinsics, np.ndarray]:
    """The camera of a room and its (V, 4, 4) camera-to-world poses; also sets the renderer's exposure."""
    rng = np.random.default_rng([GENERATOR_VERSION, config.seed, room.plan.index, 1_000_003])
    fov = float(np.deg2rad(rng.uniform(*FIELD_OF_VIEW)))
    focal = config.width / 2 / np.tan(fov / 2)
    K = Intrinsics(
        fx=focal,
        fy=focal,
        cx=(config.width - 1) / 2,
        cy=(config.height - 1) / 2,
        width=config.width,
        height=config.height,
    )
    poses = walk(room, renderer, config.views, fov, rng)
    renderer.expose(poses[:: max(1, config.views // 3)], K)
    return K, poses


def write_room(config: RoomsConfig, index: int, folder: Path) -> None:
    """Makes room ``index`` and writes it into ``folder``, which must not exist; the marker comes last.

    Raises:
        DataError: the room cannot be furnished.
        OSError: the folder cannot be written.
    """
    room = build_room(config, index)
    renderer = Renderer(room)
    K, poses = cameras(room, renderer, config)
    for name in ("color", "depth", "pose", "intrinsic", "instance-filt", "label-filt"):
        (folder / name).mkdir(parents=True)
    for number, pose in enumerate(poses):
        _write_view(folder, number, pose, renderer.picture(pose, K))
    matrix = np.eye(4)
    matrix[:3, :3] = K.matrix()
    for name in ("intrinsic_color", "intrinsic_depth"):
        (folder / "intrinsic" / f"{name}.txt").write_text(_matrix_text(matrix))
    (folder / f"{room.plan.id}.txt").write_text(_information(room, K))
    _write_mesh(room, renderer, folder)
    (folder / DONE).write_text(f"generator version {GENERATOR_VERSION}, {config.views} views\n")


def _matrix_text(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(f"{x:.12g}" for x in row) for row in matrix) + "\n"


def _write_view(folder: Path, number: int, pose: np.ndarray, picture: Picture) -> None:
    Image.fromarray(picture.color).save(folder / "color" / f"{number}.png", compress_level=4)
    millimetres = np.rint(picture.depth * 1000.0)
    for name, values in (
        ("depth", millimetres),
        ("instance-filt", picture.instance),
        ("label-filt", picture.label),
    ):
        image = Image.fromarray(np.asarray(values).astype(np.uint16))
        image.save(folder / name / f"{number}.png", compress_level=4)
    (folder / "pose" / f"{number}.txt").write_text(_matrix_text(pose))


def _information(room: Room, K: Intrinsics) -> str:
    """The text of ``<scene>.txt``: key = value lines as ScanNet writes them."""
    alignment = " ".join(f"{x:.12g}" for x in room.axis_alignment.ravel())
    lines = [f"axisAlignment = {alignment}", f"sceneType = {room.plan.type}"]
    for kind in ("color", "depth"):
        lines += [f"{kind}Width = {K.width}", f"{kind}Height = {K.height}"]
        lines += [f"{name}_{kind} = {getattr(K, key):.12g}" for name, key in _CAMERA_KEYS]
    lines.append("roomSize = " + " ".join(f"{x:.12g}" for x in room.size))
    return "\n".join(lines) + "\n"


_CAMERA_KEYS = (("fx", "fx"), ("fy", "fy"), ("mx", "cx"), ("my", "cy"))


def _write_mesh(room: Room, renderer: Renderer, folder: Path) -> None:
    """Mesh (PLY), a segment a part for every vertex, and which segments and box belong to each object."""
    name = room.plan.id
    vertices, faces, colours, segments = dense_mesh(room, renderer)
    mesh = trimesh.Trimesh(vertices, faces, vertex_colors=colours, process=False)
    (folder / f"{name}_vh_clean_2.ply").write_bytes(export_ply(mesh))
    segments_file = f"{name}_vh_clean_2.0.010000.segs.json"
    _write_json(folder / segments_file, {"sceneId": name, "segIndices": segments.tolist()})
    part_instance = np.zeros(int(room.triangles.part.max()) + 1, np.int64)
    part_instance[room.triangles.part] = room.face_instance
    groups = [
        {
            "id": instance.id - 1,
            "objectId": instance.id - 1,
            "label": instance.label,
            "segments": np.flatnonzero(part_instance == instance.id).tolist(),
            "obb": obb(instance),
        }
        for instance in room.instances
    ]
    _write_json(
        folder / f"{name}.aggregation.json", {"sceneId": name, "segmentsFile": segments_file, "segGroups": groups}
    )


def obb(instance: Instance) -> dict[str, list[float]]:
    """An instance's box in ScanNet++'s form. ValueError when it has none."""
    box = instance.box
    if box is None:
        raise ValueError(f"instance {instance.id} ({instance.label}) has no box")
    axes = np.asarray(box.axes).T  # columns of the contract, one after the other in the file
    return {
        "centroid": list(box.center),
        "axesLengths": list(box.size),
        "normalizedAxes": [float(x) for x in axes.ravel()],
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True) + "\n")


def dense_mesh(room: Room, renderer: Renderer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The room's surface with edges of at most MESH_EDGE.

    Returns:
        Vertices (V, 3) float64, faces (F, 3), colours (V, 3) uint8, and the part (V,) that each vertex belongs to.
    """
    triangles = room.triangles
    soup = np.concatenate([triangles.corners, triangles.uv], axis=2)  # (F, 3, 5)
    part, material = triangles.part, triangles.material
    done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(soup):
        edges = np.linalg.norm(np.roll(soup, -1, axis=1)[..., :3] - soup[..., :3], axis=2)
        longest = edges.argmax(axis=1)
        small = edges.max(axis=1) <= MESH_EDGE
        done.append((soup[small], part[small], material[small]))
        soup, part, material, longest = soup[~small], part[~small], material[~small], longest[~small]
        # Halve the longest edge: turn the triangle so that it is the first.
        row = np.arange(len(soup))[:, None]
        a, b, c = np.moveaxis(soup[row, (longest[:, None] + np.arange(3)) % 3], 1, 0)
        middle = (a + b) / 2
        soup = np.concatenate([np.stack([a, middle, c], 1), np.stack([middle, b, c], 1)])
        part, material = np.tile(part, 2), np.tile(material, 2)
    corners = np.concatenate([d[0] for d in done]).reshape(-1, 5)
    part = np.repeat(np.concatenate([d[1] for d in done]), 3)
    material = np.repeat(np.concatenate([d[2] for d in done]), 3)
    keys = np.column_stack([np.rint(corners[:, :3] * 1e5).astype(np.int64), part])
    first, inverse = _unique_rows(keys)
    colours = renderer.base_colour(material[first], corners[first, 3:])
    return corners[first, :3], inverse.reshape(-1, 3), colours, part[first]


def _unique_rows(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First places of the distinct rows of (N, C), sorted, and which of them each row is.

    ``np.unique(axis=0)`` gives the same in four times the time: it compares rows as records.
    """
    order = np.lexsort(keys.T[::-1])
    ordered = keys[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    inverse = np.empty(len(keys), np.int64)
    inverse[order] = np.cumsum(starts) - 1
    return order[starts], inverse
