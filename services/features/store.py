"""The feature store: what frozen encoders computed, kept on disk under names that cannot go stale.

``<root>/layout.json`` says how to read the rest · ``<root>/leases/`` pins what live runs reread · and one folder a
fingerprint (see services.features.namespace). Many processes may use one root at once without locks: every file is
written once under a unique name and becomes visible by a rename.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import CacheConfig, RunConfig
from services.errors import CacheError
from services.features import eviction, forks, maintenance
from services.features.codecs import check_codec, codec_label
from services.features.commits import write_durable
from services.features.eviction import Budget, GcReport
from services.features.keys import LAYOUT_VERSION, fingerprint
from services.features.leases import LEASE_S, Lease, pinned
from services.features.maintenance import ScrubReport
from services.features.namespace import DiskStats, Namespace
from services.features.remote import RemoteTier
from services.features.sealing import disk_error
from services.features.shards import VERIFY

_DEFAULT = CacheConfig()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class NamespaceInfo:
    """A fingerprint as it lies on the disk."""

    fingerprint: str
    identity: dict[str, Any]
    """What ``identity.json`` says: identity, codec, layout; empty when it cannot be read."""
    stats: DiskStats
    last_used: float
    """Unix time; 0 when it holds nothing."""
    pinned: bool


class FeatureStore:
    """A store in a local folder, with an optional remote tier. Cheap to make; pickles as its settings.

    Args:
        root: folder of the node-local tier; made when it is missing.
        remote: folder of a shared file system, or URI (s3://, gs://), of the remote tier; "" for none.
        verify: which reads check their bytes: always | first_touch | off.
        budget_bytes: bytes that the local tier may use; 0 is no limit.
        shard_bytes: size at which a shard is sealed.
        seal_s: seconds after its first record at which a shard is sealed.
        codec: none | fp8_e4m3.

    Raises:
        CacheError: an unknown setting, a root that another layout version wrote, or one that cannot be made.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        remote: str = _DEFAULT.remote,
        verify: str = _DEFAULT.verify,
        budget_bytes: int = _DEFAULT.budget_bytes,
        shard_bytes: int = _DEFAULT.shard_bytes,
        seal_s: float = _DEFAULT.seal_s,
        codec: str = _DEFAULT.codec,
    ) -> None:
        if verify not in VERIFY:
            raise CacheError(f"cache.verify={verify!r} is unknown; allowed: {', '.join(VERIFY)}")
        if budget_bytes < 0 or shard_bytes <= 0 or seal_s <= 0:
            raise CacheError(
                f"cache.budget_bytes={budget_bytes} must be at least 0, cache.shard_bytes={shard_bytes} and "
                f"cache.seal_s={seal_s} above 0"
            )
        self.root = Path(root).expanduser().absolute()
        self.remote, self.verify, self.codec = remote, verify, check_codec(codec)
        # A shard must not eat the whole budget before it can be counted.
        self.shard_bytes = min(shard_bytes, max(budget_bytes // 8, 1)) if budget_bytes else shard_bytes
        self.seal_s = seal_s
        self._settings: dict[str, Any] = {
            "remote": remote,
            "verify": verify,
            "budget_bytes": budget_bytes,
            "shard_bytes": shard_bytes,
            "seal_s": seal_s,
            "codec": codec,
        }
        # A mapped shard takes a descriptor; leave most of them to others.
        self.most_mapped = max(16, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._lock = threading.Lock()
        self._refused = False
        self._namespaces: dict[str, Namespace] = {}
        self.budget = Budget(self.root, budget_bytes, self._open_shards)
        forks.reset_in_child(self)
        _check_layout(self.root)
        self.tier = RemoteTier(remote) if remote else None

    @classmethod
    def from_config(cls, config: RunConfig) -> FeatureStore:
        """The store that a run's ``cache.*`` and ``storage.root`` describe."""
        cache = config.cache
        root = cache.root or str(Path(config.storage.root) / "cache")
        return cls(
            root,
            remote=cache.remote,
            verify=cache.verify,
            budget_bytes=cache.budget_bytes,
            shard_bytes=cache.shard_bytes,
            seal_s=cache.seal_s,
            codec=cache.codec,
        )

    def after_fork(self) -> None:
        """See services.features.forks."""
        self._lock = threading.Lock()

    def open(self, identity: Mapping[str, Any], exact: Collection[str] = ()) -> Namespace:
        """The namespace of an encoder's identity, the same object for the same arguments; the tensors ``exact`` of its
        records are never coded.
        """
        name = fingerprint(identity, codec_label(self.codec, exact))
        with self._lock:
            if name not in self._namespaces:
                self._namespaces[name] = Namespace(self, identity, name, exact=exact)
            return self._namespaces[name]

    def lease(self, fingerprints: Iterable[str], lasts_s: float = LEASE_S) -> Lease:
        """Pin fingerprints until the lease is released; hold one for as long as a run rereads them.

        Raises:
            CacheError: the root cannot be written.
        """
        try:
            return Lease(self.root, fingerprints, lasts_s)
        except OSError as error:
            raise disk_error(self.root, error) from error

    def say_refused(self, error: CacheError) -> None:
        """Warn that something could not be kept; once, since a full disk refuses every record from then on."""
        with self._lock:
            first, self._refused = not self._refused, True
        if first:
            _log.warning("the cache keeps nothing more, what it refuses is computed again when needed: %s", error)

    def namespaces(self) -> list[NamespaceInfo]:
        """All fingerprints on the local disk, with the identity that each stands for, oldest use first."""
        used: dict[str, float] = {}
        for shard in eviction.shard_files(self.root):
            used[shard.fingerprint] = max(shard.used, used.get(shard.fingerprint, 0.0))
        pins = pinned(self.root)
        result = []
        for folder in eviction.namespace_folders(self.root):
            result.append(
                NamespaceInfo(
                    fingerprint=folder.name,
                    identity=_read_json(folder / "identity.json"),
                    stats=self._of_folder(folder).disk_stats(),
                    last_used=used.get(folder.name, 0.0),
                    pinned=folder.name in pins,
                )
            )
        return sorted(result, key=lambda info: info.last_used)

    def verify_all(self) -> ScrubReport:
        """Read and verify every record of every fingerprint; bad ones are quarantined."""
        report = ScrubReport()
        for folder in list(eviction.namespace_folders(self.root)):
            report += maintenance.scrub(self._of_folder(folder))
        return report

    def gc(self, keep: Collection[str] | None = None, budget: int | None = None) -> GcReport:
        """Remove what is not needed: orphans always; fingerprints not in ``keep`` (hex, or a unique beginning);
        least recently used shards until the store has at most ``budget`` bytes. Pinned fingerprints stay.

        Raises:
            CacheError: a name in ``keep`` is no fingerprint of this store, or names several.
        """
        orphans = eviction.sweep(self.root)
        names = [folder.name for folder in eviction.namespace_folders(self.root)]
        wanted = {_resolve(name, names) for name in keep} if keep is not None else set()
        removed: list[str] = []
        before = len(eviction.shard_files(self.root))
        freed = 0
        if keep is not None:
            safe = wanted | pinned(self.root)
            for name in names:
                if name not in safe:
                    freed += eviction.remove_namespace(self.root / name)
                    removed.append(name)
        if budget is not None:
            over = eviction.store_bytes(self.root) - budget
            freed += eviction.evict(self.root, over, keep=wanted) if over > 0 else 0
        return GcReport(
            fingerprints=tuple(removed),
            shards=before - len(eviction.shard_files(self.root)),
            nbytes=freed,
            orphans=orphans,
            kept_bytes=eviction.store_bytes(self.root),
        )

    def sweep(self) -> int:
        """Remove what dead writers left; returns how many files."""
        return eviction.sweep(self.root)

    def close(self) -> None:
        """Commit what was put and stop the threads. CacheError when something could not be committed."""
        with self._lock:
            namespaces, self._namespaces = list(self._namespaces.values()), {}
        first: CacheError | None = None
        for namespace in namespaces:
            try:
                namespace.close()
            except CacheError as error:
                first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.root), self._settings)

    def _open_shards(self) -> dict[str, int]:
        shards: dict[str, int] = {}
        for namespace in list(self._namespaces.values()):
            shards.update(namespace.open_shards)
        return shards

    def _of_folder(self, folder: Path) -> Namespace:
        """The namespace of a folder, also of one whose identity cannot be read."""
        with self._lock:
            known = self._namespaces.get(folder.name)
        identity = _read_json(folder / "identity.json").get("identity", {})
        return known or Namespace(self, identity, folder.name, create=False)


def _reopen(root: str, settings: dict[str, Any]) -> FeatureStore:
    return FeatureStore(root, **settings)


def _check_layout(root: Path) -> None:
    """Refuse a root of another layout version; mark a new one."""
    path = root / "layout.json"
    try:
        found = json.loads(path.read_text()).get("layout")
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            try:
                root.mkdir(parents=True, exist_ok=True)
                temporary = root / f"layout.{os.urandom(8).hex()}.tmp"
                write_durable(path, json.dumps({"layout": LAYOUT_VERSION}).encode(), temporary)
            except FileExistsError as error:
                raise CacheError(f"cache.root={root} is a file, a folder is needed") from error
            except OSError as error:
                raise disk_error(root, error) from error
        return
    except NotADirectoryError as error:
        raise CacheError(f"cache.root={root} lies below a file, a folder is needed") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError) as error:
        raise CacheError(f"{path} is not the mark of a feature store; remove it if the folder is one") from error
    if found != LAYOUT_VERSION:
        raise CacheError(
            f"{root} was written with layout version {found}, this program reads and writes {LAYOUT_VERSION}; "
            "use the program that wrote it, or another cache.root"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _resolve(name: str, names: list[str]) -> str:
    found = [full for full in names if full.startswith(name)]
    if len(found) != 1:
        what = "is no fingerprint" if not found else f"begins {len(found)} fingerprints"
        raise CacheError(f"{name!r} {what} of this store; there are: {', '.join(names) or 'none'}")
    return found[0]
