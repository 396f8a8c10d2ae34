"""Training data that shares scenes with an evaluation set is refused, unless ``data.allow_leak`` names the set.

Evaluation sets are the benchmarks among the sources, with the scenes that their files show, and those of
``data.evaluation_sets``. Training data are the training splits of all other sources, and of the runs that this one
starts from (``run:NAME/PART``). Pictures whose bytes lie in Parquet files or archives have no names to tell a scene by.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import configs
from configs import RunConfig
from configs.errors import ConfigError
from configs.schema import SourceConfig
from services.contracts import Split
from services.data.checks.evaluation_sets import EvaluationSet, scenes_in
from services.data.manifest import Manifest
from services.errors import DataError

_log = logging.getLogger("loom3d")
BENCHMARK = "benchmark"
"""Format of the sources that are evaluation sets."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Scenes of an evaluation set that a source trains on."""

    source: str
    evaluation: str
    scenes: tuple[str, ...]

    def __str__(self) -> str:
        some = ", ".join(self.scenes[:3]) + (" ..." if len(self.scenes) > 3 else "")
        return f"{self.source} trains on {len(self.scenes)} scenes of the evaluation set {self.evaluation!r} ({some})"


def evaluation_sets(config: RunConfig, manifests: Mapping[str, Manifest]) -> list[EvaluationSet]:
    """The sets that the config names, and those of its benchmarks. DataError when a file cannot be read."""
    sets = [EvaluationSet.read(name, Path(path)) for name, path in config.data.evaluation_sets.items()]
    for name, manifest in manifests.items():
        if config.data.sources[name].format == BENCHMARK:
            scenes = {scene for path in manifest.places() for scene in scenes_in(path)}
            sets.append(EvaluationSet(name=name, ids=frozenset(scenes)))
    return sets


def find_leaks(config: RunConfig, manifests: Mapping[str, Manifest]) -> list[Leak]:
    """Every source of the run, or of a run that it starts from, that trains on scenes of an evaluation set."""
    sets = [one for one in evaluation_sets(config, manifests) if one.ids]
    if not sets:
        return []
    leaks = _leaks_of(config, manifests, sets, "source {!r}")
    for name, earlier in earlier_runs(config):
        leaks += _leaks_of(
            earlier, stored_manifests(earlier), sets, f"run {name!r}, which this one starts from, source {{!r}}"
        )
    return leaks


def refuse_leaks(config: RunConfig, manifests: Mapping[str, Manifest]) -> list[Leak]:
    """The leaks that ``data.allow_leak`` allows, each with a warning.

    DataError with all that it does not allow, and what can be done.
    """
    found = find_leaks(config, manifests)
    allowed = [leak for leak in found if leak.evaluation in config.data.allow_leak]
    refused = [leak for leak in found if leak not in allowed]
    if refused:
        raise DataError(refusal(refused))
    for leak in allowed:
        _log.warning("%s; data.allow_leak allows it: scores on %s are no held-out scores", leak, leak.evaluation)
    return allowed


def refusal(leaks: Sequence[Leak]) -> str:
    """What is wrong, and what can be done about it."""
    lines = "".join(f"\n  - {leak}" for leak in leaks)
    names = ",".join(sorted({leak.evaluation for leak in leaks}))
    return (
        f"training data shares scenes with evaluation sets:{lines}\nLeave them out (data.sources.NAME.splits, or "
        "data.quarantine with the list that `loom3d data check` writes), or allow it by name: "
        f"data.allow_leak=[{names}]"
    )


def earlier_runs(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """(name, config) of every run whose trained parts this one reads or starts from, and of theirs, each once."""
    seen: set[Path] = set()
    waiting = [config]
    while waiting:
        current = waiting.pop()
        places = [encoder.weights for encoder in current.encoders.values()] + list(current.model.init.values())
        for place in places:
            part = Path(place)
            folder = part.parent.parent
            saved = folder / "config.yaml"
            if part.parent.name != "weights" or folder in seen or not saved.is_file():
                continue
            seen.add(folder)
            earlier = configs.load(file=saved)
            yield folder.name, earlier
            waiting.append(earlier)


def stored_manifests(config: RunConfig) -> dict[str, Manifest]:
    """The manifests of a config's sources that are there; nothing is read or made."""
    return {name: found for name, source in config.data.sources.items() if (found := _stored(name, source, config))}


def _stored(name: str, source: SourceConfig, config: RunConfig) -> Manifest | None:
    from services.data.sources import manifest_path, resolve_source

    try:
        resolved = resolve_source(source, config.data.rooms, config.storage)
        return Manifest.load(manifest_path(name, resolved, config.storage))
    except (DataError, ConfigError, OSError):
        return None


def _leaks_of(
    config: RunConfig, manifests: Mapping[str, Manifest], sets: Sequence[EvaluationSet], naming: str
) -> list[Leak]:
    from services.streams.ledger import read_quarantine

    left_out = read_quarantine(config.data.quarantine)
    leaks = []
    for name, manifest in manifests.items():
        source = config.data.sources[name]
        if source.format == BENCHMARK or not source.weight > 0:
            continue
        without = [entry.removeprefix(f"{name}/") for entry in left_out if entry.startswith(f"{name}/")]
        places = [*manifest.places(Split.TRAIN, without), *([str(manifest.root)] if len(manifest) == 1 else [])]
        for one in sets:
            scenes = sorted({found[0] for place in places if (found := one.match(place))})
            if scenes:
                leaks.append(Leak(source=naming.format(name), evaluation=one.name, scenes=tuple(scenes)))
    return leaks
