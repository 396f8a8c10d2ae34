"""Check a whole source: every view by itself, the views of a scene with each other, and the source for repeats."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.schema import ChecksConfig, RunConfig
from models.text import missing_answer
from services.contracts import Item, Scene
from services.data.checks.evaluation_sets import EvaluationSet
from services.data.checks.evaluation_sets import findings as shared_scenes
from services.data.checks.files import check_view, thumbnail
from services.data.checks.findings import Fault, Finding, write_quarantine
from services.data.checks.geometry import check_geometry
from services.data.checks.repeats import Picture, identical, nearly_identical
from services.data.images import load_image
from services.data.manifest import Manifest
from services.errors import DataError

Progress = Callable[[int, int], None]
"""Called with (done, total) scenes."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Result of checking one source."""

    source: str
    root: str
    digest: str
    scenes: int
    views: int
    findings: tuple[Finding, ...]
    overlaps: dict[str, float]
    """``scene#view3`` -> largest overlap with another view, for all views that could be compared."""

    @property
    def counts(self) -> dict[Fault, int]:
        """Findings by kind, all kinds, in order."""
        found = Counter(finding.fault for finding in self.findings)
        return {fault: found[fault] for fault in Fault}

    def write(self, folder: Path) -> None:
        """Write ``report.html`` (self-contained), ``report.json`` and ``quarantine.txt`` into ``folder``."""
        from services.data.checks.report import render

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(render(self), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        write_quarantine(self.findings, folder / "quarantine.txt", self.source)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "source": self.source,
            "root": self.root,
            "digest": self.digest,
            "scenes": self.scenes,
            "views": self.views,
            "counts": {str(fault): count for fault, count in self.counts.items()},
            "overlaps": self.overlaps,
            "findings": [
                {
                    "fault": str(finding.fault),
                    "id": finding.id,
                    "reason": finding.reason,
                    "quarantined": finding.quarantined,
                }
                for finding in self.findings
            ],
        }

    def lines(self) -> list[str]:
        """The report as lines of text for a terminal."""
        text = [f"{self.source}: {self.scenes} scenes or items, {self.views} views in {self.root}"]
        text += [f"  {count:6d}  {fault}" for fault, count in self.counts.items() if count]
        return text if self.findings else [*text, "  no faults"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Checked:
    """One scene or item after its own checks."""

    findings: tuple[Finding, ...]
    pictures: tuple[Picture, ...]
    overlaps: dict[str, float]
    places: tuple[str, ...] = ()
    """Files of an item's pictures, or the folder of a scene's first: their names tell which scenes they show."""


def check_source(
    manifest: Manifest,
    config: ChecksConfig,
    evaluation_sets: Sequence[EvaluationSet] = (),
    progress: Progress | None = None,
) -> CheckReport:
    """Check every scene and item of a source in parallel threads.

    What the reader had to leave out at ingest is reported too. Nothing is raised for a fault of the data.
    """
    findings = [
        Finding(fault=Fault.LEFT_OUT, scene=scene, reason=reason) for scene, reason in manifest.facts.broken.items()
    ]
    ids = [entry.id for entry in manifest.entries]
    digests = {entry.id: entry.digests for entry in manifest.entries}
    pictures: list[Picture] = []
    overlaps: dict[str, float] = {}
    places: dict[str, tuple[str, ...]] = {}
    # Scenes run in parallel; were torch to split its small operations too, threads would wait for each other.
    with ThreadPoolExecutor(config.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        readable: set[str] = set()
        results = pool.map(lambda name: _check(manifest.scene(name), digests[name], config, readable), ids)
        for done, (name, result) in enumerate(zip(ids, results, strict=True), start=1):
            places[name] = tuple(path.removeprefix(f"{manifest.root}/") for path in result.places)
            findings += result.findings
            pictures += result.pictures
            overlaps |= result.overlaps
            if progress is not None:
                progress(done, len(ids))
    findings += identical(pictures)
    findings += nearly_identical(pictures, config.duplicate_bits)
    findings += shared_scenes({name: (places[name], digests[name]) for name in ids}, evaluation_sets)
    order = list(Fault)
    findings.sort(key=lambda f: (order.index(f.fault), f.scene, -1 if f.view is None else f.view))
    return CheckReport(
        source=manifest.name,
        root=str(manifest.root),
        digest=manifest.digest,
        scenes=len(ids),
        views=manifest.count_views(),
        findings=tuple(findings),
        overlaps=overlaps,
    )


def _check(scene: Scene | Item, digests: Sequence[str], config: ChecksConfig, readable: set[str]) -> _Checked:
    return _check_item(scene, digests, readable) if isinstance(scene, Item) else _check_scene(scene, digests, config)


def _check_scene(scene: Scene, digests: Sequence[str], config: ChecksConfig) -> _Checked:
    views = [check_view(scene, index) for index in range(len(scene.views))]
    findings = [finding for view in views for finding in view.findings]
    depths = {index: view.depth for index, view in enumerate(views) if view.depth is not None}
    geometry = check_geometry(scene, depths, config)
    pictures = tuple(
        Picture(scene=scene.id, view=i, image=view.image, digest=digest, thumbnail=checked.thumbnail)
        for i, (view, digest, checked) in enumerate(zip(scene.views, digests, views, strict=True))
    )
    return _Checked(
        findings=(*findings, *geometry.findings),
        pictures=pictures,
        overlaps={f"{scene.id}#view{view}": overlap for view, overlap in geometry.best_overlap.items()},
        places=tuple(str(Path(view.image.path).parent) for view in scene.views[:1]),
    )


def _check_item(item: Item, digests: Sequence[str], readable: set[str]) -> _Checked:
    """An item's pictures can be read, and its conversation answers.

    Pictures are not compared by look: corpora hold many alike on purpose. ``readable`` holds the digests of those that
    were read: many questions show the same.
    """
    findings = []
    for image, digest in zip(item.images, digests, strict=True):
        if digest in readable:
            continue
        try:
            thumbnail(load_image(image))
            readable.add(digest)
        except DataError as error:
            fault = Fault.UNREADABLE if Path(image.path).exists() else Fault.MISSING
            findings.append(Finding(fault=fault, scene=item.id, reason=str(error), pictures=(image,)))
    if not item.turns:
        shown = list(zip(item.images, digests, strict=True))
    else:
        turns = [(turn.role, turn.text) for turn in item.turns]
        missing = missing_answer(turns)
        if missing:
            findings.append(Finding(fault=Fault.NO_ANSWER, scene=item.id, reason=missing, pictures=item.images[:1]))
        # Conversations may speak of the same picture; the same conversation about it is a repetition.
        whole = hashlib.sha256(json.dumps([turns, *digests]).encode()).hexdigest()
        shown = [(image, whole) for image in item.images[:1]]
    pictures = [
        Picture(scene=item.id, view=None, image=image, digest=digest, thumbnail=None) for image, digest in shown
    ]
    places = tuple(dict.fromkeys(image.path for image in item.images))
    return _Checked(findings=tuple(findings), pictures=tuple(pictures), overlaps={}, places=places)


def run_check(
    config: RunConfig,
    out: Path,
    evaluation_sets: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> list[CheckReport]:
    """`loom3d data check`: check every source of the config and write its report into ``out/<source>``.

    Args:
        config: The run. Its evaluation sets, and the benchmarks among its sources, are held against its other sources
            unless ``data.allow_leak`` names them.
        out: Folder of the reports.
        evaluation_sets: Name -> a further file or folder that :meth:`EvaluationSet.read` understands.
        progress: Called with (done, total) for each source.
    """
    from services.data.leakage import BENCHMARK
    from services.data.leakage import evaluation_sets as sets_of
    from services.data.sources import open_sources

    given = [EvaluationSet.read(name, Path(path)) for name, path in (evaluation_sets or {}).items()]
    # The check is there to find out what is broken, so it must not stop where a run would.
    tolerant = dataclasses.replace(config, data=dataclasses.replace(config.data, max_broken=1.0))
    reports = []
    manifests = open_sources(tolerant)
    own = [one for one in sets_of(config, manifests) if one.name not in config.data.allow_leak]
    for name, manifest in manifests.items():
        sets = given if config.data.sources[name].format == BENCHMARK else [*given, *own]
        report = check_source(manifest, config.data.checks, sets, progress)
        report.write(out / name)
        reports.append(report)
    return reports
