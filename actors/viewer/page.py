"""One HTML file that shows coloured points in a view that turns, with the pictures beside: it loads nothing else."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REFERENCE, TARGET = "reference", "target"
MAX_POINTS = 600_000
"""Of the whole page; of more, every n-th is shown (about 10 bytes a point, a third more as text)."""
_SMALLEST = 224
"""Pictures narrower than this are enlarged by whole pixels, so that a browser does not blur them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Points that are shown or hidden together; one for the reference, one for each imagined view."""

    kind: str
    """reference | target."""
    points: np.ndarray
    """(P, 3) metres in the reference camera's frame."""
    colours: np.ndarray
    """(P, 3) uint8."""
    confidence: np.ndarray
    """(P,) from 1 on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Camera:
    """A camera that is drawn and that one can look from."""

    pose: np.ndarray
    """(4, 4) camera -> reference camera."""
    K: np.ndarray
    """(3, 3) of a picture of ``size``."""
    size: tuple[int, int]
    """Height and width."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """An imagined view: what stands beside its points."""

    name: str
    camera: Camera
    pictures: Sequence[tuple[str, np.ndarray]]
    """Title and uint8 (H, W, 3)."""
    facts: Mapping[str, str] = field(default_factory=dict)


def write_viewer(
    path: Path,
    *,
    title: str,
    note: str,
    threshold: float,
    reference: Shown,
    views: Sequence[Shown],
    groups: Sequence[Group],
) -> Path:
    """Write the page; returns its path.

    Args:
        path: of the HTML file.
        title: of the page.
        note: a line under the title.
        threshold: confidence at which the slider begins.
        reference: the picture that was shown to the model.
        views: what it imagined; ``groups`` holds the reference's points, then those of each view.
        groups: see there.
    """
    import jinja2

    assert len(groups) == len(views) + 1, "one group of points for the reference and for each view"
    folder = resources.files("actors.viewer")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(folder.joinpath("page.html.j2").read_text()).render(
        title=title,
        note=note,
        style=folder.joinpath("viewer.css").read_text(),
        script=folder.joinpath("viewer.js").read_text(),
        data=_json(_content(threshold, reference, views, groups)),
        several=len(views) > 1,
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def _content(threshold: float, reference: Shown, views: Sequence[Shown], groups: Sequence[Group]) -> dict[str, Any]:
    """What the script reads. Confidences are stored on a logarithmic scale that is common to all points."""
    stride = max(1, -(-sum(len(group.points) for group in groups) // MAX_POINTS))
    confidences = np.concatenate([group.confidence for group in groups])
    finite = confidences[np.isfinite(confidences)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 1.0)
    high = max(high, low * 1.001)
    return {
        "confidence": {"low": low, "high": high, "start": threshold},
        "stride": stride,
        "groups": [_packed(group, stride, low, high) for group in groups],
        "reference": _shown(reference),
        "views": [_shown(view) for view in views],
    }


def _packed(group: Group, stride: int, low: float, high: float) -> dict[str, Any]:
    """Positions as 16-bit steps within their box (1/65535 of its side), colours and confidences as bytes."""
    keep = np.isfinite(group.points).all(1) & np.isfinite(group.confidence)
    points = group.points[keep][::stride].astype(np.float64)
    corner, side = np.zeros(3), np.ones(3)
    if len(points):
        corner, side = points.min(0), np.maximum(np.ptp(points, axis=0), 1e-9)
    steps = np.round((points - corner) / side * 65535).astype("<u2")
    share = np.log(group.confidence[keep][::stride].astype(np.float64) / low) / np.log(high / low)
    return {
        "kind": group.kind,
        "count": len(points),
        "corner": corner.tolist(),
        "side": side.tolist(),
        "positions": _text(steps.tobytes()),
        "colours": _text(np.ascontiguousarray(group.colours[keep][::stride]).astype(np.uint8).tobytes()),
        "confidences": _text(np.round(np.clip(share, 0, 1) * 255).astype(np.uint8).tobytes()),
    }


def _shown(view: Shown) -> dict[str, Any]:
    height, width = view.camera.size
    # Of the outer edges of the picture, half a pixel beyond the centres.
    corners = np.array(
        [[-0.5, -0.5, 1], [width - 0.5, -0.5, 1], [width - 0.5, height - 0.5, 1], [-0.5, height - 0.5, 1]]
    )
    return {
        "name": view.name,
        "pose": view.camera.pose.tolist(),
        "corners": (corners @ np.linalg.inv(view.camera.K.astype(np.float64)).T).tolist(),
        "pictures": [{"title": title, "src": png_uri(picture)} for title, picture in view.pictures],
        "facts": [[name, value] for name, value in view.facts.items()],
    }


def png_uri(picture: np.ndarray) -> str:
    """A picture uint8 (H, W, 3) as the address of an image element."""
    factor = max(1, -(-_SMALLEST // picture.shape[1]))
    buffer = io.BytesIO()
    Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1)).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{_text(buffer.getvalue())}"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _json(value: Mapping[str, Any]) -> Any:
    """JSON that cannot end the script element that it stands in."""
    from markupsafe import Markup

    return Markup(json.dumps(value).replace("<", "\\u003c"))  # noqa: S704  escaped here
