"""Videos of conversations: which frames stand for them, and where these stand in the text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.text.template import IMAGE_MARK
from services.contracts import ImageRef, Turn
from services.data.frames import choose_frames, spread_frames
from services.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from services.data.readers.base import Notes, frame_order
from services.errors import ConfigError, DataError

VIDEO_MARK = "<video>"
"""What conversation files write where a video stands; some write the mark of an image instead."""
FILMS = VIDEO_SUFFIXES | {".gif"}
"""Suffixes of files that stand for a video where one is named; elsewhere a GIF is a picture."""


@dataclasses.dataclass(frozen=True)
class Videos:
    """Chooses the frames of videos. Folders are listed once: there are a hundred questions about one."""

    least: int
    most: int
    seconds: float
    folder_fps: float
    _folders: dict[Path, tuple[Path, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Videos:
        """From the options of a corpus. ConfigError for one that is out of range."""
        for name, whole in (
            ("least_frames", True),
            ("most_frames", True),
            ("frame_seconds", False),
            ("folder_fps", False),
        ):
            value = options[name]
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
                raise ConfigError(f"options.{name}={value!r} must be a {'whole ' if whole else ''}number above 0")
        least, most = options["least_frames"], options["most_frames"]
        if least > most:
            raise ConfigError(f"options.least_frames={least} must not be above options.most_frames={most}")
        return cls(least=least, most=most, seconds=options["frame_seconds"], folder_fps=options["folder_fps"])

    def frames(self, path: Path, where: str, notes: Notes) -> tuple[ImageRef, ...]:
        """The frames that stand for a video file or a folder of frames.

        DataError when it is missing, holds no frames, or is no video that can be read.
        """
        if path.is_dir():
            notes.containers.append(path)
            files = self._listed(path)
            if not files:
                raise DataError(
                    f"{path}: the folder holds no pictures ({where}); a video is a file or a folder of frames"
                )
            return tuple(ImageRef(path=str(files[frame])) for frame in self._chosen(len(files), self.folder_fps))
        if not path.is_file():
            raise DataError(f"{path}: there is no such video ({where}); options.images names the folder of the media")
        if path.suffix.lower() not in FILMS:
            raise DataError(f"{path}: is no video ({where}); known are {', '.join(sorted(FILMS))} and folders")
        from services.data.videos import frame_rate, frame_times

        total, fps = len(frame_times(path)), frame_rate(path)
        if total > 1 and not fps > 0:
            raise DataError(f"{path}: all of its {total} frames have the same time ({where}); encode the video again")
        chosen = self._chosen(total, fps) if total > 1 else (0,)
        return tuple(ImageRef(path=str(path), frame=frame) for frame in chosen)

    def thinned(self, images: tuple[ImageRef, ...]) -> tuple[ImageRef, ...]:
        """At most ``most`` of the pictures that stand for a video, evenly spaced."""
        return tuple(images[place] for place in spread_frames(len(images), self.most)) if images else ()

    def _chosen(self, total: int, fps: float) -> tuple[int, ...]:
        return choose_frames(total, fps, seconds=self.seconds, least=self.least, most=self.most)

    def _listed(self, folder: Path) -> tuple[Path, ...]:
        known = self._folders.get(folder)
        if known is None:
            found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            known = self._folders[folder] = tuple(sorted(found, key=frame_order))
        return known


def video_name(record: Mapping[str, Any], where: str) -> str:
    """The name of a record's video. DataError when it is not one name, or when there are pictures beside it."""
    name = record["video"]
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: 'video' must be one name, got {name!r:.80}")
    beside = [key for key in ("image", "images") if record.get(key)]
    if beside:
        raise DataError(f"{where}: has 'video' and {beside[0]!r}; which of them its marks mean is not known")
    return name


def marks(turns: Sequence[Turn], mark: str) -> int:
    """How often a mark stands in users' turns."""
    return sum(turn.text.count(mark) for turn in turns if turn.role == "user")


def asks_for_video(turns: Sequence[Turn]) -> bool:
    """Whether a conversation about pictures calls them a video: one mark of a video, none of an image."""
    return marks(turns, VIDEO_MARK) == 1 and marks(turns, IMAGE_MARK) == 0


def with_frames(turns: Sequence[Turn], frames: int, where: str) -> tuple[Turn, ...]:
    """The turns with a mark for each frame in the place of the video's, and no line break between them and the text.

    A conversation without a mark stays as it is: its pictures stand in front. DataError for several marks, unless they
    are one for each frame.
    """
    videos, images = marks(turns, VIDEO_MARK), marks(turns, IMAGE_MARK)
    if videos + images == 0 or (not videos and images == frames > 1):
        return tuple(turns)
    if videos + images > 1:
        raise DataError(
            f"{where}: {videos} marks {VIDEO_MARK} and {images} marks {IMAGE_MARK} for one video of {frames} chosen "
            "frames; one mark is needed, or one for each frame"
        )
    mark = VIDEO_MARK if videos else IMAGE_MARK
    block = IMAGE_MARK * frames
    return tuple(
        dataclasses.replace(turn, text=turn.text.replace(mark, block).replace(f"{block}\n", block))
        if turn.role == "user"
        else turn
        for turn in turns
    )


def check_marks(turns: Sequence[Turn], images: int, where: str) -> None:
    """DataError when a conversation marks more images than it has, or images as videos.

    Images without a mark are allowed: they stand before the text. A text without images may speak of ``<video>``.
    """
    videos, marked = marks(turns, VIDEO_MARK), marks(turns, IMAGE_MARK)
    if videos and images:
        raise DataError(
            f"{where}: has {videos} marks {VIDEO_MARK} and {marked} marks {IMAGE_MARK} for {images} images; write one "
            "mark of a video, or marks of images alone"
        )
    if marked > images:
        raise DataError(f"{where}: has {marked} marks {IMAGE_MARK} and {images} images")


def share_of(ids: Sequence[str], percent: float) -> list[str]:
    """``percent`` of the ids in their order, rounded down, at least one; which ones follows from the ids alone."""
    count = max(1, int(len(ids) * percent / 100)) if ids else 0
    chosen = set(sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    return [name for name in ids if name in chosen]
