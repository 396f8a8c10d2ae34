"""The namespaces of a run's encoders in the store: where the encoder side writes and everybody looks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from configs.schema import RunConfig
from models.encoders.base import FrozenEncoder
from services.contracts import CacheStats, FeatureRequest, Record
from services.errors import CacheError
from services.features import journal
from services.features.encode import Answer, Encoder, as_stored, build_encoder
from services.features.store import FeatureStore

_log = logging.getLogger(__name__)


class StoreSink:
    """Opens the namespace of an encoder at first use, by its identity, and pins it by a lease while it lives."""

    def __init__(self, config: RunConfig, store: FeatureStore) -> None:
        self.config, self.store = config, store
        self._models: dict[str, FrozenEncoder] = {}
        self._namespaces: dict[str, Any] = {}
        self._leases: list[Any] = []
        self._lock = threading.Lock()

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
                namespace = self.store.open(model.identity())
                try:
                    self._leases.append(self.store.lease([namespace.fingerprint]))
                except CacheError as error:
                    # A cache that can only be read is of use; nobody can evict from it either.
                    _log.warning("the cache is used without a lease: %s", error)
                self._namespaces[name] = namespace
            return self._namespaces[name]

    def put(self, requests: Sequence[FeatureRequest], records: Sequence[Record]) -> None:
        """Keep the records and note their inputs. CacheError when the store refuses, which is said once."""
        by_name: dict[str, list[FeatureRequest]] = {}
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
            return as_stored(self._encoder.encode(requests), self._config)
        stored: list[Answer | None] = list(
            self._sink.namespace(self.name).get_many([request.key for request in requests])
        )
        missing = [i for i, record in enumerate(stored) if record is None]
        answers = self._encoder.encode([requests[i] for i in missing])
        for i, answer, given in zip(missing, answers, as_stored(answers, self._config), strict=True):
            stored[i] = given
            if isinstance(answer, dict) and not requests[i].passing:
                self._sink.put([requests[i]], [answer])
        return [answer for answer in stored if answer is not None]


def open_store(config: RunConfig) -> FeatureStore | None:
    """The store that the run's config describes; None for cache.mode=never."""
    return None if config.cache.mode == "never" else FeatureStore.from_config(config)
