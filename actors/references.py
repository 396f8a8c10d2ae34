"""Pictures that a trained model is shown: files, or views of scenes in the data of its run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import ConfigError, RunConfig
from models.geometry.poses import relative
from services.contracts import ImageRef, Scene, View
from services.data.images import load_image, load_photo
from services.errors import DataError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture with its camera."""

    name: str
    image: np.ndarray
    """uint8 (H, W, 3)."""
    K: Tensor
    """(3, 3) float64 of it, pixel centres at integers."""
    known_camera: bool
    """Whether K is measured; else it follows from ``generate.fov``."""
    pose: Tensor | None = None
    """(4, 4) float64 camera-to-world, of a view of a scene."""

    @property
    def stem(self) -> str:
        """The name as that of a file."""
        return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(self.name).stem)


def read_pictures(name: str, config: RunConfig, *, views: Sequence[int] | None = None) -> list[Picture]:
    """A picture file, or views of a scene of the run's data: ``SOURCE/SCENE`` or ``SOURCE/SCENE:0,3``.

    Of a scene whose views are not named, as many stand for it as in the conversations that the run was trained on:
    all, or at most ``max_views`` evenly spaced ones.

    Args:
        name: what to show.
        config: of the run; ``data`` says where scenes are, ``generate.fov`` the camera of other pictures.
        views: of the scene, where ``name`` does not say which.

    DataError names a file that is no picture, a scene that is not there, or a view that it does not have.
    """
    if _is_file(name):
        path = Path(name).expanduser()
        if views is not None:
            raise ConfigError(f"--view is for scenes; {name} is a file")
        image = load_photo(path)
        return [Picture(name=path.name, image=image, K=camera_of(image, config.generate.fov), known_camera=False)]
    scene_name, scene, chosen = _scene_views(name, config, views)
    return [_view(scene, index, scene_name, config) for index in chosen]


def find_images(name: str, config: RunConfig, *, views: Sequence[int] | None = None) -> list[tuple[str, ImageRef]]:
    """Names and places of the pictures that :func:`read_pictures` reads, before they are read."""
    if _is_file(name):
        path = Path(name).expanduser().absolute()
        if views is not None:
            raise ConfigError(f"--view is for scenes; {name} is a file")
        return [(path.name, ImageRef(path=str(path)))]
    scene_name, scene, chosen = _scene_views(name, config, views)
    return [(f"{scene_name}:{index}", _view_of(scene, index, scene_name).image) for index in chosen]


def _scene_views(name: str, config: RunConfig, views: Sequence[int] | None) -> tuple[str, Scene, Sequence[int]]:
    """The scene that ``SOURCE/SCENE[:VIEW,VIEW]`` names, and which of its views."""
    scene_name, _, listed = name.partition(":")
    if listed:
        views = _indices(name, listed)
    scene = _scene(scene_name, config)
    if views is None:
        number = min(len(scene.views), _most_views(config))
        views = [round(place) for place in np.linspace(0, len(scene.views) - 1, number)]
    return scene_name, scene, views


def read_picture(name: str, config: RunConfig, view: int | None = None) -> Picture:
    """One picture, as :func:`read_pictures` reads it; of a scene the first view where none is named."""
    views = None if view is None else [view]
    if views is None and ":" not in name and not _is_file(name):
        views = [0]
    found = read_pictures(name, config, views=views)
    if len(found) != 1:
        raise ConfigError(f"--image {name}: one picture is needed, this is {len(found)}")
    return found[0]


def _is_file(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_file() or path.suffix.lower() in _SUFFIXES


def camera_of(image: np.ndarray, fov: float) -> Tensor:
    """K (3, 3) float64 of a picture (H, W, 3) whose horizontal field of view is ``fov`` degrees; square pixels."""
    height, width = image.shape[:2]
    focal = 0.5 * width / math.tan(math.radians(fov) / 2)
    return torch.tensor(
        [[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]], dtype=torch.float64
    )


def pose_between(reference: Picture, target: Picture) -> Tensor:
    """Pose (4, 4) float64, camera of ``target`` -> camera of ``reference``. DataError where one has none."""
    for picture in (reference, target):
        if picture.pose is None:
            raise DataError(f"{picture.name} has no pose; --target-view needs two posed views of a scene")
    assert reference.pose is not None
    assert target.pose is not None
    return relative(reference.pose, target.pose)


def _most_views(config: RunConfig) -> int:
    """The smallest number of pictures that stand for a scene in any source of questions."""
    limits = [int(s.options.get("max_views", 0)) for s in config.data.sources.values() if s.format == "questions"]
    return min([config.data.questions.max_views, *(limit for limit in limits if limit)])


def _indices(name: str, listed: str) -> list[int]:
    try:
        return [int(number) for number in listed.split(",")]
    except ValueError as error:
        raise ConfigError(f"--image {name}: views are written SOURCE/SCENE:0,3") from error


def _scene(name: str, config: RunConfig) -> Scene:
    from services.data.show import find_record
    from services.data.sources import open_sources

    # Questions about scenes hold no pictures of their own, and making them takes time.
    sources = {key: source for key, source in config.data.sources.items() if source.format != "questions"}
    limited = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    try:
        found = find_record(open_sources(limited), name)
    except DataError as error:
        if Path(name).expanduser().is_dir():
            raise DataError(f"{name} is a folder; give one of its pictures, or SOURCE/SCENE of the data") from error
        raise
    if not isinstance(found, Scene):
        raise DataError(f"{name} is no scene with views; give one of its picture files instead")
    return found


def _view_of(scene: Scene, index: int, name: str) -> View:
    if not 0 <= index < len(scene.views):
        raise DataError(f"{name} has no view {index}; its views are 0 to {len(scene.views) - 1}")
    return scene.views[index]


def _view(scene: Scene, index: int, name: str, config: RunConfig) -> Picture:
    view = _view_of(scene, index, name)
    image = load_image(view.image)
    K = camera_of(image, config.generate.fov) if view.K is None else torch.from_numpy(view.K.matrix())
    pose = None if view.pose is None else torch.tensor(view.pose, dtype=torch.float64)
    return Picture(name=f"{name}:{index}", image=image, K=K, known_camera=view.K is not None, pose=pose)
