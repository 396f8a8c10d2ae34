"""Pictures of a room by rays: exact depth and ids from the centre ray of a pixel, colour from 2 x 2 rays.

Rays are traced by Embree (through embreex) in bulk. Embree works in float32 and only says **which** triangle a
ray hits; where it hits is computed from the triangle's plane in float64, so that depth is exact to the geometry.

Light: every colour ray casts one shadow ray to each light and one short ray into the hemisphere (ambient
occlusion). Their directions repeat every 4 x 4 rays and cover the 16 strata of a light or of the hemisphere; a
filter of that very period, kept within a smooth surface, turns them into soft shadows without noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh

from services.contracts import Intrinsics
from services.data.rooms.room import Light, Room

SUPERSAMPLING = 2
PERIOD = 4
"""Colour rays after which the pattern of light samples repeats, in x and in y."""
TOGETHER = 2**17
"""Colour rays that are shaded together: bounds the memory of large pictures."""
OFFSET = 1e-3
"""Metres by which a secondary ray starts off its surface."""
OCCLUSION_REACH = 0.7
AMBIENT = 0.29
MIDDLE_GREY = 0.40

#: Which of 16 strata each place of the 4 x 4 pattern takes: neighbours get strata that are far apart.
_ORDER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])


@dataclass(frozen=True, slots=True)
class Picture:
    """What one camera sees."""

    color: np.ndarray
    """(H, W, 3) uint8 sRGB."""
    depth: np.ndarray
    """(H, W) float64 metres along z."""
    instance: np.ndarray
    """(H, W) int32, 0 for wall, floor, ceiling."""
    label: np.ndarray
    """(H, W) int32 label ids."""
    face: np.ndarray
    """(H, W) int32 number of the triangle."""


@dataclass(frozen=True, slots=True)
class _Surface:
    """What N rays hit, as far as colour needs it; all (N, 3) float32."""

    albedo: np.ndarray
    irradiance: np.ndarray
    """Divided by pi, before the filter."""
    added: np.ndarray
    """Highlights and own light."""
    normal: np.ndarray
    start: np.ndarray
    """From where secondary rays start."""


class Renderer:
    """Traces rays into one room; ``exposure`` is set once, so that all its pictures fit together."""

    def __init__(self, room: Room) -> None:
        self.room = room
        corners = room.triangles.corners
        self._scene = rtcore_scene.EmbreeScene()
        self._mesh = TriangleMesh(self._scene, np.ascontiguousarray(corners, np.float32))
        self._origin = corners[:, 0]
        self._e1, self._e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        normal = np.cross(self._e1, self._e2)
        self._plane = normal / np.linalg.norm(normal, axis=1, keepdims=True)
        d00, d01, d11 = (np.einsum("ij,ij->i", a, b) for a, b in self._pairs())
        self._inverse = np.stack([d11, -d01, d00], 1) / np.einsum("ij,ij->i", normal, normal)[:, None]
        look = room.materials
        self._texture = np.array([m.texture for m in look])
        self._dark = np.array([m.dark for m in look], np.float32)
        self._light = np.array([m.light for m in look], np.float32)
        self._tile = np.array([1.0 if m.fit else m.tile for m in look], np.float32)
        self._gloss = np.array([m.gloss for m in look], np.float32)
        self._emission = np.array([m.emission for m in look], np.float32)
        self._mirror = np.array([m.mirror for m in look], np.float32)
        self.exposure = 1.0

    def _pairs(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return (self._e1, self._e1), (self._e1, self._e2), (self._e2, self._e2)

    def first_hit(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first triangle that each ray (N, 3) hits and how many ``directions`` long the way to it is.

        A ray that leaves through the seam between two walls (float32) takes the nearest plane's triangle that
        a slightly turned ray hits.
        """
        starts = np.ascontiguousarray(origins, np.float32)
        face = self._scene.run(starts, np.ascontiguousarray(directions, np.float32))
        for nudge in (1e-4, -1e-4, 1e-3):
            lost = np.flatnonzero(face < 0)
            if not len(lost):
                break
            turned = directions[lost] + nudge * np.array([1.0, -0.7, 0.4])
            face[lost] = self._scene.run(starts[lost], np.ascontiguousarray(turned, np.float32))
        if (face < 0).any():
            raise ValueError(f"{self.room.plan.id}: a ray left the room; its origin must be inside")
        plane = self._plane.take(face, axis=0)
        above = np.einsum("ij,ij->i", plane, self._origin.take(face, axis=0) - origins)
        return face, above / np.einsum("ij,ij->i", plane, directions)

    def depth_and_ids(self, pose: np.ndarray, K: Intrinsics) -> tuple[np.ndarray, np.ndarray]:
        """(H, W) exact depth along z in float64 metres, and the triangle of each centre ray."""
        u, v = np.meshgrid(np.arange(K.width, dtype=float), np.arange(K.height, dtype=float))
        face, depth = self._trace_pixels(pose, K, u, v)
        return depth.reshape(K.height, K.width), face.reshape(K.height, K.width)

    def _trace_pixels(
        self, pose: np.ndarray, K: Intrinsics, u: np.ndarray, v: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        # The directions have z = 1 in camera axes, so their multiple is the depth.
        directions = self._directions(pose, K, u, v)
        return self.first_hit(np.broadcast_to(pose[:3, 3], directions.shape), directions)

    @staticmethod
    def _directions(pose: np.ndarray, K: Intrinsics, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(N, 3) world directions through image points, with length 1 along the optical axis."""
        camera = np.stack([(u - K.cx) / K.fx, (v - K.cy) / K.fy, np.ones_like(u)], -1).reshape(-1, 3)
        return camera @ pose[:3, :3].T

    def picture(self, pose: np.ndarray, K: Intrinsics) -> Picture:
        """Everything that a camera sees."""
        depth, face = self.depth_and_ids(pose, K)
        radiance = self.radiance(pose, K)
        tone = _tone(radiance * self.exposure)
        s = SUPERSAMPLING
        tone = tone.reshape(K.height, s, K.width, s, 3).mean(axis=(1, 3))
        return Picture(
            color=np.rint(255.0 * tone).astype(np.uint8),
            depth=depth,
            instance=self.room.face_instance[face],
            label=self.room.face_label[face],
            face=face,
        )

    def expose(self, poses: np.ndarray, K: Intrinsics) -> None:
        """Sets the exposure so that the middle tone over small versions of these views is a middle grey."""
        small = K.resized(48, max(8, round(48 * K.height / K.width)))
        tones = [np.log(self.radiance(pose, small).mean(axis=-1) + 1e-3) for pose in poses]
        self.exposure = MIDDLE_GREY / float(np.exp(np.mean(np.concatenate([t.ravel() for t in tones]))))

    def radiance(self, pose: np.ndarray, K: Intrinsics) -> np.ndarray:
        """(2H, 2W, 3) float32 linear radiance of the colour rays, before exposure."""
        s = SUPERSAMPLING
        bands = []
        height = max(1, TOGETHER // (K.width * s**2))
        for top in range(0, K.height, height):
            bottom = min(top + height, K.height)
            # A margin of one pixel lets the filter, which reaches two rays far, see past the band's edge.
            first, last = max(top - 1, 0), min(bottom + 1, K.height)
            rows = (np.arange(first * s, last * s) + 0.5) / s - 0.5
            columns = (np.arange(K.width * s) + 0.5) / s - 0.5
            u, v = np.meshgrid(columns, rows)
            band = self._shade(pose, K, u, v, first * s)
            bands.append(band[(top - first) * s : (bottom - first) * s])
        return np.concatenate(bands)

    def _shade(self, pose: np.ndarray, K: Intrinsics, u: np.ndarray, v: np.ndarray, row0: int) -> np.ndarray:
        """Radiance of a grid of rays (h, w, 3); ``row0`` is the place of its first row in the light pattern."""
        y, x = np.indices(u.shape)
        strata = _ORDER[(y + row0) % PERIOD, x % PERIOD].ravel()
        directions = self._directions(pose, K, u, v)
        face, t = self._trace_pixels(pose, K, u, v)
        hit = self._surface(pose[:3, 3], directions, face, t, t / (K.fx * SUPERSAMPLING), strata)
        smooth = _filter(
            hit.irradiance.reshape(*u.shape, 3), self.room.triangles.surface[face].reshape(u.shape)
        ).reshape(-1, 3)
        result = hit.albedo * smooth + hit.added
        share = self._mirror[self.room.triangles.material[face]]
        index = np.flatnonzero(share > 0)
        if len(index):
            view = directions[index] / _length(directions[index])[:, None]
            normal = hit.normal[index]
            bounced = view - 2 * np.einsum("ij,ij->i", view, normal)[:, None] * normal
            start = hit.start[index].astype(np.float64)
            other, way = self.first_hit(start, bounced)
            size = (t[index] + way) / (K.fx * SUPERSAMPLING)
            seen = self._surface(start, bounced, other, way, size, strata[index])
            part = share[index][:, None]
            result[index] = (1 - part) * result[index] + part * (seen.albedo * seen.irradiance + seen.added)
        return result.reshape(*u.shape, 3).astype(np.float32)

    def _surface(
        self,
        origin: np.ndarray,
        directions: np.ndarray,
        face: np.ndarray,
        t: np.ndarray,
        spread: np.ndarray,
        strata: np.ndarray,
    ) -> _Surface:
        """Colour and light where rays hit; ``spread`` (N,) is the width of a ray there in metres."""
        triangles = self.room.triangles
        points = origin + t[:, None] * directions
        weights = self._barycentric(face, points)
        view = (directions / _length(directions)[:, None]).astype(np.float32)
        flat = self._plane.take(face, axis=0).astype(np.float32)
        flat *= -np.sign(np.einsum("ij,ij->i", flat, view))[:, None]
        normal = np.einsum("nk,nkj->nj", weights, triangles.normals.take(face, axis=0))
        normal *= np.where(np.einsum("ij,ij->i", normal, flat) < 0, -1.0, 1.0).astype(np.float32)[:, None]
        normal /= np.maximum(_length(normal), 1e-6)[:, None]
        material = triangles.material[face]
        dark = self._dark.take(material, axis=0)
        uv = np.einsum("nk,nkj->nj", weights, triangles.uv.take(face, axis=0)) / self._tile[material][:, None]
        cosine = np.maximum(-np.einsum("ij,ij->i", view, flat), 0.15)
        texel = self.room.atlas.sample(self._texture[material], uv, spread / (cosine * self._tile[material]))
        albedo = dark + (self._light.take(material, axis=0) - dark) * texel
        start = (points + OFFSET * flat).astype(np.float32)
        diffuse, shine = self._lit(start, normal, view, strata)
        open_ = self._openness(start, normal, strata)
        # Light from the floor and the furniture comes from below, hence a little more for what faces down.
        ambient = AMBIENT * (1.0 - 0.15 * normal[:, 2:]) * (0.2 + 0.8 * open_[:, None])
        added = self._gloss[material][:, None] * shine + self._emission[material][:, None] * albedo
        return _Surface(albedo, diffuse + ambient, added, normal, start)

    def base_colour(self, material: np.ndarray, uv: np.ndarray) -> np.ndarray:
        """(N, 3) uint8 sRGB colour of materials (N,) at texture coordinates (N, 2) in metres, without light."""
        tile = self._tile[material]
        texel = self.room.atlas.sample(self._texture[material], uv / tile[:, None], 0.1 / tile)
        albedo = self._dark[material] + (self._light[material] - self._dark[material]) * texel
        return np.rint(255 * np.clip(albedo, 0, 1) ** (1 / 2.2)).astype(np.uint8)

    def _barycentric(self, face: np.ndarray, points: np.ndarray) -> np.ndarray:
        """(N, 3) float32 weights of a triangle's corners at points on it."""
        p = points - self._origin.take(face, axis=0)
        a = np.einsum("ij,ij->i", p, self._e1.take(face, axis=0))
        b = np.einsum("ij,ij->i", p, self._e2.take(face, axis=0))
        i = self._inverse.take(face, axis=0)
        v, w = i[:, 0] * a + i[:, 1] * b, i[:, 1] * a + i[:, 2] * b
        return np.stack([1.0 - v - w, v, w], axis=1).astype(np.float32)

    def _visible(self, start: np.ndarray, directions: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """(N,) whether nothing lies within ``reach`` metres along unit directions."""
        hit = self._scene.run(start, directions, dists=reach.astype(np.float32), query="OCCLUDED")
        return hit < 0

    def _lit(
        self, start: np.ndarray, normal: np.ndarray, view: np.ndarray, strata: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, 3) direct irradiance (divided by pi) and (N, 3) highlights of all lights."""
        diffuse, shine = np.zeros((len(start), 3), np.float32), np.zeros((len(start), 3), np.float32)
        for number, light in enumerate(self.room.lights):
            place = (strata * 5 + 3 * number) % 16
            to = (_light_points(light).take(place, axis=0) - start).astype(np.float32)
            distance = _length(to)
            to /= distance[:, None]
            amount = np.einsum("ij,ij->i", to, normal)
            if light.normal is not None:
                amount = amount * np.maximum(-(to @ light.normal.astype(np.float32)), 0.0)
            amount = np.maximum(amount, 0.0) / (distance**2 + 0.15)
            index = np.flatnonzero(amount > 1e-4)
            seen = self._visible(start.take(index, axis=0), to.take(index, axis=0), distance[index] - 2 * OFFSET)
            index = index[seen]
            power = np.asarray(light.power, np.float32)
            diffuse[index] += amount[index, None] * power
            half = to.take(index, axis=0) - view.take(index, axis=0)
            half /= _length(half)[:, None]
            peak = np.maximum(np.einsum("ij,ij->i", half, normal.take(index, axis=0)), 0.0) ** 48
            shine[index] += (0.6 * peak / (distance[index] ** 2 + 0.5))[:, None] * power
        return diffuse, shine

    def _openness(self, start: np.ndarray, normal: np.ndarray, strata: np.ndarray) -> np.ndarray:
        """(N,) 1 where a ray into the hemisphere meets nothing nearby, else 0."""
        # An orthonormal frame for each normal without branches (Duff et al. 2017).
        sign = np.where(normal[:, 2] >= 0, 1.0, -1.0).astype(np.float32)
        a = -1.0 / (sign + normal[:, 2])
        b = normal[:, 0] * normal[:, 1] * a
        first = np.stack([1 + sign * normal[:, 0] ** 2 * a, sign * b, -sign * normal[:, 0]], 1)
        second = np.stack([b, sign + normal[:, 1] ** 2 * a, -normal[:, 1]], 1)
        local = _HEMISPHERE.take(strata, axis=0)
        directions = local[:, :1] * first + local[:, 1:2] * second + local[:, 2:] * normal
        reach = np.full(len(start), OCCLUSION_REACH)
        return self._visible(start, np.ascontiguousarray(directions, np.float32), reach).astype(np.float32)


def _length(vectors: np.ndarray) -> np.ndarray:
    """(N,) lengths of (N, 3) vectors; a reduction over an axis of three is what numpy's own norm is slow at."""
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def _hemisphere() -> np.ndarray:
    """(16, 3) directions, one from each of 4 x 4 strata of the cosine-weighted hemisphere about z."""
    i, j = np.divmod(np.arange(PERIOD**2), PERIOD)
    radius, angle = np.sqrt((i + 0.5) / PERIOD), 2 * np.pi * (j + 0.5 * (i % 2) + 0.25) / PERIOD
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - radius**2)], 1).astype(np.float32)


_HEMISPHERE = _hemisphere()


def _light_points(light: Light) -> np.ndarray:
    """(16, 3) float64: the middle of each of 4 x 4 parts of a light."""
    i, j = np.divmod(np.arange(PERIOD**2), PERIOD)
    a, b = (2 * (k + 0.5) / PERIOD - 1.0 for k in (i, j))
    return light.center + a[:, None] * light.u + b[:, None] * light.v


def _filter(values: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Averages (H, W, 3) over one period of the light pattern, within each smooth surface only."""
    taps = (0.5, 1.0, 1.0, 1.0, 0.5)  # each of the four phases has the same total weight
    for axis in (0, 1):
        total, weight = np.zeros_like(values), np.zeros(surface.shape, np.float32)
        size = surface.shape[axis]
        for shift, tap in zip(range(-2, 3), taps, strict=True):
            here = [slice(None)] * 2
            there = [slice(None)] * 2
            here[axis] = slice(max(0, -shift), size - max(0, shift))
            there[axis] = slice(max(0, shift), size - max(0, -shift))
            to, of = tuple(here), tuple(there)
            same = tap * (surface[to] == surface[of]).astype(np.float32)
            total[to] += same[..., None] * values[of]
            weight[to] += same
        values = total / weight[..., None]
    return values


def _tone(linear: np.ndarray) -> np.ndarray:
    """Linear radiance -> display values in [0, 1]: a soft shoulder, then the sRGB curve's usual power."""
    white = 3.5
    return np.clip(linear * (1 + linear / white**2) / (1 + linear), 0.0, 1.0) ** (1 / 2.2)
