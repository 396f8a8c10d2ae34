"""Noise, schedule, options of the loss, and the sampler against its equations written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import models
from models import draws
from models.errors import ModelError, WeightsError
from models.uniugg.diffusion import (
    UNET_FILE,
    ConditionedUNet,
    NoisePrediction,
    alphas_cumprod,
    find_unet,
    load_unet,
    noise_loss,
    sample,
)
from models.uniugg.objectives import DiffusionObjective
from tests.support.hub import empty_cache, snapshot
from tests.support.uniugg_batches import generation

PLAIN = DiffusionObjective(latent="sample", condition_dropout=0.0, min_snr=0.0, offset_noise=0.0)
UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12,
    "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def build(**overrides: Any) -> ConditionedUNet:
    torch.manual_seed(0)
    module = models.build("uniugg-unet-tiny", **{"width": 32, "unet": UNET, **overrides})
    assert isinstance(module, ConditionedUNet)
    return module.eval()


def condition(number: int, queries: int = 6) -> torch.Tensor:
    return torch.randn(number, queries, 32, generator=torch.Generator().manual_seed(3))


def test_the_schedule_is_stable_diffusion_s():
    alphas = alphas_cumprod(torch.device("cpu"))
    assert float(alphas[0]) == pytest.approx(1 - 0.00085, abs=1e-7)
    assert float(alphas[-1]) == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (14, 14), (5, 7)])
def test_any_grid_also_one_that_does_not_halve(size: tuple[int, int]):
    model = build()
    times, dropped = torch.tensor([3, 900]), torch.tensor([False, True])
    out = model.denoise(torch.randn(2, 4, *size), times, condition(2, 7), dropped)
    assert out.shape == (2, 4, *size)


def test_what_is_noised_and_predicted(monkeypatch: pytest.MonkeyPatch):
    """The noisy latent is made of the normalised posterior sample, from draws of the sample's key."""
    model = build(latent_mean=(0.5, 0.0, 0.0, -0.5), latent_scale=0.25)
    batch, seen = generation(3), {}

    def spy(noisy: torch.Tensor, timestep: torch.Tensor, given: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        seen.update(noisy=noisy, timestep=timestep, dropped=dropped)
        return noisy

    monkeypatch.setattr(model, "denoise", spy)
    out = model(condition(3), batch, objective=PLAIN)
    drawn = draws.normal(batch["draw"], (4, 4, 6), "posterior")
    z = batch["mean"] + (batch["logvar"] / 2).exp() * drawn
    z = (z - torch.tensor([0.5, 0.0, 0.0, -0.5])[:, None, None]) * 0.25
    a = alphas_cumprod(z.device)[seen["timestep"]][:, None, None, None]
    torch.testing.assert_close(seen["noisy"], a.sqrt() * z + (1 - a).sqrt() * out.noise)
    assert torch.equal(out.noise, draws.normal(batch["draw"], (4, 4, 6), "noise"))
    assert not seen["dropped"].any()
    model(condition(3), batch, objective=dataclasses.replace(PLAIN, latent="mode", condition_dropout=1.0))
    mode = (batch["mean"] - torch.tensor([0.5, 0.0, 0.0, -0.5])[:, None, None]) * 0.25
    torch.testing.assert_close(seen["noisy"], a.sqrt() * mode + (1 - a).sqrt() * out.noise)
    assert seen["dropped"].all()
    torch.testing.assert_close(model.denormalise(model.normalise(z)), z)


def test_a_dropped_condition_is_the_null_sequence_and_gets_a_gradient_of_zero():
    model, batch = build(), generation(2)
    given = condition(2).requires_grad_()
    objective = dataclasses.replace(PLAIN, condition_dropout=1.0)
    noise_loss(model(given, batch, objective=objective), batch["weight"]).backward()
    assert given.grad is not None
    assert given.grad.abs().sum() == 0
    assert model.conditioning.null.grad.abs().sum() > 0
    same = model(condition(2) * 7, batch, objective=objective).predicted
    torch.testing.assert_close(same, model(condition(2), batch, objective=objective).predicted)
    share = draws.uniform(torch.arange(2000), (), "condition") < 0.1
    assert 0.08 < float(share.float().mean()) < 0.12


def test_loss_is_a_weighted_sum_of_squares():
    out = NoisePrediction(torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), torch.tensor([1.0, 0.5]))
    assert float(noise_loss(out, torch.tensor([1.0, 2.0]))) == 16 + 16
    spoilt = out._replace(predicted=torch.stack([torch.ones(4, 2, 2), torch.full((4, 2, 2), torch.nan)]))
    assert float(noise_loss(spoilt, torch.tensor([1.0, 0.0]))) == 16


def test_min_snr_and_offset_noise():
    model, batch = build(), generation(4)
    plain = model(condition(4), batch, objective=PLAIN)
    bounded = model(condition(4), batch, objective=dataclasses.replace(PLAIN, min_snr=5.0))
    a = alphas_cumprod(torch.device("cpu"))[draws.integers(batch["draw"], 1000, "timestep")]
    snr = a / (1 - a)
    torch.testing.assert_close(bounded.weight, torch.minimum(snr, torch.tensor(5.0)) / snr)
    assert torch.equal(plain.weight, torch.ones(4))
    shifted = model(condition(4), batch, objective=dataclasses.replace(PLAIN, offset_noise=0.1))
    offset = (shifted.noise - plain.noise)[..., :1, :1]
    torch.testing.assert_close(shifted.noise - plain.noise, offset.expand_as(plain.noise), atol=1e-6, rtol=0)
    torch.testing.assert_close(offset, 0.1 * draws.normal(batch["draw"], (4, 1, 1), "offset"), atol=1e-6, rtol=0)


def by_hand(model: ConditionedUNet, given: torch.Tensor, draw: torch.Tensor, guidance: float, eta: float) -> Any:
    """Equations (12) and (16) of Song et al. 2021, four steps, the last one to the clean latent."""
    alphas = alphas_cumprod(torch.device("cpu"))
    z, none = draws.normal(draw, (4, 4, 6), "generate"), torch.zeros(len(draw), dtype=torch.bool)
    for index, t in enumerate((999, 749, 499, 249)):
        times = torch.full((len(draw),), t)
        with torch.no_grad():
            noise = model.denoise(z, times, given, none)
            if guidance != 1:
                null = model.denoise(z, times, given, ~none)
                noise = null + guidance * (noise - null)
        a, before = alphas[t], alphas[t - 250] if t > 249 else torch.tensor(1.0)
        clean = (z - (1 - a).sqrt() * noise) / a.sqrt()
        sigma = eta * ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
        z = before.sqrt() * clean + (1 - before - sigma**2).sqrt() * noise
        z = z + sigma * draws.normal(draw, (4, 4, 6), f"generate {index}")
    return z / model.latent_scale + model.latent_mean[:, None, None]


@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (2.5, 0.0), (1.0, 1.0)])
def test_the_sampler_follows_its_equations(guidance: float, eta: float):
    model, draw = build(latent_mean=(0.1, 0.2, 0.3, 0.4), latent_scale=2.0), torch.tensor([4, 9])
    z = sample(model, condition(2), size=(4, 6), draw=draw, steps=4, guidance=guidance, eta=eta)
    torch.testing.assert_close(z, by_hand(model, condition(2), draw, guidance, eta), atol=1e-4, rtol=1e-4)


def test_a_sample_does_not_depend_on_its_batch():
    model, given = build(), condition(3)
    settings: dict[str, Any] = {"size": (4, 6), "steps": 3, "guidance": 1.5, "eta": 0.5}
    whole = sample(model, given, draw=torch.tensor([1, 2, 3]), **settings)
    alone = sample(model, given[1:2], draw=torch.tensor([2]), **settings)
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[0], sample(model, given[:1], draw=torch.tensor([7]), **settings)[0])


def test_clipping_bounds_the_clean_latent_and_changes_nothing_within():
    model, given = build(latent_mean=(0.1, 0.2, 0.3, 0.4), latent_scale=2.0), condition(2)
    settings: dict[str, Any] = {"size": (4, 6), "draw": torch.tensor([4, 9]), "steps": 4, "guidance": 1.0, "eta": 0.0}
    free = sample(model, given, **settings)
    assert model.normalise(free).abs().max() > 1.5
    assert model.normalise(sample(model, given, clip=1.5, **settings)).abs().max() <= 1.5 + 1e-5
    torch.testing.assert_close(sample(model, given, clip=1e4, **settings), free, atol=1e-3, rtol=1e-3)


def test_bad_settings_are_refused():
    with pytest.raises(ModelError, match="latent_mean has 2 numbers for 4"):
        build(latent_mean=(0.0, 1.0))
    with pytest.raises(ModelError, match=r"learns latents \(B, 4, 2h, 2w\), got \(2, 3, 4, 4\)"):
        build().normalise(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ModelError, match=r"generate\.steps=0"):
        sample(build(), condition(1), size=(4, 4), draw=torch.tensor([1]), steps=0, guidance=1.0, eta=0.0)
    with pytest.raises(ModelError, match="latent='mean' must be sample or mode"):
        build()(condition(2), generation(2), objective=dataclasses.replace(PLAIN, latent="mean"))
    with pytest.raises(ModelError, match="is no UNet2DConditionModel"):
        build(unet={**UNET, "block_out_channels": (8,)})


def test_weights_of_stable_diffusion_s_unet(tmp_path: Any):
    """As diffusers stores them; another architecture is refused with names."""
    source = build()
    with torch.no_grad():
        source.unet.conv_in.weight.add_(1.0)
    source.unet.save_pretrained(tmp_path / "unet")
    target = build()
    load_unet(target, tmp_path / "unet")
    for name, tensor in source.unet.state_dict().items():
        assert torch.equal(target.unet.state_dict()[name], tensor)
    with pytest.raises(WeightsError, match=r"missing \['down_blocks"):
        load_unet(build(unet={**UNET, "layers_per_block": 2}), tmp_path / "unet")
    with pytest.raises(WeightsError, match="there is no such folder"):
        load_unet(target, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="diffusers' layout"):
        load_unet(target, tmp_path / "empty")


def test_a_unet_of_a_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    """Of Stable Diffusion's many files only the UNet's two are fetched, and the cache is enough without a network."""
    cache, name = empty_cache(monkeypatch, tmp_path), "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert find_unet(name) is None
    with pytest.raises(WeightsError) as refused:
        load_unet(build(), name)
    for word in (f"hf download {name}", "'unet/config.json'", f"'unet/{UNET_FILE}'", str(cache)):
        assert word in str(refused.value)
    folder = snapshot(cache, name)
    assert find_unet(name) is None, "of the pipeline's other parts alone no UNet can be had"
    with pytest.raises(WeightsError, match=f"holds neither {UNET_FILE} nor unet/{UNET_FILE}"):
        load_unet(build(), name)
    torch.manual_seed(1)
    source, target = build(), build()
    source.unet.save_pretrained(folder / "unet")
    with torch.no_grad():
        target.unet.conv_in.weight.add_(1.0)
    load_unet(target, name)
    assert find_unet(name) == find_unet(folder / "unet") == folder / "unet" / UNET_FILE
    for key, tensor in source.unet.state_dict().items():
        assert torch.equal(target.unet.state_dict()[key], tensor)
