from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from models.errors import ModelError
from models.spec import RoleSpec
from models.uniugg.losses import SemanticObjective, SpatialObjective
from models.uniugg.pretraining import EncoderPretraining

SMALL = {
    "width": 24, "vit_depth": 2, "vit_heads": 2, "patch": 4, "max_image": 32, "decoder_width": 24, "depth": 2,
    "heads": 2, "descriptor": 6, "dpt_levels": (4, 8, 8, 8), "dpt_width": 8, "rgb_hidden": 4,
}  # fmt: skip
SIDE = 16
TERMS = {"confidence", "matching", "rgb", "semantic_tokens", "semantic_summary"}


def build() -> EncoderPretraining:
    torch.manual_seed(0)
    module = models.build("uniugg-encoder-tiny", **SMALL)
    assert isinstance(module, EncoderPretraining)
    return module


def role(*, symmetrise: bool = True, cpe_augment: bool = False) -> RoleSpec:
    return (
        models.spec("uniugg-encoder-tiny")
        .role("trainer")
        .bind(
            spatial=SpatialObjective(
                temperature=0.05, block=8, alpha=0.2, beta=10.0, metric=True, lpips=0.0, ssim=0.1, lpips_weights="",
                symmetrise=symmetrise,
            ),
            semantic=SemanticObjective(cosine=0.9, smooth_l1=0.1, share=1 / 3),
            cpe_augment=cpe_augment,
        )
    )  # fmt: skip


def batch(kind: str, samples: int = 4, views: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    axes = (samples,) if kind == "view" else (samples, views)
    columns: dict[str, Any] = {
        "kind": kind,
        "id": [str(i) for i in range(samples)],
        "weight": torch.ones(samples),
        "draw": torch.arange(samples) + 7,
        "image": torch.randint(0, 256, (*axes, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8),
        "teacher_tokens": torch.randn(*axes, 1, 4, 4, 24, generator=generator),
        "teacher_summary": torch.randn(*axes, 3, 24, generator=generator),
    }
    if kind == "pair":
        pose = torch.eye(4).repeat(samples, 2, 1, 1)
        pose[:, 1, 0, 3] = 0.2
        columns |= {
            "depth": 1 + torch.rand(samples, 2, SIDE, SIDE, generator=generator),
            "K": torch.tensor([[16.0, 0, 7.5], [0, 16, 7.5], [0, 0, 1]]).repeat(samples, 2, 1, 1),
            "pose": pose,
            "matches": torch.randint(0, SIDE**2, (samples, 2, 20), generator=generator).int(),
            "match_valid": torch.rand(samples, 20, generator=generator) < 0.5,
        }
    return columns


def part(whole: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value if name == "kind" else value[rows] for name, value in whole.items()}


def gradients(module: torch.nn.Module, batches: list[dict[str, Any]], bound: RoleSpec) -> dict[str, torch.Tensor]:
    """Of the global mean over all batches, as the trainer makes it."""
    module.zero_grad()
    counts = [bound.counts(each) for each in batches]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    for each in batches:
        sums = bound.step(module, each, {}).sums
        sum(value / max(total[name], 1) for name, value in sums.items()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["pair", "view", "item"])
@pytest.mark.parametrize("cpe_augment", [False, True])
def test_every_parameter_takes_part_in_every_kind(kind: str, cpe_augment: bool) -> None:
    module, bound = build(), role(cpe_augment=cpe_augment)
    found = gradients(module, [batch(kind)], bound)
    assert found.keys() == {name for name, _ in module.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    used = {name.split(".")[0] for name, gradient in found.items() if gradient.any()}
    assert used == ({"encoder", "spatial_decoder"} if kind == "pair" else {"encoder"})
    sums, counts = bound.step(module, batch(kind), {}).sums, bound.counts(batch(kind))
    assert counts.keys() == TERMS
    assert {name for name, count in counts.items() if count} == set(sums)


def test_gradient_does_not_depend_on_how_the_batch_is_cut() -> None:
    module, bound, whole = build(), role(cpe_augment=True), batch("pair")
    together = gradients(module, [whole], bound)
    cut = gradients(module, [part(whole, slice(0, 1)), part(whole, slice(1, 4))], bound)
    for name, gradient in together.items():
        torch.testing.assert_close(cut[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sample_of_weight_zero_is_as_if_it_were_not_there() -> None:
    module, bound, whole = build(), role(), batch("pair")
    whole["weight"][2] = 0
    rest = {
        name: value if name == "kind" else ([value[i] for i in (0, 1, 3)] if name == "id" else value[[0, 1, 3]])
        for name, value in whole.items()
    }
    expected, got = gradients(module, [rest], bound), gradients(module, [whole], bound)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_fillers_of_a_ragged_item_do_not_count() -> None:
    module, bound, items = build(), role(), batch("item", samples=2, views=3)
    items["image_lengths"] = torch.tensor([3, 1])
    counts = bound.counts(items)
    assert counts["semantic_summary"] == 4
    assert counts["semantic_tokens"] == 4 * 5
    before = bound.step(module, items, {}).sums
    items["image"][1, 1:], items["teacher_tokens"][1, 1:] = 9, 9.0
    for name, value in bound.step(module, items, {}).sums.items():
        torch.testing.assert_close(value, before[name])


def test_the_encoder_sees_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    seen: list[tuple[int, ...]] = []
    module.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    module.spatial_decoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    role(symmetrise=True).step(module, batch("pair"), {})
    assert seen == [(8, 3, SIDE, SIDE), (8, 4, 4, 24)]
    with torch.no_grad():
        image = batch("pair")["image"]
        both = module(image, pairs=True, symmetrise=True).views
        swapped = module(image.flip(1), pairs=True, symmetrise=False).views
    for together, alone in zip(both, swapped, strict=True):
        torch.testing.assert_close(together["pts3d"][4:], alone["pts3d"], rtol=1e-4, atol=1e-5)


def test_it_learns_one_batch() -> None:
    module, bound, one = build(), role(), batch("pair", samples=2)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    counts, history = bound.counts(one), []
    for _ in range(20):
        optimiser.zero_grad()
        terms = {name: value / counts[name] for name, value in bound.step(module, one, {}).sums.items()}
        sum(terms.values()).backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in terms.items()})
    assert history[-1]["confidence"] < 0.75 * history[0]["confidence"]
    for term in ("rgb", "matching", "semantic_tokens", "semantic_summary"):
        assert history[-1][term] < history[0][term]


def test_large_is_what_the_paper_has() -> None:
    with torch.device("meta"):
        module = models.build("uniugg-encoder-large")
    assert isinstance(module, EncoderPretraining)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    assert counts["encoder"] == 319_881_216
    # Projector, embedding and both stacks with the norm, both head sets with colours.
    stacks, head = 2 * 113_439_744 + 768 * 1024 + 768 + 2 * 768, 77_755_332
    colours = (256 * 9 * 128 + 128) + (128 * 9 * 32 + 32) + (32 * 3 + 3)
    assert counts["spatial_decoder"] == 2 * (1024**2 + 1024) + stacks + 2 * (head + colours)


def test_unknown_kinds_are_refused() -> None:
    wrong = batch("pair") | {"kind": "conversation"}
    with pytest.raises(ModelError, match="P1 takes micro-batches of pair, view, item, got 'conversation'"):
        role().counts(wrong)


def test_activation_checkpointing_of_the_named_blocks_changes_no_gradient() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    module, bound, one = build(), role(cpe_augment=True), batch("pair", samples=2)
    plain = gradients(module, [one], bound)
    wrapped: list[str] = []

    def chosen(child: torch.nn.Module) -> bool:
        if type(child).__name__ in bound.checkpointed:
            wrapped.append(type(child).__name__)
            return True
        return False

    apply_activation_checkpointing(module, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=chosen)
    assert sorted(wrapped) == ["DecoderBlock"] * 4 + ["PairHead"] * 2 + ["RadioLayer"] * 2
    again = gradients(module, [one], bound)
    assert len(again) == len(plain)
    assert all(torch.equal(one, two) for one, two in zip(plain.values(), again.values(), strict=True))


@pytest.mark.parametrize("kind", ["pair", "view"])
def test_losses_are_float32_inside_autocast(kind: str) -> None:
    module, bound, one = build(), role(), batch(kind, samples=2)
    plain = bound.step(module, one, {}).sums
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = bound.step(module, one, {}).sums
    for name, value in sums.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, plain[name], rtol=0.1, atol=1.0)
    sum(sums.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_a_teacher_with_another_summary_is_named() -> None:
    wrong = batch("view")
    wrong["teacher_summary"] = wrong["teacher_summary"][:, :2]
    with pytest.raises(ModelError, match=r"summary are \(3, 24\) an image and the teacher's \(2, 24\)"):
        role().step(build(), wrong, {})
