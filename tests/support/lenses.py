"""Rays of two distorted cameras, by their published formulas and Newton's method: independent of OpenCV."""

from __future__ import annotations

import numpy as np

from tests.support.analytic import HEIGHT, WIDTH, K

BROWN = {"k1": -0.18, "k2": 0.04, "p1": 0.004, "p2": -0.003}
FISHEYE = {"k1": 0.06, "k2": -0.02, "k3": 0.004, "k4": -0.001}


def _normalised() -> tuple[np.ndarray, np.ndarray]:
    u, v = np.meshgrid(np.arange(WIDTH, dtype=float), np.arange(HEIGHT, dtype=float))
    return (u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]


def brown_rays() -> np.ndarray:
    """Camera rays (H, W, 3), z = 1, of a lens with radial and tangential distortion."""
    xd, yd = _normalised()
    k1, k2, p1, p2 = BROWN.values()

    def distort(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2 * r2
        return (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        )

    x, y = xd.copy(), yd.copy()
    for _ in range(100):
        dx, dy = distort(x, y)
        x, y = x + (xd - dx), y + (yd - dy)
    dx, dy = distort(x, y)
    assert max(np.abs(dx - xd).max(), np.abs(dy - yd).max()) < 1e-10
    return np.stack([x, y, np.ones_like(x)], axis=-1)


def fisheye_rays() -> np.ndarray:
    """Camera rays (H, W, 3), z = 1, of an equidistant lens."""
    xd, yd = _normalised()
    coefficients = np.array(list(FISHEYE.values()))
    powers = 2 * np.arange(1, 5)
    radius = np.hypot(xd, yd)
    theta = radius.copy()
    for _ in range(20):
        series = theta[..., None] ** powers @ coefficients
        slope = 1 + theta[..., None] ** powers @ (coefficients * (powers + 1))
        theta -= (theta * (1 + series) - radius) / slope
    assert np.abs(theta * (1 + theta[..., None] ** powers @ coefficients) - radius).max() < 1e-10
    scale = np.where(radius > 1e-12, np.tan(theta) / np.maximum(radius, 1e-12), 1.0)
    return np.stack([xd * scale, yd * scale, np.ones_like(xd)], axis=-1)
