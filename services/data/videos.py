"""Frames of a video by index, through PyAV. The index counts decoded frames in the order of presentation."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from services.data.images import file_version
from services.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer


def decoder_version() -> str:
    """Name and version of what turns a video into pixels; part of the content digest of a frame."""
    import av

    libraries = "-".join(f"{part}" for part in av.library_versions.get("libavcodec", ()))
    return f"av-{av.__version__}/libavcodec-{libraries}"


def frame_times(path: Path) -> tuple[float, ...]:
    """Seconds of each frame from the first one, in the order of presentation. Cached until the file changes."""
    index = _index(path, file_version(path))
    return tuple((pts - index.pts[0]) * index.time_base for pts in index.pts)


def frame_rate(path: Path) -> float:
    """Frames a second on average: as the file states, else from the times of its frames. 0 for a single frame."""
    index = _index(path, file_version(path))
    if index.rate:
        return index.rate
    seconds = (index.pts[-1] - index.pts[0]) * index.time_base
    return (len(index.pts) - 1) / seconds if seconds > 0 else 0.0


def frame_size(path: Path) -> tuple[int, int]:
    """(width, height) of the video's frames in pixels."""
    index = _index(path, file_version(path))
    return index.width, index.height


def load_frame(path: Path, frame: int) -> np.ndarray:
    """Frame ``frame`` as uint8 (H, W, 3) RGB. DataError when the video does not decode or has no such frame."""
    index = _index(path, file_version(path))
    if not 0 <= frame < len(index.pts):
        raise DataError(f"{path}: has {len(index.pts)} frames, frame {frame} was asked for")
    # After a jump a stream may begin with frames that refer to what was jumped over; then it is read from its start.
    for start in (index.pts[frame], None):
        found = _decode(path, index.pts[frame], start)
        if found is not None:
            return found
    raise DataError(f"{path}: frame {frame} does not decode; the video is truncated or damaged")


def _decode(path: Path, wanted: int, start: int | None) -> np.ndarray | None:
    """The frame shown at ``wanted``, read from the keyframe at or before ``start`` or from the beginning."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # A damaged frame is an error, not a guess at what it may have shown.
            stream.codec_context.options = {"err_detect": "explode"}
            if start is not None:
                container.seek(start, stream=stream, backward=True)
            for decoded in container.decode(stream):
                if decoded.pts == wanted:
                    return decoded.to_ndarray(format="rgb24")
                if decoded.pts is not None and decoded.pts > wanted:
                    return None
    except (av.FFmpegError, OSError):
        return None
    return None


class _Index:
    """Presentation times of a video's frames, from its packets: nothing is decoded but the first frame."""

    def __init__(self, container: InputContainer, path: Path) -> None:
        if not container.streams.video:
            raise DataError(f"{path}: the file has no video stream")
        stream = container.streams.video[0]
        self.width, self.height = int(stream.width), int(stream.height)
        self.time_base = float(stream.time_base or 0)
        self.rate = float(stream.average_rate or 0)
        self.pts = sorted(p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard)
        if not self.pts or not self.time_base or not self.width:
            raise DataError(f"{path}: the video has no frames that can be addressed (no presentation times)")


@lru_cache(maxsize=256)
def _index(path: Path, _version: tuple[int, int]) -> _Index:
    import av

    try:
        with av.open(str(path)) as container:
            return _Index(container, path)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: not a readable video ({error})") from error
