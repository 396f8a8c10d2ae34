"""Why features are not in the cache: which part of the key or fingerprint differs from the nearest stored one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from configs.schema import RunConfig
from services.contracts import FeatureRequest, ImageRef, PlanSample, ViewRole
from services.errors import DataError
from services.features import journal
from services.features.codecs import codec_label, parse_label
from services.features.keys import namespace_identity
from services.features.maintain import chosen_encoders
from services.features.requests import feature_requests
from services.features.sink import StoreSink
from services.features.store import FeatureStore
from services.features.text_table import text_table
from services.features.view_sets import reads_sets, set_requests

_MISSING = "(absent)"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One part of a key or fingerprint."""

    part: str
    wanted: str
    nearest: str


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One input of the sample."""

    key: str
    stored: bool
    reason: str
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WhyReport:
    """Why the features of a sample hit or miss."""

    sample: str
    encoder: str
    fingerprint: str
    reasons: tuple[Reason, ...]
    what: str = "view"
    """What each reason is of: a view, or a set of views."""

    @property
    def stored(self) -> bool:
        """Whether all of them are stored."""
        return all(reason.stored for reason in self.reasons)

    def __str__(self) -> str:
        lines = [f"sample {self.sample}, encoder {self.encoder}, fingerprint {self.fingerprint[:12]}"]
        for number, reason in enumerate(self.reasons):
            lines.append(f"{self.what} {number}, key {reason.key}: {reason.reason}")
            if reason.differences:
                rows = [(d.part, d.wanted, d.nearest) for d in reason.differences]
                lines.append(text_table(("part", "wanted", "nearest stored"), rows))
        return "\n".join(lines)


def why(
    config: RunConfig, store: FeatureStore, manifests: Mapping[str, Any], sample: str, *, encoder: str = ""
) -> WhyReport:
    """Look up ``sample`` (``source/item``, with ``#n`` as in a plan or ``:view`` for one view) and explain a miss.

    Of a planned view set, ``source/item#view_setN``, the sets are looked up that a run asks for.

    ``encoder`` defaults to the recipe's (its first, where it has several). DataError when no source has such an item.
    """
    name = chosen_encoders(config, encoder)[0]
    planned, manifest = _find(sample, manifests)
    unit = re.search(r"#view_set(\d+)$", sample)
    if unit and reads_sets(name, config):
        requests = set_requests(config, name, planned.source, manifest, item=planned.item, unit=int(unit[1]))
    else:
        requests = feature_requests(planned, manifest, name, config)
    with closing(StoreSink(config, store)) as sink:
        namespace = sink.namespace(name)
        found = namespace.contains([request.key for request in requests])
        reasons = [
            Reason(key=request.key.hex(), stored=True, reason="stored")
            if there
            else _explain(request, sink.model(name).identity(), namespace, store)
            for request, there in zip(requests, found, strict=True)
        ]
    return WhyReport(
        sample=sample,
        encoder=name,
        fingerprint=namespace.fingerprint,
        reasons=tuple(reasons),
        what="view set" if reads_sets(name, config) else "view",
    )


def _find(sample: str, manifests: Mapping[str, Any]) -> tuple[PlanSample, Any]:
    source, _, rest = sample.partition("/")
    rest = rest.partition("#")[0]
    if source not in manifests:
        raise DataError(f"sample {sample!r}: there is no source {source!r}; the config has {sorted(manifests)}")
    manifest, view = manifests[source], None
    if rest not in manifest and ":" in rest:
        rest, _, number = rest.rpartition(":")
        view = int(number) if number.isdigit() else None
    if rest not in manifest:
        raise DataError(f"sample {sample!r}: source {source!r} has no item {rest!r} among its {len(manifest)}")
    count = manifest.entry(rest).n_views
    if view is not None and view >= count:
        raise DataError(f"sample {sample!r}: item {rest!r} has views 0 to {count - 1}")
    views = tuple(ViewRole(index=i) for i in ([view] if view is not None else range(count)))
    return PlanSample(id=f"{source}/{rest}", source=source, item=rest, kind="", views=views, seed=0), manifest


def _explain(request: FeatureRequest, identity: Mapping[str, Any], namespace: Any, store: FeatureStore) -> Reason:
    """The nearest stored: the same key under another fingerprint, else a like key under this one."""
    key = request.key.hex()
    others = list(_same_key_elsewhere(request, identity, namespace, store))
    if others:
        mark, differences = min(others, key=lambda item: len(item[1]))
        text = f"stored under fingerprint {mark[:12]} only; the fingerprint differs in {_count(differences)}"
        return Reason(key=key, stored=False, reason=text, differences=differences)
    wanted, pictures = _parts(request), _pictures(request)
    best: tuple[tuple[int, bool], FeatureRequest, tuple[Difference, ...]] | None = None
    for candidate in journal.read(namespace.folder):
        # Like it is what shares content, or lies where it lies: the same file with other bytes.
        same_place = bool(_pictures(candidate) & pictures)
        if candidate.key != request.key and (same_place or set(candidate.digests) & set(request.digests)):
            differences = _differences(wanted, _parts(candidate))
            rank = (len(differences), not same_place)
            if best is None or rank < best[0]:
                best = (rank, candidate, differences)
    if any(candidate.key == request.key for candidate in journal.read(namespace.folder)):
        return Reason(key=key, stored=False, reason="was encoded, but its shard was lost, evicted or never committed")
    if best is None:
        return Reason(key=key, stored=False, reason="never encoded with this fingerprint, nor anything like it")
    text = f"nearest stored is {best[1].sample_id!r}; the key differs in {_count(best[2])}"
    return Reason(key=key, stored=False, reason=text, differences=best[2])


def _same_key_elsewhere(
    request: FeatureRequest, identity: Mapping[str, Any], namespace: Any, store: FeatureStore
) -> Iterator[tuple[str, tuple[Difference, ...]]]:
    wanted = _flat(namespace_identity(identity, codec_label(store.codec, namespace.exact)))
    for info in store.namespaces():
        if info.fingerprint == namespace.fingerprint or not info.identity:
            continue
        codec, exact = parse_label(info.identity["codec"])
        there = FeatureStore(store.root, codec=codec).open(info.identity["identity"], exact)
        if there.fingerprint == info.fingerprint and bool(there.contains([request.key])[0]):
            yield info.fingerprint, _differences(wanted, _flat(info.identity))


def _parts(request: FeatureRequest) -> dict[str, str]:
    """What a key is made of, by name."""
    parts = {f"image {i} content": digest for i, digest in enumerate(request.digests)}
    parts |= {f"view {i} role": role.value for i, role in enumerate(request.roles)}
    parts |= {f"transform {name}": str(value) for name, value in request.transform.items()}
    if request.text is not None:
        parts["text"] = request.text
    if request.upstream is not None:
        parts |= {f"upstream {name}": value for name, value in _parts(request.upstream).items()}
        # The upstream's content stands for it; listing it twice would count it twice.
        parts = {name: value for name, value in parts.items() if not name.startswith("image ")}
    return parts


def _pictures(request: FeatureRequest) -> set[ImageRef]:
    return set(request.images) if request.upstream is None else _pictures(request.upstream)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        merged: dict[str, str] = {}
        for name, item in value.items():
            merged |= _flat(item, f"{prefix}.{name}" if prefix else str(name))
        return merged
    return {prefix: str(value)}


def _differences(wanted: Mapping[str, str], nearest: Mapping[str, str]) -> tuple[Difference, ...]:
    names = [name for name in {**wanted, **nearest} if wanted.get(name) != nearest.get(name)]
    return tuple(
        Difference(part=name, wanted=wanted.get(name, _MISSING), nearest=nearest.get(name, _MISSING)) for name in names
    )


def _count(differences: tuple[Difference, ...]) -> str:
    return f"{len(differences)} part{'s' if len(differences) != 1 else ''}"
