"""What was imagined, as files: coloured points (PLY, GLB), depth, pictures, animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from models.uniugg.scenes import PointCloud

MILLIMETRES = 1000.0
_DEEPEST = 65535
"""Of a 16-bit picture, millimetres."""
_SMALLEST = 224
"""Frames of animations lower than this are enlarged by whole pixels."""


def as_bytes(picture: Tensor) -> np.ndarray:
    """Colours (..., 3) in [0, 1] -> uint8."""
    scaled: np.ndarray = (picture.detach().float().cpu().clamp(0, 1) * 255).round().numpy()
    return scaled.astype(np.uint8)


def save_ply(cloud: PointCloud, path: Path) -> None:
    """Binary PLY in metres, axes as the reference camera's (x right, y down, z ahead)."""
    import trimesh

    points = cloud.points.detach().cpu().numpy().astype(np.float32)
    trimesh.PointCloud(points, as_bytes(cloud.colours)).export(path)


def save_glb(clouds: Mapping[str, PointCloud], path: Path) -> None:
    """Binary glTF with one node a cloud that has points. glTF's y points up and z backward, and viewers rely on it."""
    import trimesh

    scene = trimesh.Scene()
    for name, cloud in clouds.items():
        if len(cloud.points):
            points = cloud.points.detach().cpu().numpy().astype(np.float32) * np.array([1, -1, -1], np.float32)
            scene.add_geometry(trimesh.PointCloud(points, as_bytes(cloud.colours)), node_name=name, geom_name=name)
    scene.export(path)


def save_depth(depth: Tensor, path: Path) -> None:
    """Depth (H, W) in metres -> 16-bit PNG in millimetres; 0 is unknown, and what is deeper than 65.535 m."""
    known = np.nan_to_num(depth.detach().float().cpu().numpy(), nan=0.0, posinf=0.0, neginf=0.0) * MILLIMETRES
    Image.fromarray(np.where(known > _DEEPEST, 0, np.clip(known, 0, None)).round().astype(np.uint16)).save(path)


def depth_range(depths: Sequence[Tensor]) -> tuple[float, float]:
    """Metres from the 2nd to the 98th percentile of what is known, for one scale of colours over several maps."""
    known = np.concatenate([depth.detach().float().cpu().numpy().ravel() for depth in depths])
    known = known[np.isfinite(known) & (known > 0)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, [2, 98])
    return float(low), float(high)


def save_gif(frames: Sequence[np.ndarray], path: Path, rate: float) -> None:
    """Frames uint8 (H, W, 3) as an animation that repeats, ``rate`` frames a second."""
    pictures = [Image.fromarray(_enlarged(frame)).quantize(256, dither=Image.Dither.NONE) for frame in frames]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=round(1000 / rate), loop=0, optimize=False
    )


def save_mp4(frames: Sequence[np.ndarray], path: Path, rate: float) -> bool:
    """Frames uint8 (H, W, 3) as H.264 (MPEG-4 where PyAV has no encoder for it); False where PyAV is not installed."""
    try:
        import av
    except ImportError:
        return False
    from fractions import Fraction

    pictures = [_enlarged(frame) for frame in frames]
    height, width = (side - side % 2 for side in pictures[0].shape[:2])  # of yuv420p
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return True


def _enlarged(frame: np.ndarray) -> np.ndarray:
    factor = max(1, -(-_SMALLEST // frame.shape[0]))
    return frame.repeat(factor, 0).repeat(factor, 1)
