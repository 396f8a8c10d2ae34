"""Families, taps, identity, strict weights. Oracles are transformers' own forward passes, run another way."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.encoders.hf import flops_per_image, load_encoder, parameter_count
from models.errors import ModelError, WeightsError

TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
FAMILIES = {
    "dinov2": ("dinov2", {**TINY, "image_size": 112, "patch_size": 14}, (112, 84)),
    "dinov2-registers": (
        "dinov2",
        {**TINY, "model_type": "dinov2_with_registers", "image_size": 112, "patch_size": 14, "num_register_tokens": 4},
        (84, 112),
    ),
    "dinov3": ("dinov3", {**TINY, "num_register_tokens": 4}, (64, 96)),
    "radio": ("radio", {**TINY, "max_img_size": 256, "summary_idxs": [0, 2]}, (64, 96)),
    "siglip": ("siglip2", {**TINY, "image_size": 64}, (64, 96)),
    "siglip2-naflex": ("siglip2", {**TINY, "model_type": "siglip2_vision_model", "num_patches": 16}, (64, 96)),
    "clip": ("clip", {**TINY, "image_size": 64, "patch_size": 16, "projection_dim": 32}, (96, 64)),
}
IMAGE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)


def tiny(name: str, **changes):
    family, arch, (height, width) = FAMILIES[name]
    settings = {"layers": [2, 4], "dtype": "float32", "height": height, "width": width, "arch": arch}
    return load_encoder(family, "random", **{**settings, **changes})


def save(encoder, folder: Path) -> Path:
    encoder.model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_have_the_declared_shapes_and_dtype(name):
    for dtype in ("float32", "bfloat16"):
        encoder = tiny(name, dtype=dtype)
        outputs = encoder([encoder.prepare(IMAGE, {})] * 3)
        for key, spec in encoder.outputs().items():
            assert tuple(outputs[key].shape) == (3, *spec.shape)
            assert str(outputs[key].dtype) == f"torch.{spec.dtype}" == f"torch.{dtype}"
            assert torch.isfinite(outputs[key]).all()
        height, width = FAMILIES[name][2]
        assert encoder.outputs()["tokens"].shape[1:3] == (height // encoder.patch, width // encoder.patch)


def test_taps_are_hidden_states_with_the_final_norm_and_no_prefix():
    encoder = tiny("dinov2-registers", layers=[1, 3, 4])
    x = encoder.prepare(IMAGE, {})
    outputs = encoder([x])
    with torch.inference_mode():
        states = encoder.model(x[None], output_hidden_states=True)
        want = torch.stack([encoder.model.layernorm(states.hidden_states[i][0, 5:]) for i in (1, 3, 4)])
    assert torch.equal(outputs["tokens"][0], want.unflatten(1, (6, 8)))
    assert torch.equal(outputs["summary"][0, 0], states.last_hidden_state[0, 0])


def test_the_summary_of_each_family_is_the_one_it_defines():
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        radio = tiny("radio")
        last = radio.model(x).last_hidden_state
        assert torch.equal(radio([x[0]])["summary"][0], last[0, [0, 2]])
        siglip = tiny("siglip")
        pooled = siglip.model(x, interpolate_pos_encoding=True).pooler_output
        assert torch.equal(siglip([x[0]])["summary"][:, 0], pooled)
        clip = tiny("clip", height=64, width=96)
        embedded = clip.model(pixel_values=x, interpolate_pos_encoding=True).image_embeds
        assert torch.equal(clip([x[0]])["summary"][:, 0], embedded)


def test_naflex_patches_are_laid_out_as_its_own_processor_does():
    encoder = tiny("siglip2-naflex", layers=[4])
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    processor = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=24, do_resize=False)
    features = processor(images=[pixels], return_tensors="pt")
    with torch.inference_mode():
        want = encoder.model(**features).last_hidden_state[0]
    got = encoder([pixels.float().div(255).sub(0.5).div(0.5)])["tokens"][0, 0].flatten(0, 1)
    torch.testing.assert_close(got, want[: got.shape[0]], atol=1e-4, rtol=1e-4)


def test_neighbours_in_a_batch_change_nothing():
    encoder = tiny("dinov2")
    images = [encoder.prepare(np.roll(IMAGE, i, axis=1), {}) for i in range(5)]
    together = encoder(images)["tokens"]
    assert torch.equal(together[3], encoder(images[3:4])["tokens"][0])


def test_random_weights_are_a_function_of_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = tiny("dinov2", seed=1), tiny("dinov2", seed=1), tiny("dinov2", seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert a.identity() == b.identity()
    assert a.identity()["weights"] != c.identity()["weights"]
    x = a.prepare(IMAGE, {})
    assert torch.equal(a([x])["tokens"], b([x])["tokens"])


def test_encoders_built_in_threads_at_once_do_not_mix_their_draws():
    wanted = [tiny("dinov2", seed=seed).identity()["weights"] for seed in range(4)]
    torch.manual_seed(5)
    drawn = torch.rand(20_000)
    torch.manual_seed(5)
    with ThreadPoolExecutor(4) as threads:
        built = [threads.submit(tiny, "dinov2", seed=seed % 4) for seed in range(16)]
        # Neither does a trainer that draws meanwhile.
        assert torch.equal(torch.cat([torch.rand(100) for _ in range(200)]), drawn)
        assert [encoder.result().identity()["weights"] for encoder in built] == wanted * 4


def test_a_frozen_encoder_is_frozen():
    encoder = tiny("dinov3", dtype="bfloat16")
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert encoder.model.rope_embeddings.inv_freq.dtype == torch.float32
    assert not encoder([encoder.prepare(IMAGE, {})])["tokens"].requires_grad


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [4]},
        {"dtype": "bfloat16"},
        {"height": 56},
        {"seed": 1},
        {"arch": {**FAMILIES["dinov2"][1], "layer_norm_eps": 1e-5}},
    ],
)
def test_whatever_changes_an_output_changes_the_identity(change):
    assert json.dumps(tiny("dinov2").identity(), sort_keys=True) != json.dumps(
        tiny("dinov2", **change).identity(), sort_keys=True
    )


def test_the_identity_of_a_folder_names_content_and_no_place(tmp_path):
    source = tiny("dinov2")
    one, two = save(source, tmp_path / "one"), save(source, tmp_path / "two")
    tensors = load_file(two / "model.safetensors")
    save_file(dict(reversed(tensors.items())), two / "model.safetensors", metadata={"format": "pt", "by": "me"})
    identities = [
        load_encoder("dinov2", str(folder), height=56, width=56, dtype="float32").identity() for folder in (one, two)
    ]
    assert identities[0] == identities[1]
    assert str(tmp_path) not in json.dumps(identities[0])
    changed = {**tensors, "layernorm.bias": tensors["layernorm.bias"] + 1e-7}
    save_file(changed, two / "model.safetensors", metadata={"format": "pt"})
    again = load_encoder("dinov2", str(two), height=56, width=56, dtype="float32").identity()
    assert again["weights"] != identities[0]["weights"]


def test_identity_and_shapes_of_a_folder_need_no_weights_in_memory(tmp_path):
    source = tiny("dinov2")
    encoder = load_encoder("dinov2", str(save(source, tmp_path)), height=112, width=84, layers=[2, 4], dtype="float32")
    encoder.identity()
    assert encoder.outputs() == source.outputs()
    assert encoder.model is None
    x = source.prepare(IMAGE, {})
    assert torch.equal(encoder([x])["tokens"], source([x])["tokens"])


@pytest.mark.parametrize("name", ["dinov2-registers", "dinov3", "radio", "siglip2-naflex"])
def test_a_folder_gives_what_was_saved(name, tmp_path):
    source = tiny(name)
    family, _, (height, width) = FAMILIES[name]
    encoder = load_encoder(
        family, str(save(source, tmp_path)), height=height, width=width, layers=[2, 4], dtype="float32"
    )
    x = source.prepare(IMAGE, {})
    for key, value in source([x]).items():
        assert torch.equal(value, encoder([x])[key])


@pytest.mark.parametrize(
    ("family", "config", "model", "projection"),
    [("clip", "CLIPConfig", "CLIPModel", {"projection_dim": 24}), ("siglip2", "SiglipConfig", "SiglipModel", {})],
)
def test_the_image_side_of_a_two_tower_checkpoint(family, config, model, projection, tmp_path):
    vision = {**TINY, "intermediate_size": 128, "image_size": 32, "patch_size": 16}
    text = {**TINY, "intermediate_size": 128, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    whole = getattr(transformers, model)(
        getattr(transformers, config)(vision_config=vision, text_config=text, **projection)
    ).eval()
    whole.save_pretrained(tmp_path)
    encoder = load_encoder(family, str(tmp_path), height=32, width=32, dtype="float32")
    x = encoder.prepare(IMAGE, {})
    with torch.inference_mode():
        want = whole.get_image_features(x[None]).pooler_output
    assert tuple(want.shape[1:]) == encoder.outputs()["summary"].shape[1:]
    torch.testing.assert_close(encoder([x])["summary"][:, 0], want, atol=1e-5, rtol=1e-5)


def damage(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.layer.1.mlp.fc1.weight"), r"missing: .*layer\.1\.mlp\.fc1\.weight"),
        (lambda t: t.update(surplus=torch.zeros(2)), "not part of the model: surplus"),
        (lambda t: t.update({"layernorm.weight": torch.zeros(3)}), r"of another shape: layernorm\.weight \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    folder = damage(save(tiny("dinov2"), tmp_path), change)
    encoder = load_encoder("dinov2", str(folder), height=56, width=56, dtype="float32")
    with pytest.raises(WeightsError, match=message):
        encoder.load()


def test_files_that_are_no_weights_are_named(tmp_path):
    folder = save(tiny("dinov2"), tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        load_encoder("dinov2", str(folder), height=56, width=56).identity()
    weights.write_bytes(b"pickle" * 10)
    with pytest.raises(WeightsError, match="no safetensors file"):
        load_encoder("dinov2", str(folder), height=56, width=56).identity()
    weights.unlink()
    with pytest.raises(WeightsError, match="only safetensors are read"):
        load_encoder("dinov2", str(folder), height=56, width=56).load()
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        load_encoder("dinov2", str(folder), height=56, width=56)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "multiple of the patch size 14; 98x84 would do"),
        ({"layers": [5]}, r"layers \[5\] do not exist"),
        ({"layers": [0]}, "counted from 1 to 4"),
        ({"dtype": "float8"}, "computes in"),
        ({"arch": {"hidden_sise": 64}}, "did you mean 'hidden_size'"),
        ({"arch": {"model_type": "radio"}}, "'radio' are no dinov2"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        tiny("dinov2", **changes)


def test_unknown_families_and_places_are_refused(tmp_path):
    with pytest.raises(ModelError, match="unknown encoder family 'dinov9'"):
        load_encoder("dinov9", "random", height=14, width=14)
    with pytest.raises(WeightsError, match="there is no such folder"):
        load_encoder("dinov2", str(tmp_path / "nowhere"), height=14, width=14)
    with pytest.raises(WeightsError, match="neither a local folder nor in the cache"):
        load_encoder("dinov2", "nobody/nothing-at-all", height=14, width=14)
    with pytest.raises(ModelError, match="for weights=random only"):
        load_encoder("dinov2", str(tmp_path), arch={"hidden_size": 8}, height=14, width=14)


def test_preprocessing_comes_from_the_folder(tmp_path):
    folder = save(tiny("dinov2"), tmp_path)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    assert load_encoder("dinov2", str(folder), height=56, width=56).preprocessing.mean == (0.1, 0.2, 0.3)
    (folder / "preprocessor_config.json").write_text(json.dumps({**values, "do_normalize": False}))
    assert load_encoder("dinov2", str(folder), height=56, width=56).preprocessing.std == (1.0, 1.0, 1.0)
    (folder / "preprocessor_config.json").write_text(json.dumps({**values, "rescale_factor": 1.0}))
    with pytest.raises(ModelError, match=r"rescale_factor 1\.0 is not 1/255"):
        load_encoder("dinov2", str(folder), height=56, width=56)


def test_flops_and_parameters_are_counted_without_memory():
    encoder = tiny("dinov2", height=112, width=112)
    tokens, width, layers = 65, 64, 4
    patches = 2 * 64 * width * 3 * 14 * 14
    dense = 2 * tokens * 12 * width * width
    attention = 2 * 2 * tokens * tokens * width
    assert flops_per_image(encoder) == patches + layers * (dense + attention)
    assert parameter_count(encoder) == sum(p.numel() for p in encoder.parameters())


def test_real_dinov2_small_against_transformers(weights_dir):
    folder = weights_dir / "dinov2-small"
    encoder = load_encoder("dinov2", str(folder), height=224, width=224, layers=[3, 6, 9, 12], dtype="float32")
    x = encoder.prepare(IMAGE, {})
    outputs = encoder([x])
    model = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        want = model(x[None]).last_hidden_state[0]
    torch.testing.assert_close(outputs["tokens"][0, -1].flatten(0, 1), want[1:], atol=1e-4, rtol=1e-4)
    assert parameter_count(encoder) == 22_056_576
    # Features of a trained network tell an image from noise of the same histogram.
    shuffled = np.random.default_rng(1).permutation(IMAGE.reshape(-1, 3)).reshape(IMAGE.shape)
    other = encoder([encoder.prepare(shuffled, {})])["summary"]
    assert not torch.allclose(other, outputs["summary"], atol=0.1)
