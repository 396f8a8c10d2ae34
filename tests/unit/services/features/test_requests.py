"""What is in a key and what is not."""

from __future__ import annotations

import dataclasses

import pytest

from configs.schema import EncoderConfig
from models.encoders import families
from models.encoders.base import InputKind
from services.contracts import ImageRef, PlanSample, Role, View, ViewRole
from services.errors import ConfigError, DataError
from services.features import requests as module
from services.features.requests import feature_request, feature_requests, text_request


class Manifest:
    def __init__(self, views, digests):
        self._views, self._digests = views, digests

    def views(self, _, places):
        return [self._views[place] for place in places]

    def digests(self, _, places):
        return [self._digests[place] for place in places]


def manifest(folder="/data", digests=("d0", "d1", "d2")):
    return Manifest([View(image=ImageRef(path=f"{folder}/{i}.png")) for i in range(3)], digests)


def sample(*views, roles=None):
    roles = roles or [Role.CONTEXT] * len(views)
    chosen = tuple(ViewRole(index=v, role=r) for v, r in zip(views, roles, strict=True))
    return PlanSample(id="src/s#0", source="src", item="s", kind="view", views=chosen, seed=1)


@pytest.fixture
def config(make_config, monkeypatch):
    monkeypatch.setattr(families, "INPUT_KINDS", {**families.INPUT_KINDS, "views": InputKind.VIEWS})
    base = make_config()
    return dataclasses.replace(base, encoders={**base.encoders, "set": EncoderConfig(family="views")})


def test_a_picture_is_known_by_its_content_alone(config):
    one = feature_request(sample(1), manifest(), "features", config)
    moved = feature_request(sample(1, roles=[Role.TARGET]), manifest("/elsewhere"), "features", config)
    assert one.key == moved.key
    assert one.images[0].path == "/data/1.png"
    assert one.digests == ("d1",)
    assert one.key != feature_request(sample(1), manifest(digests=("d0", "dX", "d2")), "features", config).key


def test_per_sample_parameters_are_part_of_the_key(config):
    plain = feature_request(sample(0), manifest(), "features", config)
    flipped = feature_request(sample(0), manifest(), "features", config, transform={"flip": True})
    assert plain.key != flipped.key
    assert flipped.transform == {"flip": True}


def test_an_encoder_of_single_pictures_gets_a_request_a_view(config):
    requests = feature_requests(sample(2, 0), manifest(), "features", config)
    assert [r.digests for r in requests] == [("d2",), ("d0",)]
    with pytest.raises(DataError, match="has 2 views"):
        feature_request(sample(2, 0), manifest(), "features", config)


def test_an_encoder_of_view_sets_knows_order_and_roles(config):
    keys = {
        feature_request(s, manifest(), "set", config).key
        for s in (sample(0, 1), sample(1, 0), sample(0, 1, roles=[Role.CONTEXT, Role.TARGET]), sample(0))
    }
    assert len(keys) == 4
    assert feature_request(sample(0, 1), manifest(), "set", config).roles == (Role.CONTEXT, Role.CONTEXT)


def test_a_chained_request_holds_the_one_before(config):
    request = feature_request(sample(1), manifest(), "small", config, transform={"flip": True})
    assert request.upstream == feature_request(sample(1), manifest(), "features", config, transform={"flip": True})
    assert request.key != request.upstream.key
    assert request.transform == {}


def test_items_have_pictures_too(config):
    item = Manifest([View(image=ImageRef(path="/x.png"))], ("d",))
    assert feature_request(sample(0), item, "features", config).images[0].path == "/x.png"


def test_a_text_is_its_own_key():
    assert text_request("a chair", "s", "t").key == text_request("a chair", "other", "t").key
    assert text_request("a chair", "s", "t").key != text_request("a sofa", "s", "t").key


@pytest.mark.parametrize(
    ("views", "encoder", "error", "message"),
    [
        ((), "features", DataError, "asks for no view of 's'"),
        ((0,), "nobody", ConfigError, "no encoder 'nobody'"),
    ],
)
def test_what_is_not_there_is_named(views, encoder, error, message, config):
    with pytest.raises(error, match=message):
        feature_requests(sample(*views), manifest(), encoder, config)


def test_pictures_for_a_text_encoder_are_refused(config):
    words = EncoderConfig(family="clip_text")
    config = dataclasses.replace(config, encoders={"words": words})
    with pytest.raises(DataError, match="takes text"):
        module.feature_requests(sample(0), manifest(), "words", config)
