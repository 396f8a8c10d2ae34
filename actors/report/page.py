"""Puts a run's data and figures into the page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from actors.report.collect import RunData, collect

LOSS_SHOWN = 6


def write_report(folder: Path, against: Path | None = None) -> Path:
    """Write ``folder/report/index.html`` from what the run left in ``folder``; returns its path.

    With ``against``, another run on the same data, its metrics stand beside with the margin. The file is
    self-contained: it loads nothing. Raises DataError when a folder is no run folder or the two do not compare.
    """
    import jinja2

    run = collect(folder, against)
    template = resources.files("actors.report").joinpath("page.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    html = environment.from_string(template).render(**page_values(run))
    path = folder / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def page_values(run: RunData) -> dict[str, Any]:
    """The template's variables."""
    from markupsafe import Markup

    from actors.report import figures

    timeline = Markup(figures.timeline(run.events)) if run.events else ""  # noqa: S704  our own SVG
    return {
        "name": run.folder.name,
        "summary": run.summary,
        "scores": run.scores,
        "against": run.against,
        "evaluated_on": run.evaluated_on,
        "curve_figures": [(title, Markup(svg)) for title, svg in _curve_figures(run)],  # noqa: S704  our own SVG
        "examples": _examples(run.examples),
        "legend": _legend(run.examples),
        "pictures": _pictures(run),
        "tables": run.tables,
        "blind": run.blind,
        "throughput": _throughput(run.curves.get("train", {})),
        "timeline": timeline,
        "quarantined": run.quarantined,
        "config": run.config,
    }


def _curve_figures(run: RunData) -> list[tuple[str, str]]:
    from actors.report import figures

    train, val = run.curves.get("train", {}), run.curves.get("val", {})
    losses = {name: values for name, values in train.items() if name == "loss" or name.startswith("loss/")}
    result = []
    if losses:
        shown = dict(list(losses.items())[:LOSS_SHOWN])
        positive = all(value > 0 for values in shown.values() for value in values.values())
        result.append(("Training losses", figures.curves(shown, y_label="loss", log=positive)))
    groups: dict[str, dict[str, Mapping[int, float]]] = {}
    for name, values in val.items():
        if name.startswith("loss/"):
            continue  # the terms stand beside the training losses already; here they would drown the metrics
        group = name.rsplit("/", 1)[-1]
        groups.setdefault(group, {})[name] = values
    for group, series in groups.items():
        result.append((f"Validation: {group}", figures.curves(series, y_label=group)))
    rates = {
        f"{role} {label}".strip(): values
        for name, label in (("hit_rate", "cache hits"), ("wait_share", "waiting"))
        for role, values in _by_role(train, name)
    }
    if rates:
        result.append(
            ("Share of look-ups that hit, share of time waiting for data", figures.curves(rates, y_label="share"))
        )
    speeds = dict(_by_role(train, "samples_per_s"))
    if speeds:
        result.append(("Throughput", figures.curves(speeds, y_label="samples/s")))
    return result


def _by_role(train: Mapping[str, Mapping[int, float]], name: str) -> Iterator[tuple[str, Mapping[int, float]]]:
    """The curve called ``name`` of every role that logged it; of a run of one role, of "" alone."""
    for key, values in train.items():
        role, _, last = key.rpartition("/")
        if last == name:
            yield role, values


def _throughput(train: Mapping[str, Mapping[int, float]]) -> list[tuple[str, str]]:
    rows = []
    for name, label, style in (
        ("samples_per_s", "samples per second, median", "{:.1f}"),
        ("wait_share", "share of time waiting for data, median", "{:.1%}"),
        ("hit_rate", "cache hits, last", "{:.1%}"),
    ):
        for role, curve in _by_role(train, name):
            values = list(curve.values())
            number = values[-1] if name == "hit_rate" else float(np.median(values))
            rows.append((f"{role}: {label}" if role else label, style.format(number)))
    return rows


def _pictures(run: RunData) -> list[dict[str, str]]:
    """The recipe's pictures, inside the page."""
    shown = []
    for entry in run.pictures:
        path = run.folder / entry["file"]
        if path.exists():
            kind = "gif" if path.suffix == ".gif" else "png"
            source = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            shown.append({"title": entry["title"], "caption": entry["caption"], "source": source})
    return shown


def _class_count(arrays: Mapping[str, np.ndarray]) -> int:
    if "classes" in arrays:
        return len(arrays["classes"])
    return 1 + max((int(arrays[name].max()) for name in ("seg_true", "seg_pred") if name in arrays), default=0)


def _legend(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """(class name, colour) of the classes that the shown pictures have."""
    if "classes" not in arrays:
        return []
    from actors.report import figures

    shown = np.unique(np.concatenate([arrays[name].ravel() for name in ("seg_true", "seg_pred") if name in arrays]))
    colours = figures.class_colours(len(arrays["classes"]))
    return [(str(arrays["classes"][i]), "#{:02x}{:02x}{:02x}".format(*colours[i])) for i in shown if i >= 0]


def _examples(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row a held-out view: titled pictures, predictions beside truth."""
    if "image" not in arrays:
        return []
    from actors.report import figures

    classes = _class_count(arrays)
    rows = []
    for index, image in enumerate(arrays["image"]):
        height, width = image.shape[:2]
        pictures = [("image", image)]
        if "depth_true" in arrays:
            known = arrays["depth_true"][index]
            valid = known[known > 0]
            near, far = (float(valid.min()), float(valid.max())) if valid.size else (0.0, 1.0)
            for name, title in (("depth_true", "depth"), ("depth_linear", "linear probe"), ("depth_dpt", "DPT probe")):
                if name in arrays:
                    pictures.append((title, figures.depth_picture(arrays[name][index], near, far)))
        for name, title in (("seg_true", "classes"), ("seg_pred", "predicted classes")):
            if name in arrays:
                pictures.append((title, figures.label_picture(arrays[name][index], classes)))
        if "pca" in arrays:
            pictures.append(("features (PCA)", figures.enlarge(arrays["pca"][index], height, width)))
        label = str(arrays["ids"][index]) if "ids" in arrays else str(index)
        rows.append({"id": label, "pictures": [(title, figures.picture(array)) for title, array in pictures]})
    return rows
