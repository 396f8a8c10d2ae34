"""Spa3-VLM as a whole: the base model's logits at the start, samples apart, packing, text alone, weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models.encoders.qwen import tower_input
from models.errors import ModelError, WeightsError
from models.spa3r.vlm.packing import Packed, unpack
from models.spa3r.vlm.qwen import attach_tower, load_qwen, our_name, qwen_settings
from models.spa3r.vlm.spec import BLOCKS, LORA_TARGETS, ROLE, counts, step
from tests.support.spa3_vlm import LANGUAGE, LATENT, PAD, WIDTH, batch_of, sample, small_vlm

GRIDS = [[(2, 3), (3, 2)], [(1, 4)], [(2, 2), (2, 2), (4, 1)]]


def gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = step(model, batch, {}).sums["ce"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("switches", [{}, {"projector": False, "qk_norm": False, "norm": False, "gate": False}])
def test_at_the_start_it_is_the_base_model_bit_for_bit(switches: dict[str, bool], tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    source = small_vlm(seed=5, vision=True)
    source.language.save_pretrained(tmp_path)
    base: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    model = small_vlm(seed=1, vision=True, adapter=switches)
    load_qwen(model.language, str(tmp_path))
    frames, grids = torch.randn(3, 3, 56, 84), [(2, 3)] * 3
    pixels, grid = tower_input(frames, base.config.vision_config)
    row = sample(grids)
    ids = torch.tensor([row.ids])
    theirs = base(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=(ids == PAD).int()).logits
    batch = batch_of([row], [grids]) | {"visual": torch.cat(model.encode_images(pixels, grid))[None]}
    assert torch.equal(model.logits(model.hidden(batch)), theirs)
    # transformers initialises what a folder lacks; the adapter must come out of that as zero as before
    model.language.init_weights()
    load_qwen(model.language, str(tmp_path))
    assert torch.equal(model.logits(model.hidden(batch)), theirs)
    torch.nn.init.normal_(model.adapter.mlp.fc2.weight)
    assert not torch.equal(model.logits(model.hidden(batch)), theirs), "the latents are read"


def test_each_sample_reads_its_own_latents() -> None:
    model = small_vlm(awake=True)
    rows = [sample(grids, seed=number) for number, grids in enumerate(GRIDS)]
    batch = batch_of(rows, GRIDS)
    together = model.hidden(batch)
    for number, row in enumerate(rows):
        alone = model.hidden(batch_of([row], GRIDS[number : number + 1]))[0]
        torch.testing.assert_close(together[number, : len(row)], alone, atol=1e-5, rtol=1e-5)
    changed = {**batch, "latents": batch["latents"].clone()}
    changed["latents"][1] += 1
    after = model.hidden(changed)
    assert torch.equal(after[0], together[0])
    assert torch.equal(after[2], together[2])
    assert not torch.allclose(after[1], together[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_questions_equal_separate_samples(attention: str) -> None:
    model = small_vlm(awake=True, attention=attention)
    rows = [sample(GRIDS[0], questions=3), sample(GRIDS[1], questions=1, seed=4)]
    apart = [one for row in rows for one in unpack(row)]
    packed, separate = batch_of(rows, GRIDS[:2]), batch_of(apart, [GRIDS[0]] * 3 + [GRIDS[1]])
    assert counts(packed) == counts(separate) == {"ce": 8.0}
    loss, got = gradients(model, packed)
    expected_loss, expected = gradients(model, separate)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(got, expected)
    logits, alone = (model.logits(model.hidden(batch)) for batch in (packed, separate))
    segments = packed["segments"][0]
    for number in range(3):
        mine = logits[0, (segments == 0) | (segments == number + 1)]
        torch.testing.assert_close(mine, alone[number, : len(mine)], rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_network_s_own() -> None:
    model = small_vlm(awake=True)
    row = sample(GRIDS[0])
    batch = batch_of([row], GRIDS[:1])
    labels = torch.where(batch["supervised"], batch["input_ids"], -100)
    hidden = model.hidden(batch)
    theirs = model.language.loss_function(
        logits=model.language.lm_head(hidden), labels=labels, vocab_size=model.vocab_size
    )
    torch.testing.assert_close(model(batch)["ce"] / counts(batch)["ce"], theirs)
    double = {**batch, "weight": torch.tensor([2.0])}
    torch.testing.assert_close(model(double)["ce"], 2 * model(batch)["ce"])
    assert counts(double) == {"ce": 4.0}


def test_without_images_every_parameter_takes_part() -> None:
    model = small_vlm(awake=True)
    row = Packed(ids=[1, 2, 3], supervised=[False, True, True], segments=[0, 1, 1])
    bare = {key: value for key, value in batch_of([row], [[]]).items() if key in (
        "kind", "id", "weight", "input_ids", "supervised", "segments",
    )}  # fmt: skip
    loss, found = gradients(model, bare)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith("adapter."))
    empty_loss, _ = gradients(model, batch_of([row], [[]]))
    assert torch.equal(loss, empty_loss), "empty columns are no columns"
    mixed, alone = batch_of([row, sample(GRIDS[0])], [[], GRIDS[0]]), batch_of([sample(GRIDS[0])], [GRIDS[0]])
    torch.testing.assert_close(model(mixed)["ce"], loss + model(alone)["ce"])
    broken = {**alone, "weight": torch.zeros(1)}
    zero, found = gradients(model, broken)
    assert zero == 0
    assert counts(broken) == {"ce": 0.0}
    assert len(found) == len(list(model.parameters()))


def test_appended_latents_stand_behind_the_frames() -> None:
    model = small_vlm(adapter={"kind": "append"})
    row = sample([*GRIDS[0], (1, 5)])
    batch = batch_of([row], GRIDS[:1])
    hidden = model.hidden(batch)
    changed = {**batch, "latents": batch["latents"] + 1}
    first = row.ids.index(PAD) + 6 + 2 + 6 + 2
    assert torch.equal(model.hidden(changed)[:, :first], hidden[:, :first])
    assert not torch.allclose(model.hidden(changed)[:, first], hidden[:, first])
    _, found = gradients(model, batch)
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if name.startswith("adapter.projector"))
    plain = small_vlm(adapter={"kind": "none"})
    without = {key: value for key, value in batch_of([sample(GRIDS[0])], GRIDS[:1]).items() if key != "latents"}
    assert torch.isfinite(plain(without)["ce"])
    assert plain.adapter is None


def test_what_does_not_fit_is_named() -> None:
    model = small_vlm()
    batch = batch_of([sample(GRIDS[0]), sample(GRIDS[1])], GRIDS[:2])
    with pytest.raises(ModelError, match="sample sample 1: the text has 4 image tokens for 6 visual tokens"):
        model(batch_of([sample(GRIDS[0]), sample(GRIDS[1])], [GRIDS[0], [(2, 3)]]))
    with pytest.raises(ModelError, match="visual tokens and no latents, which the adapter reads"):
        model({key: value for key, value in batch.items() if key != "latents"})
    with pytest.raises(ModelError, match=rf"latents has shape \(2, 5, 7\); it must be \(samples, tokens, {LATENT}\)"):
        model({**batch, "latents": torch.zeros(2, 5, 7)})
    with pytest.raises(ModelError, match=rf"visual has shape \(2, 9, 3\); .* {WIDTH}\)"):
        model({**batch, "visual": torch.zeros(2, 9, 3)})
    with pytest.raises(ModelError, match="input_ids has token 300, the vocabulary has 300"):
        model({**batch, "input_ids": batch["input_ids"] + 300 - int(batch["input_ids"].max())})
    with pytest.raises(ModelError, match="built without a vision tower"):
        model.encode_images(torch.zeros(24, 1176), torch.tensor([[1, 4, 6]]))
    flash = small_vlm()
    flash.attention = "flash_attention_2"
    with pytest.raises(ModelError, match="takes no mask of tokens by tokens"):
        flash(batch_of([sample(GRIDS[0], questions=2)], GRIDS[:1]))
    with pytest.raises(ModelError, match=r"image_token_id=300 must be a token of the vocabulary of 300"):
        small_vlm(image_token_id=300)
    wide = {**LANGUAGE, "vision_config": {**LANGUAGE["vision_config"], "out_hidden_size": 48}}
    with pytest.raises(ModelError, match=r"out_hidden_size=48 must be the width of the language model, 32"):
        small_vlm(language=wide)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
    with pytest.raises(ModelError, match="must add up to half of a head's 8 channels"):
        small_vlm(language={**LANGUAGE, "text_config": {**LANGUAGE["text_config"], "rope_parameters": rope}})


@pytest.mark.parametrize("layout", ["4", "5"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_published_folder_is_read_in_both_layouts(layout: str, tied: bool, tmp_path: Path) -> None:
    language = {**LANGUAGE, "tie_word_embeddings": tied}
    source = small_vlm(seed=2, language=language, vision=True)
    source.language.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = {our_name(name): tensor for name, tensor in load_file(file).items()}
    if layout == "5":
        save_file(stored, file)
    settings = qwen_settings(str(tmp_path))
    target = small_vlm(seed=3, language=settings, vocab_size=303)
    load_qwen(target.language, str(tmp_path))
    own, theirs = target.language.state_dict(), source.language.state_dict()
    assert not any(name.startswith("model.visual.") for name in own)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor[: len(theirs[name])], theirs[name])
    table = target.language.get_input_embeddings().weight
    torch.testing.assert_close(table[300:], table[:300].mean(0).expand(3, -1))
    assert (target.language.lm_head.weight is table) == tied
    attach_tower(target.language, str(tmp_path))
    for name, tensor in target.language.model.visual.state_dict().items():
        assert torch.equal(tensor, theirs[f"model.visual.{name}"])
    save_file({name: tensor for name, tensor in stored.items() if "layers.1.mlp" not in name}, file)
    with pytest.raises(WeightsError, match=r"missing \['model\.language_model\.layers\.1\.mlp"):
        load_qwen(target.language, str(tmp_path))
    save_file({name: tensor for name, tensor in stored.items() if "visual.merger" not in name}, file)
    with pytest.raises(WeightsError, match=r"no vision tower for this config: missing \['merger"):
        attach_tower(target.language, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(WeightsError, match="model_type 'qwen2', not 'qwen2_5_vl'"):
        qwen_settings(str(tmp_path))


def test_a_published_checkpoint_is_accepted_whole() -> None:
    model = small_vlm(awake=True)
    published = {theirs: tensor.clone() for ours, theirs in model.reference_names().items()
                 for tensor in [model.state_dict()[ours]]}  # fmt: skip
    assert "model.layers.0.self_attn.q_proj.weight" in published
    assert "geom_cross_attention.proj.weight" in published
    del published["lm_head.weight"]  # tied
    extra = {"geometry_encoder.spa3r.query_embed.weight": torch.zeros(3, 4), "visual.merger.ln_q.weight": torch.ones(2)}
    other = small_vlm(seed=9)
    models.load_reference(other, {**published, **extra})
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(WeightsError, match=r"unexpected \(1\): geometry_gate\.7\.weight"):
        models.load_reference(other, {**published, "geometry_gate.7.weight": torch.zeros(1)})


def test_the_role_names_layers_that_are_there() -> None:
    model = small_vlm()
    updated = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LORA_TARGETS]
    assert len(updated) == 2 * 7
    assert not any(name.startswith("adapter") for name in updated), "the adapter is trained whole"
    assert {type(module).__name__ for module in model.modules()} >= set(BLOCKS)
    assert models.spec("spa3-vlm-3b").role("vlm") is ROLE
