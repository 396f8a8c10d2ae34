"""The fp8 codec against torch's own cast, and the error that it reports against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.contracts import Tensor
from services.errors import CacheError
from services.features import codecs
from services.features.codecs import CodecError, decode, encode


def _bf16(values: torch.Tensor) -> Tensor:
    return Tensor(data=values.to(torch.bfloat16).view(torch.int16).numpy(), dtype="bfloat16")


def test_codes_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 256, generator=generator) * torch.logspace(-4, 3, 400)[:, None]
    stored, _ = encode("fp8_e4m3", {"x": Tensor(data=values.numpy(), dtype="float32")})
    scale = torch.from_numpy(stored["x.scale"].data)[:, None]
    assert torch.allclose(scale[:, 0], values.abs().amax(1) / 448)
    expected = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(stored["x"].data, expected.view(torch.uint8).numpy())
    decoded = decode(stored)["x"].data
    assert np.array_equal(decoded, (expected.float() * scale).numpy())


def test_the_table_of_codes_is_that_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(codecs._decode_table(), codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)


def test_bfloat16_conversion_is_that_of_torch() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 100
    bits = values.to(torch.bfloat16)
    assert np.array_equal(codecs.from_float32(values.numpy(), "bfloat16"), bits.view(torch.int16).numpy())
    assert np.array_equal(codecs.to_float32(bits.view(torch.int16).numpy(), "bfloat16"), bits.float().numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_reported_error_is_the_error(dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    values = torch.randn(3, 50, 128, generator=torch.Generator().manual_seed(2)).to(torch_dtype)
    data = values.view(torch.int16).numpy() if dtype == "bfloat16" else values.numpy()
    stored, errors = encode("fp8_e4m3", {"x": Tensor(data=data, dtype=dtype)})
    found = decode(stored)["x"]
    assert found.dtype == dtype
    assert found.data.shape == data.shape
    decoded = torch.from_numpy(codecs.to_float32(found.data, dtype)).double().reshape(-1, 128)
    original = values.double().reshape(-1, 128)
    cosine = 1 - torch.nn.functional.cosine_similarity(original, decoded)
    error = errors["x"]
    assert error.tokens == 150
    assert error.cosine_mean == pytest.approx(cosine.mean().item(), rel=1e-3, abs=1e-9)
    assert error.cosine_max == pytest.approx(cosine.max().item(), rel=1e-3, abs=1e-9)
    rmse = ((decoded - original).square().sum() / original.square().sum()).sqrt().item()
    assert error.relative_rmse == pytest.approx(rmse, rel=1e-3)
    assert 1e-5 < error.cosine_mean < 1e-3
    assert stored["x"].data.nbytes + stored["x.scale"].data.nbytes < 0.6 * data.nbytes


def test_outlier_channels_and_zero_tokens() -> None:
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    values[:, 5] *= 1000
    values[3] = 0
    values[4] = 1e-38
    record = {"x": _bf16(values)}
    stored, errors = encode("fp8_e4m3", record)
    decoded = codecs.to_float32(decode(stored)["x"].data, "bfloat16")
    assert np.isfinite(decoded).all()
    assert not decoded[3].any()
    assert errors["x"].cosine_max < 2e-3


def test_what_is_no_float_passes_through() -> None:
    record = {
        "ids": Tensor(data=np.arange(5), dtype="int64"),
        "scalar": Tensor(data=np.array(1.5, np.float32), dtype="float32"),
        "empty": Tensor(data=np.zeros((0, 4), np.float32), dtype="float32"),
        "own.scale": Tensor(data=np.arange(3), dtype="int64"),
    }
    stored, errors = encode("fp8_e4m3", record)
    assert not errors
    assert {name: decode(stored)[name] for name in record} == record
    assert encode("none", record)[0] == record


def test_exact_tensors_are_left_alone() -> None:
    pose = Tensor(data=np.linspace(-3, 3, 18, dtype=np.float32).reshape(2, 9), dtype="float32")
    tokens = Tensor(data=np.linspace(-3, 3, 16, dtype=np.float32).reshape(2, 8), dtype="float32")
    stored, errors = encode("fp8_e4m3", {"pose": pose, "tokens": tokens}, exact=("depth", "pose"))
    assert set(errors) == {"tokens"}
    assert set(stored) == {"pose", "tokens", "tokens.scale"}
    assert np.array_equal(decode(stored)["pose"].data, pose.data)
    assert not np.array_equal(decode(stored)["tokens"].data, tokens.data)


@pytest.mark.parametrize(
    ("codec", "exact", "label"),
    [
        ("none", ("pose",), "none"),
        ("fp8_e4m3", (), "fp8_e4m3"),
        ("fp8_e4m3", {"pose", "depth"}, "fp8_e4m3 except depth pose"),
    ],
)
def test_a_namespace_says_what_is_not_coded(codec: str, exact: set[str], label: str) -> None:
    assert codecs.codec_label(codec, exact) == label
    assert codecs.parse_label(label) == (codec, tuple(sorted(exact)) if codec != "none" else ())


def test_refusals() -> None:
    bad = Tensor(data=np.array([[1.0, np.nan]], np.float32), dtype="float32")
    with pytest.raises(CacheError, match="'x' holds NaN or infinity"):
        encode("fp8_e4m3", {"x": bad})
    good = Tensor(data=np.ones((1, 2), np.float32), dtype="float32")
    with pytest.raises(CacheError, match=r"'x\.scale', which the record already has"):
        encode("fp8_e4m3", {"x": good, "x.scale": good})
    with pytest.raises(CacheError, match="allowed: none, fp8_e4m3"):
        codecs.check_codec("zip")


def test_errors_add_up() -> None:
    a, b = CodecError(2, 0.2, 0.15, 1.0, 4.0), CodecError(3, 0.1, 0.05, 3.0, 12.0)
    total = a + b
    assert (total.tokens, total.cosine_max) == (5, 0.15)
    assert total.cosine_mean == pytest.approx(0.06)
    assert total.relative_rmse == pytest.approx(0.5)
    assert CodecError.from_json(total.to_json()) == total
    assert CodecError().report()["relative_rmse"] == 0
