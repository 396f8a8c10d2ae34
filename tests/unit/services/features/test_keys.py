"""Names of features: equal for equal inputs, different for everything that matters, free of paths and times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import FeatureKey, Role
from services.errors import CacheError
from services.features.keys import canonical_json, feature_key, fingerprint, key_array

_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_everything_that_matters_changes_the_key() -> None:
    up = feature_key(["c"])
    variants = [
        feature_key(["a", "b"]),
        feature_key(["b", "a"]),
        feature_key(["ab"]),
        feature_key(["a", "b"], roles=["context", "target"]),
        feature_key(["a", "b"], roles=["target", "context"]),
        feature_key(["a", "b"], transform={"crop": [0, 0, 10, 10]}),
        feature_key(["a", "b"], transform={"crop": [0, 0, 10, 11]}),
        feature_key(["a", "b"], text=""),
        feature_key(["a", "b"], text="a chair"),
        feature_key(["a", "b"], upstream=up),
        feature_key([], text="a chair"),
        feature_key([], upstream=up),
        up,
    ]
    assert len(set(variants)) == len(variants)
    assert all(len(key.digest) == 16 for key in variants)


def test_what_does_not_matter_does_not_change_the_key() -> None:
    key = feature_key(["a"], roles=["context"], transform={"x": 1, "crop": [1, 2]})
    assert feature_key(("a",), roles=[Role.CONTEXT], transform={"crop": (1.0, np.int64(2)), "x": np.float32(1)}) == key
    assert feature_key(["a"], transform={}) == feature_key(["a"])


@given(_PLAIN, _PLAIN)
def test_canonical_json_is_equal_exactly_for_equal_values(a: object, b: object) -> None:
    def normal(value: object) -> object:
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return (type(value).__name__, value)
        if isinstance(value, int | float):
            return ("number", value)
        if isinstance(value, list):
            return ("list", tuple(normal(item) for item in value))
        assert isinstance(value, dict)
        return ("dict", frozenset((name, normal(item)) for name, item in value.items()))

    assert (canonical_json(a) == canonical_json(b)) == (normal(a) == normal(b))


def test_the_fingerprint_covers_identity_and_codec() -> None:
    identity = {"weights": "abc", "layers": [3, 7], "dtype": "bfloat16"}
    name = fingerprint(identity, "none")
    assert name == fingerprint(dict(reversed(identity.items())), "none")
    assert len(name) == 32
    assert set(name) <= set("0123456789abcdef")
    others = [fingerprint(identity, "fp8_e4m3"), *(fingerprint({**identity, k: "other"}, "none") for k in identity)]
    assert len({name, *others}) == 5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: feature_key([]), "at least one content digest"),
        (lambda: feature_key(["a", "b"], roles=["context"]), "1 roles, 2 views"),
        (lambda: feature_key(["a"], transform={"x": float("nan")}), r"\$\.transform\.x: nan"),
        (lambda: feature_key(["a"], transform={"x": [{1, 2}]}), r"\$\.transform\.x\[0\]: a set"),
        (lambda: fingerprint({"a": {1: "b"}}), r"\$\.a: the name 1 is no string"),
        (lambda: fingerprint({"path": Path("/x")}), r"\$\.path: a PosixPath"),
    ],
)
def test_what_cannot_be_named_is_refused(call: object, match: str) -> None:
    with pytest.raises(CacheError, match=match):
        call()  # type: ignore[operator]


def test_key_array() -> None:
    keys = [FeatureKey(bytes(range(i, i + 16))) for i in range(3)]
    assert [row.tobytes() for row in key_array(keys)] == [key.digest for key in keys]
    assert key_array([]).shape == (0, 16)
