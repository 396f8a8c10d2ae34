"""The report's figures, each as an inline SVG or PNG ``<img>`` source. Drawn without a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

#: Categorical colours, told apart also by people who see few colours (Okabe and Ito, 2008), in a fixed order.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#B8A800")
INK, MUTED, GRID = "#1f2430", "#667085", "#e4e7ec"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "loom3d",
}


def curves(series: Mapping[str, Mapping[int, float]], *, y_label: str, log: bool = False) -> str:
    """Lines over steps, labelled at their ends rather than in a legend far away."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, values) in enumerate(series.items()):
            steps, numbers = list(values), list(values.values())
            colour = PALETTE[index % len(PALETTE)]
            axes.plot(steps, numbers, color=colour, linewidth=1.6, marker="o" if len(steps) < 15 else "", markersize=3)
            axes.annotate(
                name, (steps[-1], numbers[-1]), xytext=(5, 0), textcoords="offset points", color=colour, va="center"
            )
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        if log:
            axes.set_yscale("log")
        axes.margins(x=0.02)
        return _svg(figure)


def timeline(events: Sequence[Mapping[str, Any]], *, most_kinds: int = 8) -> str:
    """Who did what when: a row for each process, a colour for each kind of span, seconds since the run's start."""
    start = min(event["t0"] for event in events)
    who = sorted({str(event["who"]) for event in events}, key=lambda name: _first(events, name))
    seconds: dict[str, float] = {}
    for event in events:
        seconds[event["what"]] = seconds.get(event["what"], 0.0) + event["t1"] - event["t0"]
    kinds = sorted(seconds, key=lambda kind: -seconds[kind])[:most_kinds]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.6, 0.9 + 0.42 * len(who)), layout="constrained")
        axes = figure.add_subplot()
        end = max(event["t1"] for event in events) - start
        for index, kind in enumerate(kinds):
            for row, name in enumerate(who):
                bars = [
                    (event["t0"] - start, max(event["t1"] - event["t0"], end / 2000))
                    for event in events
                    if event["what"] == kind and event["who"] == name
                ]
                label = f"{kind} ({seconds[kind]:.1f} s)" if row == 0 else None
                axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=PALETTE[index % len(PALETTE)], label=label)
        axes.set_yticks(range(len(who)), who)
        axes.set_ylim(len(who) - 0.5, -0.5)
        axes.set_xlim(0, end * 1.01)
        axes.set_xlabel("seconds since the first event; a kind's sum over all processes in brackets")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=min(len(kinds), 6), frameon=False)
        return _svg(figure)


def _first(events: Sequence[Mapping[str, Any]], name: str) -> float:
    return min(float(event["t0"]) for event in events if event["who"] == name)


def picture(image: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def depth_picture(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Metres (H, W) as colours, near bright, far dark; unknown (0) is grey."""
    share = np.clip((depth - near) / max(far - near, 1e-6), 0.0, 1.0)
    colours: np.ndarray = (colormaps["magma_r"](share)[..., :3] * 255).astype(np.uint8)
    colours[depth <= 0] = 200
    return colours


def class_colours(count: int) -> np.ndarray:
    """(count, 3) uint8 colours, neighbours far apart in hue (golden-ratio steps)."""
    hue = (np.arange(count) * 0.61803398875) % 1.0
    value = np.where(np.arange(count) % 2 == 0, 0.85, 0.62)
    hsv = np.stack([hue, np.full(count, 0.55), value], axis=-1)
    from matplotlib.colors import hsv_to_rgb

    colours: np.ndarray = (hsv_to_rgb(hsv) * 255).astype(np.uint8)
    return colours


def label_picture(labels: np.ndarray, count: int) -> np.ndarray:
    """Class ids (H, W), negative = ignored, as colours; ignored is grey."""
    colours: np.ndarray = class_colours(count)[np.clip(labels, 0, count - 1)]
    colours[labels < 0] = 200
    return colours


def enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour resize of (h, w, 3) for display: patches stay visible as patches."""
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    enlarged: np.ndarray = image[rows][:, columns]
    return enlarged


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
