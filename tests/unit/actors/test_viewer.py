"""The page of points: what it holds, and that a browser draws it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.viewer import Camera, Group, Shown, page, write_viewer

CAMERA = Camera(pose=np.eye(4), K=np.array([[8.0, 0, 3.5], [0, 8.0, 2.5], [0, 0, 1]]), size=(6, 8))
PICTURE = np.full((6, 8, 3), (200, 40, 90), np.uint8)


def group(kind: str, number: int, seed: int = 0) -> Group:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(number, 3)).astype(np.float32) + np.float32([0, 0, 4])
    colours = rng.integers(0, 256, (number, 3), dtype=np.uint8)
    return Group(kind=kind, points=points, colours=colours, confidence=1 + rng.exponential(2, number))


def write(path: Path, groups: list[Group], title: str = "A room") -> dict[str, Any]:
    views = [
        Shown(name=f"{i:03d}", camera=CAMERA, pictures=[("Depth", PICTURE)], facts={"moved by": "1 m"})
        for i in range(len(groups) - 1)
    ]
    shown = Shown(name="x", camera=CAMERA, pictures=[("Seen", PICTURE)])
    write_viewer(path, title=title, note="a note", threshold=1.5, reference=shown, views=views, groups=groups)
    found = re.search(r'id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_confidences_come_back_on_their_logarithmic_scale(tmp_path: Path):
    groups = [group("reference", 50), group("target", 40, 1)]
    data = write(tmp_path / "index.html", groups)
    low, high = data["confidence"]["low"], data["confidence"]["high"]
    for made, packed in zip(groups, data["groups"], strict=True):
        steps = np.frombuffer(base64.b64decode(packed["confidences"]), np.uint8) / 255
        np.testing.assert_allclose(low * (high / low) ** steps, made.confidence, rtol=np.log(high / low) / 255)
    assert data["confidence"]["start"] == 1.5


def test_points_that_are_nowhere_are_left_out_with_their_colours(tmp_path: Path):
    made = group("target", 20)
    made.points[3, 1] = np.nan
    made.confidence[7] = np.inf
    data = write(tmp_path / "index.html", [group("reference", 0), made])
    assert [packed["count"] for packed in data["groups"]] == [0, 18]
    colours = np.frombuffer(base64.b64decode(data["groups"][1]["colours"]), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(colours, np.delete(made.colours, [3, 7], axis=0))


def test_very_many_points_are_thinned_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "MAX_POINTS", 100)
    data = write(tmp_path / "index.html", [group("reference", 150), group("target", 120)])
    assert data["stride"] == 3
    assert [packed["count"] for packed in data["groups"]] == [50, 40]


def test_corners_of_a_camera_are_the_edges_of_its_picture(tmp_path: Path):
    data = write(tmp_path / "index.html", [group("reference", 5), group("target", 5)])
    np.testing.assert_allclose(data["views"][0]["corners"][0], [-0.5, -3 / 8, 1])
    np.testing.assert_allclose(data["views"][0]["corners"][2], [0.5, 3 / 8, 1])


def test_names_cannot_break_out_of_the_page(tmp_path: Path):
    path = tmp_path / "index.html"
    evil = Shown(name="</script><script>alert(1)</script>", camera=CAMERA, pictures=[("<b>&", PICTURE)])
    groups = [group("reference", 5), group("target", 5)]
    write_viewer(path, title="<i>t", note="&", threshold=1.0, reference=evil, views=[evil], groups=groups)
    text = path.read_text()
    assert "<script>alert" not in text
    assert "&lt;i&gt;t" in text
    assert text.count("</script>") == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--disable-gpu", "--disable-3d-apis"], ["--enable-unsafe-swiftshader"]])
def test_a_browser_draws_it(tmp_path: Path, flags: list[str]):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here")
    path = tmp_path / "index.html"
    write(path, [group("reference", 500), group("target", 400), group("target", 300)])
    text = path.read_text()
    path.write_text(text.replace("<script>", "<script>window.onerror=(m)=>{document.title='broke: '+m};", 1))
    command = [browser, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}/profile", *flags]
    ran = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>A room</title>" in ran.stdout
    assert re.search(r'data-renderer="(2d|webgl)"', ran.stdout)
    if "--disable-3d-apis" in flags:
        assert 'data-renderer="2d"' in ran.stdout
    assert re.search(r"\d+ points of the reference, \d+ imagined", ran.stdout)
    assert "000 (1 of 2)" in ran.stdout
