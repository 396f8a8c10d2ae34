"""The second training: terms and counts, who gets gradients, the mixed pairs, and what must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from models.errors import ModelError
from models.spec import RoleSpec
from models.uniugg.latent import TRAINER, LatentModel, LatentObjective, kept_originals, kl_divergence
from models.uniugg.losses import SpatialObjective
from tests.support.uniugg_batches import broken, filler, pairs, take

TERMS = {"reconstruction", "kl", "confidence", "matching", "rgb"}


def role(*, mixed_share: float = 0.5, symmetrise: bool = True) -> RoleSpec:
    spatial = SpatialObjective(
        temperature=0.05, block=16, alpha=0.2, beta=10.0, metric=True, lpips=0.0, ssim=0.0, lpips_weights="",
        symmetrise=symmetrise,
    )  # fmt: skip
    return TRAINER.bind(objective=LatentObjective(spatial=spatial, mixed_share=mixed_share))


def build(*, finetune: bool = True) -> LatentModel:
    torch.manual_seed(0)
    module = models.build("uniugg-latent-tiny", vae={"width": 32, "depth": 1}, finetune_spatial_decoder=finetune)
    assert isinstance(module, LatentModel)
    return module


def means(trainer: RoleSpec, module: LatentModel, batch: dict[str, Any]) -> torch.Tensor:
    counts = trainer.counts(batch)
    return torch.stack([value / counts[term] for term, value in trainer.step(module, batch, {}).sums.items()])


def test_terms_and_counts():
    batch, trainer = pairs(), role()
    out = trainer.step(build(), batch, {})
    assert set(out.sums) == set(trainer.counts(batch)) == TERMS
    counts = trainer.counts(batch)
    assert counts["reconstruction"] == 2 * 2 * 6 * 96
    assert counts["kl"] == 2 * 2 * 24
    assert counts["confidence"] == 2 * (2 * 2 * 32 * 48), "both views, both orders"
    assert all(torch.isfinite(value) for value in out.sums.values())


def test_reconstruction_is_the_mean_square_in_deviations_of_the_tokens():
    module, batch, trainer = build(), pairs(), role()
    module.vae.calibrate_tokens([batch["tokens"] * 3])
    with torch.no_grad():
        out = module(batch["tokens"][:, :, 0], batch["draw"], mixed_share=0.0, symmetrise=False)
        sums = trainer.step(module, batch, {}).sums
    torch.testing.assert_close(sums["reconstruction"], out.residual.square().sum())
    kl = kl_divergence(out.mean, out.logvar)
    torch.testing.assert_close(sums["kl"] / trainer.counts(batch)["kl"], kl.mean(), msg="the paper's mean")
    assert float(kl_divergence(torch.zeros(1), torch.zeros(1))) == 0.0
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(torch.tensor(0.3), torch.tensor(2.0)), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_divergence(torch.tensor(0.3), torch.tensor(4.0).log()), want)


def test_everything_is_trained_end_to_end():
    module, batch = build(), pairs()
    means(role(), module, batch).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if "bias" not in n)
    module.zero_grad()
    role(mixed_share=0.0).step(module, batch, {}).sums["confidence"].backward()
    assert module.vae.encoder.conv_in.weight.grad is not None, "the spatial terms reach the VAE's encoder"
    assert module.vae.encoder.conv_in.weight.grad.abs().sum() > 0


def test_a_frozen_decoder_passes_gradients_on():
    module = build(finetune=False)
    means(role(), module, pairs())[2:].sum().backward()
    assert not any(p.requires_grad for p in module.spatial_decoder.parameters())
    assert all(p.grad is None for p in module.spatial_decoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.vae.decoder.conv_out.parameters())


def test_mixed_pairs_keep_exactly_one_original(monkeypatch: pytest.MonkeyPatch):
    kept = kept_originals(torch.arange(1000), 0.5)
    number = kept.sum(1)
    assert set(number.tolist()) == {0, 1}
    assert 0.45 < float(number.float().mean()) < 0.55
    assert 0.4 < float(kept[number == 1][:, 0].float().mean()) < 0.6, "either side"
    assert not kept_originals(torch.arange(50), 0.0).any()
    module, batch, seen = build(), pairs(6), {}

    def spy(first: torch.Tensor, second: torch.Tensor) -> Any:
        seen.update(first=first, second=second)
        return ({}, {})

    monkeypatch.setattr(module.spatial_decoder, "forward", spy)
    tokens = batch["tokens"][:, :, 0]
    module(tokens, batch["draw"], mixed_share=1.0, symmetrise=True)
    kept = kept_originals(batch["draw"], 1.0)
    same = torch.stack([(seen["first"][:6] == tokens[:, 0]), (seen["second"][:6] == tokens[:, 1])], 1)
    assert torch.equal(same.flatten(2).all(2), kept)
    assert torch.equal(seen["first"][6:], seen["second"][:6]), "the other order"


def test_sums_and_gradients_add_up_over_any_cut_of_the_batch():
    module, batch, trainer = build(), pairs(3), role()
    sum(trainer.step(module, batch, {}).sums.values()).backward()
    whole = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    for rows in ((0, 2), (1,)):
        sum(trainer.step(module, take(batch, *rows), {}).sums.values()).backward()
    counts = [trainer.counts(take(batch, *rows)) for rows in ((0, 2), (1,))]
    assert {term: sum(count[term] for count in counts) for term in TERMS} == trainer.counts(batch)
    for name, p in module.named_parameters():
        scale = whole[name].abs().max().clamp_min(1e-3)
        torch.testing.assert_close(p.grad / scale, whole[name] / scale, atol=2e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("spoil", [broken, filler])
def test_a_sample_of_weight_zero_adds_nothing(spoil: Any):
    module, batch, trainer = build(), pairs(2), role()
    alone, spoilt = take(batch, 0), spoil(batch, 1)
    assert trainer.counts(spoilt) == trainer.counts(alone)
    a, b = trainer.step(module, spoilt, {}).sums, trainer.step(module, alone, {}).sums
    for term in TERMS:
        torch.testing.assert_close(a[term], b[term], rtol=1e-4, atol=1e-3)
    sum(a.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match=r"P2 takes pairs with tokens .* got 'view'"):
        role().step(build(), {**pairs(), "kind": "view"}, {})
    with pytest.raises(ModelError, match="VAE gives tokens of 8 channels, the spatial decoder takes 96"):
        models.build("uniugg-latent-tiny", vae={"channels": 8})


def test_the_paper_s_size_on_meta():
    with torch.device("meta"):
        module = models.build("uniugg-latent-base")
    assert [name for name, _ in module.named_children()] == ["vae", "spatial_decoder"]
    assert sum(p.numel() for p in module.vae.parameters()) == 7_664_136
    assert module.vae.settings["channels"] == module.spatial_decoder.in_width == 1024
