"""Pictures without poses: folders of images, and videos.

Layout: the root is a video, a folder of pictures (one scene), or a folder of such folders and videos. Pictures are
ordered by the number that their name is, otherwise by name with its numbers as numbers. ``frame_stride`` thins videos
and folders alike. Views have neither intrinsics nor poses; frames of a video have their time.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from services.contracts import ImageRef, Scene, View
from services.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from services.data.readers.base import Notes, Reader
from services.errors import DataError


class ImagesReader(Reader):
    """Folders of images and videos, each a scene."""

    def layout(self) -> str:
        """One line on the layout."""
        return "expected images, videos, or folders of images"

    @cached_property
    def scenes(self) -> dict[str, Path]:
        """Scene id -> video or folder."""
        if self.root.is_file():
            return {self.root.stem: self.root} if _is_video(self.root) else {}
        entries = sorted(self.root.iterdir())
        found = {entry.name: entry for entry in entries if entry.is_dir() and _holds_images(entry)}
        for entry in entries:
            if _is_video(entry):
                found[entry.name if entry.stem in found else entry.stem] = entry
        if _holds_images(self.root):
            found[self.root.name] = self.root
        return found

    def all_ids(self) -> list[str]:
        """Names of the folders and videos."""
        return sorted(self.scenes)

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """The pictures of a folder, or the frames of a video, in order."""
        if scene_id not in self.scenes:
            raise DataError(f"{self.root}: has no folder or video {scene_id!r}")
        place = self.scenes[scene_id]
        if place.is_dir():
            images = self.every_nth(notes.listing(place, IMAGE_SUFFIXES))
            return Scene(id=scene_id, views=tuple(View(image=ImageRef(path=str(path))) for path in images))
        from services.data.videos import frame_times, load_frame

        frames = self.every_nth(list(enumerate(frame_times(place))))
        # A container that can be listed may still hold a stream that no decoder reads.
        load_frame(place, frames[0][0])
        views = (View(image=ImageRef(path=str(place), frame=number), timestamp=time) for number, time in frames)
        return Scene(id=scene_id, views=tuple(views))


def _is_video(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
