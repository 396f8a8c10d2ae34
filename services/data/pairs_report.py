"""``loom3d data pairs``: counts of each split, and a page with histograms of overlap, angle and distance."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np

from configs import RunConfig
from services.data.checks.report import image_tag
from services.data.ingest import Progress
from services.data.manifest import Manifest
from services.data.pairs import PairIndex, open_pairs, pairs_path

SHOWN = 10
"""Pairs that are shown with pictures, evenly spread over the overlap."""
NAMED = 50
"""Views that were left out, and scenes without pairs, that are named; the counts are of all."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1d2430;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}.meta{color:#5b6572}
table{border-collapse:collapse}td,th{padding:.25rem .9rem .25rem 0;text-align:left}.n{text-align:right;
font-variant-numeric:tabular-nums}.f{display:flex;gap:.8rem;border-top:1px solid #e3e6ea;padding:.6rem 0;
align-items:flex-start}.f img,.none{height:110px;border-radius:4px;flex:none}.none{width:146px;background:#f2f4f7;
color:#8a93a0;display:flex;align-items:center;justify-content:center;font-size:.8rem}.f p{margin:0;
overflow-wrap:anywhere}code{font-size:.9em}.warn{color:#9a6700;font-weight:600}.wide{max-width:100%}
"""


def run_pairs(config: RunConfig, out: Path, progress: Progress | None = None) -> tuple[list[str], list[str]]:
    """Make the index of every source and write ``<out>/<source>/pairs.html``.

    Returns lines for a terminal, and the sources whose scenes have no pairs at all. A source without scenes (single
    images, conversations) is none of them: nothing is missing there.
    """
    from services.data.sources import open_sources

    manifests = open_sources(config, progress=progress)
    lines: list[str] = []
    empty: list[str] = []
    for name, index in open_pairs(config, manifests, progress=progress).items():
        page = out / name / "pairs.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render(index, manifests[name], config), encoding="utf-8")
        lines += summary(index)
        lines += [f"  index  {pairs_path(config, name, manifests[name].digest)}", f"  report {page}"]
        if index.facts and not len(index):
            empty.append(name)
    return lines, empty


def summary(index: PairIndex) -> list[str]:
    """What is in an index: pairs of each split, and what was left out."""
    lines = [f"{index.source}: {len(index)} pairs of {len(index.facts)} scenes; digest {index.digest[:16]}"]
    for split, (scenes, paired, pairs) in sorted(index.splits().items()):
        lines.append(f"  {split:<6}{pairs:>10} pairs of {paired} of {scenes} scenes")
    broken = index.broken()
    if broken:
        name, why = next(iter(broken.items()))
        lines.append(f"  left out {len(broken)} views, e.g. {name}: {why}")
    if index.missing():
        lines.append(f"  {index.missing()}")
    return lines


def render(index: PairIndex, manifest: Manifest, config: RunConfig) -> str:
    """The page of one source, without references to anything outside of it."""
    pairs = config.data.pairs
    facts = index.facts.values()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Pairs of {escape(index.source)}</title>'
        f"<style>{_STYLE}</style><body><h1>Pairs of {escape(index.source)}</h1>"
        f'<p class="meta">{escape(str(manifest.root))} · manifest {manifest.digest[:16]} · pairs {index.digest[:16]} · '
        f"each view sees {100 * pairs.min_overlap:g} to {100 * pairs.max_overlap:g} % of the other</p>"
        f"{_splits(index)}<p>{sum(f.usable for f in facts)} of {sum(f.views for f in facts)} views have readable depth "
        f"and a pose. {sum(f.measured for f in facts)} pairs of views were reprojected; the others lie too far outside "
        f"of each other's picture.</p>{_histograms(index)}{_examples(index, manifest)}{_left_out(index)}"
        "</body></html>\n"
    )


def histogram_png(index: PairIndex) -> bytes:
    """Overlap (the smaller of the two directions), angle and distance of all pairs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    columns = (
        (100 * index.overlaps.min(axis=1), "overlap, smaller direction (%)"),
        (index.angles, "angle (degrees)"),
        (index.distances, "distance (m)"),
    )
    for axes, (values, label) in zip(figure.subplots(1, 3), columns, strict=True):
        axes.hist(values, bins=30, color="#3b6fb5")
        axes.axvline(float(np.median(values)), color="#b3261e", linewidth=1)
        axes.set_xlabel(f"{label}, median {np.median(values):.3g}")
        axes.set_ylabel("pairs")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _splits(index: PairIndex) -> str:
    rows = "".join(
        f'<tr><td>{escape(split)}</td><td class="n">{scenes}</td><td class="n">{paired}</td>'
        f'<td class="n">{pairs}</td></tr>'
        for split, (scenes, paired, pairs) in sorted(index.splits().items())
    )
    head = '<tr><th>split</th><th class="n">scenes</th><th class="n">with pairs</th><th class="n">pairs</th></tr>'
    return f"<h2>Counts</h2><table>{head}{rows}</table>"


def _histograms(index: PairIndex) -> str:
    if not len(index):
        return f'<h2>No pairs</h2><p class="warn">{escape(index.missing())}</p>'
    data = base64.b64encode(histogram_png(index)).decode()
    return (
        "<h2>How the pairs are spread</h2>"
        f'<img class="wide" alt="histograms of overlap, angle and distance" src="data:image/png;base64,{data}">'
    )


def _examples(index: PairIndex, manifest: Manifest) -> str:
    if not len(index):
        return ""
    least = index.overlaps.min(axis=1)
    order = np.argsort(least, kind="stable")
    chosen = set(order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)].tolist())
    shown = sorted((number for number in _numbered(index) if number[0] in chosen), key=lambda n: least[n[0]])
    return "<h2>Examples</h2>" + "".join(_example(index, manifest, *number) for number in shown)


def _example(index: PairIndex, manifest: Manifest, number: int, scene: str) -> str:
    i, j = index.views[number].tolist()
    first, second = manifest.views(scene, [i, j])
    there, back = 100 * index.overlaps[number]
    return (
        f'<div class="f">{image_tag(first.image)}{image_tag(second.image)}<p><code>{escape(scene)}</code> views {i} '
        f"and {j}<br>{there:.0f} % and {back:.0f} % seen, {index.angles[number]:.0f} degrees, "
        f"{index.distances[number]:.2f} m</p></div>"
    )


def _left_out(index: PairIndex) -> str:
    broken = list(index.broken().items())
    bare = [facts for facts in index.facts.values() if not facts.pairs]
    parts = []
    if broken:
        rows = "".join(f"<li><code>{escape(name)}</code> {escape(why)}</li>" for name, why in broken[:NAMED])
        parts.append(f"<h2>Left out: {len(broken)} views</h2><ul>{rows}</ul>")
    if bare:
        rows = "".join(
            f"<li><code>{escape(f.id)}</code>: {f.views} views, {f.without_depth} without depth, {f.without_pose} "
            f"without pose, {len(f.broken)} broken</li>"
            for f in bare[:NAMED]
        )
        parts.append(f"<h2>Without pairs: {len(bare)} scenes</h2><ul>{rows}</ul>")
    return "".join(parts)


def _numbered(index: PairIndex) -> Iterator[tuple[int, str]]:
    """(number of the pair, its scene) of all pairs in order."""
    names = (name for name, facts in index.facts.items() for _ in range(facts.pairs))
    return enumerate(names)
