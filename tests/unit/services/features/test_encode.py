"""Grouping by shape, errors in their place, bfloat16 as bits, chains, and what a config cannot be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from configs.schema import EncoderConfig
from models.encoders.base import FrozenEncoder, InputKind
from models.spec import TensorSpec
from services.contracts import FeatureRequest, ImageRef
from services.errors import ConfigError, DataError, ModelError, WeightsError
from services.features import encode
from services.features.encode import Encoder, as_stored, build_encoder, pin_weights, record_bytes, to_record, to_torch
from services.features.keys import feature_key
from services.features.sink import StoredUpstream, StoreSink, open_store


class ByText(FrozenEncoder):
    """An encoder of texts whose inputs differ in shape; "nan" gives NaN, "bad" cannot be prepared."""

    input_kind = InputKind.TEXT

    def __init__(self):
        super().__init__()
        self.batches = []

    def identity(self):
        return {"kind": "test"}

    def outputs(self):
        return {"x": TensorSpec(shape=(None,), dtype="float32")}

    def prepare(self, value, transform):
        if value == "bad":
            raise ModelError("no such word: 'bad'")
        return torch.full((len(value),), float("nan") if value == "nan" else float(ord(value[0])))

    def encode(self, inputs):
        self.batches.append([len(x) for x in inputs])
        return {"x": torch.stack(list(inputs)) * 2}


def texts(*values):
    return [
        FeatureRequest(key=feature_key((), text=value), encoder="features", sample_id=value, text=value)
        for value in values
    ]


@pytest.fixture
def by_text(monkeypatch, make_config):
    model = ByText()
    monkeypatch.setattr(encode, "build_encoder", lambda name, config: model)
    return model, Encoder("features", make_config())


def test_inputs_are_grouped_by_shape_in_micro_batches_and_answered_in_order(by_text):
    model, encoder = by_text
    words = ["aa", "b", "cc", "dd", "e", "ff", "gg", "hhh"]
    answers = encoder.encode(texts(*words))
    assert sorted(model.batches) == [[1, 1], [2], [2, 2, 2, 2], [3]]
    for word, answer in zip(words, answers, strict=True):
        assert answer["x"].data.tolist() == [2.0 * ord(word[0])] * len(word)


def test_errors_stand_where_their_input_was(by_text):
    _, encoder = by_text
    good, bad, nan, empty = encoder.encode([*texts("ok", "bad", "nan"), dataclasses.replace(texts("x")[0], text=None)])
    assert isinstance(good, dict)
    assert isinstance(bad, ModelError)
    assert isinstance(nan, DataError)
    assert "NaN or infinity in 'x'" in str(nan)
    assert isinstance(empty, DataError)


def test_records_are_independent_copies_and_bfloat16_is_bits():
    batch = {"x": torch.tensor([[1.0, -2.0], [3.0, 4.0]]).bfloat16(), "n": torch.tensor([[1], [2]])}
    record = to_record(batch, 1)
    batch["x"].zero_()
    assert record["x"].dtype == "bfloat16"
    assert record["x"].data.dtype == np.int16
    assert to_torch(record["x"]).tolist() == [3.0, 4.0]
    assert record["n"].dtype == "int64"


def test_a_request_with_the_wrong_number_of_images_is_an_error(make_config, make_requests):
    encoder = Encoder("features", make_config())
    request = make_requests(1)[0]
    (answer,) = encoder.encode([dataclasses.replace(request, images=request.images * 2)])
    assert isinstance(answer, DataError)
    assert "takes one image, got 2" in str(answer)


def test_a_missing_file_is_an_error_of_its_input(make_config, make_requests):
    good = make_requests(1)[0]
    lost = dataclasses.replace(good, images=(ImageRef(path="/nowhere/x.png"),))
    answers = Encoder("features", make_config()).encode([lost, good])
    assert isinstance(answers[0], DataError)
    assert "/nowhere/x.png" in str(answers[0])
    assert isinstance(answers[1], dict)


def test_a_chain_encodes_its_upstream_and_passes_its_errors_on(make_config, make_requests, tmp_path):
    config = make_config()
    requests = make_requests(2, encoder="small")
    (tmp_path / "a0.png").write_bytes(b"broken")
    broken, fine = Encoder("small", config).encode(requests)
    assert isinstance(broken, DataError)
    assert fine["tokens"].data.shape == (1, 2, 2, 32)


def test_the_service_keeps_upstream_records_and_reads_them(make_config, make_requests):
    config = make_config()
    chained = make_requests(3, encoder="small")
    upstream = [request.upstream for request in chained]
    sink = StoreSink(config, open_store(config))
    first = StoredUpstream("small", config, sink)(upstream)
    sink.flush()
    assert sink.namespace("features").contains([r.key for r in upstream]).all()
    second = StoredUpstream("small", config, sink)
    second._encoder = None  # nothing may be encoded
    with pytest.raises(AttributeError):
        second(make_requests(4)[3:])
    second._encoder = Encoder("features", config)
    for a, b in zip(first, second(upstream), strict=True):
        assert np.array_equal(a["tokens"].data, b["tokens"].data)
    sink.close()


def test_a_lossy_codec_is_applied_once_and_errors_pass(make_config, make_requests):
    config = make_config(cache={"codec": "fp8_e4m3"})
    encoder = Encoder("features", config)
    (record,) = encoder.encode(make_requests(1))
    error = DataError("x")
    lossy, same = as_stored([record, error], config, encoder)
    assert same is error
    assert not np.array_equal(lossy["tokens"].data, record["tokens"].data)
    np.testing.assert_allclose(lossy["tokens"].data, record["tokens"].data, atol=0.2)
    exact = as_stored([record], make_config(), encoder)[0]
    assert exact is record


def test_record_bytes():
    specs = {"a": TensorSpec(shape=(2, 3), dtype="bfloat16"), "b": TensorSpec(shape=(None, 2), dtype="int32")}
    assert record_bytes(specs) == 12 + 64 * 8


@pytest.mark.parametrize(
    ("encoders", "name", "message"),
    [
        ({}, "nothing", "no encoder 'nothing'"),
        ({"a": EncoderConfig(family="pooled", upstream="b"), "b": EncoderConfig(family="pooled", upstream="a")},
         "a", "in a circle: a -> b -> a"),
        ({"a": EncoderConfig(family="pooled")}, "a", "upstream must name an encoder"),
        ({"a": EncoderConfig(family="dinov2", upstream="b")}, "a", "reads images, not records"),
        ({"a": EncoderConfig(family="pooled", upstream="features", arch={"rows": 2})}, "a", "does not fit pooled"),
    ],
)  # fmt: skip
def test_chains_that_cannot_be_are_refused(encoders, name, message, make_config):
    config = make_config()
    config = dataclasses.replace(config, encoders={**config.encoders, **encoders})
    with pytest.raises(ConfigError, match=message):
        build_encoder(name, config)


@pytest.fixture
def stored(make_config, tmp_path):
    """A run on weights from a folder, and a function that puts other weights there."""

    def save(seed):
        build_encoder("features", make_config(encoder={"seed": seed})).model.save_pretrained(tmp_path / "weights")

    save(0)
    settings = dataclasses.replace(
        make_config().encoders["features"], arch={}, weights=str(tmp_path / "weights"), dtype="float32"
    )
    return dataclasses.replace(make_config(), encoders={"features": settings}), save


def test_a_run_is_bound_to_the_weights_that_it_began_with(stored):
    config, save = stored
    pinned = pin_weights(config)
    assert pinned.encoders["features"].digest == build_encoder("features", config).identity()["weights"]
    assert build_encoder("features", pinned).identity() == build_encoder("features", config).identity()
    save(1)
    with pytest.raises(WeightsError, match=r"encoders\.features .*changed after the run began"):
        build_encoder("features", pinned)
    assert pin_weights(config) != pinned


def test_weights_that_change_between_identity_and_loading_are_refused(stored):
    config, save = stored
    encoder = build_encoder("features", config)
    encoder.identity()
    save(1)
    with pytest.raises(WeightsError, match="changed after the run began"):
        encoder.load()


def test_chains_are_pinned_link_by_link(make_config):
    pinned = pin_weights(make_config())
    assert len(pinned.encoders["features"].digest) == 64
    assert pinned.encoders["small"].digest == "", "pooling has no weights"
    build_encoder("small", pinned)
