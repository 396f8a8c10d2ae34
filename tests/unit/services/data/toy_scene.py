"""A small room of boxes, ray-cast exactly in numpy: images, depth, instance masks and boxes with known answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from services.contracts import Box3D, DepthRef, ImageRef, Instance, Intrinsics, Scene, Split, View

WIDTH, HEIGHT = 64, 48
K = Intrinsics(fx=48.0, fy=48.0, cx=31.5, cy=23.5, width=WIDTH, height=HEIGHT)


@dataclass(frozen=True)
class Thing:
    """A box on the floor (unless ``bottom`` says otherwise), turned by ``yaw`` degrees about z."""

    label: str
    x: float
    y: float
    size: tuple[float, float, float] = (0.6, 0.6, 0.8)
    yaw: float = 0.0
    bottom: float = 0.0

    def axes(self) -> np.ndarray:
        c, s = np.cos(np.deg2rad(self.yaw)), np.sin(np.deg2rad(self.yaw))
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])

    def box(self) -> Box3D:
        axes = tuple(tuple(float(v) for v in row) for row in self.axes())
        return Box3D(center=(self.x, self.y, self.bottom + self.size[2] / 2), size=self.size, axes=axes)


@dataclass
class Room:
    """A room [0, width] x [0, length] x [0, height] with things and a camera path (eye, target)."""

    things: list[Thing]
    cameras: list[tuple[tuple[float, float, float], tuple[float, float, float]]] = field(default_factory=list)
    width: float = 6.0
    length: float = 5.0
    height: float = 2.6


def look_at(eye: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """Camera-to-world with OpenCV axes, z up; written here in numpy, apart from the code under test."""
    forward = np.subtract(target, eye)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = right, np.cross(forward, right), forward, eye
    return pose


def _slabs(origin: np.ndarray, direction: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    with np.errstate(divide="ignore"):
        a, b = (low - origin) / direction, (high - origin) / direction
    return np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)


def cast(room: Room, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth along z (H, W) metres, instance ids (H, W) and colours (H, W, 3) of one view."""
    v, u = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    local = np.stack([(u - K.cx) / K.fx, (v - K.cy) / K.fy, np.ones_like(u)], -1)
    direction = local @ pose[:3, :3].T  # of length 1 along z: the parameter of the ray is the depth
    origin = pose[:3, 3]
    depth = _slabs(origin, direction, np.zeros(3), np.array([room.width, room.length, room.height]))[1]
    ids = np.zeros((HEIGHT, WIDTH), int)
    for i, thing in enumerate(room.things, start=1):
        box = thing.box()
        axes, half = thing.axes(), np.array(box.size) / 2
        near, far = _slabs((origin - box.center) @ axes, direction @ axes, -half, half)
        hit = (near <= far) & (near > 0) & (near < depth)
        depth, ids = np.where(hit, near, depth), np.where(hit, i, ids)
    world = origin + depth[..., None] * direction
    texture = 0.5 + 0.25 * np.sin(7 * world + ids[..., None]) + 0.2 * np.sin(2 * world[..., [1, 2, 0]] + 1)
    return depth, ids, (texture * 255).clip(0, 255).astype(np.uint8)


def as_matrix(array: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in array)


def write(room: Room, folder: Path, name: str = "toy", scene_type: str = "living room", mesh: bool = True) -> Scene:
    """Write the files of a room below ``folder`` and return its Scene."""
    import trimesh

    folder.mkdir(parents=True, exist_ok=True)
    views = []
    for i, (eye, target) in enumerate(room.cameras):
        pose = look_at(eye, target)
        depth, ids, colour = cast(room, pose)
        Image.fromarray(colour).save(folder / f"{i}.png")
        Image.fromarray((depth * 1000).round().astype(np.uint16)).save(folder / f"{i}.depth.png")
        Image.fromarray(ids.astype(np.uint16)).save(folder / f"{i}.ids.png")
        view = View(
            image=ImageRef(path=str(folder / f"{i}.png")),
            K=K,
            pose=as_matrix(pose),
            depth=DepthRef(path=str(folder / f"{i}.depth.png"), metres_per_unit=0.001, K=K),
            instance_path=str(folder / f"{i}.ids.png"),
        )
        views.append(view)
    if mesh:
        shell = trimesh.creation.box(bounds=[[0, 0, 0], [room.width, room.length, room.height]])
        shell.invert()
        parts = [shell]
        for thing in room.things:
            turned = np.eye(4)
            turned[:3, :3], turned[:3, 3] = thing.axes(), thing.box().center
            parts.append(trimesh.creation.box(extents=thing.size, transform=turned))
        trimesh.util.concatenate(parts).export(folder / "mesh.ply")
    instances = tuple(
        Instance(
            id=i,
            label=thing.label,
            class_id=1 + sorted({t.label for t in room.things}).index(thing.label),
            box=thing.box(),
        )
        for i, thing in enumerate(room.things, start=1)
    )
    return Scene(
        id=name,
        views=tuple(views),
        split=Split.TRAIN,
        scene_type=scene_type,
        instances=instances,
        mesh_path=str(folder / "mesh.ply") if mesh else None,
    )


def circle(count: int, room: Room | None = None, radius: float = 0.4) -> list:
    """Cameras near the middle of the room that look all around."""
    cx, cy = (3.0, 2.5) if room is None else (room.width / 2, room.length / 2)
    cameras = []
    for i in range(count):
        angle = 2 * np.pi * i / count
        eye = (cx + radius * np.cos(angle), cy + radius * np.sin(angle), 1.5)
        cameras.append((eye, (cx + 2.5 * np.cos(angle), cy + 2.5 * np.sin(angle), 0.7)))
    return cameras


def furnished(seed: int = 0, cameras: int = 8) -> Room:
    """A random room: ten things without collision around a free middle, two labels several times."""
    rng = np.random.default_rng(seed)
    room = Room(things=[], width=float(rng.uniform(4.5, 7)), length=float(rng.uniform(4.5, 7)))
    labels = [
        "chair",
        "chair",
        "chair",
        "bed",
        "table",
        "lamp",
        "sofa",
        "plant",
        "cabinet",
        "picture",
        "bench",
        "bench",
    ]
    for label in labels:
        for _ in range(200):
            size = tuple(float(s) for s in rng.uniform([0.3, 0.3, 0.4], [1.4, 0.8, 1.1]))
            x, y = rng.uniform(0.8, [room.width - 0.8, room.length - 0.8])
            apart = all(np.hypot(x - t.x, y - t.y) > 0.6 * (max(size[:2]) + max(t.size[:2])) for t in room.things)
            if apart and np.hypot(x - room.width / 2, y - room.length / 2) > 1.3:
                room.things.append(Thing(label, float(x), float(y), size, yaw=float(rng.uniform(0, 90))))
                break
    room.cameras = circle(cameras, room)
    return room
