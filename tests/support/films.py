"""Short videos for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int = 10, gop: int = 4) -> None:
    """An H.264 file with B-frames; the first frame is at time 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        # All of the colour in full resolution and nearly without loss, so that colours can be compared.
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        stream.gop_size = gop
        stream.max_b_frames = 2
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
