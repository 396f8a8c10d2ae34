"""What the inputs behind the keys of a namespace were: a line of JSON each, written beside the shards.

The store knows keys only, and a key cannot be turned back. The journal lets `features verify` encode a stored input
again and `features why` say which part of a key differs. It is a convenience: losing it loses no feature, a torn
line (a killed writer) is left out, and a key that was encoded twice has two lines.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from services.contracts import FeatureKey, FeatureRequest, ImageRef, Role
from services.errors import CacheError

NAME = "inputs.jsonl"


def to_line(request: FeatureRequest) -> dict[str, Any]:
    """A request as JSON; images by their path, which helps to find them again and is no part of the key."""
    line: dict[str, Any] = {
        "key": request.key.hex(),
        "encoder": request.encoder,
        "sample": request.sample_id,
        "images": [dataclasses.asdict(image) for image in request.images],
        "digests": list(request.digests),
        "roles": [role.value for role in request.roles],
        "transform": request.transform,
        "text": request.text,
    }
    if request.upstream is not None:
        line["upstream"] = to_line(request.upstream)
    return line


def from_line(line: dict[str, Any]) -> FeatureRequest:
    """The request that :func:`to_line` wrote. KeyError, TypeError or ValueError for something else."""
    upstream = line.get("upstream")
    return FeatureRequest(
        key=FeatureKey(bytes.fromhex(line["key"])),
        encoder=line["encoder"],
        sample_id=line["sample"],
        images=tuple(ImageRef(**image) for image in line["images"]),
        digests=tuple(line["digests"]),
        roles=tuple(Role(role) for role in line["roles"]),
        transform=dict(line["transform"]),
        text=line["text"],
        upstream=from_line(upstream) if upstream else None,
    )


def append(folder: Path, requests: Sequence[FeatureRequest]) -> None:
    """Add the requests to the journal of a namespace's folder. CacheError when it cannot be written."""
    data = "".join(json.dumps(to_line(request)) + "\n" for request in requests).encode()
    try:
        # One write on a file opened for appending: lines of several writers do not mix.
        descriptor = os.open(folder / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CacheError(f"{folder / NAME} cannot be written: {error.strerror or error}") from error


def read(folder: Path) -> Iterator[FeatureRequest]:
    """The requests in the journal, oldest first, each key once (its newest line). Empty without a journal."""
    newest: dict[str, FeatureRequest] = {}
    for request in _lines(folder / NAME):
        newest[request.key.hex()] = request
    yield from newest.values()


def _lines(path: Path) -> Iterable[FeatureRequest]:
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                yield from_line(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue  # torn by a killed writer, or written by another version
