"""Does the probe tell a trained encoder from an untrained one? Real weights, held-out procedural rooms."""

from __future__ import annotations

from pathlib import Path

import pytest

import configs
from actors import driver
from actors.report import write_report

pytestmark = pytest.mark.e2e

#: DINOv2-S, whose random twin is built with the same sizes.
ARCH = "{hidden_size: 384, num_hidden_layers: 12, num_attention_heads: 6, patch_size: 14}"


def probe(root: Path, weights: str) -> dict[str, float]:
    arch = [f"encoders.features.arch={ARCH}"] if weights == "random" else []
    config = configs.load(
        [
            "recipe=probe", "size=tiny", "data=rooms", "encoder=dinov2-small", f"encoders.features.weights={weights}",
            "encoders.features.height=112", "encoders.features.width=112", "data.rooms.scenes=16",
            "data.rooms.views=6", "trainer.steps=100", "trainer.validate_every=50", "trainer.checkpoint_every=0",
            "cluster=inline", "logger.tensorboard=false", "logger.progress=off", f"storage.root={root}",
            f"name={'random' if weights == 'random' else 'pretrained'}", *arch,
        ]
    )  # fmt: skip
    return {name: row["value"] for name, row in driver.train(config).metrics.items()}


def test_pretrained_features_beat_the_same_network_at_random(tmp_path: Path, weights_dir: Path) -> None:
    folder = weights_dir / "dinov2-small"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    trained, random = probe(tmp_path, str(folder)), probe(tmp_path, "random")
    # Measured: 0.71, 0.82 and 2.7 times.
    assert trained["depth_dpt/abs_rel"] < 0.92 * random["depth_dpt/abs_rel"]
    assert trained["depth_linear/abs_rel"] < 0.85 * random["depth_linear/abs_rel"]
    assert trained["segmentation/miou"] > 1.7 * random["segmentation/miou"]
    # The report of the one shows the margin over the other.
    page = write_report(tmp_path / "runs" / "pretrained", tmp_path / "runs" / "random").read_text()
    gain = trained["segmentation/miou"] / random["segmentation/miou"] - 1
    assert f"{100 * gain:+.0f} %" in page
