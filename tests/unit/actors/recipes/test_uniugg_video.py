"""Depth of frames and videos by a network of pairs, under each alignment's own name."""

from __future__ import annotations

from contextlib import closing
from typing import ClassVar

import pytest
import torch

import configs
import models
from actors.recipes import uniugg_video
from actors.recipes.uniugg_video import CONSTANT, Video, judge_videos, video_depth, videos_of
from actors.trainers.feed import Feed
from models.metrics.depth import VIDEO_ALIGNMENTS
from models.uniugg.pretraining import EncoderPretraining
from services.contracts import Split
from services.data.pairs import open_pairs
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.sink import open_store
from services.streams.inputs import KindInputs

UNTRAINED = "untrained network"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    config = configs.load(
        ["recipe=uniugg_encoder", f"storage.root={tmp_path_factory.mktemp('video')}", "data.rooms.scenes=4",
         "data.rooms.views=3", "data.rooms.width=64", "data.rooms.height=48", "logger.progress=off"]
    )  # fmt: skip
    manifests, store = open_sources(config), open_store(config)
    open_pairs(config, manifests)
    with (
        closing(FeatureClient(config, store)) as client,
        closing(Feed.open(config, manifests, client, store)) as feed,
    ):
        return list(videos_of(feed, Split.TRAIN, feed.inputs["pair"].size))


@pytest.fixture(scope="module")
def network() -> EncoderPretraining:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = models.build("uniugg-encoder-tiny").eval()
    assert isinstance(found, EncoderPretraining)
    return found


class FakeFeed:
    inputs: ClassVar = {"pair": KindInputs(size=(112, 112))}


def test_a_video_is_a_scene_in_its_order(videos: list[Video]):
    assert len(videos) == 2, "the rooms of the training split"
    for video in videos:
        assert video.images.shape == (3, 112, 112, 3)
        assert video.images.dtype == torch.uint8
        assert video.depth.shape == (3, 112, 112)
        assert float((video.depth > 0).float().mean()) > 0.9


def test_each_picture_is_a_pair_with_itself(videos: list[Video], network: EncoderPretraining):
    images = videos[0].images
    together = video_depth(network, images)
    assert together.shape == (3, 112, 112)
    assert float(together.min()) > 0
    torch.testing.assert_close(video_depth(network, images[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


def test_alignments_forgive_what_their_names_say(
    videos: list[Video], network: EncoderPretraining, monkeypatch: pytest.MonkeyPatch
):
    """Depth three times too far and half a metre off: scale and shift mend it, a scale alone does not."""
    monkeypatch.setattr(uniugg_video, "videos_of", lambda *_: iter(videos))
    known = {id(network): 0}

    def shifted(module: EncoderPretraining, images: torch.Tensor) -> torch.Tensor:
        (video,) = [video for video in videos if torch.equal(video.images, images)]
        known[id(module)] += 1
        return 3 * video.depth + 0.5

    monkeypatch.setattr(uniugg_video, "video_depth", shifted)
    metrics = judge_videos({"trained": network}, FakeFeed(), split=Split.TRAIN, device="cpu")  # type: ignore[arg-type]
    assert known[id(network)] == len(videos)
    error = {way: metrics[f"video_depth/abs_rel/{way}"]["value"] for way in VIDEO_ALIGNMENTS}
    assert error["least_squares_scale_shift"] == pytest.approx(0, abs=1e-5)
    assert error["least_squares_scale"] > 0.005
    assert error["median_scale"] > 0.005
    assert metrics["frame_depth/abs_rel"]["value"] > 0.005
    # One depth everywhere, scaled and shifted by least squares, is the mean of the video.
    means = [video.depth[video.depth > 0].double().mean() for video in videos]
    errors = [
        ((mean - video.depth[video.depth > 0].double()).abs() / video.depth[video.depth > 0].double())
        for mean, video in zip(means, videos, strict=True)
    ]
    found = metrics["video_depth/abs_rel/least_squares_scale_shift"]
    assert found["baseline"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert found["baseline_name"] == CONSTANT


def test_networks_stand_beside_each_other(
    videos: list[Video], network: EncoderPretraining, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uniugg_video, "videos_of", lambda *_: iter(videos[:1]))
    metrics = judge_videos(
        {"trained": network, UNTRAINED: network},
        FakeFeed(),
        split=Split.TRAIN,
        device="cpu",  # type: ignore[arg-type]
    )
    assert len(metrics) == 2 * (1 + len(VIDEO_ALIGNMENTS))
    for entry in metrics.values():
        assert entry["value"] == entry["also"][UNTRAINED]


def test_scenes_without_depth_give_no_scores(network: EncoderPretraining, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uniugg_video, "videos_of", lambda *_: iter(()))
    assert judge_videos({"trained": network}, FakeFeed(), split=Split.TEST, device="cpu") == {}  # type: ignore[arg-type]
