from __future__ import annotations

import pytest
import torch

import models
from models.errors import ModelError
from models.pretrained import load_pretrained, save_pretrained
from models.uniugg.spatial import SpatialDecoder, load_mast3r

SMALL = {
    "in_width": 20, "width": 24, "depth": 2, "heads": 2, "patch": 4, "descriptor": 6, "dpt_levels": (4, 8, 8, 8),
    "dpt_width": 8, "rgb_hidden": 4,
}  # fmt: skip


@pytest.fixture
def decoder() -> SpatialDecoder:
    torch.manual_seed(0)
    module = models.build("uniugg-spatial-decoder-tiny", **SMALL)
    assert isinstance(module, SpatialDecoder)
    return module


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (6, 4)])
def test_any_grid(decoder: SpatialDecoder, grid: tuple[int, int]) -> None:
    views = decoder(torch.randn(2, *grid, 20), torch.randn(2, *grid, 20))
    for view in views:
        assert view["pts3d"].shape == (2, 4 * grid[0], 4 * grid[1], 3)
        assert set(view) == {"pts3d", "conf", "desc", "desc_conf", "rgb"}


def test_one_pair_does_not_see_another(decoder: SpatialDecoder) -> None:
    a, b = torch.randn(3, 2, 3, 20), torch.randn(3, 2, 3, 20)
    alone = decoder(a[1:2], b[1:2])
    together = decoder(a, b)
    for one, all_of_them in zip(alone, together, strict=True):
        for name, maps in one.items():
            torch.testing.assert_close(all_of_them[name][1:2], maps, rtol=1e-4, atol=1e-5)


def test_mast3r_starts_decoder_and_heads_of_the_large_size() -> None:
    with torch.device("meta"):
        decoder = models.build("uniugg-spatial-decoder-large")
        mast3r = models.build("mast3r-large")
    assert isinstance(decoder, SpatialDecoder)
    state = {published: mast3r.state_dict()[ours] for ours, published in mast3r.reference_names().items()}
    report = load_mast3r(decoder, state)
    assert report.complete
    kept = [name for name in decoder.state_dict() if name.startswith("projector.") or ".rgb." in name]
    assert len(report.loaded) == len(decoder.state_dict()) - len(kept)
    assert len(kept) == 4 + 2 * 6
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert shapes["head1.rgb.neck.weight"] == (128, 256, 3, 3)
    assert shapes["head2.rgb.head.0.weight"] == (32, 128, 3, 3)
    assert shapes["head2.rgb.head.2.weight"] == (3, 32, 1, 1)
    assert shapes["projector.fc1.weight"] == (1024, 1024)


def test_saved_part_gives_the_same_maps(decoder: SpatialDecoder, tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path)) / "spatial_decoder"
    save_pretrained(decoder, folder, "uniugg-spatial-decoder-tiny", decoder.settings)
    again = load_pretrained(folder)
    tokens = torch.randn(1, 2, 2, 20), torch.randn(1, 2, 2, 20)
    with torch.no_grad():
        for first, second in zip(decoder(*tokens), again(*tokens), strict=True):
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens_of_another_encoder_are_refused(decoder: SpatialDecoder) -> None:
    with pytest.raises(ModelError, match=r"takes tokens \(B, h, w, 20\), got \(1, 2, 2, 7\)"):
        decoder(torch.randn(1, 2, 2, 7), torch.randn(1, 2, 2, 7))
