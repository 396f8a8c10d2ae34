"""The rooms as geometry: plan of types and splits, placement, cameras, rays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from configs.schema import RoomsConfig
from services.contracts import Split
from services.data.rooms import build_room, plan_room, plan_rooms
from services.data.rooms.classes import CLASSES, IDS, ROOM_TYPES, label_table
from services.data.rooms.layout import Zone, overlaps
from services.data.rooms.paths import look_at, walkable
from services.data.rooms.render import Renderer, _filter
from services.data.rooms.shapes import Material, Shape
from services.data.rooms.write import cameras, dense_mesh
from services.errors import DataError

CONFIG = RoomsConfig(scenes=6, views=4, width=64, height=48, seed=3)
GREY = Material(0, (0.2, 0.2, 0.2), (0.6, 0.6, 0.6))


@pytest.fixture(scope="module")
def rooms():
    """One room of each type, with its renderer, camera and poses."""
    made = []
    for index in range(6):
        room = build_room(CONFIG, index)
        renderer = Renderer(room)
        made.append((room, renderer, *cameras(room, renderer, CONFIG)))
    return made


def in_box(points, box, slack=0.0):
    """Which points (N, 3) lie in an oriented box that is ``slack`` metres larger on every side."""
    local = (points - np.asarray(box.center)) @ np.asarray(box.axes)
    return (np.abs(local) <= np.asarray(box.size) / 2 + slack).all(axis=1)


def unproject(depth, K, pose):
    """(H*W, 3) world points of a depth map, written out independently of the renderer."""
    v, u = np.indices(depth.shape)
    camera = np.stack([(u - K.cx) / K.fx * depth, (v - K.cy) / K.fy * depth, depth], -1).reshape(-1, 3)
    return camera @ pose[:3, :3].T + pose[:3, 3]


# --- plan


@pytest.mark.parametrize("seed", [0, 1, 2, 17])
@pytest.mark.parametrize("scenes", [3, 6, 24, 120])
def test_types_and_splits_are_balanced(seed, scenes):
    plans = plan_rooms(seed, scenes)
    types = Counter(p.type for p in plans)
    assert max(types.values()) - min(types[t] for t in ROOM_TYPES) <= 1
    for split in Split:
        members = [p for p in plans if p.split == split]
        assert members, f"{split} is empty with {scenes} rooms"
        counts = Counter(p.type for p in members)
        allowed = 1 if split != Split.TRAIN else 2
        assert max(counts.values()) - min(counts[t] for t in ROOM_TYPES) <= allowed


def test_splits_are_about_70_15_15():
    counts = Counter(p.split for p in plan_rooms(0, 240))
    assert counts == {Split.TRAIN: 168, Split.VAL: 36, Split.TEST: 36}


def test_a_longer_list_begins_with_the_shorter_one():
    assert plan_rooms(5, 40)[:11] == plan_rooms(5, 11)
    assert len({p.id for p in plan_rooms(5, 40)}) == 40
    assert [p.type for p in plan_rooms(5, 24)] != [p.type for p in plan_rooms(6, 24)]


def test_a_negative_room_is_refused():
    with pytest.raises(ValueError, match="-1"):
        plan_room(0, -1)


def test_labels_are_unique_and_follow_nyu40():
    assert len({c.id for c in CLASSES}) == len({c.raw for c in CLASSES}) == len(CLASSES)
    assert all(c.id == c.nyu40 for c in CLASSES if c.id <= 40)
    rows = [line.split("\t") for line in label_table().splitlines()]
    assert rows[0][:3] == ["id", "raw_category", "category"]
    assert {row[1]: int(row[0]) for row in rows[1:]} == IDS


# --- shapes


@pytest.mark.parametrize(
    ("add", "size"),
    [
        (lambda s: s.box((1, 2, 3), (1.0, 2.0, 3.0), GREY), (1.0, 2.0, 3.0)),
        (lambda s: s.cylinder((0, 0, 0), 0.5, 2.0, GREY, sides=16), (1.0, 1.0, 2.0)),
        (lambda s: s.cushion((0, 0, 1), (0.4, 0.6, 0.2), GREY), (0.4, 0.6, 0.2)),
    ],
)
def test_shapes_are_closed_face_outwards_and_have_their_size(add, size):
    shape = Shape([])
    add(shape)
    t = shape.triangles()
    points = t.corners.reshape(-1, 3)
    np.testing.assert_allclose(np.ptp(points, axis=0), size, atol=1e-9)
    flat = np.cross(t.corners[:, 1] - t.corners[:, 0], t.corners[:, 2] - t.corners[:, 0])
    assert (np.einsum("ij,ij->i", flat, t.normals.mean(axis=1)) > 0).all()
    np.testing.assert_allclose(flat.sum(axis=0), 0.0, atol=1e-5)  # a closed surface has no net area
    np.testing.assert_allclose(np.linalg.norm(t.normals, axis=-1), 1.0, atol=1e-5)


def test_overlap_of_turned_rectangles():
    square = Zone((0.0, 0.0), (1.0, 1.0), 0.0, 0.0, 1.0)
    # A diamond of half diagonal 0.5 touches the square's corner region only along x + y = 2.
    near = Zone((1.3, 1.3), (0.5, 0.5), np.pi / 4, 0.0, 1.0)
    far = Zone((1.4, 1.4), (0.5, 0.5), np.pi / 4, 0.0, 1.0)
    above = Zone((0.0, 0.0), (1.0, 1.0), 0.3, 1.0, 2.0)
    np.testing.assert_array_equal(overlaps(square, [near, far, above]), [True, False, False])
    assert overlaps(square, []).shape == (0,)


# --- furnished rooms


def test_every_type_has_what_makes_it(rooms):
    needed = {
        "bedroom": {"bed"},
        "living room": {"sofa"},
        "kitchen": {"counter", "stove", "refrigerator", "sink"},
        "bathroom": {"toilet", "sink"},
        "office": {"desk", "chair"},
        "dining room": {"table", "chair"},
    }
    assert {room.plan.type for room, *_ in rooms} == set(needed)
    for room, *_ in rooms:
        labels = {i.label for i in room.instances}
        assert needed[room.plan.type] | {"door", "lamp"} <= labels
        assert not {"wall", "floor", "ceiling"} & labels


@pytest.mark.parametrize("index", range(6, 18))
def test_nothing_collides_and_all_is_inside(index):
    room = build_room(CONFIG, index)
    zones = [p.zone.grown(-1e-4) for p in room.placed]
    for i, placed in enumerate(room.placed):
        corners = zones[i].corners()
        assert (corners >= 0).all()
        assert (corners <= room.size[:2]).all()
        assert placed.zone.low >= -1e-9
        assert placed.zone.high <= room.size[2] + 1e-6
        for j in np.flatnonzero(overlaps(zones[i], zones[:i])):
            other = room.placed[int(j)]
            kinds = {placed.piece.kind, other.piece.kind}
            assert "rug" in kinds, f"{room.plan.id}: {kinds} collide"
        if placed.parent is not None and placed.piece.kind != "wall_cabinet":
            top = room.placed[placed.parent].piece.tops[0]
            assert placed.zone.low == pytest.approx(top.z, abs=1e-6)


@pytest.mark.parametrize("index", range(6))
def test_the_door_can_be_reached(rooms, index):
    room = rooms[index][0]
    door = next(p for p in room.placed if p.piece.kind == "door")
    middle = door.point((0.0, 0.5, 1.0))
    blocking = [p.piece.kind for p in room.placed if p is not door and _holds(p.zone, middle)]
    assert blocking == []
    assert walkable(room.placed, room.size[:2]) is not None


def _holds(zone, point):
    small = Zone((float(point[0]), float(point[1])), (0.3, 0.3), zone.yaw, 0.1, 1.8)
    return bool(overlaps(small, [zone])[0])


def test_boxes_are_tight_around_the_triangles(rooms):
    for room, *_ in rooms:
        for instance in room.instances:
            points = room.triangles.corners[room.face_instance == instance.id].reshape(-1, 3)
            assert in_box(points, instance.box, 1e-6).all()
            local = (points - np.asarray(instance.box.center)) @ np.asarray(instance.box.axes)
            np.testing.assert_allclose(np.ptp(local, axis=0), instance.box.size, atol=1e-6)


def test_alignment_puts_walls_on_the_axes(rooms):
    for room, *_ in rooms:
        wall = room.triangles.corners[room.face_label == IDS["wall"]].reshape(-1, 3)
        aligned = wall @ room.axis_alignment[:3, :3].T + room.axis_alignment[:3, 3]
        np.testing.assert_allclose(aligned.min(axis=0), 0.0, atol=1e-9)
        np.testing.assert_allclose(aligned.max(axis=0), room.size, atol=1e-9)
        np.testing.assert_allclose(room.axis_alignment @ room.to_world, np.eye(4), atol=1e-12)


# --- cameras


def test_cameras_are_rigid_indoors_and_outside_of_furniture(rooms):
    for room, _, _, poses in rooms:
        eyes = poses[:, :3, 3]
        local = eyes @ room.axis_alignment[:3, :3].T + room.axis_alignment[:3, 3]
        assert (local[:, :2] > 0.4).all()
        assert (local[:, :2] < np.array(room.size[:2]) - 0.4).all()
        assert ((local[:, 2] > 1.25) & (local[:, 2] < 1.75)).all()
        for instance in room.instances:
            assert not in_box(eyes, instance.box, 0.15).any(), f"{room.plan.id}: camera in {instance.label}"
        turn = poses[:, :3, :3]
        np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turn.shape), atol=1e-9)
        np.testing.assert_allclose(np.linalg.det(turn), 1.0, atol=1e-9)
        assert (turn[:, 2, 1] < -0.8).all()  # the camera's y axis points down


def test_look_at_uses_opencv_axes():
    pose = look_at(np.zeros(3), 0.0, 0.0, 0.0)
    np.testing.assert_allclose(pose[:3, :3].T, [[0, -1, 0], [0, 0, -1], [1, 0, 0]], atol=1e-12)


def test_consecutive_views_overlap(rooms):
    for room, renderer, K, poses in rooms:
        depths = [renderer.depth_and_ids(pose, K)[0] for pose in poses]
        for i in range(len(poses) - 1):
            points = unproject(depths[i], K, poses[i])
            seen = _seen_in(points, K, poses[i + 1], depths[i + 1])[0]
            assert seen.mean() > 0.25, f"{room.plan.id}: views {i} and {i + 1} share {seen.mean():.2f}"


# --- rays


def _seen_in(points, K, pose, depth, tolerance=0.02):
    """Which world points are visible in another view (nearest pixel), their pixels, and their depth there."""
    camera = (points - pose[:3, 3]) @ pose[:3, :3]
    z = np.where(camera[:, 2] > 0.05, camera[:, 2], np.nan)
    u, v = camera[:, 0] / z * K.fx + K.cx, camera[:, 1] / z * K.fy + K.cy
    inside = (u > -0.5) & (u < K.width - 0.5) & (v > -0.5) & (v < K.height - 0.5)
    column, row = (np.rint(np.where(inside, x, 0)).astype(int) for x in (u, v))
    there = depth[row, column]
    return inside & (np.abs(there - z) < tolerance * z), row, column, z


def test_depth_is_exact_along_z(rooms):
    """A ray cast from another camera at a point seen by the first meets that very point, if nothing is before it."""
    for _, renderer, K, poses in rooms[:3]:
        depth, face = renderer.depth_and_ids(poses[0], K)
        points = unproject(depth, K, poses[0])
        rays = points - poses[1][:3, 3]
        other, way = renderer.first_hit(np.broadcast_to(poses[1][:3, 3], rays.shape), rays)
        same = other == face.ravel()
        assert same.mean() > 0.3
        np.testing.assert_allclose(way[same], 1.0, atol=1e-9)
        assert (way[~same] < 1.0 + 1e-5).all()  # otherwise something nearer hides it


def test_depth_against_a_second_ray_tracer(rooms):
    """Moeller and Trumbore's test against every triangle, for some pixels."""
    room, renderer, K, poses = rooms[0]
    depth, face = renderer.depth_and_ids(poses[0], K)
    a, b, c = np.moveaxis(room.triangles.corners, 1, 0)
    for v, u in [(5, 7), (20, 50), (33, 12), (40, 40), (24, 31)]:
        ray = poses[0][:3, :3] @ np.array([(u - K.cx) / K.fx, (v - K.cy) / K.fy, 1.0])
        p = np.cross(ray, c - a)
        det = np.einsum("ij,ij->i", b - a, p)
        det = np.where(np.abs(det) < 1e-12, np.nan, det)
        s = poses[0][:3, 3] - a
        q = np.cross(s, b - a)
        x = np.einsum("ij,ij->i", s, p) / det
        y = np.einsum("j,ij->i", ray, q) / det
        t = np.einsum("ij,ij->i", c - a, q) / det
        hit = (x >= -1e-9) & (y >= -1e-9) & (x + y <= 1 + 1e-9) & (t > 0)
        assert depth[v, u] == pytest.approx(np.nanmin(np.where(hit, t, np.nan)), abs=1e-6)
        assert hit[face[v, u]]


def test_masks_agree_with_boxes_and_labels(rooms):
    for room, renderer, K, poses in rooms:
        picture = renderer.picture(poses[0], K)
        points = unproject(picture.depth, K, poses[0])
        ids, labels = picture.instance.ravel(), picture.label.ravel()
        assert len(set(ids.tolist())) > 1
        for instance in room.instances:
            own = ids == instance.id
            assert in_box(points[own], instance.box, 1e-3).all()
            assert (labels[own] == instance.class_id).all()
        assert set(labels[ids == 0].tolist()) <= {IDS["wall"], IDS["floor"], IDS["ceiling"]}


def test_colours_agree_between_views(rooms):
    for _, renderer, K, poses in rooms:
        first, second = renderer.picture(poses[0], K), renderer.picture(poses[1], K)
        points = unproject(first.depth, K, poses[0])
        seen, row, column, _ = _seen_in(points, K, poses[1], second.depth, 0.005)
        seen &= second.face[row, column] == first.face.ravel()
        difference = first.color.reshape(-1, 3)[seen].astype(float) - second.color[row, column][seen]
        shuffled = first.color.reshape(-1, 3)[seen][::-1].astype(float) - second.color[row, column][seen]
        assert np.median(np.abs(difference)) <= 6
        assert np.abs(difference).mean() < 0.4 * np.abs(shuffled).mean()


def test_pictures_are_neither_dark_nor_burnt_out(rooms):
    for room, renderer, K, poses in rooms:
        grey = np.stack([renderer.picture(p, K).color for p in poses]).astype(float).mean(axis=-1)
        assert 60 < grey.mean() < 200, room.plan.id
        assert (grey > 252).mean() < 0.1, room.plan.id
        assert grey.std() > 15, room.plan.id


def test_bands_do_not_show(rooms, monkeypatch):
    _, renderer, K, poses = rooms[1]
    whole = renderer.radiance(poses[0], K)
    monkeypatch.setattr("services.data.rooms.render.TOGETHER", 5000)
    np.testing.assert_allclose(renderer.radiance(poses[0], K), whole, atol=1e-5)


def test_light_filter_keeps_to_its_surface():
    values = np.zeros((8, 12, 3), np.float32)
    values[:, 6:] = 1.0
    surface = np.repeat([[0] * 6 + [1] * 6], 8, axis=0)
    np.testing.assert_allclose(_filter(values, surface), values)
    pattern = np.tile(np.arange(4, dtype=np.float32), (12, 4))[..., None].repeat(3, 2)
    np.testing.assert_allclose(_filter(pattern, np.zeros((12, 16), int))[:, 2:-2], 1.5)


def test_rays_that_start_outside_are_an_error(rooms):
    room, renderer, _, _ = rooms[0]
    with pytest.raises(ValueError, match=room.plan.id):
        renderer.first_hit(np.array([[0.0, 0.0, 99.0]]), np.array([[0.0, 0.0, 1.0]]))


def test_the_mesh_is_the_same_surface_with_short_edges(rooms):
    room, renderer, _, _ = rooms[0]
    vertices, faces, colours, parts = dense_mesh(room, renderer)
    corners = vertices[faces]
    edges = np.linalg.norm(np.roll(corners, -1, axis=1) - corners, axis=2)
    assert edges.max() <= 0.25 + 1e-4

    def area(t):
        return np.linalg.norm(np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]), axis=1).sum() / 2

    assert area(corners) == pytest.approx(area(room.triangles.corners), rel=1e-3)
    assert len(vertices) == len(colours) == len(parts)
    assert set(parts.tolist()) == set(room.triangles.part.tolist())


def test_a_room_that_cannot_be_furnished_is_an_error(monkeypatch):
    monkeypatch.setattr("services.data.rooms.room.EXTENTS", dict.fromkeys(ROOM_TYPES, ((1.2, 1.3), (1.2, 1.3))))
    with pytest.raises(DataError, match="none of 40 layouts"):
        build_room(CONFIG, 0)
