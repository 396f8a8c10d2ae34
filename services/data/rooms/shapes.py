"""Triangles of objects made of parts: boxes, turned bodies, cushions, prisms, leaves.

An object is built in its own frame: origin in the middle of its footprint on the floor, x to its right, z up,
and its **front looks along +y**. Every call of a :class:`Shape` method adds one part, which becomes one segment
of the written mesh. UV coordinates are in metres, so that a texture has the same scale on every part; with
``fit`` they run from 0 to 1 over the face instead (pictures, screens).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Vec = Sequence[float]


@dataclass(frozen=True, slots=True)
class Material:
    """How a part looks: the colour runs from ``dark`` to ``light`` (linear RGB, 0..1) with the texture's value."""

    texture: int
    """Index into the scene's texture atlas."""
    dark: tuple[float, float, float]
    light: tuple[float, float, float]
    tile: float = 1.0
    """Edge length in metres of one repetition of the texture."""
    gloss: float = 0.0
    """Strength of the highlight, 0 (matt) to 1 (polished)."""
    emission: float = 0.0
    """Radiance that the surface gives off, as a multiple of its colour."""
    fit: bool = False
    """The texture is stretched once over each face instead of repeated."""
    mirror: float = 0.0
    """Share of what is seen that is the reflected room."""


@dataclass(slots=True)
class Triangles:
    """A triangle soup with what shading needs. F triangles; all arrays have F rows."""

    corners: np.ndarray
    """(F, 3, 3) float64, metres."""
    normals: np.ndarray
    """(F, 3, 3) float32 unit normals at the corners."""
    uv: np.ndarray
    """(F, 3, 2) float32."""
    material: np.ndarray
    """(F,) int32."""
    part: np.ndarray
    """(F,) int32, counted from 0 within the object (or the room, after merging)."""
    surface: np.ndarray
    """(F,) int32: smooth surfaces within the object; light is filtered within one, never across."""

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> Triangles:
        """The same triangles after ``x -> rotation @ x + translation``."""
        normals = (self.normals.astype(np.float64) @ rotation.T).astype(np.float32)
        return Triangles(
            self.corners @ rotation.T + translation, normals, self.uv, self.material, self.part, self.surface
        )


def merge(pieces: Sequence[Triangles]) -> Triangles:
    """One soup of many; part and surface numbers are shifted so that they stay distinct."""
    parts, surfaces, part0, surface0 = [], [], 0, 0
    for piece in pieces:
        parts.append(piece.part + part0)
        surfaces.append(piece.surface + surface0)
        part0 += int(piece.part.max()) + 1
        surface0 += int(piece.surface.max()) + 1
    return Triangles(
        corners=np.concatenate([p.corners for p in pieces]),
        normals=np.concatenate([p.normals for p in pieces]),
        uv=np.concatenate([p.uv for p in pieces]),
        material=np.concatenate([p.material for p in pieces]),
        part=np.concatenate(parts).astype(np.int32),
        surface=np.concatenate(surfaces).astype(np.int32),
    )


def rotation_z(angle: float) -> np.ndarray:
    """3x3 rotation about z by ``angle`` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotation_x(angle: float) -> np.ndarray:
    """3x3 rotation about x by ``angle`` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


# The six faces of the unit cube, corners counter-clockwise seen from outside.
_BOX_CORNERS = np.array(
    [[x, y, z] for z in (-0.5, 0.5) for y in (-0.5, 0.5) for x in (-0.5, 0.5)],
)
_BOX_FACES = np.array([[0, 4, 6, 2], [5, 1, 3, 7], [4, 5, 1, 0][::-1], [2, 3, 7, 6][::-1], [1, 0, 2, 3], [4, 5, 7, 6]])
_BOX_NORMALS = np.array([[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]], float)
_BOX_UV_AXES = np.array([[1, 2], [1, 2], [0, 2], [0, 2], [0, 1], [0, 1]])


@dataclass(slots=True)
class Shape:
    """Collects the parts of one object."""

    materials: list[Material]
    """The scene's list; a material is added when a part first uses it."""
    _pieces: list[Triangles] = field(default_factory=list)
    _index: dict[Material, int] = field(default_factory=dict)

    def triangles(self) -> Triangles:
        """All parts added so far."""
        return merge(self._pieces)

    def box(self, center: Vec, size: Vec, material: Material, rotation: np.ndarray | None = None) -> None:
        """A cuboid of edge lengths ``size``, turned about its centre by ``rotation``."""
        edges = np.asarray(size, float)
        corners = (_BOX_CORNERS * edges)[_BOX_FACES]  # (6, 4, 3)
        uv = np.take_along_axis(corners, np.broadcast_to(_BOX_UV_AXES[:, None, :], (6, 4, 2)), axis=2)
        if material.fit:
            uv = uv / edges[_BOX_UV_AXES][:, None, :] + 0.5
        # Texture coordinates that depend on the place keep two boards of one plank from looking alike.
        else:
            uv = uv + np.asarray(center, float)[_BOX_UV_AXES][:, None, :]
        turn = np.eye(3) if rotation is None else rotation
        corners = corners @ turn.T + np.asarray(center, float)
        normals = np.broadcast_to((_BOX_NORMALS @ turn.T)[:, None, :], (6, 4, 3))
        self._quads(corners, normals, uv, material, np.arange(6))

    def quad(self, corners: np.ndarray, material: Material, uv_size: Vec) -> None:
        """A flat quadrilateral (4, 3), counter-clockwise seen from its front; ``uv_size`` is its size in metres."""
        corners = np.asarray(corners, float)
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        normal /= np.linalg.norm(normal)
        w, h = (1.0, 1.0) if material.fit else uv_size
        uv = np.array([[0, 0], [w, 0], [w, h], [0, h]], float)
        self._quads(corners[None], np.broadcast_to(normal, (1, 4, 3)), uv[None], material, np.zeros(1, int))

    def turned(
        self,
        base: Vec,
        profile: Sequence[tuple[float, float]],
        material: Material,
        *,
        sides: int = 14,
        squash: float = 1.0,
        rotation: np.ndarray | None = None,
    ) -> None:
        """A body turned about z: ``profile`` lists (radius, height) from below; ``squash`` scales its y radius.

        Each stretch of the profile is a smooth surface of its own, so that edges between stretches stay sharp.
        """
        angle = np.linspace(0.0, 2 * np.pi, sides + 1)
        circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        corners, normals, uvs, surfaces = [], [], [], []
        for k, ((r0, z0), (r1, z1)) in enumerate(itertools.pairwise(profile)):
            slope = np.array([z1 - z0, -(r1 - r0)]) / max(np.hypot(z1 - z0, r1 - r0), 1e-9)
            ring = [np.column_stack([r * circle, np.full(sides + 1, z)]) for r, z in ((r0, z0), (r1, z1))]
            normal = np.column_stack([slope[0] * circle, np.full(sides + 1, slope[1])])
            length = np.hypot(z1 - z0, r1 - r0)
            along = angle * max(r0, r1)
            for i in range(sides):
                corners.append([ring[0][i], ring[0][i + 1], ring[1][i + 1], ring[1][i]])
                normals.append([normal[i], normal[i + 1], normal[i + 1], normal[i]])
                uvs.append([[along[i], 0], [along[i + 1], 0], [along[i + 1], length], [along[i], length]])
            surfaces += [k] * sides
        points = np.array(corners) * [1.0, squash, 1.0]
        directions = np.array(normals) * [1.0, 1.0 / squash, 1.0]
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        turn = np.eye(3) if rotation is None else rotation
        self._quads(
            points @ turn.T + np.asarray(base, float),
            directions @ turn.T,
            np.array(uvs),
            material,
            np.array(surfaces),
        )

    def cylinder(self, base: Vec, radius: float, height: float, material: Material, **options: object) -> None:
        """A closed upright cylinder; ``top`` (option) is the radius at its upper end, for cones and legs."""
        top = float(options.pop("top", radius))  # type: ignore[arg-type]
        profile = [(0.0, 0.0), (radius, 0.0), (top, height), (0.0, height)]
        self.turned(base, profile, material, **options)  # type: ignore[arg-type]

    def cushion(
        self, center: Vec, size: Vec, material: Material, *, edge: float = 0.35, rotation: np.ndarray | None = None
    ) -> None:
        """A box with round edges (a superellipsoid): ``edge`` near 0 is a box, 1 an ellipsoid."""
        extent = np.asarray(size, float)
        lat, lon = np.meshgrid(np.linspace(-np.pi / 2, np.pi / 2, 9), np.linspace(-np.pi, np.pi, 17), indexing="ij")

        def power(x: np.ndarray) -> np.ndarray:
            return np.sign(x) * np.abs(x) ** edge

        unit = np.stack(
            [power(np.cos(lat)) * power(np.cos(lon)), power(np.cos(lat)) * power(np.sin(lon)), power(np.sin(lat))], -1
        )
        points = unit * extent / 2
        # The gradient of the implicit function |x|^(2/e) + ...: the superellipsoid's normal.
        normal = np.sign(unit) * np.abs(unit) ** (2.0 / edge - 1.0) / extent
        normal += np.where(np.abs(normal).sum(-1, keepdims=True) < 1e-12, unit, 0.0)
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
        uv = np.stack([points[..., 0] + points[..., 1], points[..., 2] + points[..., 1]], -1)
        turn = np.eye(3) if rotation is None else rotation
        points = points @ turn.T + np.asarray(center, float)
        normal = normal @ turn.T

        def cells(grid: np.ndarray) -> np.ndarray:
            ring = [grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]]
            return np.stack(ring, axis=2).reshape(-1, 4, grid.shape[-1])

        quads = cells(points)
        self._quads(quads, cells(normal), cells(uv), material, np.zeros(len(quads), int))

    def sheets(self, strips: np.ndarray, material: Material) -> None:
        """Thin bent strips (S, N, 2, 3): S leaves of N cross sections with a left and a right edge."""
        strips = np.asarray(strips, float)
        quads = np.stack([strips[:, :-1, 0], strips[:, :-1, 1], strips[:, 1:, 1], strips[:, 1:, 0]], axis=2)
        normal = np.cross(quads[:, :, 2] - quads[:, :, 0], quads[:, :, 3] - quads[:, :, 1])
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
        uv = np.stack([quads[..., 0] + quads[..., 1], quads[..., 2]], -1)
        count = quads.shape[0] * quads.shape[1]
        self._quads(
            quads.reshape(count, 4, 3),
            np.broadcast_to(normal[:, :, None], quads.shape).reshape(count, 4, 3),
            uv.reshape(count, 4, 2),
            material,
            np.repeat(np.arange(quads.shape[0]), quads.shape[1]),
        )

    def _quads(
        self, corners: np.ndarray, normals: np.ndarray, uv: np.ndarray, material: Material, surface: np.ndarray
    ) -> None:
        """Splits quadrilaterals (Q, 4, ...) into triangles, drops the degenerate ones, and keeps them as a part."""
        if material not in self._index:
            self._index[material] = len(self.materials)
            self.materials.append(material)
        take = np.array([[0, 1, 2], [0, 2, 3]])
        points = corners[:, take].reshape(-1, 3, 3)
        area = np.linalg.norm(np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]), axis=1)
        keep = area > 1e-10
        count = int(keep.sum())
        self._pieces.append(
            Triangles(
                corners=points[keep],
                normals=normals[:, take].reshape(-1, 3, 3)[keep].astype(np.float32),
                uv=uv[:, take].reshape(-1, 3, 2)[keep].astype(np.float32),
                material=np.full(count, self._index[material], np.int32),
                part=np.zeros(count, np.int32),
                surface=np.repeat(surface, 2)[keep].astype(np.int32),
            )
        )
