"""The check's report as one HTML file without references to anything outside of it."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from services.contracts import DepthRef, ImageRef
from services.data.checks.findings import Fault, Finding
from services.data.images import load_depth, load_image
from services.errors import DataError

if TYPE_CHECKING:
    from services.data.checks.run import CheckReport

SHOWN = 24
"""Findings of each kind that are shown with pictures; all are in report.json."""
HEIGHT = 110
"""Height of a thumbnail in pixels."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1d2430;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}.meta{color:#5b6572}
table{border-collapse:collapse}td,th{padding:.25rem .9rem .25rem 0;text-align:left}td.n{text-align:right;
font-variant-numeric:tabular-nums}.bad{color:#b3261e;font-weight:600}.warn{color:#9a6700;font-weight:600}
.ok{color:#1a7f37}.f{display:flex;gap:.8rem;border-top:1px solid #e3e6ea;padding:.6rem 0;align-items:flex-start}
.f img,.none{height:110px;border-radius:4px;flex:none}.none{width:146px;background:#f2f4f7;color:#8a93a0;display:flex;
align-items:center;justify-content:center;font-size:.8rem}.f p{margin:0;overflow-wrap:anywhere}code{font-size:.9em}
"""


def render(report: CheckReport) -> str:
    """The whole page."""
    quarantined = len({finding.id for finding in report.findings if finding.quarantined})
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Check of {escape(report.source)}</title>'
        f"<style>{_STYLE}</style><body><h1>Check of {escape(report.source)}</h1>"
        f'<p class="meta">{escape(report.root)} · manifest {report.digest[:16]} · {report.scenes} scenes or items, '
        f"{report.views} views · {quarantined} ids in quarantine.txt</p>"
        f"{_counts(report)}{_overlap(report)}{_sections(report)}</body></html>\n"
    )


def _counts(report: CheckReport) -> str:
    rows = []
    for fault, count in report.counts.items():
        style = "ok" if count == 0 else "warn" if fault is Fault.NEAR_DUPLICATE else "bad"
        rows.append(f'<tr><td>{escape(fault)}</td><td class="n {style}">{count}</td></tr>')
    return f"<h2>Faults</h2><table>{''.join(rows)}</table>"


def _overlap(report: CheckReport) -> str:
    values = np.array(list(report.overlaps.values()))
    if values.size == 0:
        return "<h2>View overlap</h2><p>No two views of a scene have depth and poses.</p>"
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    return (
        "<h2>View overlap</h2><p>Share of each view's pixels that the view sharing most with it sees too "
        f"({values.size} views, median {100 * np.median(values):.0f} %).</p>{histogram(counts)}"
    )


def histogram(counts: np.ndarray) -> str:
    """Bars of equal width over 0 to 100 %, as SVG."""
    width, height, left, bottom = 640, 180, 46, 24
    step = (width - left - 24) / len(counts)
    tallest = max(int(counts.max()), 1)
    bars = []
    for i, count in enumerate(counts):
        bar = (height - bottom - 14) * count / tallest
        bars.append(
            f'<rect x="{left + i * step:.1f}" y="{height - bottom - bar:.1f}" width="{step - 2:.1f}" '
            f'height="{bar:.1f}" fill="#3b6fb5"><title>{count} views</title></rect>'
        )
    ticks = "".join(
        f'<text x="{left + share * (width - left - 24):.0f}" y="{height - 6}" text-anchor="middle">{100 * share:.0f} %'
        "</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" font-size="12" fill="#5b6572" role="img" '
        f'aria-label="histogram of view overlap">{"".join(bars)}{ticks}'
        f'<line x1="{left}" x2="{width - 24}" y1="{height - bottom}" y2="{height - bottom}" stroke="#8a93a0"/>'
        f'<text x="{left - 6}" y="16" text-anchor="end">{tallest}</text></svg>'
    )


def _sections(report: CheckReport) -> str:
    groups: dict[Fault, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        groups[finding.fault].append(finding)
    sections = []
    for fault, findings in groups.items():
        shown = "".join(_finding(finding) for finding in findings[:SHOWN])
        rest = len(findings) - SHOWN
        more = f"<p>and {rest} more, see report.json</p>" if rest > 0 else ""
        sections.append(f"<h2>{escape(fault[:1].upper() + fault[1:])}</h2>{shown}{more}")
    return "".join(sections)


def _finding(finding: Finding) -> str:
    pictures = [image_tag(ref) for ref in finding.pictures]
    if finding.depth is not None and finding.fault in (Fault.DEPTH_SCALE, Fault.UNREADABLE, Fault.SIZE):
        pictures.append(depth_tag(finding.depth))
    text = f"<p><code>{escape(finding.id)}</code><br>{escape(finding.reason)}</p>"
    return f'<div class="f">{"".join(pictures)}{text}</div>'


def image_tag(ref: ImageRef) -> str:
    """A thumbnail, or a grey field that says why there is none."""
    try:
        return _tag(load_image(ref))
    except DataError:
        return '<div class="none">cannot be read</div>'


def depth_tag(ref: DepthRef) -> str:
    """A depth map as colours, near is bright, or a grey field."""
    try:
        depth = load_depth(ref)
    except DataError:
        return '<div class="none">no depth</div>'
    return _tag(colour_depth(depth))


def colour_depth(depth: np.ndarray) -> np.ndarray:
    """Depth (H, W) metres -> uint8 (H, W, 3): near is yellow, far is violet, unknown is grey."""
    import cv2

    known = depth > 0
    if not known.any():
        return np.full((*depth.shape, 3), 128, np.uint8)
    low, high = np.percentile(depth[known], [2, 98])
    share = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)
    shades = cv2.applyColorMap(((1 - share) * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    colours = np.asarray(cv2.cvtColor(shades, cv2.COLOR_BGR2RGB))
    colours[~known] = 128
    return colours


def _tag(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((4 * HEIGHT, HEIGHT))
    return f'<img alt="" src="{data_uri(np.asarray(picture))}">'


def data_uri(image: np.ndarray, *, quality: int = 80) -> str:
    """An image (H, W, 3) uint8 as a JPEG within a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
