"""The two roles of the unified model and the direct variant: counts, sums, gradients, and what must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models.errors import ModelError
from models.spec import RoleSpec, StepOutput
from models.uniugg.direct import DIRECT_ROLE
from models.uniugg.losses import distillation
from models.uniugg.objectives import DiffusionObjective, DirectObjective, LanguageObjective
from models.uniugg.unified import DIFFUSION_ROLE, LLM_ROLE, part_settings
from tests.support.uniugg_batches import broken, conversation, filler, generation, take

LANGUAGE = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {"language": LANGUAGE}

LLM = LLM_ROLE.bind(objective=LanguageObjective(translation_scale="metres"))
PLAIN = DiffusionObjective(latent="sample", condition_dropout=0.3, min_snr=0.0, offset_noise=0.0)
DIFFUSION = DIFFUSION_ROLE.bind(objective=PLAIN)
DIRECT = DIRECT_ROLE.bind(objective=DirectObjective(translation_scale="metres", cosine=0.9, smooth_l1=0.1))


def build(name: str = "uniugg-tiny", **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, **{"llm": SMALL, **overrides})


def run(role: RoleSpec, module: nn.Module, batch: dict[str, Any], received: dict[str, Any] | None = None) -> StepOutput:
    out = role.step(module, batch, received or {})
    assert set(out.sums) == set(role.counts(batch)), "sums and counts have the same terms"
    return out


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing, f"these take no part: {missing}"
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def total(role: RoleSpec, module: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, StepOutput]:
    """A scalar of everything that a role gives: its sums, and its outputs against fixed numbers a sample."""
    received = {}
    if role.name == "diffusion":
        g = torch.Generator().manual_seed(5)
        whole = torch.randn(8, batch["input_ids"].eq(264).sum(1).max(), 32, generator=g)
        received = {"condition": whole[batch["draw"] % 8].requires_grad_()}
    out = run(role, module, batch, received)
    loss = torch.stack(list(out.sums.values())).sum()
    for tensor in out.outputs.values():
        loss = loss + (tensor * batch["draw"][:, None, None].cos()).sum()
    return loss, out


CASES = [("llm", LLM, generation), ("llm", LLM, conversation), ("diffusion", DIFFUSION, generation),
         ("direct", DIRECT, generation), ("direct", DIRECT, conversation)]  # fmt: skip


def part(name: str) -> nn.Module:
    if name == "direct":
        return build("uniugg-direct-tiny")
    return build().get_submodule(name)


@pytest.mark.parametrize(("name", "role", "make"), CASES)
def test_every_parameter_takes_part_in_every_kind(name: str, role: RoleSpec, make: Any):
    module = part(name)
    loss, _ = total(role, module, make())
    found = gradients(module, loss)
    moved = {name for name, gradient in found.items() if gradient.abs().sum() > 0}
    used = {"llm": {"projector"}, "direct": {"projector"}, "diffusion": {"unet", "conditioning.project"}}[name]
    assert all(any(entry.startswith(prefix) for entry in moved) for prefix in used)
    if make is conversation:
        assert not any(entry.startswith(("queries", "head")) for entry in moved), "with weight zero"
    elif name != "diffusion":
        assert any(entry.startswith("queries.mlp") for entry in moved)


@pytest.mark.parametrize(("name", "role", "make"), CASES)
def test_sums_and_gradients_add_up_over_any_cut_of_the_batch(name: str, role: RoleSpec, make: Any):
    """As over ranks: whichever batch a sample lies in, it adds the same."""
    module = part(name)
    batch = make(4) if make is generation else make((1, 2, 0, 1))
    whole_loss, whole = total(role, module, batch)
    whole_gradient = gradients(module, whole_loss)
    added: dict[str, torch.Tensor] = {}
    counted: dict[str, float] = {}
    sums: dict[str, float] = {}
    for rows in ((0, 3), (1, 2)):
        loss, out = total(role, module, take(batch, *rows))
        for key, gradient in gradients(module, loss).items():
            added[key] = added.get(key, 0) + gradient
        for term, value in out.sums.items():
            sums[term] = sums.get(term, 0.0) + float(value.detach())
            counted[term] = counted.get(term, 0.0) + role.counts(take(batch, *rows))[term]
    assert counted == role.counts(batch)
    assert sums == {term: pytest.approx(float(value.detach()), rel=1e-5) for term, value in whole.sums.items()}
    for key, gradient in whole_gradient.items():
        torch.testing.assert_close(added[key], gradient, atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("spoil", [broken, filler])
@pytest.mark.parametrize(("name", "role", "make"), CASES)
def test_a_sample_of_weight_zero_adds_nothing(name: str, role: RoleSpec, make: Any, spoil: Any):
    module = part(name)
    batch = make(2) if make is generation else make((1, 1))
    alone, with_spoilt = take(batch, 0), spoil(batch, 1)
    assert role.counts(with_spoilt) == role.counts(alone)
    out, want = run_sums(role, module, with_spoilt), run_sums(role, module, alone)
    for term, (value, gradient) in want.items():
        torch.testing.assert_close(out[term][0], value, rtol=1e-5, atol=1e-5)
        for key, entry in gradient.items():
            assert torch.isfinite(out[term][1][key]).all(), key
            torch.testing.assert_close(out[term][1][key], entry, atol=1e-4, rtol=1e-3)


def run_sums(role: RoleSpec, module: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    received = {"condition": torch.ones(len(batch["draw"]), 6, 32)} if role.name == "diffusion" else {}
    out = run(role, module, batch, received)
    loss = torch.stack(list(out.sums.values())).sum()
    return {"all": (loss.detach(), gradients(module, loss))}


def test_the_broken_sample_s_condition_is_zero_and_its_neighbours_the_same():
    module, batch = part("llm"), generation(3)
    whole = run(LLM, module, batch).outputs["condition"]
    spoilt = run(LLM, module, broken(batch, 1)).outputs["condition"]
    assert spoilt[1].abs().sum() == 0
    torch.testing.assert_close(spoilt[[0, 2]], whole[[0, 2]])


def test_cross_entropy_is_that_of_the_supervised_tokens_from_what_stands_before_them():
    """Against the language model's own logits; padding and the first token count nothing."""
    module = part("llm").eval()
    batch = conversation((1, 2), answer=3)
    batch["supervised"][0, 0] = True  # nothing predicts the first token
    assert LLM.counts(batch) == {"ce": 3.0 + 4.0}
    want = 0.0
    for row in range(2):
        one = take(batch, row)
        length = int(one["input_ids_lengths"])
        logits = module.language(inputs_embeds=module.embed(one, "metres")[:, :length]).logits[0]
        for place in range(1, length):
            if one["supervised"][0, place]:
                want += float(F.cross_entropy(logits[place - 1], one["input_ids"][0, place]).detach())
    assert float(run(LLM, module, batch).sums["ce"].detach()) == pytest.approx(want, rel=1e-5)


def test_logits_are_computed_at_supervised_positions_only():
    module, batch, seen = part("llm"), conversation(), []
    module.language.lm_head.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    run(LLM, module, batch)
    assert seen == [int(LLM.counts(batch)["ce"])]
    assert LLM.counts(generation()) == {"ce": 0.0}


def test_the_condition_is_the_last_hidden_state_at_the_queries():
    module, batch = part("llm").eval(), generation(1)
    embeds = module.embed(batch, "metres")
    states = module.language(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
    condition = run(LLM, module, batch).outputs["condition"]
    torch.testing.assert_close(condition[0], states[0, 8:14], msg="6 queries behind 1 + 6 + 1 tokens")
    assert torch.equal(embeds[0, 8:14], module.queries(*_camera(batch), (2, 3))[0])
    assert torch.equal(embeds[0, 1:7], module.projector(batch["tokens"][0, 0].flatten(0, 1)))


def _camera(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    from models.uniugg.llm import target_camera

    return target_camera(batch, "metres")


def test_views_fill_their_placeholders_in_order_and_padding_none():
    module, batch = part("llm"), conversation((1, 2))
    embeds = module.embed(batch, "metres")
    tokens = batch["tokens"][1].flatten(0, 3)
    at = (batch["input_ids"][1] == 261).nonzero().flatten()
    torch.testing.assert_close(embeds[1, at], module.projector(tokens))
    assert (batch["input_ids"][0] == 261).sum() == 6, "the second view of sample 0 is padding"
    changed = {**batch, "tokens": batch["tokens"].clone()}
    changed["tokens"][0, 1] = 1e6
    torch.testing.assert_close(module.embed(changed, "metres"), embeds)


@pytest.mark.parametrize("column", [True, False], ids=["no view in the batch", "no column"])
def test_text_alone_trains_the_same_parameters(column: bool):
    module, batch = part("llm"), conversation((0, 0))
    assert batch["tokens"].shape[1] == 0
    if not column:
        batch = {name: value for name, value in batch.items() if not name.startswith("tokens")}
    found = gradients(module, run(LLM, module, batch).sums["ce"])
    assert all(gradient.abs().sum() == 0 for name, gradient in found.items() if name.startswith("projector"))
    assert found["language.model.embed_tokens.weight"].abs().sum() > 0


def test_queries_may_see_each_other():
    causal, both = part("llm"), build(llm={**SMALL, "bidirectional_queries": True}).llm
    both.load_state_dict(causal.state_dict())
    batch = generation(1)
    for module in (causal, both):
        embeds = module.embed(batch, "metres")
        changed = embeds.clone()
        changed[:, 13] += 1.0  # the last query
        a, b = module.hidden(embeds, batch["input_ids"]), module.hidden(changed, batch["input_ids"])
        assert torch.allclose(a[:, 8], b[:, 8], atol=1e-6) == (module is causal), "the first query"
        torch.testing.assert_close(a[:, :8], b[:, :8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.full((2, 15), 9)}, "0 placeholders for 6 patch tokens"),
        ({"input_ids": torch.full((2, 15), 512)}, "token 512, the vocabulary has 512"),
        ({"tokens": torch.zeros(2, 1, 2, 3, 32)}, "tokens of 96 channels, got 32"),
    ],
)
def test_text_and_views_that_do_not_fit_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        run(LLM, part("llm"), generation() | change)


def test_depth_scales_the_translation_and_is_asked_for():
    role = LLM_ROLE.bind(objective=LanguageObjective(translation_scale="depth"))
    module, batch = part("llm"), generation()
    with pytest.raises(ModelError, match="needs the depth of the reference"):
        role.step(module, batch, {})
    scaled = {**batch, "depth": torch.full((2, 2, 32, 48), 2.0)}
    halved = {**batch, "pose": batch["pose"].clone()}
    halved["pose"][:, 1, :3, 3] /= 2
    a = role.step(module, scaled, {}).outputs["condition"]
    torch.testing.assert_close(a, run(LLM, module, halved).outputs["condition"], atol=1e-5, rtol=1e-5)


def test_the_direct_variant_regresses_the_target_s_tokens():
    module, batch = part("direct"), generation()
    out = module(batch, translation_scale="metres")
    assert out["tokens"].shape == (2, 2, 3, 96)
    want = distillation(out["tokens"], batch["target_tokens"][:, 0], 0.9, 0.1).sum()
    torch.testing.assert_close(run(DIRECT, module, batch).sums["token_regression"], want)
    assert DIRECT.counts(batch) == {"ce": 0.0, "token_regression": 12.0}
    assert DIRECT.counts(conversation())["token_regression"] == 0.0
    with pytest.raises(ModelError, match="target view has 3x2 tokens"):
        run(DIRECT, module, {**batch, "target_tokens": torch.zeros(2, 1, 3, 2, 96)})


def test_a_part_builds_alone_what_the_whole_has():
    overrides = {"channels": 32, "vocab_size": 300, "latent_scale": 0.5, "llm": SMALL}
    whole = build(**overrides)
    parts = part_settings("uniugg-tiny", overrides)
    for role, (name, settings) in parts.items():
        alone, child = models.build(name, **settings), whole.get_submodule(role)
        shapes = {key: value.shape for key, value in child.state_dict().items()}
        assert {key: value.shape for key, value in alone.state_dict().items()} == shapes
        again = models.build(name, **child.settings)
        assert {key: value.shape for key, value in again.state_dict().items()} == shapes
    assert float(whole.diffusion.latent_scale) == 0.5
    assert list(part_settings("uniugg-direct-tiny", {})) == ["llm"]
    with pytest.raises(ModelError, match="has no setting"):
        part_settings("uniugg-tiny", {"chanels": 3})


def test_sizes_of_the_paper_on_meta():
    with torch.device("meta"):
        paper = models.build("uniugg-3b")
        small = models.build("uniugg-small")
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(paper.diffusion.unet) == 859_520_964
    assert count(paper.llm.language) == 3_085_938_688, "Qwen2.5-3B, embeddings tied"
    assert count(paper.llm.projector) == 1024 * 2048 + 2048 + 2048 * 2048 + 2048
    assert paper.llm.queries.mlp.fc1.weight.shape == (2048, 1536)
    assert paper.diffusion.conditioning.project.weight.shape == (768, 2048)
    assert small.diffusion.conditioning.project.in_features == small.llm.width == 576
    assert [name for name, _ in paper.named_children()] == ["llm", "diffusion"]


def test_the_spec_names_roles_edge_and_blocks():
    spec = models.spec("uniugg-tiny")
    (edge,) = spec.edges
    assert (edge.source, edge.target, edge.kinds) == ("llm", "diffusion", ("generation",))
    assert edge.tensors[0].name == "condition"
    assert spec.role("llm").takes_part("conversation")
    assert not spec.role("diffusion").takes_part("conversation")
    module = build()
    for role in spec.roles:
        child = module.get_submodule(role.name)
        names = [name for name, entry in child.named_modules() if isinstance(entry, nn.Linear)]
        for target in role.lora_targets:
            assert any(name.endswith(target) for name in names), target
        assert any(type(entry).__name__ in role.checkpointed for entry in child.modules())


def test_placeholders_must_be_two_tokens_of_the_vocabulary():
    with pytest.raises(ModelError, match="two different tokens of the vocabulary of 512"):
        build(image_token_id=512)
    with pytest.raises(ModelError, match="model_type 'nothing' is unknown"):
        build(llm={"language": {"model_type": "nothing", "hidden_size": 8}})
