"""The namespaces of a run's encoders in the store: where the encoder side writes and everybody looks."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from configs.schema import RunConfig
from models.encoders.base import FrozenEncoder
from services.contracts import CacheStats, FeatureKey, FeatureRequest, Record
from services.errors import CacheError
from services.features import journal
from services.features.encode import Answer, Encoder, as_stored, build_encoder, exact_outputs
from services.features.keys import key_array
from services.features.store import FeatureStore

_log = logging.getLogger(__name__)

_RECENT_BYTES = 64 * 2**20


class Recent:
    """Records that were just made, until the store has surely committed them: what is put cannot be read at once.

    A view is in many pairs, and a chain reads what another column reads: without this, all that comes within
    ``cache.seal_s`` would be encoded several times. Bounded in bytes; any thread may use it.
    """

    def __init__(self, keep_s: float, most_bytes: int = _RECENT_BYTES) -> None:
        self._keep_s, self._most = keep_s, most_bytes
        self._records: OrderedDict[tuple[str, bytes], tuple[float, int, Record]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, request: FeatureRequest, record: Record) -> None:
        """Remember a record as the store will give it back."""
        nbytes = sum(tensor.data.nbytes for tensor in record.values())
        name, now = (request.encoder, request.key.digest), time.monotonic()
        with self._lock:
            if name not in self._records:
                self._records[name] = (now + self._keep_s, nbytes, record)
                self._bytes += nbytes
            while self._records and (self._bytes > self._most or next(iter(self._records.values()))[0] < now):
                self._bytes -= self._records.popitem(last=False)[1][1]

    def get(self, encoder: str, key: FeatureKey) -> Record | None:
        """The record, if it is still remembered."""
        with self._lock:
            found = self._records.get((encoder, key.digest))
        return found[2] if found is not None else None


class StoreSink:
    """Opens the namespace of an encoder at first use, by its identity, and pins it by a lease while it lives."""

    def __init__(self, config: RunConfig, store: FeatureStore) -> None:
        self.config, self.store = config, store
        self._models: dict[str, FrozenEncoder] = {}
        self._namespaces: dict[str, Any] = {}
        self._leases: list[Any] = []
        self._lock = threading.Lock()
        self._recent = Recent(keep_s=1.0 + 2 * config.cache.seal_s)

    def model(self, name: str) -> FrozenEncoder:
        """The encoder, for its identity and shapes; its weights stay on disk unless they are random."""
        with self._lock:
            if name not in self._models:
                self._models[name] = build_encoder(name, self.config)
            return self._models[name]

    def namespace(self, name: str) -> Any:
        """The namespace of encoder ``name``."""
        model = self.model(name)
        with self._lock:
            if name not in self._namespaces:
                namespace = self.store.open(model.identity(), exact_outputs(model))
                try:
                    self._leases.append(self.store.lease([namespace.fingerprint]))
                except CacheError as error:
                    # A cache that can only be read is of use; nobody can evict from it either.
                    _log.warning("the cache is used without a lease: %s", error)
                self._namespaces[name] = namespace
            return self._namespaces[name]

    def get_many(self, name: str, requests: Sequence[FeatureRequest]) -> list[Record | None]:
        """The record of each request to encoder ``name``: from the store, or what was just made; None where absent."""
        records: list[Record | None] = list(self.namespace(name).get_many([request.key for request in requests]))
        for place, request in enumerate(requests):
            if records[place] is None:
                records[place] = self._recent.get(name, request.key)
        return records

    def contains(self, name: str, requests: Sequence[FeatureRequest]) -> list[bool]:
        """Whether :meth:`get_many` has each of them."""
        there = self.namespace(name).contains(key_array([request.key for request in requests]))
        return [
            bool(found) or self._recent.get(name, request.key) is not None
            for request, found in zip(requests, there, strict=True)
        ]

    def remember(self, requests: Sequence[FeatureRequest], answers: Sequence[Answer]) -> None:
        """Have records at hand until they can be read. ``answers`` are as :func:`as_stored` gives them."""
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, dict):
                self._recent.add(request, answer)

    def put(self, requests: Sequence[FeatureRequest], records: Sequence[Record]) -> None:
        """Keep the records and note their inputs. CacheError when the store refuses, which is said once."""
        by_name: dict[str, list[FeatureRequest]] = {}
        if self.store.codec == "none":
            self.remember(requests, records)
        try:
            for request, record in zip(requests, records, strict=True):
                if self.namespace(request.encoder).put(request.key, record):
                    by_name.setdefault(request.encoder, []).append(request)
            for name, written in by_name.items():
                journal.append(self.namespace(name).folder, written)
        except CacheError as error:
            self.store.say_refused(error)
            raise

    def flush(self) -> None:
        """Commit what is buffered."""
        for namespace in list(self._namespaces.values()):
            namespace.flush()

    def stats(self) -> CacheStats:
        """Sum over the namespaces."""
        return sum((namespace.stats for namespace in list(self._namespaces.values())), CacheStats())

    def close(self) -> None:
        """Commit, and let go of the leases. What the disk refuses now is said, and will be encoded again."""
        try:
            self.flush()
        except CacheError as error:
            self.store.say_refused(error)
        for lease in self._leases:
            lease.release()
        self._leases.clear()


class StoredUpstream:
    """Records that a chained encoder reads, on the encoder side: from the store, else encoded here and kept.

    ``encoders`` gives an encoder that is there already, by name: several chains, and requests for the encoder itself,
    then share its weights. By default it is made here.
    """

    def __init__(
        self, name: str, config: RunConfig, sink: StoreSink | None, *, encoders: Callable[[str], Any] | None = None
    ) -> None:
        self.name = config.encoders[name].upstream
        self._config, self._sink = config, sink
        if encoders is not None:
            self._encoder = encoders(self.name)
            return
        before = StoredUpstream(self.name, config, sink) if config.encoders[self.name].upstream else None
        self._encoder = Encoder(self.name, config, upstream=before)

    def __call__(self, requests: Sequence[FeatureRequest]) -> list[Answer]:
        """One answer a request, in order."""
        if self._sink is None or all(request.passing for request in requests):
            return as_stored(self._encoder.encode(requests), self._config, self._encoder)
        stored: list[Answer | None] = list(self._sink.get_many(self.name, requests))
        missing = [i for i, record in enumerate(stored) if record is None]
        answers = self._encoder.encode([requests[i] for i in missing])
        for i, answer, given in zip(missing, answers, as_stored(answers, self._config, self._encoder), strict=True):
            stored[i] = given
            if not requests[i].passing:
                self._sink.remember([requests[i]], [given])
            if isinstance(answer, dict) and not requests[i].passing:
                self._sink.put([requests[i]], [answer])
        return [answer for answer in stored if answer is not None]


def open_store(config: RunConfig) -> FeatureStore | None:
    """The store that the run's config describes; None for cache.mode=never."""
    return None if config.cache.mode == "never" else FeatureStore.from_config(config)
