"""The Spatial-VAE: shapes of Table 4, parameter counts, any grid, statistics, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import models
from models.errors import ModelError
from models.uniugg.vae import SpatialVae, sample_posterior, sincos_positions


def build(**overrides: object) -> SpatialVae:
    torch.manual_seed(0)
    module = models.build("spatial-vae-tiny", **{"channels": 12, "width": 16, "depth": 1, "heads": 2, **overrides})
    assert isinstance(module, SpatialVae)
    return module.eval()


def test_every_row_of_table_4_has_its_shape():
    """At 14 x 14, as the paper prints them; the module that makes a row -> channels and grid."""
    with torch.device("meta"):
        vae = models.build("spatial-vae-base")
        seen: dict[str, tuple[int, ...]] = {}
        for name, module in vae.named_modules():
            module.register_forward_hook(
                lambda _m, _i, out, name=name: (
                    seen.update({name: tuple(out.shape[1:])}) if torch.is_tensor(out) else None
                )
            )
        tokens, posterior = vae(torch.empty(1, 14, 14, 1024), torch.empty(1, 4, 28, 28))
    want = {
        "encoder.conv_in": (256, 14, 14), "encoder.up": (128, 28, 28), "encoder.conv": (128, 28, 28),
        "encoder.mixer.blocks.3": (784, 128), "encoder.mixer": (128, 28, 28), "encoder.mean": (4, 28, 28),
        "encoder.logvar": (4, 28, 28), "decoder.conv_in": (128, 28, 28), "decoder.mixer.blocks.3": (784, 128),
        "decoder.mixer": (128, 28, 28), "decoder.conv": (128, 28, 28), "decoder.down": (256, 14, 14),
        "decoder.conv_out": (1024, 14, 14),
    }  # fmt: skip
    assert {name: seen[name] for name in want} == want
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, 28, 28)
    assert tokens.shape == (1, 14, 14, 1024)


@pytest.mark.parametrize(("depth", "millions"), [(2, 3.4), (4, 3.8), (6, 4.2)])
def test_parameters_each_way(depth: int, millions: float):
    with torch.device("meta"):
        vae = models.build("spatial-vae-base", depth=depth)
    for side in (vae.encoder, vae.decoder):
        assert sum(p.numel() for p in side.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (24, 32)])
def test_any_grid(grid: tuple[int, int]):
    vae = build()
    mean, logvar = vae.encode(torch.randn(2, *grid, 12))
    assert mean.shape == logvar.shape == (2, 4, 2 * grid[0], 2 * grid[1])
    assert vae.decode(mean).shape == (2, *grid, 12)


def test_positions_tell_rows_from_columns():
    positions = sincos_positions(3, 4, 16, torch.device("cpu")).unflatten(0, (3, 4))
    assert torch.equal(positions[0, :, :8], positions[0, :1, :8].expand(4, -1)), "rows in the first half"
    assert torch.equal(positions[:, 0, 8:], positions[:1, 0, 8:].expand(3, -1)), "columns in the second"
    flat = positions.flatten(0, 1)
    assert torch.cdist(flat, flat)[~torch.eye(12, dtype=torch.bool)].min() > 0.1


def test_a_sample_of_the_posterior():
    mean, logvar, noise = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1e4]), torch.tensor([2.0, 1.0])
    drawn = sample_posterior(mean, logvar, noise)
    assert drawn[0] == 3.0
    assert torch.isfinite(drawn[1]), "the log-variance is clamped"


def test_tokens_are_normalised_and_brought_back():
    """Scaling the tokens by a constant that calibration measures changes nothing but the scale of the output."""
    vae, other = build(), build()
    tokens = torch.randn(4, 3, 3, 12)
    vae.calibrate_tokens([tokens[:2], tokens[2:]])
    other.calibrate_tokens([100 * tokens + 7])
    torch.testing.assert_close(vae.token_mean, tokens.flatten(0, 2).mean(0))
    torch.testing.assert_close(vae.token_std, tokens.flatten(0, 2).std(0, correction=0))
    noise = torch.randn(4, 4, 6, 6)
    a, b = vae(tokens, noise)[0], other(100 * tokens + 7, noise)[0]
    torch.testing.assert_close(b, 100 * a + 7, atol=1e-2, rtol=1e-4)
    constant = build()
    constant.calibrate_tokens([torch.ones(5, 12)])
    assert torch.equal(constant.token_std, torch.ones(12)), "a channel that does not vary is not divided by 0"


def test_latent_statistics_make_samples_of_unit_variance():
    vae = build()
    tokens = torch.randn(64, 3, 4, 12)
    vae.calibrate_latents([tokens[:10], tokens[10:]])
    torch.manual_seed(1)
    mean, logvar = vae.encode(tokens)
    z = torch.cat([sample_posterior(mean, logvar, torch.randn_like(mean)) for _ in range(8)])
    z = (z - vae.latent_mean[:, None, None]) * vae.latent_scale
    assert z.mean((0, 2, 3)).abs().max() < 0.02
    assert float(z.detach().var()) == pytest.approx(1.0, abs=0.02)
    assert {"latent_mean", "latent_scale", "token_mean", "token_std"} <= set(vae.state_dict())


@pytest.mark.parametrize("what", ["tokens", "latents"])
def test_statistics_of_nothing_are_refused(what: str):
    with pytest.raises(ModelError, match=f"no {what} to measure"):
        getattr(build(), f"calibrate_{what}")([])


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 4, 5, 6), (4, 6, 6)])
def test_a_wrong_latent_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ModelError, match=r"decodes latents \(B, 4, 2h, 2w\)"):
        build().decode(torch.zeros(shape))


def test_tokens_of_another_encoder_are_refused():
    with pytest.raises(ModelError, match=r"takes tokens \(B, h, w, 12\), got \(2, 3, 3, 8\)"):
        build().encode(torch.zeros(2, 3, 3, 8))
    with pytest.raises(ModelError, match="divisible by 4 and by heads=3"):
        build(heads=3)
