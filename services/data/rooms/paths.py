"""Camera paths of a person who walks through a room and looks around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from services.data.rooms.layout import Placed
from services.data.rooms.shapes import rotation_z

if TYPE_CHECKING:
    from services.data.rooms.render import Renderer
    from services.data.rooms.room import Room

CELL = 0.1
"""Metres between the points of the walking grid."""
BODY = (0.38, 0.32, 0.26)
"""Distances in metres that a walker keeps from furniture; the largest that leaves enough floor is used."""
WALL_DISTANCE = 0.45
ENOUGH = 1.1
"""Square metres of connected floor that a walk needs."""
STRIDE = 0.45
"""Largest distance in metres between two views."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Where a person can stand: a grid of points in the room frame."""

    free: np.ndarray
    """(nx, ny) bool; true cells are connected."""
    clearance: np.ndarray
    """(nx, ny) metres to the nearest cell that is not free."""

    def points(self, cells: np.ndarray) -> np.ndarray:
        """(N, 2) cells -> (N, 2) metres."""
        return (cells + 0.5) * CELL

    def allows(self, points: np.ndarray) -> np.ndarray:
        """(N,) whether each point (metres) lies in a free cell."""
        cells = np.floor(points / CELL).astype(int)
        inside = ((cells >= 0) & (cells < self.free.shape)).all(axis=1)
        cells = np.clip(cells, 0, np.array(self.free.shape) - 1)
        return inside & self.free[cells[:, 0], cells[:, 1]]


def walkable(placed: Sequence[Placed], extent: tuple[float, float]) -> Floor | None:
    """The largest connected floor on which a person can walk; None when there is too little of it."""
    shape = (int(extent[0] / CELL), int(extent[1] / CELL))
    axes = [(np.arange(n) + 0.5) * CELL for n in shape]
    x, y = np.meshgrid(*axes, indexing="ij")
    indoors = np.minimum(np.minimum(x, extent[0] - x), np.minimum(y, extent[1] - y)) >= WALL_DISTANCE
    zones = [p.zone for p in placed if p.zone.low < 1.75 and p.zone.high > 0.1]
    for body in BODY:
        free = indoors.copy()
        for zone in zones:
            local = np.stack([x - zone.center[0], y - zone.center[1]], -1) @ rotation_z(zone.yaw)[:2, :2]
            beyond = np.maximum(np.abs(local) - np.asarray(zone.half), 0.0)
            free &= np.hypot(beyond[..., 0], beyond[..., 1]) >= body
        parts, count = ndimage.label(free)
        if not count:
            continue
        areas = np.bincount(parts.ravel())[1:]
        free = parts == 1 + int(areas.argmax())
        if free.sum() * CELL**2 >= ENOUGH:
            padded = ndimage.distance_transform_edt(np.pad(free, 1))
            return Floor(free, padded[1:-1, 1:-1] * CELL)
    return None


def _graph(floor: Floor) -> tuple[sparse.csr_array, np.ndarray]:
    """Neighbouring free cells as a graph that is dearer near obstacles, and the (N, 2) cells."""
    cells = np.argwhere(floor.free)
    number = np.full(floor.free.shape, -1)
    number[cells[:, 0], cells[:, 1]] = np.arange(len(cells))
    rows, columns, costs = [], [], []
    price = 1.0 + 0.15 / floor.clearance[cells[:, 0], cells[:, 1]]
    for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1)):
        other = cells + np.array([dx, dy])
        valid = ((other >= 0) & (other < floor.free.shape)).all(axis=1)
        index = np.flatnonzero(valid)
        target = number[other[index, 0], other[index, 1]]
        index, target = index[target >= 0], target[target >= 0]
        rows.append(index)
        columns.append(target)
        costs.append(np.hypot(dx, dy) * CELL * (price[index] + price[target]) / 2)
    size = len(cells)
    entries = (np.concatenate(costs), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_array(entries, shape=(size, size)), cells


def _route(floor: Floor, start: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) metres: from the free point nearest ``start`` to two far places, one after the other."""
    graph, cells = _graph(floor)
    points = floor.points(cells)
    at = int(np.linalg.norm(points - start, axis=1).argmin())
    visited, route = [at], [at]
    reach = np.full(len(cells), np.inf)
    for _ in range(3):
        distance, before = csgraph.dijkstra(graph, directed=False, indices=np.array(at), return_predecessors=True)
        reach = np.minimum(reach, distance)
        goal = int((reach * rng.uniform(0.75, 1.0, len(cells))).argmax())
        leg = [goal]
        while leg[-1] != at:
            leg.append(int(before[leg[-1]]))
        route += leg[::-1][1:]
        visited.append(goal)
        at = goal
    line = points[route]
    smooth = ndimage.gaussian_filter1d(line, 3.0, axis=0, mode="nearest")
    # Corners are cut only where there is floor.
    return np.where(floor.allows(smooth)[:, None], smooth, line)


def _resample(line: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """``count`` points at equal distances of at most STRIDE from the line's start, and that distance."""
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    spacing = min(STRIDE, along[-1] / max(count - 1, 1))
    at = np.arange(count) * spacing
    return np.stack([np.interp(at, along, line[:, k]) for k in (0, 1)], axis=1), spacing


def look_at(position: np.ndarray, yaw: float, pitch: float, roll: float) -> np.ndarray:
    """4x4 camera-to-world pose, OpenCV axes, of a camera that looks along yaw (from x) and pitch (upwards)."""
    forward = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    pose = np.eye(4)
    pose[:3, 0] = np.cos(roll) * right + np.sin(roll) * down
    pose[:3, 1] = -np.sin(roll) * right + np.cos(roll) * down
    pose[:3, 2], pose[:3, 3] = forward, position
    return pose


_BINS = 72
#: How much a walker looks for an object of a class; 1 for those not named. Wall, floor and ceiling count nothing.
_INTEREST = {"bed": 4.0, "sofa": 4.0, "toilet": 3.5, "bathtub": 3.0, "stove": 2.5, "refrigerator": 2.0, "desk": 3.0}
_INTEREST |= {"table": 2.5, "sink": 2.5, "counter": 1.5, "chair": 1.3, "television": 1.5, "bookshelf": 1.3}
_INTEREST |= {"window": 0.4, "door": 0.7, "curtain": 0.3, "picture": 0.5, "lamp": 0.7, "mirror": 0.7}
_ELEVATIONS = np.deg2rad([-42.0, -34.0, -26.0, -19.0, -12.0, -5.0, 2.0, 9.0])


def _panorama(renderer: Renderer, eye: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is seen all around: instance ids and distances, (bins, elevations)."""
    yaw = 2 * np.pi * np.arange(_BINS) / _BINS
    a, e = np.meshgrid(yaw, _ELEVATIONS, indexing="ij")
    rays = np.stack([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)], -1).reshape(-1, 3)
    face, distance = renderer.first_hit(np.broadcast_to(eye, rays.shape), rays)
    return renderer.room.face_instance[face].reshape(a.shape), distance.reshape(a.shape)


def _gaze(renderer: Renderer, eyes: np.ndarray, fov: float, spacing: float, rng: np.random.Generator) -> np.ndarray:
    """(V,) yaws that show much of the room's furniture while turning slowly.

    A best sequence of directions is found by dynamic programming; then what it showed well counts less and the
    search is repeated. The sequence that shows the most objects well wins.
    """
    half = max(1, int(0.45 * fov / (2 * np.pi) * _BINS))
    turn = np.deg2rad(np.clip(8.0 + 50.0 * spacing, 10.0, 27.0))
    reach = max(1, int(turn * _BINS / (2 * np.pi)))
    count = len(renderer.room.instances) + 1
    window = (np.arange(_BINS)[:, None] + np.arange(-half, half + 1)) % _BINS
    shares, scenery = np.zeros((len(eyes), _BINS, count)), np.zeros((len(eyes), _BINS))
    for k, eye in enumerate(eyes):
        ids, distance = _panorama(renderer, eye)
        columns = (ids[..., None] == np.arange(count)).sum(axis=1)  # (bins, instances)
        shares[k] = np.minimum(columns[window].sum(axis=1) / 14.0, 1.0)
        near = distance[window].reshape(_BINS, -1)
        ahead = distance[window][:, :, np.deg2rad(-20.0) < _ELEVATIONS].reshape(_BINS, -1)
        scenery[k] = np.minimum(ahead, 4.0).mean(axis=1) - 8.0 * (ahead < 1.0).mean(axis=1)
        scenery[k] -= 3.0 * (near < 1.1).mean(axis=1)
    shares *= np.array([0.0] + [_INTEREST.get(i.label, 1.0) for i in renderer.room.instances])
    weight, best, best_score = np.ones(count), np.zeros(len(eyes), int), -np.inf
    for _ in range(4):
        gain = shares @ weight + scenery + 0.05 * rng.uniform(size=scenery.shape)
        yaws = _best_sequence(gain, reach)
        seen = shares[np.arange(len(eyes)), yaws % _BINS].sum(axis=0)
        score = float(np.sqrt(seen).sum() * np.sqrt(len(eyes)) + scenery[np.arange(len(eyes)), yaws % _BINS].sum())
        if score > best_score:
            best, best_score = yaws, score
        weight = 1.0 / (0.5 + seen * 4.0 / len(eyes))
    result = best * (2 * np.pi / _BINS)
    return ndimage.gaussian_filter1d(result, 1.5, mode="nearest") if len(result) > 12 else result


def _best_sequence(gain: np.ndarray, reach: int) -> np.ndarray:
    """(V,) bins that maximise the sum of ``gain`` (V, bins) with steps of at most ``reach``; not wrapped around."""
    steps = np.arange(-reach, reach + 1)
    total = gain[0]
    before = np.zeros(gain.shape, int)
    for k in range(1, len(gain)):
        options = np.stack([np.roll(total, -s) for s in steps])  # from bin b + s to bin b
        before[k] = options.argmax(axis=0)
        total = options.max(axis=0) + gain[k]
    place = int(total.argmax())
    path = [place]
    for k in range(len(gain) - 1, 0, -1):
        path.append(path[-1] + int(steps[before[k][path[-1] % _BINS]]))
    return np.array(path[::-1])


def walk(room: Room, renderer: Renderer, views: int, fov: float, rng: np.random.Generator) -> np.ndarray:
    """(V, 4, 4) camera-to-world poses along a walk that starts near the door.

    Args:
        room: the room, whose layout is known to leave enough floor.
        renderer: rays into it.
        views: number of poses.
        fov: horizontal field of view in radians.
        rng: draws the person's height, goals and small movements.
    """
    floor = walkable(room.placed, room.size[:2])
    assert floor is not None, "a room is only built when a person can walk in it"
    door = next(p for p in room.placed if p.piece.kind == "door")
    line = _route(floor, np.array(door.zone.center), rng)
    ground, spacing = _resample(line, views)
    stature = float(rng.normal(1.5, 0.05))
    bob = 0.02 * np.sin(2 * np.pi * np.arange(views) * spacing / 0.75)
    local = np.column_stack([ground, stature + bob])
    eyes = local @ room.to_world[:3, :3].T + room.to_world[:3, 3]
    yaws = _gaze(renderer, eyes, fov, spacing, rng)
    pitch = np.deg2rad(-15.0 + 4.0 * np.sin(np.linspace(0, 2 * np.pi, views) + rng.uniform(0, 6.28)))
    pitch += np.deg2rad(rng.normal(0, 0.8, views))
    roll = np.deg2rad(rng.normal(0, 0.5, views))
    return np.stack([look_at(eyes[i], float(yaws[i]), float(pitch[i]), float(roll[i])) for i in range(views)])
