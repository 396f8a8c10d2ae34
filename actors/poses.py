"""Where imagined cameras stand: from a file, from angles and a move, or along a trajectory.

A pose is a 4x4 matrix, imagined camera -> reference camera, in metres, with OpenCV's axes (x right, y down, z ahead)
of the reference camera. Angles turn the camera: yaw about its y axis, positive to the right; pitch about its x axis,
positive upward; roll about its z axis, positive clockwise (the picture turns the other way). They are applied in this
order: the camera turns to the side, then up, then rolls; the move is along the reference camera's axes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import ConfigError
from configs.schema import GenerateConfig
from models.geometry.poses import make_pose, rigidity_error
from services.errors import DataError

ORBIT, SWEEP = "orbit", "sweep"
_FORM = "a pose is a 4x4 matrix: in JSON a list of four rows of four numbers (or of such poses), in text four lines"
_RIGID = 1e-3
"""Files hold few digits; a sheared or scaled pose is far beyond this."""


@dataclass(frozen=True, kw_only=True)
class PoseOptions:
    """What a command was told about cameras; exactly one way of saying it may be used."""

    file: str = ""
    yaw: float | None = None
    pitch: float | None = None
    roll: float | None = None
    move: str = ""
    trajectory: str = ""

    @property
    def turned(self) -> bool:
        """Whether angles or a move are given."""
        return any(value is not None for value in (self.yaw, self.pitch, self.roll)) or bool(self.move)

    @property
    def given(self) -> list[str]:
        """The ways of saying it that are used."""
        ways = {"--pose": self.file, "--yaw, --pitch, --roll, --move": self.turned, "--trajectory": self.trajectory}
        return [way for way, used in ways.items() if used]


def poses_of(options: PoseOptions, settings: GenerateConfig, distance: Callable[[], float]) -> Tensor:
    """The poses (N, 4, 4) float64 that ``options`` ask for; N is 1 but for a trajectory or a file of several.

    ``distance`` gives the metres to what the reference camera looks at, around which an orbit turns.

    ConfigError when none or several ways are used; DataError names a file that does not hold rigid poses.
    """
    if len(options.given) != 1:
        said = f"both {' and '.join(options.given)} are given" if options.given else "no pose is given"
        raise ConfigError(
            f"{said}: say where the imagined camera stands by --pose FILE, by --yaw, --pitch, --roll and --move, or by "
            "--trajectory orbit, sweep or FILE"
        )
    if options.file:
        return read_poses(options.file)
    if options.turned:
        angles = (options.yaw or 0.0, options.pitch or 0.0, options.roll or 0.0)
        for name, angle in zip(("--yaw", "--pitch", "--roll"), angles, strict=True):
            if not math.isfinite(angle):
                raise ConfigError(f"{name} {angle}: must be a number of degrees, such as 20")
        return make_pose(rotation(*angles), _move(options.move))[None]
    if options.trajectory == SWEEP:
        return sweep(settings.frames, settings.angle)
    if options.trajectory == ORBIT:
        return orbit(settings.frames, settings.angle, distance())
    return read_poses(options.trajectory)


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Tensor:
    """Degrees -> rotation (3, 3) float64, turned camera -> camera before; see the top of this file for the signs."""
    return _about(1, yaw) @ _about(0, pitch) @ _about(2, roll)


def _about(axis: int, degrees: float) -> Tensor:
    """Right-handed rotation about an axis."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    first, second = (axis + 1) % 3, (axis + 2) % 3
    found = torch.eye(3, dtype=torch.float64)
    found[first, first] = found[second, second] = cos
    found[first, second], found[second, first] = -sin, sin
    return found


def sweep(frames: int, angle: float) -> Tensor:
    """The camera stays and turns by ``angle`` degrees to the right, back, to the left, back: (frames, 4, 4)."""
    turns = torch.stack([rotation(yaw) for yaw in _swing(frames, angle)])
    return make_pose(turns, torch.zeros(frames, 3, dtype=torch.float64))


def orbit(frames: int, angle: float, distance: float) -> Tensor:
    """The camera goes around the point ``distance`` metres ahead, which stays in the middle: (frames, 4, 4).

    It turns by ``angle`` degrees to the right, and therefore goes to the left, then to the other side and back.
    """
    turns = torch.stack([rotation(yaw) for yaw in _swing(frames, angle)])
    centre = torch.tensor([0.0, 0.0, distance], dtype=torch.float64)
    return make_pose(turns, centre - distance * turns[:, :, 2])


def _swing(frames: int, angle: float) -> list[float]:
    """A whole period that begins at 0; what follows its last frame is its first."""
    return [angle * math.sin(2 * math.pi * frame / frames) for frame in range(frames)]


def read_poses(file: str) -> Tensor:
    """Poses (N, 4, 4) float64 of a file: JSON (one matrix, or a list of them), or text, four rows of four a pose.

    DataError names the file, and the pose that is not rigid.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a file of poses, or `orbit` or `sweep`") from error
    try:
        values: Any = json.loads(text) if path.suffix == ".json" else _numbers(text)
        found = torch.tensor(values, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: holds no matrices of numbers ({error}); {_FORM}") from error
    if not found.numel() or found.numel() % 16 or (found.ndim != 1 and found.shape[-2:] != (4, 4)):
        raise DataError(f"{path}: holds numbers of the shape {tuple(found.shape)}; {_FORM}")
    return check_rigid(found.reshape(-1, 4, 4), str(path))


def check_rigid(poses: Tensor, where: str) -> Tensor:
    """``poses`` (N, 4, 4). DataError names the first that is not rigid."""
    off = rigidity_error(poses)
    bad = (~(off <= _RIGID)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"{where}: pose {bad[0]} is not rigid (off by {float(off[bad[0]]):.3g}, allowed {_RIGID}): "
            f"{poses[bad[0]].tolist()}; a pose is rotation and translation, without scale or shear, last row 0 0 0 1"
        )
    return poses


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.replace(",", " ").split()]


def _move(text: str) -> Tensor:
    """The text X,Y,Z -> metres (3,)."""
    if not text:
        return torch.zeros(3, dtype=torch.float64)
    try:
        numbers: Sequence[float] = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"--move {text}: write three numbers of metres to the right, down and ahead, such as 0.5,0,0")
    return torch.tensor(numbers, dtype=torch.float64)
