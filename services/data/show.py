"""Pictures of one scene: seen from above, its views, depth and masks, its point cloud. PNGs, a PLY and a page."""

from __future__ import annotations

import base64
import colorsys
import difflib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from configs.schema import RunConfig
from services.contracts import Instance, Item, Scene, View
from services.data.checks.report import colour_depth
from services.data.cloud import fuse, picture, posed_views, save_ply, upright
from services.data.images import load_depth, load_ids, load_image
from services.data.manifest import Manifest
from services.data.questions.boxes import Box
from services.errors import DataError

TILE = 240
"""Width of a thumbnail in pixels."""
TILES = 24
"""Views that are shown, evenly spaced."""
_GOLDEN = 0.6180339887

#: Style sheet of the pages.
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1d2430;"
    "background:#fff}h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}"
    "img{max-width:100%;border-radius:4px}.meta{color:#5b6572}"
)


def show_scene(scene: Scene, folder: Path) -> Path:
    """Draw everything that is known of a scene into ``folder``; returns the page ``index.html``, self-contained.

    What a scene does not have (poses, depth, masks) is left out. DataError names a file that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections: list[tuple[str, str, Path]] = []

    def add(name: str, title: str, note: str, image: np.ndarray) -> None:
        path = folder / f"{name}.png"
        Image.fromarray(image).save(path)
        sections.append((title, note, path))

    if posed_views(scene):
        path = folder / "above.png"
        draw_above(scene, path)
        sections.append(("From above", "Boxes of the instances, and the cameras in order; arrows look ahead.", path))
    chosen = np.unique(np.linspace(0, len(scene.views) - 1, min(TILES, len(scene.views))).round().astype(int))
    views = [scene.views[i] for i in chosen]
    add("views", "Views", f"{len(views)} of {len(scene.views)} views.", tiles(views, lambda v: load_image(v.image)))
    if any(view.depth for view in views):
        add("depth", "Depth", "Near is bright, unknown is grey; each map has its own range.", tiles(views, _depth))
    if any(view.instance_path for view in views):
        add("instances", "Instances", "One colour an instance.", tiles(views, lambda v: _mask(v, v.instance_path)))
    if any(view.label_path for view in views):
        add("labels", "Classes", "One colour a class.", tiles(views, lambda v: _mask(v, v.label_path)))
    cloud = fuse(scene)
    if cloud is not None:
        save_ply(cloud, str(folder / "cloud.ply"))
        add("cloud", "Point cloud", f"{len(cloud.points):,} points; the whole is in cloud.ply.", picture(cloud))
    page = folder / "index.html"
    page.write_text(_page(scene, sections), encoding="utf-8")
    return page


def colour_of(number: int) -> tuple[float, float, float]:
    """A colour in [0, 1]^3 for an id; near ids get hues that are far apart, and the same id always the same."""
    return colorsys.hsv_to_rgb(
        (0.11 + number * _GOLDEN) % 1.0, 0.55 + 0.3 * (number % 2), 0.92 - 0.2 * (number % 3) / 2
    )


def colour_ids(ids: np.ndarray) -> np.ndarray:
    """Ids (H, W) -> uint8 (H, W, 3); 0 is nearly black."""
    known, index = np.unique(ids, return_inverse=True)
    palette = np.array([(0.12, 0.13, 0.15) if i == 0 else colour_of(int(i)) for i in known])
    return (palette[index.reshape(ids.shape)] * 255).round().astype(np.uint8)


def tiles(views: Sequence[View], draw: Callable[[View], np.ndarray | None]) -> np.ndarray:
    """A grid of thumbnails, four a row, as uint8 (H, W, 3). A view for which ``draw`` gives None stays grey."""
    pictures = [draw(view) for view in views]
    shape = next((p.shape for p in pictures if p is not None), (3, 4, 3))
    height = round(TILE * shape[0] / shape[1])
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    canvas = np.full((rows * (height + 4) - 4, columns * (TILE + 4) - 4, 3), 255, np.uint8)
    for number, image in enumerate(pictures):
        top, left = number // columns * (height + 4), number % columns * (TILE + 4)
        tile = np.full((height, TILE, 3), 200, np.uint8)
        if image is not None:
            tile = np.asarray(Image.fromarray(image).resize((TILE, height), Image.Resampling.BOX))
        canvas[top : top + height, left : left + TILE] = tile
    return canvas


def _depth(view: View) -> np.ndarray | None:
    return None if view.depth is None else colour_depth(load_depth(view.depth))


def _mask(view: View, path: str | None) -> np.ndarray | None:
    """A mask over the darkened picture of its view."""
    if path is None:
        return None
    colours = colour_ids(load_ids(path))
    image = Image.fromarray(load_image(view.image)).resize((colours.shape[1], colours.shape[0]))
    return (0.75 * colours + 0.25 * np.asarray(image)).round().astype(np.uint8)


def draw_above(scene: Scene, path: Path) -> None:
    """Draw footprints of the boxes and the camera path from above, metres on both axes."""
    from matplotlib.figure import Figure

    alignment = upright(scene)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.subplots()
    boxed = [(instance, Box.of(instance.box, alignment)) for instance in scene.instances if instance.box is not None]
    # Large ones first, so that a lamp is drawn on its table.
    written: list[np.ndarray] = []
    for instance, box in sorted(boxed, key=lambda pair: -pair[1].volume):
        place = box.center[:2].copy()
        while any(abs(place[1] - other[1]) < 0.12 and abs(place[0] - other[0]) < 0.5 for other in written):
            place[1] -= 0.13
        written.append(place)
        _draw_box(axes, instance, box, place)
    cameras = np.array([alignment @ np.asarray(scene.views[i].pose) for i in posed_views(scene)])
    standing, ahead = cameras[:, :2, 3], cameras[:, :2, 2]
    axes.plot(*standing.T, "-", color="#1d2430", lw=1, alpha=0.6)
    axes.quiver(*standing.T, *ahead.T, color="#1d2430", angles="xy", scale_units="xy", scale=2.5, width=0.004)
    steps = axes.scatter(
        standing[:, 0], standing[:, 1], c=posed_views(scene), cmap="viridis", zorder=3, s=28, edgecolors="white", lw=0.6
    )
    figure.colorbar(steps, ax=axes, label="view", shrink=0.6)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("x, metres")
    axes.set_ylabel("y, metres")
    axes.grid(alpha=0.25)
    axes.set_title(f"{scene.id}" + (f" ({scene.scene_type})" if scene.scene_type else ""))
    figure.savefig(path, dpi=110)


def _draw_box(axes: object, instance: Instance, box: Box, label_at: np.ndarray) -> None:
    import cv2
    from matplotlib.patches import Polygon

    outline = cv2.convexHull(box.corners()[:, :2].astype(np.float32))[:, 0]
    colour = colour_of(instance.id)
    axes.add_patch(Polygon(outline, facecolor=(*colour, 0.45), edgecolor=colour, lw=1.2))  # type: ignore[attr-defined]
    axes.text(  # type: ignore[attr-defined]
        label_at[0],
        label_at[1],
        instance.label,
        ha="center",
        va="center",
        fontsize=8,
        color="#1d2430",
        clip_on=True,
    )


def _page(scene: Scene, sections: Sequence[tuple[str, str, Path]]) -> str:
    facts = [
        f"{len(scene.views)} views",
        f"{len(scene.instances)} instances",
        str(scene.scene_type or "type unknown"),
        f"split {scene.split or 'none'}",
    ]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(scene.id)}</title>'
        f"<style>{STYLE}</style><body><h1>{escape(scene.id)}</h1>"
        f'<p class="meta">{escape(" · ".join(facts))}</p>'
    ]
    for title, note, path in sections:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{escape(title)}</h2><p class="meta">{escape(note)}</p>'
            f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        )
    return "".join(parts) + "</body></html>\n"


def find_record(manifests: dict[str, Manifest], name: str) -> Scene | Item:
    """The scene or item called ``name``, as ``scene`` or ``source/scene``. DataError lists similar names."""
    names: list[str] = []
    for source, manifest in manifests.items():
        for scene_id in (name, name.removeprefix(f"{source}/")):
            if scene_id in manifest:
                return manifest.scene(scene_id)
        names += manifest.ids
    near = difflib.get_close_matches(name, names, 5, 0.4) or names[:5]
    raise DataError(f"no source has a scene or item {name!r}; sources are {sorted(manifests)}, similar names {near}")


def run_show(config: RunConfig, name: str, out: Path) -> Path:
    """`loom3d data show`: draw one scene or item of the config's sources into ``out``; returns the page."""
    from services.data.show_item import show_item
    from services.data.sources import open_sources

    record = find_record(open_sources(config), name)
    return show_scene(record, out) if isinstance(record, Scene) else show_item(record, config.data.text, out)
