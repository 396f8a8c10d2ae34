"""What `loom3d features warm | stats | verify | why | gc` do. Each returns a report that prints itself as a table."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import RunConfig
from models.encoders.base import InputKind
from models.encoders.families import input_kind
from services.contracts import FeatureRequest, PlanSample, Record, ViewRole
from services.data.digests import Digester
from services.errors import ConfigError, DataError
from services.features import codecs, journal
from services.features.client import FeatureClient, FeaturePool
from services.features.encode import Encoder, as_stored, exact_outputs
from services.features.eviction import GcReport
from services.features.keys import fingerprint
from services.features.requests import encoder_config, feature_requests
from services.features.sink import StoreSink
from services.features.store import FeatureStore
from services.features.text_table import megabytes, text_table
from services.features.view_sets import item_requests, set_requests
from services.streams.inputs import entry_kinds, used_encoders

Progress = Callable[[int, int], None]
"""Called with the inputs done and the inputs in all."""


def chosen_encoders(config: RunConfig, encoder: str = "") -> tuple[str, ...]:
    """``encoder``, or without one all encoders that the recipe reads. ConfigError when there is no such encoder."""
    names = (encoder,) if encoder else used_encoders(config)
    for name in names:
        encoder_config(name, config)
    return names


# --- warm ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WarmReport:
    """What a source's features took."""

    encoder: str
    source: str
    inputs: int
    stored: int
    """Inputs whose features were there before."""
    encoded: int
    broken: dict[str, str]
    """Input -> why it could not be encoded."""
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        rows = [
            ("encoder", self.encoder),
            ("source", self.source),
            ("inputs", self.inputs),
            ("already stored", self.stored),
            ("encoded", self.encoded),
            ("broken", len(self.broken)),
            ("written", megabytes(self.nbytes)),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return text_table((), rows + [("", f"{name}: {why}") for name, why in list(self.broken.items())[:20]])


def warm(
    config: RunConfig,
    store: FeatureStore,
    source: str,
    manifest: Any,
    *,
    encoder: str = "",
    splits: Sequence[str] = (),
    pool: FeaturePool | None = None,
    progress: Progress | None = None,
) -> WarmReport:
    """Encode every picture of a source (of ``splits``, or all) whose features are not stored yet; of an encoder of
    view sets, every planned set in every partition and all pictures of every conversation, as the recipe reads it.

    What is stored is left out, so an interrupted run goes on where it stopped; what several entries show counts once.
    ``encoder`` defaults to the recipe's (its first, where it has several). Where the recipe reads it for scenes alone,
    items are left out, and the other way round. ConfigError for an encoder whose inputs depend on a run's plan (view
    sets that are not planned, texts).
    """
    name = chosen_encoders(config, encoder)[0]
    started = time.monotonic()
    requests = _requests(name, config, source, manifest, splits)
    client = FeatureClient(config, store, pool=pool)
    # As many at a time as keep the encoder, or all replicas, busy.
    size = max(1, encoder_config(name, config).batch_size) * max(1, 2 * config.service.replicas)
    stored, broken = 0, dict[str, str]()
    try:
        namespace = client.sink.namespace(name)
        for start in range(0, len(requests), size):
            chunk = requests[start : start + size]
            there = namespace.contains([request.key for request in chunk])
            stored += int(there.sum())
            missing = [request for request, found in zip(chunk, there, strict=True) if not found]
            for request, answer in zip(missing, client.get(missing, start), strict=True):
                if isinstance(answer, BaseException):
                    broken[request.sample_id] = str(answer)
            if progress is not None:
                progress(start + len(chunk), len(requests))
        client.sink.flush()
    finally:
        client.close()
    counts = client.stats
    return WarmReport(
        encoder=name,
        source=source,
        inputs=len(requests),
        stored=stored,
        encoded=counts.encoded,
        broken=broken,
        nbytes=counts.bytes_written,
        seconds=time.monotonic() - started,
    )


def _requests(name: str, config: RunConfig, source: str, manifest: Any, splits: Sequence[str]) -> list[FeatureRequest]:
    """All that a run asks of an encoder about a source, each input once."""
    kinds = entry_kinds(config, name)
    if _reads(name, config) is InputKind.VIEWS:
        found = item_requests(config, name, source, manifest, splits) if "item" in kinds else []
        return found if kinds == {"item"} else [*found, *set_requests(config, name, source, manifest, splits)]
    samples = _samples(source, manifest, splits, kinds)
    requests = [request for sample in samples for request in feature_requests(sample, manifest, name, config)]
    return list({request.key.digest: request for request in requests}.values())


def _reads(name: str, config: RunConfig) -> InputKind:
    """What the first encoder of the chain reads, pictures or view sets. ConfigError for texts, which no source has."""
    settings = encoder_config(name, config)
    kind = input_kind(settings.family)
    if kind is InputKind.RECORD:
        return _reads(settings.upstream, config)
    if kind is InputKind.TEXT:
        raise ConfigError(f"encoder {name!r} reads {kind}, which only a run's plan knows; it is cached by running")
    return kind


def _samples(source: str, manifest: Any, splits: Sequence[str], kinds: Collection[str]) -> Iterator[PlanSample]:
    """Every entry with pictures, as one sample; ``kinds`` of entries, or all where the recipe reads none of them."""
    for entry in manifest.entries:
        if kinds and entry.kind not in kinds:
            continue
        if not splits or (entry.split is not None and str(entry.split) in splits):
            views = tuple(ViewRole(index=index) for index in range(entry.n_views))
            if views:
                yield PlanSample(id=f"{source}/{entry.id}", source=source, item=entry.id, kind="", views=views, seed=0)


# --- stats -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NamespaceRow:
    """One fingerprint of the store."""

    fingerprint: str
    encoders: tuple[str, ...]
    """Encoders of the run's config that it belongs to; none: an older model or setting."""
    model: str
    records: int
    shards: int
    nbytes: int
    quarantined: int
    pinned: bool
    last_used: float
    codec_error: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class StatsReport:
    """What is in the store, least recently used first."""

    rows: tuple[NamespaceRow, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "the cache is empty"
        rows: list[Sequence[Any]] = [
            (
                row.fingerprint[:12],
                ",".join(row.encoders) or "-",
                row.model,
                row.records,
                row.shards,
                megabytes(row.nbytes),
                row.quarantined,
                "yes" if row.pinned else "no",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(row.last_used)) if row.last_used else "never",
                "; ".join(f"{name} {error['relative_rmse']:.3g}" for name, error in row.codec_error.items()) or "-",
            )
            for row in self.rows
        ]
        rows.append(("all", "", "", *self._sums(), "", "", ""))
        heads = ("fingerprint", "encoder", "model", "records", "shards", "size", "bad", "in use", "last used", "rmse")
        return text_table(heads, rows)

    def _sums(self) -> tuple[int, int, str, int]:
        records, shards, nbytes, bad = (
            sum(getattr(row, name) for row in self.rows) for name in ("records", "shards", "nbytes", "quarantined")
        )
        return records, shards, megabytes(nbytes), bad


def stats(config: RunConfig, store: FeatureStore) -> StatsReport:
    """Every fingerprint of the store: whose it is, what it holds, whether a live run uses it, its codec's error."""
    mine = _fingerprints(config, store)
    rows = []
    for info in store.namespaces():
        rows.append(
            NamespaceRow(
                fingerprint=info.fingerprint,
                encoders=tuple(name for name, mark in mine.items() if mark == info.fingerprint),
                model=str(info.identity.get("identity", {}).get("model", "unknown")),
                records=info.stats.records,
                shards=info.stats.shards,
                nbytes=info.stats.nbytes,
                quarantined=info.stats.quarantined,
                pinned=info.pinned,
                last_used=info.last_used,
                codec_error={name: error.report() for name, error in info.stats.codec_error.items()},
            )
        )
    return StatsReport(rows=tuple(rows))


def _fingerprints(config: RunConfig, store: FeatureStore) -> dict[str, str]:
    sink = StoreSink(config, store)
    models = {name: sink.model(name) for name in config.encoders}
    return {
        name: fingerprint(model.identity(), codecs.codec_label(store.codec, exact_outputs(model)))
        for name, model in models.items()
    }


# --- verify ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Difference of what is stored and what is encoded now, of one tensor over all checked inputs."""

    max_abs: float = 0.0
    cosine_error: float = 0.0
    """Largest 1 - cos over tokens."""
    differing: int = 0
    """Inputs whose tensors are not equal bit for bit."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Drift of a sample of stored features."""

    encoder: str
    fingerprint: str
    checked: int
    drift: dict[str, Drift]
    changed: tuple[str, ...]
    """Inputs whose files are gone or have other content now: they cannot be checked."""
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether nothing drifted by more than ``tolerance`` in cosine, and something was checked."""
        return self.checked > 0 and all(drift.cosine_error <= self.tolerance for drift in self.drift.values())

    def __str__(self) -> str:
        rows = [
            (name, f"{drift.max_abs:.3g}", f"{drift.cosine_error:.3g}", f"{drift.differing} of {self.checked}")
            for name, drift in self.drift.items()
        ]
        table = text_table(("tensor", "max abs", "max 1-cos", "not bit-equal"), rows)
        lines = [f"encoder {self.encoder}, fingerprint {self.fingerprint[:12]}, {self.checked} inputs encoded again"]
        if self.changed:
            lines.append(f"{len(self.changed)} inputs are gone or changed since, for example {self.changed[0]}")
        verdict = "no drift" if self.ok else "DRIFT" if self.checked else "nothing could be checked"
        return "\n".join([*lines, table, f"{verdict} (tolerance {self.tolerance:g} in 1-cos)"])


def verify(
    config: RunConfig, store: FeatureStore, *, encoder: str = "", sample: int = 16, seed: int = 0,
    tolerance: float = 1e-3,
) -> VerifyReport:  # fmt: skip
    """Encode a random sample of the stored inputs again and compare. Catches drift that no digest sees.

    ``encoder`` defaults to the recipe's (its first, where it has several).
    Inputs are found by the journal; those whose file changed since are counted and left out.
    """
    name = chosen_encoders(config, encoder)[0]
    with closing(StoreSink(config, store)) as sink:  # lets go of its lease, so that a later gc may remove
        return _verify(config, sink.namespace(name), name, sample, seed, tolerance)


def _verify(
    config: RunConfig, namespace: Any, name: str, sample: int, seed: int, tolerance: float
) -> VerifyReport:  # fmt: skip
    journalled = list(journal.read(namespace.folder))
    there = namespace.contains([request.key for request in journalled]) if journalled else []
    stored = [request for request, found in zip(journalled, there, strict=True) if found]
    random.Random(seed).shuffle(stored)
    checked: list[FeatureRequest] = []
    changed: list[str] = []
    digester = Digester()
    for request in stored:
        if len(checked) == sample:
            break
        if _unchanged(request, digester):
            checked.append(request)
        else:
            changed.append(request.sample_id)
    model = Encoder(name, config)
    answers = as_stored(model.encode(checked), config, model)
    model.close()
    drift: dict[str, Drift] = {}
    for record, answer in zip(namespace.get_many([request.key for request in checked]), answers, strict=True):
        if isinstance(answer, BaseException):
            raise answer
        if record is not None:
            _compare(record, answer, drift)
    return VerifyReport(
        encoder=name,
        fingerprint=namespace.fingerprint,
        checked=len(checked),
        drift=drift,
        changed=tuple(changed),
        tolerance=tolerance,
    )


def _unchanged(request: FeatureRequest, digester: Digester) -> bool:
    if request.upstream is not None:
        return _unchanged(request.upstream, digester)
    try:
        return all(
            digester.image(image).hex() == digest for image, digest in zip(request.images, request.digests, strict=True)
        )
    except DataError:
        return False


def _compare(stored: Record, now: Record, drift: dict[str, Drift]) -> None:
    for name, tensor in stored.items():
        a = codecs.to_float32(tensor.data, tensor.dtype)
        b = codecs.to_float32(now[name].data, now[name].dtype)
        rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
        cosine = np.where(norms > 0, (rows_a * rows_b).sum(axis=1) / np.where(norms > 0, norms, 1.0), 1.0)
        before = drift.get(name, Drift())
        drift[name] = Drift(
            max_abs=max(before.max_abs, float(np.abs(a - b).max())),
            cosine_error=max(before.cosine_error, float((1 - cosine).max())),
            differing=before.differing + int(not np.array_equal(tensor.data, now[name].data)),
        )


# --- gc --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CollectionReport:
    """What was removed from the store."""

    removed: GcReport

    def __str__(self) -> str:
        rows = [
            ("fingerprints removed", ", ".join(mark[:12] for mark in self.removed.fingerprints) or "none"),
            ("shards removed", self.removed.shards),
            ("orphans swept", self.removed.orphans),
            ("freed", megabytes(self.removed.nbytes)),
            ("kept", megabytes(self.removed.kept_bytes)),
        ]
        return text_table((), rows)


def gc(
    config: RunConfig,
    store: FeatureStore,
    *,
    keep: Collection[str] | None = None,
    budget: int | None = None,
) -> CollectionReport:
    """Remove what is not kept. ``keep`` names encoders of the config or fingerprints; see FeatureStore.gc."""
    marks = _fingerprints(config, store) if keep else {}
    present = {info.fingerprint for info in store.namespaces()}
    wanted = None
    if keep is not None:
        # An encoder that has nothing stored yet needs no keeping.
        wanted = [marks[name] for name in keep if name in marks and marks[name] in present]
        wanted += [name for name in keep if name not in marks]
    return CollectionReport(removed=store.gc(keep=wanted, budget=budget))
