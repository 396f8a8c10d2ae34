"""Depth of single frames and of videos by the spatial decoder, each picture decoded as a pair with itself.

The views of a scene in their order are a video. A single frame is aligned by its median (the protocol on NYU-v2), a
video once as a whole; papers do not agree on how, so the alignments stand beside each other, each under its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.recipes.base import row
from actors.recipes.samples import spread
from models.metrics.depth import VIDEO_ALIGNMENTS, DepthMetrics, VideoDepthMetrics, self_pair_depth
from models.uniugg.encoder import normalise
from models.uniugg.pretraining import EncoderPretraining
from services.contracts import Scene, Split
from services.data.images import load_image
from services.errors import DataError
from services.streams.cut import cut_picture
from services.streams.maps import read_maps

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

CONSTANT = "one depth everywhere"
_AT_ONCE = 8
"""Pictures decoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """The views of a scene in their order, as the network sees them."""

    images: Tensor
    """uint8 (T, H, W, 3)."""
    depth: Tensor
    """(T, H, W) metres; 0 is unknown."""


@dataclass(kw_only=True)
class _Scores:
    frames: DepthMetrics = field(default_factory=DepthMetrics)
    videos: VideoDepthMetrics = field(default_factory=VideoDepthMetrics)

    def update(self, predicted: Tensor, true: Tensor) -> None:
        self.frames.update(predicted, true)
        self.videos.update(predicted, true)


def videos_of(feed: Feed, split: Split, size: tuple[int, int]) -> Iterator[Video]:
    """Scenes of the split that have depth, at most ``evaluate.samples``; those with broken files are left out."""
    scenes = [
        (manifest, entry.id)
        for manifest in feed.manifests.values()
        for entry in manifest.of_split(split)
        if entry.kind == "scene"
    ]
    for manifest, name in spread(scenes, feed.config.evaluate.samples):
        scene = manifest.scene(name)
        if not isinstance(scene, Scene) or not any(view.depth is not None for view in scene.views):
            continue
        try:
            images = [cut_picture(load_image(view.image), *size) for view in scene.views]
            depths = [read_maps(view, *size, labels=False)["depth"].data for view in scene.views]
        except DataError:
            continue  # the loader has told of it, and counts it
        yield Video(images=torch.from_numpy(np.stack(images)), depth=torch.from_numpy(np.stack(depths)))


@torch.no_grad()
def video_depth(module: EncoderPretraining, images: Tensor) -> Tensor:
    """Pictures uint8 (T, H, W, 3) -> metric depth (T, H, W) of each as a pair with itself, never below a millimetre."""
    found = []
    for part in images.split(_AT_ONCE):
        tokens = module.encoder(normalise(part)).tokens
        found.append(self_pair_depth(module.spatial_decoder, tokens, (images.shape[1], images.shape[2])))
    return torch.cat(found).clamp_min(1e-3)


def judge_videos(
    networks: Mapping[str, EncoderPretraining], feed: Feed, *, split: Split, device: str
) -> dict[str, dict[str, Any]]:
    """Metrics of the first of ``networks`` (by name); the others, and one depth everywhere, stand beside it.

    ``frame_depth/<score>``, and ``video_depth/<score>/<alignment>``; none where no scene of the split has depth.
    """
    name, *others = networks
    scores = {key: _Scores() for key in (*networks, CONSTANT)}
    for video in videos_of(feed, split, feed.inputs["pair"].size):
        true = video.depth.to(device)
        for key, module in networks.items():
            scores[key].update(video_depth(module, video.images.to(device)), true)
        scores[CONSTANT].update(torch.ones_like(true), true)
    frames = {key: found.frames.compute() for key, found in scores.items()}
    videos = {key: found.videos.compute() for key, found in scores.items()}
    if not frames[name]:
        return {}
    metrics = {}
    for score, better in (("abs_rel", "lower"), ("delta1", "higher")):
        kinds = {f"frame_depth/{score}": (frames, score)}
        kinds |= {f"video_depth/{score}/{way}": (videos, f"{score}/{way}") for way in VIDEO_ALIGNMENTS}
        for metric, (found, key) in kinds.items():
            also = {other: found[other][key] for other in others}
            metrics[metric] = row(found[name][key], found[CONSTANT][key], CONSTANT, better, **also)
    return metrics
