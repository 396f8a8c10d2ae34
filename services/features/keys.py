"""Names of features: what an input is (the key) and what made the output (the fingerprint).

A key covers the bytes of the input, the per-sample transform and the ordered views with their roles; a
fingerprint covers the encoder, its preprocessing, the codec and the layout of the store. Neither ever contains a
path, a file name or a time, so moving or touching a file changes nothing, and changing a pixel changes the key.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from services.contracts import FeatureKey
from services.errors import CacheError

LAYOUT_VERSION = 1
"""Version of the files of the store; raised when an older program could misread them."""


def canonical_json(value: Any) -> str:
    """JSON that is equal for equal values: sorted names, no spaces, whole floats as integers, numpy as Python.

    Raises:
        CacheError: a value that has no such form (NaN, a set, an object, a name that is no string); says where.
    """
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def feature_key(
    digests: Sequence[str],
    *,
    roles: Sequence[str] = (),
    transform: Mapping[str, Any] | None = None,
    text: str | None = None,
    upstream: FeatureKey | None = None,
) -> FeatureKey:
    """The key of one input of an encoder.

    Args:
        digests: content digests of the views, in order.
        roles: one role a view, or none at all.
        transform: per-sample parameters of the preprocessing (crop, flip, ...); settings that all samples share
            belong into the encoder's identity.
        text: text input, where there is one.
        upstream: key of the record that is the input, for an encoder of records.

    Raises:
        CacheError: nothing to name, as many roles as views neither given nor left out, or a transform that is no
            plain data.
    """
    if roles and len(roles) != len(digests):
        raise CacheError(f"a feature key needs one role a view or none: got {len(roles)} roles, {len(digests)} views")
    if not digests and text is None and upstream is None:
        raise CacheError("a feature key needs at least one content digest, a text or an upstream key")
    identity = {
        "digests": list(digests),
        "roles": [str(role) for role in roles],
        "transform": dict(transform or {}),
        "text": text,
        "upstream": upstream.hex() if upstream else None,
    }
    return FeatureKey(hashlib.sha256(canonical_json(identity).encode()).digest()[:16])


def fingerprint(identity: Mapping[str, Any], codec: str = "none") -> str:
    """32 hexadecimal digits that name all that decides an output beside its input; a folder of the store.

    ``identity`` is what :meth:`FrozenEncoder.identity` returns. CacheError when it is no plain data.
    """
    return hashlib.sha256(canonical_json(namespace_identity(identity, codec)).encode()).hexdigest()[:32]


def namespace_identity(identity: Mapping[str, Any], codec: str) -> dict[str, Any]:
    """What a namespace writes into ``identity.json``: the encoder's identity, the codec and the layout version."""
    return {"identity": _plain(identity, "$"), "codec": codec, "layout": LAYOUT_VERSION}


def key_array(keys: Sequence[FeatureKey]) -> np.ndarray:
    """Keys as an array (N, 16) of uint8, the form that batched look-ups take."""
    return np.frombuffer(b"".join(key.digest for key in keys), np.uint8).reshape(len(keys), 16)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str):
        # A StrEnum is a str, and becomes the plain one.
        return str(value) if isinstance(value, str) else value
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CacheError(f"{where}: {value} cannot be part of a feature's name; use a finite number or null")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise CacheError(f"{where}: the name {name!r} is no string and cannot be part of a feature's name")
        return {str(name): _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise CacheError(
        f"{where}: a {type(value).__name__} cannot be part of a feature's name; "
        "use numbers, strings, booleans, null, lists and mappings of these"
    )
